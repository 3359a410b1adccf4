"""Many peers trained together learn what each would alone; what is modelled is what would be coded."""

import numpy as np
import pytest

from p2pfm.config import CompressionConfig
from p2pfm.lora.compress import compress, decode_payload, quantise_update
from p2pfm.types import NANO, Round
from sim.scenarios import LearnerModel, Scenario
from sim.world import World

mlp = pytest.importorskip("sim.learners.mlp", reason="needs scikit-learn: pip install 'p2pfm[sim]'")

TOLERANCE = 1e-5


def make_lab(num_peers: int) -> "mlp.MlpLab":
    return mlp.MlpLab(mlp.Digits(3), num_peers, work_steps=1)


def test_batched_training_is_training_alone() -> None:
    lab = make_lab(70)  # more than one chunk
    base = lab.learners[0].initial()
    lab.prepare(base, Round(1), range(70))
    for index, learner in enumerate(lab.learners):
        together, alone = lab.take(index, base, Round(1)), learner.train_alone(base, Round(1), None)
        assert together is not None
        assert together.num_tokens == alone.num_tokens
        assert together.loss_nats == pytest.approx(alone.loss_nats, abs=TOLERANCE)
        for name, part in alone.delta.items():
            assert np.abs(together.delta[name] - part).max() < TOLERANCE


def test_what_a_peer_learns_does_not_depend_on_its_company() -> None:
    lab, other = make_lab(9), make_lab(9)
    base = lab.learners[0].initial()
    lab.prepare(base, Round(0), range(9))
    other.prepare(base, Round(0), [4])
    together, alone = lab.take(4, base, Round(0)), other.take(4, base, Round(0))
    assert together is not None
    assert alone is not None
    for name, part in alone.delta.items():
        assert np.abs(together.delta[name] - part).max() < TOLERANCE


def test_nothing_is_ready_for_another_base_or_round() -> None:
    lab = make_lab(2)
    base = lab.learners[0].initial()
    lab.prepare(base, Round(0), [0])
    moved = {name: part + 1 for name, part in base.items()}
    assert lab.take(0, base, Round(0)) is not None
    assert lab.take(1, base, Round(0)) is None
    assert lab.take(0, base, Round(1)) is None
    assert lab.take(0, moved, Round(0)) is None


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
    update, num_bytes = quantise_update(delta, config)
    assert np.array_equal(update.positions, coded.positions)
    assert np.array_equal(update.values, coded.values)
    assert update.norm() == coded.norm()
    assert len(payload) <= num_bytes <= 1.4 * len(payload)  # the coder finds that dead units' rows are empty


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
