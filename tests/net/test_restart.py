"""What a node knows when it starts again, and what it gives to whoever asks."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import trio
from net_victim_process import VICTIM, make_keys, make_ledger, make_network

from p2pfm.config import NodeConfig
from p2pfm.lora.delta import encode_tensors
from p2pfm.messages import (
    NO_DIGEST,
    BlobReply,
    BlobRequest,
    Certificate,
    IncludedUpdate,
    Proposal,
    decode_reply,
    encode,
)
from p2pfm.protocol.peer import initial_durable
from p2pfm.protocol.phases import compute_position
from p2pfm.runtime.node import Models, Node
from p2pfm.types import Contribution, Digest, MemberIndex, Millis, PeerId, Round, Weight, compute_digest
from sim.learners.convex import LinearLearner, Problem

LEARNER = LinearLearner(Problem(1), 0)
BASE = Digest(b"\x01" * 32)


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
        initial_durable(BASE),
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


def make_proposal(payloads: tuple[Digest, ...], shards: tuple[Digest, ...] = ()) -> Proposal:
    updates = tuple(
        IncludedUpdate(PeerId("p"), MemberIndex(0), payload, Contribution(0), Weight(0)) for payload in payloads
    )
    return Proposal(Round(3), MemberIndex(0), 1, 0, NO_DIGEST, BASE, NO_DIGEST, NO_DIGEST, updates, (), (), shards)


def test_what_shards_certified_is_served_again(node: Node) -> None:
    of_member, of_shard = compute_digest(b"a member's update"), compute_digest(b"a shard's update")
    inner = node._store.put(encode(make_proposal((of_member,))))
    liars = node._store.put(b"P2U2 of the round that runs now")
    whole = make_proposal((of_shard,), (inner, liars, compute_digest(b"not here")))
    head = Certificate(whole, (), bytes(96))
    node._store.save_durable(msgspec.structs.replace(initial_durable(BASE), head=head))
    assert node._find_released() == {BASE, of_shard, inner, of_member}


def test_what_the_chain_names_is_public_if_it_is_a_proposal(node: Node) -> None:
    """A committee that lies could name the payload of the round that runs, and others would copy it."""
    running = node._store.put(b"P2U2 of the round that runs now")
    plain, sharded = node._store.put(encode(make_proposal(()))), node._store.put(encode(make_proposal((), (running,))))
    node.stage = "running"
    node.effects = SimpleNamespace(served=set())  # type: ignore[assignment]
    node.settler.data_digests |= {plain, sharded}
    node.settler.learn_shards(node._store.get(sharded))
    assert running in node.settler.data_digests

    def ask(digest: Digest) -> tuple[bytes | None, int]:
        reply = decode_reply(node._answer_blob(BlobRequest(digest, 0, 1000)))
        assert isinstance(reply, BlobReply)
        return trio.run(node.find_public, digest), reply.total

    node.serving = SimpleNamespace(adapters=SimpleNamespace(is_known=lambda digest: False))  # type: ignore[assignment]
    assert ask(running) == (None, 0)
    for digest in (plain, sharded):
        data = node._store.get(digest)
        assert ask(digest) == (data, len(data))
    node.effects.served.add(running)
    assert ask(running) == (node._store.get(running), 31)
