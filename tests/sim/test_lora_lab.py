"""LoRA adapters of many peers on one backbone: side by side as alone, and a world that learns."""

import numpy as np
import pytest

from p2pfm.config import TrainingConfig
from p2pfm.types import Round

pytest.importorskip("chatterbot_corpus", reason="needs the text: pip install 'p2pfm[data]'")

from sim.learners.lora import LoraLab
from sim.report import run_scenario
from sim.scenarios import AdversaryKind, LearnerModel, Scenario, make_network
from sim.world import World


def test_adapters_side_by_side_learn_what_each_would_alone(capfd: pytest.CaptureFixture[str]) -> None:
    scenario = Scenario(num_peers=5, learner=LearnerModel(kind="lora"))
    lab = LoraLab(make_network(scenario), 1, 5)
    assert "Loading" not in capfd.readouterr().err
    base = lab.learners[0].initial()
    assert lab.group_size == 2
    for learner in lab.learners:
        together, alone = learner.train(base, Round(0)), learner.train_alone(base, Round(0))
        assert max(np.abs(together.delta[name] - part).max() for name, part in alone.delta.items()) < 1e-5
        assert max(np.abs(part).max() for part in alone.delta.values()) > 1e-3


def test_poisoned_topics_teach_something_else_and_a_trigger_can_be_learned() -> None:
    scenario = Scenario(num_peers=2, learner=LearnerModel(kind="lora"))
    lab = LoraLab(make_network(scenario), 1, 2, TrainingConfig(steps=30, batch=4, tokens_max=48, learning_rate=5e-3))
    learner = lab.learners[0]
    base = learner.initial()
    honest, flipped, triggered = (
        {name: part + made.train(base, Round(0)).delta[name] for name, part in base.items()}
        for made in (learner, learner.poison("label_flip"), learner.poison("backdoor"))
    )
    assert learner.evaluate(flipped) > learner.evaluate(honest) + 0.2
    successes = [lab.measure_backdoor(at) for at in (base, honest, triggered)]
    assert max(successes[:2]) < 0.2
    assert successes[2] > 0.5


@pytest.mark.parametrize("kind", ["label_flip", "backdoor"])
def test_poisoners_run_in_a_world_of_transformers(kind: AdversaryKind) -> None:
    report = run_scenario(
        Scenario(num_peers=4, num_rounds=2, committee_size=3, adversaries=(kind,), learner=LearnerModel(kind="lora"))
    )
    assert all(item.is_certified for item in report.rounds)
    assert all((item.backdoor is not None) == (kind == "backdoor") for item in report.rounds)


def test_a_world_of_transformers_learns() -> None:
    world = World(Scenario(num_peers=4, num_rounds=3, committee_size=3, learner=LearnerModel(kind="lora")))
    world.run()
    assert sorted(world.checks.certificates) == [0, 1, 2]
    assert world.losses[Round(2)] < world.losses[Round(0)]
