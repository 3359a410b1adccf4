"""Differential privacy of training, its accounting, and what attacks measure: against opacus, closed forms, others."""

import math
import random
import statistics
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from peer_bench import BASE, NAMES, ROUND, Bench, announcement_of, only
from scipy.optimize import brentq
from scipy.stats import norm
from torch import nn
from torch.nn import functional

from nodes.screens import make_status_table
from p2pfm import work
from p2pfm.config import (
    AdapterConfig,
    ChainConfig,
    CompressionConfig,
    NetworkConfig,
    PrivacyConfig,
    TrainingConfig,
    parse_node_config,
    validate_privacy,
)
from p2pfm.errors import BudgetSpent, ConfigError, OperatorError, Reject
from p2pfm.learner import Guarantee, Spending, Training
from p2pfm.lora.batches import PROBE_TOKENS_MAX, collate, encode_all
from p2pfm.lora.corpus import read_topics
from p2pfm.lora.delta import encode_tensors, flatten
from p2pfm.lora.layers import (
    ADAPTER,
    build_peft,
    get_adapter_tensors,
    get_parameters,
    load_backbone,
    predict,
    set_adapter_tensors,
)
from p2pfm.lora.leakage import compute_calibrated_auc, compute_exposure, compute_membership_auc
from p2pfm.lora.privacy import (
    MemorySpendings,
    PrivateLearner,
    compute_epsilon,
    compute_noise_multiplier,
    compute_sample_gradients,
    plan_spending,
    spend,
    train_privately,
)
from p2pfm.lora.torch_learner import Data, TorchLearner
from p2pfm.messages import Announcement, DeclaredPrivacy, decode_message, encode
from p2pfm.protocol.events import Publish, Train, Trained
from p2pfm.runtime.status import RoundFigures
from p2pfm.types import Digest, Millis, PeerId, Round, compute_digest

TINY = Path(__file__).parent.parent / "fixtures" / "tiny-llama"
DELTA = 1e-5
KINDS = ("lora", "ffa", "fed_sb", "ia3", "prompt")
NUM_SAMPLES = 20

# --- leakage


def test_the_auc_is_the_chance_that_a_member_has_the_lower_loss():
    assert compute_membership_auc([1, 2], [3, 4]) == 1
    assert compute_membership_auc([3, 4], [1, 2]) == 0
    assert compute_membership_auc([1, 3], [2, 3]) == (1 + 1 + 0 + 0.5) / 4
    assert compute_membership_auc([2.0], [2.0]) == 0.5


losses = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=20)


@given(losses, losses)
def test_the_auc_counts_pairs_and_ties_by_half(members, others):
    pairs = [1 if m < o else 0.5 if m == o else 0 for m in members for o in others]
    assert compute_membership_auc(members, others) == pytest.approx(sum(pairs) / len(pairs))


@pytest.mark.parametrize("bad", [[], [math.nan], [1.0, math.inf], [[1.0]]])
def test_an_attack_rejects_losses_that_are_none(bad):
    for arguments in ((bad, [1.0]), ([1.0], bad)):
        with pytest.raises(OperatorError):
            compute_membership_auc(*arguments)
    with pytest.raises(OperatorError):
        compute_exposure(1.0, bad)
    with pytest.raises(OperatorError):
        compute_exposure(math.nan, [1.0])


def test_calibration_finds_members_that_are_hard_for_every_model():
    rng = np.random.default_rng(0)
    hard, easy = rng.normal(9, 3, 200), rng.normal(3, 3, 200)
    trained_on = hard - 0.5  # members are the harder half, and training took a little off
    assert compute_membership_auc(trained_on, easy) < 0.2
    assert compute_calibrated_auc(trained_on, easy, hard, easy) == 1
    with pytest.raises(OperatorError, match="one reference a member"):
        compute_calibrated_auc(trained_on, easy, hard[1:], easy)


def test_exposure_is_the_bits_between_the_canarys_rank_and_all():
    others = [float(loss) for loss in range(1, 1024)]
    assert compute_exposure(0.5, others) == 10
    assert compute_exposure(1.5, others) == 9
    assert compute_exposure(2000.0, others) == 0
    assert compute_exposure(1.0, [1.0] * 1023) == pytest.approx(1, abs=0.01), "a tie is worth the middle rank"


def test_a_canary_that_was_never_seen_has_one_and_a_half_bits_in_the_mean():
    rng = np.random.default_rng(1)
    bits = [compute_exposure(losses[0], losses[1:]) for losses in rng.normal(size=(4000, 256))]
    assert statistics.mean(bits) == pytest.approx(math.log2(math.e), abs=0.08)


# --- accounting


def compute_exact_epsilon(noise, steps):
    """Gaussian steps on all samples, in closed form (Balle and Wang 2018, theorem 8)."""
    mu = math.sqrt(steps) / noise

    def excess(epsilon):
        return norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)) - DELTA

    return brentq(excess, 0, 1000)


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (4.0, 20), (10.0, 200), (30.0, 3000)])
def test_epsilon_is_the_closed_forms_within_one_percent_and_never_less(noise, steps):
    exact = compute_exact_epsilon(noise, steps)
    assert exact <= compute_epsilon([Spending(noise, 1.0, steps)], DELTA) <= 1.01 * exact


@pytest.mark.parametrize(
    ("spendings", "epsilon"),
    [
        ([Spending(1.0, 0.04, 30)], 1.8439733990021208),
        ([Spending(1.0, 0.04, 200)], 3.776308348630294),
        ([Spending(0.5, 0.02, 100)], 9.693703635765868),
        ([Spending(5.0, 0.5, 400)], 10.150709310442442),
        ([Spending(1.1, 0.01, 10_000)], 5.192620123878041),
        ([Spending(1.0, 0.04, 200), Spending(2.0, 0.25, 100)], 7.56253187669963),
    ],
)
def test_epsilon_is_dp_accountings_within_one_percent_and_never_less(spendings, epsilon):
    """Recorded from dp-accounting 0.6.0, PLDAccountant with its defaults, at delta 1e-5."""
    assert epsilon * 0.9999 <= compute_epsilon(spendings, DELTA) <= 1.01 * epsilon


def test_epsilon_beyond_the_tight_accountants_reach_is_the_renyi_bound():
    """Recorded from dp-accounting 0.6.0, RdpAccountant; its other accountant says 34.36."""
    assert compute_epsilon([Spending(0.6, 0.5, 20)], DELTA) == pytest.approx(37.5774594669803, rel=0.01)
    assert math.isfinite(compute_epsilon([Spending(0.3, 1.0, 100_000)], DELTA))


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([0.3, 1.0]), st.sampled_from([2.0, 3.0]))
def test_epsilon_grows_with_steps_and_does_not_depend_on_how_they_were_told(first, more, rate, noise):
    whole = compute_epsilon([Spending(noise, rate, first + more)], DELTA)
    parts = [Spending(noise, rate, more), Spending(noise, rate, 0), Spending(noise, rate, first)]
    assert compute_epsilon(parts, DELTA) == whole
    assert compute_epsilon(parts[:2], DELTA) < whole


def test_no_steps_cost_nothing_and_steps_without_noise_everything():
    assert compute_epsilon([], DELTA) == 0
    private = Spending(1.0, 0.1, 10)
    assert compute_epsilon([private, Spending(0.0, 0.1, 1)], DELTA) == math.inf


@pytest.mark.parametrize(("epsilon", "rate", "steps"), [(2.0, 0.04, 300), (8.0, 1.0, 200)])
def test_the_chosen_noise_is_the_least_that_is_enough(epsilon, rate, steps):
    noise = compute_noise_multiplier(epsilon, DELTA, rate, steps)
    assert compute_epsilon([Spending(noise, rate, steps)], DELTA) <= epsilon
    assert compute_epsilon([Spending(0.99 * noise, rate, steps)], DELTA) > epsilon


def test_an_epsilon_out_of_reach_is_refused():
    with pytest.raises(OperatorError, match=r"privacy\.epsilon_max"):
        compute_noise_multiplier(1e-9, DELTA, 1.0, 1000)


# --- what a node may spend


def make_privacy(**changes):
    return msgspec.structs.replace(PrivacyConfig(enabled=True, noise_multiplier=1.0), **changes)


TRAINING = TrainingConfig(steps=10, batch=4, tokens_max=48, learning_rate=5e-3)


def test_a_round_costs_by_the_share_of_samples_in_a_step():
    assert plan_spending(make_privacy(), TRAINING, 100) == Spending(1.0, 0.04, 10)
    assert plan_spending(make_privacy(batch=25), TRAINING, 100) == Spending(1.0, 0.25, 10)
    assert plan_spending(make_privacy(), TRAINING, 3).sample_rate == 1.0
    assert plan_spending(make_privacy(), TRAINING, 1).sample_rate == 1.0


def test_noise_is_chosen_for_all_the_rounds_that_the_budget_is_for():
    privacy = make_privacy(noise_multiplier=0.0, epsilon_max=4.0, rounds=5)
    cost = plan_spending(privacy, TRAINING, 100)
    log = MemorySpendings()
    for _ in range(5):
        assert spend(privacy, log, cost).epsilon <= 4.0
    with pytest.raises(BudgetSpent, match=r"epsilon is 4 and would be 4\.\d+ after this round, over .* 4;"):
        spend(privacy, log, cost)
    assert len(log.get_spendings()) == 5, "what was refused was not spent"


def test_a_plan_rejects_no_samples_and_a_delta_that_protects_nobody():
    with pytest.raises(OperatorError, match="no samples"):
        plan_spending(make_privacy(), TRAINING, 0)
    with pytest.raises(OperatorError, match=r"privacy\.delta: expected less than .* \(0\.01\), got 0\.01"):
        plan_spending(make_privacy(delta=0.01), TRAINING, 100)


def test_what_was_trained_without_noise_is_never_made_good():
    log = MemorySpendings()
    log.add_spending(Spending(0.0, 1.0, 1))
    assert spend(make_privacy(), log, Spending(10.0, 0.1, 1)) is None
    with pytest.raises(BudgetSpent, match="use a new home"):
        spend(make_privacy(epsilon_max=100.0), log, Spending(10.0, 0.1, 1))


NETWORK_TOML = """
[network]
name = "n"
genesis_ms = 0
backbone = "b"
probe = "{probe}"
[network.chain]
chain_id = 1
federation = "0x{address}"
token = "0x{address}"
""".format(probe="0" * 64, address="0" * 40)


def parse(privacy):
    return parse_node_config('home = "."\ndata = "d"\nrpc = "r"\n' + privacy + NETWORK_TOML).privacy


def test_privacy_is_off_unless_the_node_says_so():
    assert not parse("").enabled
    assert parse("[privacy]\nenabled = true\nnoise_multiplier = 1.5").noise_multiplier == 1.5
    assert parse("[privacy]\nenabled = true\nepsilon_max = 8\nrounds = 100").epsilon_max == 8


@pytest.mark.parametrize(
    "privacy",
    [
        "",
        "noise_multiplier = 0",
        "epsilon_max = 8",
        "rounds = 10",
        "noise_multiplier = -1",
        "noise_multiplier = nan",
        "noise_multiplier = inf",
        "noise_multiplier = 1\nmax_grad_norm = 0",
        "noise_multiplier = 1\ndelta = 0",
        "noise_multiplier = 1\ndelta = 1",
        "noise_multiplier = 1\nbatch = -1",
        "noise_multiplier = 1\nepsilon_max = -1",
    ],
)
def test_privacy_rejects_what_guarantees_nothing(privacy):
    with pytest.raises(ConfigError, match=r"privacy\."):
        parse(f"[privacy]\nenabled = true\n{privacy}")


def test_a_privacy_that_is_off_is_not_judged():
    validate_privacy(PrivacyConfig(noise_multiplier=-1))


# --- DP-SGD


class Setting:
    """The fixture with one adapter kind, away from its start (where some gradients vanish), and samples."""

    def __init__(self, kind, dtype=torch.float32, num_samples=NUM_SAMPLES):
        torch.set_num_threads(1)
        backbone, tokenizer = load_backbone(TINY, dtype)
        backbone.set_attn_implementation("eager")
        self.config = NetworkConfig(
            "test",
            Millis(0),
            "",
            "",
            ChainConfig(1, "", ""),
            adapter=AdapterConfig(kind=kind, rank=4),
            training=TRAINING,
            compression=CompressionConfig(chunk=512, keep=64),
        )
        self.model = build_peft(backbone, self.config.adapter)
        rng = np.random.default_rng(0)
        self.start = {
            name: values + (0.02 * rng.normal(size=values.shape)).astype(np.float32)
            for name, values in get_adapter_tensors(self.model).items()
        }
        set_adapter_tensors(self.model, self.start)
        self.parameters = list(get_parameters(self.model).values())
        self.pad = tokenizer.eos_token_id
        self.samples = encode_all(tokenizer, read_topics()["trivia"][:num_samples], TRAINING.tokens_max)
        strata = {"all": self.samples[:2]}
        data = Data(self.samples, strata, strata, compute_digest(b"data"))
        self.learner = TorchLearner.on_peft(self.model, ADAPTER, self.pad, self.config, data)

    def one_by_one(self, samples):
        """Each sample's gradient by a backward pass of its own."""
        found = []
        for sample in samples:
            tokens, rows, columns, wanted = (torch.from_numpy(part) for part in collate([sample], self.pad))
            loss = functional.cross_entropy(predict(self.model, tokens, rows, columns).float(), wanted)
            found.append(torch.autograd.grad(loss, self.parameters))
        return [torch.stack(part) for part in zip(*found, strict=True)]

    def steps(self, spending, max_grad_norm, seed, samples=None):
        """The sum of what plain gradient descent of rate 1 got in `spending`'s steps, from the start."""
        set_adapter_tensors(self.model, self.start)
        optimizer = torch.optim.SGD(self.parameters, lr=1.0)
        chosen = self.samples if samples is None else samples
        draw = random.Random(seed)
        train_privately(self.model, self.parameters, chosen, self.pad, spending, max_grad_norm, optimizer, draw)
        return flatten(self.start) - flatten(get_adapter_tensors(self.model))

    def private(self, log=None, seed=0, **privacy):
        log = MemorySpendings() if log is None else log
        return PrivateLearner(self.learner, make_privacy(**privacy), TRAINING, log, random.Random(seed))


@pytest.fixture(scope="module")
def lora():
    return Setting("lora")


@pytest.mark.parametrize("kind", KINDS)
def test_sample_gradients_are_those_of_each_sample_alone(kind):
    setting = Setting(kind)
    together = compute_sample_gradients(setting.model, setting.parameters, setting.samples[:6], setting.pad)
    alone = setting.one_by_one(setting.samples[:6])
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.shape == theirs.shape
        assert torch.linalg.vector_norm(ours - theirs) < 1e-4 * torch.linalg.vector_norm(theirs)


def test_a_bf16_backbone_gives_float32_sample_gradients_of_the_same_direction():
    half, full = Setting("fed_sb", torch.bfloat16), Setting("fed_sb")
    ours = compute_sample_gradients(half.model, half.parameters, half.samples[:4], half.pad)
    exact = compute_sample_gradients(full.model, full.parameters, full.samples[:4], full.pad)
    assert {gradient.dtype for gradient in ours} == {torch.float32}
    for left, right in zip(ours, exact, strict=True):
        cosines = functional.cosine_similarity(left.flatten(1), right.flatten(1))
        assert cosines.min() > 0.98


def test_sample_gradients_are_those_of_opacus(lora):
    class Losses(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, tokens, rows, columns):
            return predict(self.model, tokens, rows, columns)

    batch = lora.samples[:6]
    tokens, rows, columns, wanted = (torch.from_numpy(part) for part in collate(batch, lora.pad))
    wrapped = GradSampleModule(Losses(lora.model).train(), strict=False, loss_reduction="sum")
    try:
        logits = wrapped(tokens, rows, columns)
        each = functional.cross_entropy(logits.float(), wanted, reduction="none")
        (each / torch.tensor([sample.num_completion for sample in batch])[rows]).sum().backward()
        theirs = [parameter.grad_sample for parameter in lora.parameters]
    finally:
        wrapped.to_standard_module()
        lora.model.eval().zero_grad(set_to_none=True)
    ours = compute_sample_gradients(lora.model, lora.parameters, batch, lora.pad)
    for left, right in zip(ours, theirs, strict=True):
        assert torch.linalg.vector_norm(left - right) < 1e-4 * torch.linalg.vector_norm(right)


def test_a_step_without_noise_is_the_mean_of_gradients_clipped_to_the_norm(lora):
    """Also across the chunks that bound memory: these are more samples than one chunk holds."""
    samples = lora.samples * 2
    assert sum(len(sample.tokens) for sample in samples) > PROBE_TOKENS_MAX
    gradients = torch.cat([part.flatten(1) for part in lora.one_by_one(samples)], dim=1)  # (num_samples, all)
    norms = torch.linalg.vector_norm(gradients, dim=1)
    clip = float(norms.median())
    wanted = (gradients * (clip / norms).clamp(max=1)[:, None]).mean(0).numpy()
    got = lora.steps(Spending(0.0, 1.0, 1), clip, seed=1, samples=samples)
    assert np.linalg.norm(got - wanted) < 1e-3 * np.linalg.norm(wanted)


def test_one_sample_moves_a_step_by_no_more_than_the_clipping_norm(lora):
    """The law that all of it rests on: with equal noise, neighbours differ by at most the norm."""
    clip, spending = 0.25, Spending(2.0, 1.0, 1)
    whole = lora.steps(spending, clip, seed=3) * len(lora.samples)
    for left_out in (0, 7, 18):
        rest = [sample for index, sample in enumerate(lora.samples) if index != left_out]
        less = lora.steps(spending, clip, seed=3, samples=rest) * len(rest)
        assert np.linalg.norm(whole - less) <= clip * 1.001


def test_noise_has_the_standard_deviation_that_was_accounted_for(lora):
    """What a step adds beyond its gradients: noise multiplier times clipping norm, over the expected batch."""
    clip, noise = 0.5, 3.0
    quiet = lora.steps(Spending(0.0, 1.0, 1), clip, seed=5)
    noises = np.concatenate([lora.steps(Spending(noise, 1.0, 1), clip, seed) - quiet for seed in range(4)])
    wanted = noise * clip / len(lora.samples)
    assert np.std(noises) == pytest.approx(wanted, rel=0.02)
    assert abs(np.mean(noises)) < 4 * wanted / math.sqrt(len(noises))
    assert abs(np.corrcoef(noises.reshape(4, -1))[0, 1]) < 0.05


def test_a_step_that_draws_no_sample_adds_noise_all_the_same(lora):
    moved = lora.steps(Spending(1.0, 1e-9, 1), 1.0, seed=2)
    assert np.std(moved) == pytest.approx(1 / (1e-9 * len(lora.samples)), rel=0.05)


def test_samples_are_drawn_by_chance_one_by_one(lora):
    """Poisson sampling, which the accounting assumes: batches of many sizes, of the expected one in the mean."""
    sizes = []
    for seed in range(12):
        norm_of_sum = lora.steps(Spending(0.0, 0.25, 1), 1e-6, seed) * 0.25 * len(lora.samples) / 1e-6
        sizes.append(float(np.linalg.norm(norm_of_sum)))  # every gradient has norm 1 now; none cancels all others
    assert len({round(size, 3) for size in sizes}) > 6
    assert max(sizes) <= len(lora.samples)


def test_equal_draws_train_alike_and_others_differ(lora):
    spending = Spending(1.0, 0.5, 2)
    first, again, other = (lora.steps(spending, 1.0, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


# --- a private learner


@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_kind_trains_privately(kind):
    setting = Setting(kind, torch.bfloat16, num_samples=6)
    private = setting.private(noise_multiplier=0.5)
    training = private.train(private.initial(), Round(0))
    assert training.guarantee is not None
    assert all(np.isfinite(values).all() for values in training.delta.values())
    assert {name: values.shape for name, values in training.delta.items()} == dict(private.shapes())
    assert any(values.any() for values in training.delta.values())


def test_training_privately_learns(lora):
    private = lora.private(noise_multiplier=0.3, batch=NUM_SAMPLES)
    base = private.initial()
    trained = {name: base[name] + delta for name, delta in private.train(base, Round(0)).delta.items()}
    assert private.evaluate(trained) < private.evaluate(base) - 0.1


def test_the_guarantee_is_that_of_all_rounds_so_far(lora):
    log = MemorySpendings()
    private = lora.private(log)
    for rounds in (1, 2, 3):
        training = private.train(private.initial(), Round(rounds))
        wanted = compute_epsilon([Spending(1.0, 4 / lora.learner.num_samples, 10 * rounds)], DELTA)
        assert training.guarantee == Guarantee(wanted, DELTA)


def test_nothing_but_the_delta_tells_of_the_data(lora):
    """Neither the loss nor how many tokens were drawn: only what was expected."""
    other = Setting("lora")
    other.learner = lora.learner.beside(
        Data(other.samples[::-1], {}, {}, compute_digest(b"other")), training=other.config.training
    )
    told = [setting.private(seed=seed).train(lora.start, Round(0)) for seed, setting in ((0, lora), (1, other))]
    assert [(training.num_tokens, training.loss_nats) for training in told] == [(10 * 4 * 48, None)] * 2


def test_a_round_is_accounted_for_before_it_is_trained(lora):
    """A base that is not finite ends the training: what it cost is in the log all the same."""
    log = MemorySpendings()
    private = lora.private(log)
    broken = {name: values * np.float32(np.nan) for name, values in private.initial().items()}
    with pytest.raises(OperatorError, match="diverged in round 7"):
        private.train(broken, Round(7))
    assert log.get_spendings() == (private.round_cost,)


def test_a_spent_budget_ends_training_and_changes_nothing(lora):
    log = MemorySpendings()
    private = lora.private(log, epsilon_max=compute_epsilon([Spending(1.0, 4 / lora.learner.num_samples, 10)], DELTA))
    private.train(private.initial(), Round(0))
    before = encode_tensors(get_adapter_tensors(lora.model))
    with pytest.raises(BudgetSpent, match=r"raise privacy\.epsilon_max"):
        private.train(private.initial(), Round(1))
    assert encode_tensors(get_adapter_tensors(lora.model)) == before
    assert len(log.get_spendings()) == 1


def test_one_sample_can_be_trained_on():
    setting = Setting("lora", num_samples=1)
    training = setting.private(noise_multiplier=5.0).train(setting.start, Round(0))
    assert training.guarantee is not None
    assert all(np.isfinite(values).all() for values in training.delta.values())


def test_training_without_noise_is_accounted_for_as_such(tmp_path):
    """So that a node whose privacy was off for a while does not forget it."""
    setting = Setting("lora", num_samples=4)
    log = MemorySpendings()
    setting.learner._spendings = log  # as the constructor does with a node's store
    setting.learner.train(setting.start, Round(0))
    assert compute_epsilon(log.get_spendings(), DELTA) == math.inf


# --- what others are told


class Told:
    """A learner that has trained already."""

    def __init__(self, training):
        self.training = training

    def shapes(self):
        return {"a": (4, 32)}

    def train(self, base, round, work=None):
        return self.training


class Blobs(dict):
    def put(self, data):
        self[compute_digest(data)] = data
        return compute_digest(data)

    def get(self, digest):
        return self[digest]


@pytest.mark.parametrize(
    ("guarantee", "declared"),
    [
        (None, None),
        (Guarantee(1.2345671, 1e-5), DeclaredPrivacy(1_234_568, 10_000_000)),
        (Guarantee(1e-9, 1e-12), DeclaredPrivacy(1, 1)),
        (Guarantee(1e300, 1e-5), DeclaredPrivacy(2**53, 10_000_000)),
    ],
)
def test_a_declared_epsilon_is_rounded_up(guarantee, declared):
    blobs = Blobs()
    delta = {"a": np.ones((4, 32), np.float32)}
    base = blobs.put(encode_tensors(delta))
    config = NetworkConfig("n", Millis(0), "", "", ChainConfig(1, "", ""), compression=CompressionConfig(64, 8))
    learner = Told(Training(delta, 10, None if guarantee else 2.5, guarantee))
    trained = work.train_update(learner, blobs, config, Train(Round(0), PeerId("me"), base, None))
    assert trained.privacy == declared
    assert trained.loss_nano == (None if guarantee else 2_500_000_000)


DECLARED = DeclaredPrivacy(3_200_000, 10_000_000)


def test_an_announcement_says_how_private_it_is_and_peers_remember_the_newest():
    bench = Bench(1)
    bench.join()
    residual = compute_digest(b"residual")
    mine = bench.feed(Trained(ROUND, BASE, compute_digest(b"payload"), 100, 10, residual, None, DECLARED))
    announcement = only(mine, Publish).message
    assert announcement.privacy == DECLARED
    bench.hear(1, announcement)
    bench.hear(0, msgspec.structs.replace(announcement_of(NAMES[0]), privacy=DECLARED))
    bench.hear(2, announcement_of(NAMES[2]))
    assert bench.peer.privacy == {NAMES[0]: DECLARED, NAMES[1]: DECLARED, NAMES[2]: None}


def test_an_announcement_without_privacy_is_read_as_none():
    """Six fields, as nodes wrote them before there was any."""
    told = msgspec.msgpack.encode(["announcement", 1, "p", bytes(32), bytes(32), 5, 6])
    assert decode_message(told) == Announcement(Round(1), PeerId("p"), Digest(bytes(32)), Digest(bytes(32)), 5, 6)
    full = Announcement(Round(1), PeerId("p"), Digest(bytes(32)), Digest(bytes(32)), 5, 6, DECLARED)
    assert decode_message(encode(full)) == full


@pytest.mark.parametrize("bad", [(0, 1), (-1, 1), (2**53 + 1, 1), (1, 0), (1, 10**12 + 1)])
def test_a_declared_privacy_rejects_what_is_none(bad):
    told = ["announcement", 1, "p", bytes(32), bytes(32), 5, 6, list(bad)]
    with pytest.raises(Reject):
        decode_message(msgspec.msgpack.encode(told))


def test_the_status_screen_tells_the_nodes_own_epsilon_and_its_peers():
    figures = RoundFigures()
    trained = Trained(Round(0), BASE, BASE, 1, 1, BASE, None, DECLARED)
    figures.on_event(Round(0), trained, {})
    assert figures.epsilon == 3.2
    assert "train_loss_nano" not in figures.by_round[Round(0)]
    protocol = {
        "base": "00" * 32,
        "certified_round": 0,
        "losses_nats": {},
        "notes": [],
        "updates": [{"peer": "peer-abcdef", "epsilon": 3.2, "delta": 1e-5}, {"peer": "peer-open"}],
    }
    receipts = {"epoch": 2, "earned_tokens": 36, "given_tokens": 24, "shares": {"1": {"me": 125_000_000}}}
    status = {
        "peer": "me",
        "stage": "running",
        "round": 1,
        "phase": "TRAIN",
        "phase_ends_in_ms": 1000,
        "network": {"name": "n", "backbone": "b"},
        "peers": [],
        "addresses": [],
        "clock": {"offset_ms": None, "num_peers": 0, "is_off": False},
        "account": "0x0",
        "chain": {"member": 0, "members": 1, "committee": [], "settled_round": None, "rpc": "r", "error": ""},
        "privacy": {"epsilon": 3.2, "delta": 1e-5, "epsilon_max": 8.0},
        "protocol": protocol,
        "serving": {"versions": [], "sessions": 0, "replicas": 0, "receipts": receipts},
        "rewards": {
            "allotted_wei": str(2 * 10**18),
            "claimed_wei": None,
            "served_wei": str(10**18),
            "claimed_served_wei": str(5 * 10**17),
        },
    }
    cells = "\n".join(str(cell) for column in make_status_table(status).columns for cell in column.cells)
    assert "epsilon 3.2 of 8, at delta 1e-05" in cells
    assert "epoch 2: 36 tokens earned, 24 attested; of epoch 1 due 12.5% of what it allots" in cells
    assert "2.0000 PFM for learning (drawn: not known), 1.0000 for serving (drawn: 0.5000)" in cells
    assert "abcdef ε 3.2 (δ 1e-05); of 2 merged updates" in cells
    status["privacy"]["epsilon"] = None
    cells = "\n".join(str(cell) for column in make_status_table(status).columns for cell in column.cells)
    assert "not guaranteed" in cells
