"""A node's settler when the chain replaces blocks: what was settled in them is settled again, in order."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio
from ledger_worlds import IMPLEMENTATIONS, PEERS, SECRETS, World, chain_world, rpc, running_chain

from p2pfm.config import NetworkConfig
from p2pfm.messages import Certificate, Proposal
from p2pfm.protocol.events import AnyEvent, SettledChanged
from p2pfm.protocol.peer import initial_durable
from p2pfm.runtime.settler import Settler
from p2pfm.runtime.store import Store
from p2pfm.settlement import bls, merkle
from p2pfm.settlement.ledger import LeafValue
from p2pfm.settlement.rewards import proposal_message, to_wire
from p2pfm.types import Digest, MemberIndex, Millis, Round, Wei

pytestmark = pytest.mark.skipif("anvil" not in IMPLEMENTATIONS, reason="anvil is not installed (npm)")
NOTHING = Digest(bytes(32))


@pytest.fixture
def url() -> Iterator[str]:
    with running_chain("anvil") as rpc_url:
        yield rpc_url


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


def test_what_was_settled_in_replaced_blocks_is_settled_again(url: str, tmp_path: Path) -> None:
    world = chain_world(url).found(4)
    first = certify(world, 0, NOTHING, 0)
    second = certify(world, 2, first.proposal.root, 7)
    events: list[AnyEvent] = []

    async def emit(event: AnyEvent) -> None:
        events.append(event)

    async def main() -> None:
        with Store(tmp_path) as store:
            settler = Settler(
                PEERS[1],
                NetworkConfig("n", Millis(0), "none", "00" * 32, world.chain),
                world.ledgers[1],
                store,
                emit,
                auto_claim=False,
            )
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
