"""What a node knows when it starts again: what it has signed, and what it may give to whoever asks."""

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from net_victim_process import VICTIM, make_keys, make_ledger, make_network

from p2pfm.config import NodeConfig
from p2pfm.lora.delta import encode_tensors
from p2pfm.protocol.peer import initial_durable
from p2pfm.protocol.phases import compute_position
from p2pfm.runtime.node import Models, Node
from p2pfm.types import Digest, Millis, Round
from sim.learners.convex import LinearLearner, Problem

LEARNER = LinearLearner(Problem(1), 0)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    def fail(*_: object) -> None:
        raise AssertionError("no model is loaded")

    keys = make_keys(VICTIM)
    config = NodeConfig(home=str(tmp_path), data="", rpc="", network=make_network(int(time.time() * 1000) - 60_000))
    ledger = make_ledger(0).as_account(keys.account_address)
    node = Node(config, keys, ledger, Models(fail, fail, fail))  # type: ignore[arg-type]
    yield node
    node._store.close()


def test_who_lost_its_base_signs_no_round_twice_at_either_level(node: Node) -> None:
    durable = msgspec.structs.replace(
        initial_durable(Digest(b"\x01" * 32)),
        signed_round=Round(6),
        signed_shard_round=Round(7),
        announced_round=Round(8),
        residual=Digest(b"\x02" * 32),
    )
    whole = node._make_whole(durable, LEARNER)
    assert whole.base == node._store.put(encode_tensors(LEARNER.initial()))
    assert (whole.signed_round, whole.signed_shard_round, whole.announced_round) == (6, 7, 8)


def test_a_member_that_lost_its_disk_says_nothing_in_the_round_that_runs(node: Node) -> None:
    node._was_member = True
    before = compute_position(node.config.network, Millis(int(time.time() * 1000))).round
    whole = node._make_whole(None, LEARNER)
    assert before > 0
    assert min(whole.signed_round, whole.signed_shard_round, whole.announced_round) >= before
    node._was_member = False
    assert node._make_whole(None, LEARNER).signed_shard_round == -1
