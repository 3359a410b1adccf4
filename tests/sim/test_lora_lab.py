"""LoRA adapters of many peers on one backbone: side by side as alone, and a world that learns."""

import numpy as np
import pytest

from p2pfm.types import Round

pytest.importorskip("chatterbot_corpus", reason="needs the text: pip install 'p2pfm[data]'")

from sim.learners.lora import LoraLab
from sim.scenarios import LearnerModel, Scenario, make_network
from sim.world import World


def test_adapters_side_by_side_learn_what_each_would_alone() -> None:
    scenario = Scenario(num_peers=5, learner=LearnerModel(kind="lora"))
    lab = LoraLab(make_network(scenario), 1, 5)
    base = lab.learners[0].initial()
    assert lab.group_size == 2
    for learner in lab.learners:
        together, alone = learner.train(base, Round(0)), learner.train_alone(base, Round(0))
        assert max(np.abs(together.delta[name] - part).max() for name, part in alone.delta.items()) < 1e-5
        assert max(np.abs(part).max() for part in alone.delta.values()) > 1e-3


def test_a_world_of_transformers_learns() -> None:
    world = World(Scenario(num_peers=4, num_rounds=3, committee_size=3, learner=LearnerModel(kind="lora")))
    world.run()
    assert sorted(world.checks.certificates) == [0, 1, 2]
    assert world.losses[Round(2)] < world.losses[Round(0)]
