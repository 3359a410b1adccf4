"""Differential privacy of a peer's samples: what it costs in utility, and what attacks find without and with it.

    python bench/privacy.py [--json FILE] [--check] [--quick]

Accounting: the node's epsilon beside closed forms (Gaussian steps on all samples, and one Poisson-sampled step, both
exact: Balle and Wang 2018, Zhu et al. 2022) and dp-accounting 0.6.0's privacy-loss distributions (recorded here; from
the installed package where there is one).

Utility and leakage: one peer trains as a node does (`PrivateLearner`: rounds of DP-SGD, accounted for), with epsilon
infinite (no DP: the same number of steps and samples) and at several budgets, for two adapter kinds. Its samples are
half of ChatterBot's; the other half is held out. It also holds canaries: a question with random digits for an answer,
each several times. The attacked model is the peer's own update, which every peer sees. Reference of the same run: the
untrained adapter, which knows nothing.

AUC: a low loss tells members from held-out samples (.5 is chance; "calibrated" takes the untrained model's loss off
first, the stronger attack). Exposure: bits of a canary, with the untrained model's loss off, too (1.44 by chance, 7 at
most). Spread: standard deviation over seeds.
"""

import math
import multiprocessing
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import harness
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm
from tasks import BACKBONE
from torch.nn import functional

from p2pfm.config import AdapterConfig, ChainConfig, NetworkConfig, PrivacyConfig, TrainingConfig
from p2pfm.learner import Learner, Spending
from p2pfm.lora.batches import PROBE_TOKENS_MAX, Encoded, collate, encode_all
from p2pfm.lora.corpus import read_topics
from p2pfm.lora.delta import add
from p2pfm.lora.layers import ADAPTER, build_peft, load_backbone, predict, set_adapter_tensors
from p2pfm.lora.leakage import compute_calibrated_auc, compute_exposure, compute_membership_auc
from p2pfm.lora.privacy import MemorySpendings, PrivateLearner, compute_epsilon, compute_noise_multiplier
from p2pfm.lora.samples import Sample
from p2pfm.lora.torch_learner import Data, TorchLearner
from p2pfm.types import Digest, Millis, Round, Tensors

DELTA = 1e-5
DIGITS = 6
"""A canary's secret: 20 bits."""
ROOMS = ("cellar", "garage", "kitchen", "library", "tower", "stable", "office", "museum")
"""Each canary asks for another one's code."""
ADAPTERS = {
    "lora": AdapterConfig(kind="lora", rank=8, alpha=16, targets=("all-linear",)),
    "fed_sb": AdapterConfig(kind="fed_sb", rank=16, alpha=32, targets=("all-linear",)),
}
LEARNING_RATE = 5e-3
EPSILON_ERROR_MAX, AUC_LEAK, AUC_SAFE, EXPOSURE_LEAK, EXPOSURE_SAFE = 0.01, 0.6, 0.55, 3.0, 2.5
"""The bounds: of epsilon against its references; of both attacks without DP (at least) and with it (at most)."""
SAFE_EPSILON = 8.0
"""Up to here the attacks must find nothing."""

RECORDED = {
    (1.0, 0.04, 30): 1.8439733990021208,
    (1.0, 0.04, 200): 3.776308348630294,
    (0.5, 0.02, 100): 9.693703635765868,
    (5.0, 0.5, 400): 10.150709310442442,
    (1.1, 0.01, 10_000): 5.192620123878041,
}
"""dp-accounting 0.6.0, PLDAccountant with its defaults: (noise multiplier, sample rate, steps) to epsilon at DELTA."""


class Size(NamedTuple):
    """How much is run."""

    seeds: tuple[int, ...]
    epsilons: tuple[float, ...]
    num_samples: int = 384
    num_canaries: int = 8
    copies: int = 8
    num_references: int = 127
    rounds: int = 5
    steps: int = 20
    batch: int = 32


DEFAULT = Size(seeds=(1, 2, 3), epsilons=(math.inf, 16.0, 8.0, 4.0, 2.0))
QUICK = Size((1,), (math.inf, 8.0), num_samples=64, num_canaries=2, copies=2, num_references=15, rounds=2, steps=3)


class Job(NamedTuple):
    """One training run."""

    kind: str
    epsilon: float
    seed: int
    size: Size


def main() -> None:
    options = harness.parse_options(__doc__)
    size = QUICK if options.quick else DEFAULT
    accounting = check_accounting()
    peer_level = print_peer_level()
    jobs = [Job(kind, eps, seed, size) for eps in size.epsilons for kind in ADAPTERS for seed in size.seeds]
    # Spawned: torch's threads do not survive a fork.
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(run_job, jobs))
    figures = summarise(size, dict(zip(jobs, results, strict=True)))
    targets = [
        harness.Target("epsilon_error_max", max(accounting["errors"]), EPSILON_ERROR_MAX, "less"),
        harness.Target("epsilon_understated_max", max(accounting["understated"]), 1e-4, "less"),
    ]
    for kind, rows in figures.items():
        safe = [row for row in rows if row["epsilon"] <= SAFE_EPSILON]
        open_row = next(row for row in rows if math.isinf(row["epsilon"]))
        targets += [
            harness.Target(f"{kind}_auc_without_dp", open_row["calibrated_auc"], AUC_LEAK, "more"),
            harness.Target(f"{kind}_auc_with_dp", max(row["calibrated_auc"] for row in safe), AUC_SAFE, "less"),
            harness.Target(f"{kind}_exposure_without_dp", open_row["exposure"], EXPOSURE_LEAK, "more"),
            harness.Target(f"{kind}_exposure_with_dp", max(row["exposure"] for row in safe), EXPOSURE_SAFE, "less"),
        ]
    harness.finish(options, {"accounting": accounting, "peer_level": peer_level, "runs": figures}, targets)


# --- accounting


def check_accounting() -> dict[str, list[float]]:
    """Print epsilon beside its references; relative errors, and how far any falls below its reference."""
    rows: list[tuple[float, float, int, float, str]] = [
        (noise, 1.0, steps, exact_full(noise, steps), "closed form, all samples")
        for noise, steps in ((1.0, 1), (4.0, 20), (10.0, 200), (30.0, 3000))
    ]
    rows += [
        (noise, rate, 1, exact_one(noise, rate), "closed form, one step")
        for noise, rate in ((0.5, 0.01), (0.6, 0.1), (1.0, 0.3))
    ]
    name, references = find_library()
    rows += [(*case, epsilon, name) for case, epsilon in references.items()]
    table, errors, understated = [], [], []
    for noise, rate, steps, reference, source in rows:
        ours = compute_epsilon([Spending(noise, rate, steps)], DELTA)
        error = ours / reference - 1
        errors.append(abs(error))
        understated.append(max(0.0, -error))
        table.append((f"noise {noise:g}, rate {rate:g}, {steps} steps", ours, reference, f"{error:+.2%}", source))
    harness.print_table(
        f"Epsilon at delta {DELTA:g}", ("steps", "p2pfm", "reference", "error", "reference's source"), table
    )
    return {"errors": errors, "understated": understated}


def exact_full(noise: float, steps: int) -> float:
    """Epsilon of Gaussian steps on all samples, exactly (Balle and Wang 2018, theorem 8)."""
    mu = math.sqrt(steps) / noise

    def excess(epsilon: float) -> float:
        return float(norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon + norm.logcdf(-mu / 2 - epsilon / mu)) - DELTA)

    return float(brentq(excess, 0, 1000))


def exact_one(noise: float, rate: float) -> float:
    """Epsilon of one Poisson-sampled Gaussian step, exactly: the worse of adding and of removing a sample."""

    def remove(epsilon: float) -> float:
        # The likelihood ratio of the mixture to the noise grows with x: it is over e^epsilon beyond `edge`.
        edge = noise**2 * math.log((math.exp(epsilon) - 1 + rate) / rate) + 0.5
        mixture = (1 - rate) * norm.sf(edge / noise) + rate * norm.sf((edge - 1) / noise)
        return float(mixture - math.exp(epsilon) * norm.sf(edge / noise) - DELTA)

    def add_one(epsilon: float) -> float:
        if math.exp(-epsilon) <= 1 - rate:
            return -DELTA
        edge = noise**2 * math.log((math.exp(-epsilon) - 1 + rate) / rate) + 0.5
        mixture = (1 - rate) * norm.cdf(edge / noise) + rate * norm.cdf((edge - 1) / noise)
        return float(norm.cdf(edge / noise) - math.exp(epsilon) * mixture - DELTA)

    return max(float(brentq(find, 0, 50)) if find(0) > 0 else 0.0 for find in (remove, add_one))


def find_library() -> tuple[str, dict[tuple[float, float, int], float]]:
    """dp-accounting's epsilons: computed where it is installed (it is no dependency), else as recorded."""
    try:
        from dp_accounting import dp_event
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        return "dp-accounting 0.6.0, recorded", RECORDED
    found = {}
    for noise, rate, steps in RECORDED:
        accountant = PLDAccountant()
        step = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise))
        accountant.compose(dp_event.SelfComposedDpEvent(step, steps))
        found[noise, rate, steps] = accountant.get_epsilon(DELTA)
    return "dp-accounting, installed", found


def print_peer_level() -> dict[str, float]:
    """What hiding a whole peer would take: the norm of the mean update's noise over what updates are clipped to."""
    rounds, table, figures = 50, [], {}
    noise = compute_noise_multiplier(SAFE_EPSILON, DELTA, 1.0, rounds)
    for num_peers in (50, 1000, 10_000):
        for num_parameters in (2_048, 8_192, 1_000_000):
            ratio = noise * math.sqrt(num_parameters) / num_peers
            table.append((num_peers, num_parameters, ratio))
            figures[f"{num_peers} peers, {num_parameters} parameters"] = ratio
    harness.print_table(
        f"Hiding a whole peer (not built): epsilon {SAFE_EPSILON:g} over {rounds} rounds",
        ("peers", "parameters", "noise over signal"),
        table,
    )
    return figures


# --- utility and leakage


def run_job(job: Job) -> dict[str, float]:
    """Train, then attack."""
    torch.set_num_threads(1)
    size = job.size
    backbone, tokenizer = load_backbone(BACKBONE, torch.float32)
    backbone.set_attn_implementation("eager")  # as TorchLearner does
    training = TrainingConfig(size.steps, size.batch, tokens_max=48, learning_rate=LEARNING_RATE)
    config = NetworkConfig(
        "privacy", Millis(0), "", "", ChainConfig(1, "", ""), adapter=ADAPTERS[job.kind], training=training
    )
    draw = random.Random(job.seed)
    pool = [sample for _, part in sorted(read_topics().items()) for sample in part]
    draw.shuffle(pool)
    codes = [make_code(room, draw) for room in ROOMS[: size.num_canaries] for _ in range(1 + size.num_references)]
    members = pool[: size.num_samples - size.copies * size.num_canaries]
    others = pool[len(members) :][: size.num_samples]
    secrets, private, held_out = (encode_all(tokenizer, part, training.tokens_max) for part in (codes, members, others))
    model = build_peft(backbone, config.adapter)
    strata = {"all": held_out}
    data = Data(private + secrets[:: 1 + size.num_references] * size.copies, strata, strata, Digest(bytes([job.seed])))
    honest = TorchLearner.on_peft(model, ADAPTER, tokenizer.eos_token_id, config, data)
    learner: Learner = honest
    if math.isfinite(job.epsilon):
        privacy = PrivacyConfig(enabled=True, epsilon_max=job.epsilon, rounds=size.rounds, delta=DELTA)
        learner = PrivateLearner(honest, privacy, training, MemorySpendings(), random.Random(job.seed))
    at: Tensors = learner.initial()
    epsilon, start = math.inf, time.process_time()
    for number in range(size.rounds):
        trained = learner.train(at, Round(number))
        at = add(at, trained.delta)
        epsilon = trained.guarantee.epsilon if trained.guarantee else math.inf
    seconds = time.process_time() - start

    parts = (private, held_out, secrets)
    before, after = (measure(model, adapter, parts, tokenizer.eos_token_id) for adapter in (learner.initial(), at))
    exposure, exposure_before = (
        statistics.mean(compute_exposure(part[0], part[1:]) for part in losses.reshape(size.num_canaries, -1))
        for losses in (after[2] - before[2], before[2])
    )
    return {
        "epsilon": epsilon,
        "noise": learner.round_cost.noise_multiplier if isinstance(learner, PrivateLearner) else 0.0,
        "loss_before": honest.evaluate(learner.initial()),
        "loss": honest.evaluate(at),
        "auc": compute_membership_auc(after[0], after[1]),
        "calibrated_auc": compute_calibrated_auc(after[0], after[1], before[0], before[1]),
        "auc_before": compute_membership_auc(before[0], before[1]),
        "exposure": exposure,
        "exposure_before": exposure_before,
        "train_s": seconds,
    }


def make_code(room: str, draw: random.Random) -> Sample:
    code = " ".join(draw.choice("0123456789") for _ in range(DIGITS))
    return Sample("canary", f"What is the code of the {room}?", code)


def measure(
    model: torch.nn.Module, adapter: Tensors, parts: Sequence[Sequence[Encoded]], pad: int
) -> list[NDArray[np.float64]]:
    """Each sample's mean loss under an adapter [nats/token], part by part."""
    set_adapter_tensors(model, adapter)
    return [sample_losses(model, part, pad) for part in parts]


def sample_losses(model: torch.nn.Module, samples: Sequence[Encoded], pad: int) -> NDArray[np.float64]:
    losses = np.zeros(len(samples))
    order = sorted(range(len(samples)), key=lambda index: len(samples[index].tokens))
    size = PROBE_TOKENS_MAX // max(len(sample.tokens) for sample in samples)
    with torch.inference_mode():
        for start in range(0, len(order), size):
            indices = order[start : start + size]
            batch = [samples[index] for index in indices]
            tokens, rows, columns, wanted = (torch.from_numpy(part) for part in collate(batch, pad))
            each = functional.cross_entropy(predict(model, tokens, rows, columns), wanted, reduction="none")
            sums = torch.zeros(len(batch)).index_add(0, rows, each)
            losses[indices] = sums.numpy() / [sample.num_completion for sample in batch]
    return losses


def summarise(size: Size, results: dict[Job, dict[str, float]]) -> dict[str, list[dict[str, float]]]:
    """Means over seeds, printed by adapter kind."""
    figures: dict[str, list[dict[str, float]]] = {}
    for kind, adapter in ADAPTERS.items():
        runs = {eps: [results[Job(kind, eps, seed, size)] for seed in size.seeds] for eps in size.epsilons}
        drops = {eps: [run["loss_before"] - run["loss"] for run in part] for eps, part in runs.items()}
        free = statistics.mean(drops[math.inf])
        first = runs[math.inf]
        untrained = (means(first, key) for key in ("loss_before", "auc_before", "exposure_before"))
        loss, auc, exposure = untrained
        table: list[tuple[object, ...]] = [("untrained", "", loss, "", auc, "", exposure, "")]
        figures[kind] = []
        for eps, part in runs.items():
            row = {key: statistics.mean(run[key] for run in part) for key in part[0]} | {"epsilon": eps}
            row |= {"spent": max(run["epsilon"] for run in part), "share": statistics.mean(drops[eps]) / free}
            figures[kind].append(row)
            table.append(
                (
                    "no DP" if math.isinf(eps) else f"{row['spent']:.2f}",
                    row["noise"],
                    means(part, "loss"),
                    f"{row['share']:.0%}",
                    means(part, "auc"),
                    means(part, "calibrated_auc"),
                    means(part, "exposure"),
                    row["train_s"],
                )
            )
        harness.print_table(
            f"{kind}, rank {adapter.rank}: {size.num_samples} samples, {size.rounds} rounds of {size.steps} steps of "
            f"{size.batch}, {len(size.seeds)} seeds",
            ("epsilon", "noise", "held-out loss", "drop of no DP's", "AUC", "calibrated", "exposure bits", "CPU s"),
            table,
        )
    return figures


def means(part: Sequence[dict[str, float]], key: str) -> str:
    values = [run[key] for run in part]
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
