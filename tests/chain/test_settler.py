"""A node's settler: what replaced blocks held is settled again, in order, and nonsense that was signed ends nothing."""

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import trio
from ledger_worlds import IMPLEMENTATIONS, PARAMS, PEERS, SECRETS, World, chain_world, memory_world, rpc, running_chain

from p2pfm.config import NetworkConfig
from p2pfm.errors import Reverted
from p2pfm.messages import Certificate, IncludedUpdate, Presence, Proposal, Score, ScoreReveal, encode
from p2pfm.protocol.events import AnyEvent, SettledChanged
from p2pfm.protocol.peer import initial_durable
from p2pfm.runtime.settler import Settler
from p2pfm.runtime.store import Store
from p2pfm.settlement import bls, merkle
from p2pfm.settlement.ledger import LeafValue
from p2pfm.settlement.rewards import proposal_message, to_wire
from p2pfm.types import Contribution, Digest, MemberIndex, Millis, PeerId, Round, Wei, Weight, compute_digest

NOTHING = Digest(bytes(32))


@pytest.fixture
def url() -> Iterator[str]:
    with running_chain("anvil") as rpc_url:
        yield rpc_url


def make_settler(world: World, store: Store, emit: Callable[[AnyEvent], Awaitable[None]]) -> Settler:
    config = NetworkConfig("n", Millis(0), "none", "00" * 32, world.chain)
    return Settler(PEERS[1], config, world.ledgers[1], store, emit, auto_claim=False)


async def ignore(event: AnyEvent) -> None:
    pass


def certify(world: World, round: int, prev_root: Digest, contribution: int) -> Certificate:
    """A round that pays nothing, signed by all four."""
    leaves = tuple(LeafValue(Wei(0), Wei(0), contribution) for _ in range(4))
    proposal = Proposal(
        round=Round(round),
        proposer=MemberIndex(0),
        epoch=1,
        nonce=0,
        base=NOTHING,
        new_base=NOTHING,
        prev_root=prev_root,
        root=merkle.compute_root(leaves).digest,
        updates=(),
        reveals=(),
        leaves=to_wire(leaves),
    )
    message = proposal_message(world.chain, proposal)
    signature = bls.aggregate([bls.sign(secret, message) for secret in SECRETS[1:5]])
    return Certificate(proposal, (), signature)


@pytest.mark.skipif("anvil" not in IMPLEMENTATIONS, reason="anvil is not installed (npm)")
def test_what_was_settled_in_replaced_blocks_is_settled_again(url: str, tmp_path: Path) -> None:
    world = chain_world(url).found(4)
    first = certify(world, 0, NOTHING, 0)
    second = certify(world, 2, first.proposal.root, 7)
    events: list[AnyEvent] = []

    async def emit(event: AnyEvent) -> None:
        events.append(event)

    async def main() -> None:
        with Store(tmp_path) as store:
            settler = make_settler(world, store, emit)
            await settler.refresh()
            for certificate in (first, second):
                store.save_durable(msgspec.structs.replace(initial_durable(NOTHING), head=certificate))
                await settler.queue(certificate, 0)
            kept = int(rpc(url, "eth_blockNumber"), 16)
            await settler._settle()
            assert [settled.round for settled in world.any.get_rounds(Round(0))] == [0, 2]
            rpc(url, "anvil_reorg", int(rpc(url, "eth_blockNumber"), 16) - kept, [])
            await settler.refresh()
            assert world.any.get_head() is None, "both stood in blocks that are gone"
            assert events[-1] == SettledChanged(None)
            for _ in range(2):
                await settler._settle()
            rounds = world.any.get_rounds(Round(0))
            assert [(settled.round, settled.root) for settled in rounds] == [
                (0, first.proposal.root),
                (2, second.proposal.root),
            ]
            assert store.get_settlements() == ()

    trio.run(main)


def test_a_certificate_whose_root_is_of_other_leaves_is_dropped_and_settlement_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = memory_world().found(4)
    good = certify(world, 3, NOTHING, 0)
    false_root = msgspec.structs.replace(good.proposal, round=Round(1), root=Digest(b"\x01" * 32))

    async def main() -> None:
        with Store(tmp_path) as store:
            settler = make_settler(world, store, ignore)
            await settler.queue(msgspec.structs.replace(good, proposal=false_root), 0)
            await settler.queue(good, 0)
            await settler.refresh()
            for _ in range(2):
                await settler._settle()
            assert store.get_settlements() == ()

    trio.run(main)
    assert [settled.round for settled in world.any.get_rounds(Round(0))] == [3]
    assert sum("round 1: dropped" in line for line in caplog.messages) == 1


def claim(world: World, folder: Path, data: bytes, num_times: int = 1) -> None:
    """A node that holds `data` looks at the chain once and then at what it is owed."""

    async def main() -> None:
        with Store(folder) as store:
            store.put(data)
            settler = make_settler(world, store, ignore)
            await settler.refresh()
            for _ in range(num_times):
                await settler._claim()

    trio.run(main)


@pytest.mark.parametrize(
    "data",
    [b"nonsense", encode(Presence(PEERS[1], (), 0, 1, 1, 1)), None],
    ids=["nonsense", "presence", "other leaves"],
)
def test_data_that_are_not_of_the_root_are_claimed_by_once_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes | None
) -> None:
    world = memory_world().found(4)
    data = encode(certify(world, 2, NOTHING, 5).proposal) if data is None else data
    world.settle(0)
    world.settle(1, [1, 0, 0, 0], data_digest=compute_digest(data))
    world.advance(PARAMS.challenge_window_s)

    claim(world, tmp_path, data, num_times=2)
    assert sum("no claim by it" in line for line in caplog.messages) == 1


def test_data_of_any_size_that_the_chain_names_are_claimed_by(tmp_path: Path) -> None:
    """Of 16,000 members they are over the size of a message."""
    world = memory_world().found(4)
    world.submission(1, [1, 0, 0, 0])
    updates = tuple(
        IncludedUpdate(PeerId("p" * 128), MemberIndex(0), NOTHING, Contribution(0), Weight(0)) for _ in range(4096)
    )
    reveals = tuple(
        ScoreReveal(Round(1), MemberIndex(0), NOTHING, tuple(Score(NOTHING, Contribution(0)) for _ in range(4096)))
        for _ in range(4)
    )
    proposal = msgspec.structs.replace(
        certify(world, 1, NOTHING, 0).proposal, leaves=to_wire(world.leaves), updates=updates, reveals=reveals
    )
    data = encode(proposal)
    assert len(data) > 1_000_000
    world.settle(1, [1, 0, 0, 0], data_digest=compute_digest(data))
    world.advance(PARAMS.challenge_window_s)

    claim(world, tmp_path, data)
    assert world.any.get_claimed(MemberIndex(0)) == world.leaves[0].cumulative_wei > 0


def test_a_round_that_the_contract_has_no_number_for_is_refused_and_not_fatal() -> None:
    with running_chain("embedded") as url:
        world = chain_world(url).found(4)
        with pytest.raises(Reverted, match="BadRound"):
            world.ledgers[1].submit_round(world.sign(msgspec.structs.replace(world.submission(0), round=Round(2**50))))
