"""Who draws the next committee: any member may, one draw an epoch is enough."""

from contextlib import ExitStack
from pathlib import Path

import msgspec
import trio
from ledger_worlds import PARAMS, PEERS, memory_world
from trio.testing import MockClock

from p2pfm.config import NetworkConfig, ScoringConfig, SettlementConfig
from p2pfm.protocol.events import AnyEvent
from p2pfm.protocol.phases import compute_round_start
from p2pfm.runtime.settler import Settler
from p2pfm.runtime.store import Store
from p2pfm.types import Millis, Round

QUIET_S = 3600
"""Longer than any member's turn takes to come."""
NUM_MEMBERS = PARAMS.committee_size + 1


def test_one_draw_an_epoch_is_enough_however_many_members_could(tmp_path: Path) -> None:
    """A second one would outdate what the first one's predecessor certifies right now."""
    world = memory_world(msgspec.structs.replace(PARAMS, rotation_s=0)).found(NUM_MEMBERS)
    config = NetworkConfig(
        "n",
        Millis(0),
        "none",
        "00" * 32,
        world.chain,
        scoring=ScoringConfig(committee_size=PARAMS.committee_size),
        settlement=SettlementConfig(rounds_per_epoch=PARAMS.rounds_per_epoch),
    )

    async def emit(event: AnyEvent) -> None:
        pass

    def make_settler(stack: ExitStack, member: int, name: str) -> Settler:
        store = stack.enter_context(Store(tmp_path / name))
        ledger = world.ledgers[member]
        return Settler(PEERS[member], config, ledger, store, emit, auto_claim=False, now_ms=lambda: now_ms)

    async def everybody_looks(settlers: list[Settler]) -> None:
        await trio.sleep(QUIET_S)
        for settler in settlers:
            await settler.refresh()
            await settler._rotate()

    now_ms = Millis(0)

    async def main() -> None:
        nonlocal now_ms
        with ExitStack() as stack:
            settlers = [make_settler(stack, member, f"{member}") for member in range(1, NUM_MEMBERS + 1)]
            for settler in settlers:
                await settler.refresh()
            for epoch in (1, 2):
                world.settle(epoch * PARAMS.rounds_per_epoch)
                now_ms = compute_round_start(config, Round(epoch * PARAMS.rounds_per_epoch + 1))
                before = world.any.get_roster().epoch
                for _ in range(3):
                    await everybody_looks(settlers)
                assert world.any.get_roster().epoch == before + 1
            now_ms = compute_round_start(config, Round(2 * PARAMS.rounds_per_epoch + 2))
            restarted = make_settler(stack, 1, "restarted")
            for _ in range(2):  # its turn comes a while after it first saw the committee
                await everybody_looks([restarted])
            assert world.any.get_roster().epoch == before + 1, "who restarts does not know whether it drew"

    trio.run(main, clock=MockClock(autojump_threshold=0.2))
