"""Many peers trained together learn what each would alone; what is modelled is what would be coded."""

from collections.abc import Sequence

import numpy as np
import pytest

from p2pfm.config import CompressionConfig
from p2pfm.learner import Training
from p2pfm.lora.compress import compress, decode_payload, quantise_rows
from p2pfm.lora.delta import compute_layout, flatten
from p2pfm.types import NANO, Round, Tensors
from sim.faults import make_learners
from sim.learners import Company
from sim.page import make_plots
from sim.report import run_scenario
from sim.scenarios import AdversaryKind, LearnerModel, Scenario
from sim.tables import make_round_rows
from sim.world import World

mlp = pytest.importorskip("sim.learners.mlp", reason="needs scikit-learn: pip install 'p2pfm[sim]'")

TOLERANCE = 1e-5
LAYOUT = compute_layout(mlp.SHAPES)


def make_lab(num_peers: int) -> "mlp.MlpLab":
    return mlp.MlpLab(mlp.Digits(3), num_peers, work_steps=1)


def test_batched_training_is_training_alone() -> None:
    lab = make_lab(70)  # groups of 16, and a rest
    assert lab.group_size == mlp.PEERS_AT_ONCE
    base = lab.learners[0].initial()
    for learner in lab.learners:
        together, alone = learner.train(base, Round(1)), learner.train_alone(base, Round(1), None)
        assert together.num_tokens == alone.num_tokens
        assert together.loss_nats == pytest.approx(alone.loss_nats, abs=TOLERANCE)
        for name, part in alone.delta.items():
            assert np.abs(together.delta[name] - part).max() < TOLERANCE


def test_what_a_peer_learns_does_not_depend_on_who_asks_when() -> None:
    """To the last bit: on a cluster others ask, in another order, and some were on another base before."""
    lab, other = make_lab(9), make_lab(9)
    base = lab.learners[0].initial()
    moved = {name: part + 1 for name, part in base.items()}
    all_asked = [learner.train(base, Round(0)) for learner in lab.learners]
    other.learners[8].train(moved, Round(0))
    other.learners[3].train(base, Round(1))
    for index in (4, 8, 1):
        found = other.learners[index].train(base, Round(0))
        for name, part in all_asked[index].delta.items():
            assert np.array_equal(found.delta[name], part)


def test_a_group_is_trained_once_a_base_and_round_and_whole() -> None:
    calls: list[tuple[float, int, list[int]]] = []

    def train(base: Tensors, round: Round, indices: Sequence[int]) -> list[Training]:
        calls.append((float(base["part"][0]), round, list(indices)))
        return [Training(base, index, None) for index in indices]

    company = Company(train, 10, 3)
    left, right = ({"part": np.full(1, value, np.float32)} for value in (1, 2))
    asked = [(9, left, 0), (4, left, 0), (3, left, 0), (4, right, 0), (5, left, 0), (4, left, 1), (4, right, 1)]
    for index, base, round in asked:
        assert company.get(index, base, Round(round)).num_tokens == index
    assert calls == [(1, 0, [9]), (1, 0, [3, 4, 5]), (2, 0, [3, 4, 5]), (1, 1, [3, 4, 5]), (2, 1, [3, 4, 5])]
    assert Company(train, 5, 8).size == 2  # four groups at least, where there are so many peers


def test_a_public_batch_and_spoilt_data_change_what_is_learned() -> None:
    lab = make_lab(1)
    learner = lab.learners[0]
    base = learner.initial()
    honest = learner.train(base, Round(0)).delta["layer.out"]
    for other in (
        learner.train(base, Round(0), work=7),
        learner.poison("label_flip").train(base, Round(0)),
        learner.poison("backdoor").train(base, Round(0)),
    ):
        assert np.abs(other.delta["layer.out"] - honest).max() > 1e-3


@pytest.mark.parametrize("keep", [256, 4096])
def test_a_modelled_update_is_what_receivers_would_decode(keep: int) -> None:
    lab, config = make_lab(1), CompressionConfig(keep=keep)
    delta = lab.learners[0].train(lab.learners[0].initial(), Round(0)).delta
    payload, _ = compress(delta, config)
    coded = decode_payload(payload, mlp.SHAPES, config, len(payload))
    ((update, num_bytes),) = quantise_rows(flatten(delta)[None], LAYOUT, config)
    assert np.array_equal(update.positions, coded.positions)
    assert np.array_equal(update.values, coded.values)
    assert update.norm() == coded.norm()
    assert len(payload) <= num_bytes <= 1.4 * len(payload)  # the coder finds that dead units' rows are empty


@pytest.mark.parametrize("keep", [1, 256, 4096])
def test_updates_that_are_quantised_together_are_what_each_is_alone(keep: int) -> None:
    rng, config = np.random.default_rng(keep), CompressionConfig(keep=keep)
    batch = [
        {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in mlp.SHAPES.items()}
        for scale in (1, 1e-3, 0, 1e9, 1e-30)
    ]
    batch[1]["layer.in"][:, 3] = 0
    rows = np.stack([flatten(one) for one in batch])
    for index, (update, num_bytes) in enumerate(quantise_rows(rows, LAYOUT, config)):
        ((alone, num_bytes_alone),) = quantise_rows(rows[index : index + 1], LAYOUT, config)
        assert (update.digest, num_bytes, update.layout) == (alone.digest, num_bytes_alone, alone.layout)
        for name in ("positions", "values", "levels", "counts"):
            assert np.array_equal(getattr(update, name), getattr(alone, name)), name


def run(model: LearnerModel) -> World:
    world = World(Scenario(seed=4, num_peers=6, num_rounds=3, learner=model))
    world.run()
    return world


def test_a_world_learns_the_same_batched_or_not_and_coded_or_modelled() -> None:
    plain = run(LearnerModel(kind="mlp", batched=False))
    assert sorted(plain.checks.certificates) == [0, 1, 2]
    assert plain.losses[Round(2)] < plain.losses[Round(0)]
    for model in (LearnerModel(kind="mlp"), LearnerModel(kind="mlp", codec="modelled")):
        other = run(model)
        for round, loss in plain.losses.items():
            assert other.losses[round] / NANO == pytest.approx(loss / NANO, abs=1e-3)


def test_a_backdoor_that_a_plain_mean_would_take_hardly_comes_through_a_world() -> None:
    liars: tuple[AdversaryKind, ...] = ("backdoor",) * 3
    lab = make_lab(12)
    learners = make_learners((*liars, *[None] * 9), lab.learners, 3)
    base = lab.learners[0].initial()
    for number in range(4):
        deltas = [learner.train(base, Round(number)).delta for learner in learners]
        base = {name: part + np.mean([delta[name] for delta in deltas], axis=0) for name, part in base.items()}
    by_mean = lab.measure_backdoor(base)
    assert by_mean is not None
    assert by_mean > 0.8
    model = LearnerModel(kind="mlp", codec="modelled")
    report, honest = (
        run_scenario(Scenario(seed=5, num_peers=12, num_rounds=4, adversaries=kinds, learner=model))
        for kinds in (liars, ())
    )
    found = [item.backdoor for item in report.rounds]
    assert max(share for share in found if share is not None) < 0.3
    assert None not in found
    assert [plot.key for plot in make_plots(report)].count("backdoor") == 1
    assert [row["backdoor"] for row in make_round_rows(report)] == found
    assert [item.backdoor for item in honest.rounds] == [None] * 4
    assert "backdoor" not in [plot.key for plot in make_plots(honest)]
    drawn = [peer.reward_pfm for peer in report.peers]
    assert np.mean(drawn[:3]) < np.mean(drawn[3:])
