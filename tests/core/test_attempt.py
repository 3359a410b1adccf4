from collections.abc import AsyncGenerator

import pytest
import trio
import trio.testing

from p2pfm.errors import PeerUnreachable
from p2pfm.messages import GenerateRequest, TokenChunk
from p2pfm.runtime.attempt import Attempt, Deadlines, Stalled
from p2pfm.serving.routing import AdaptiveDeadline, ReplicaTable
from p2pfm.serving.session import Session, Vocabulary
from p2pfm.types import Digest, PeerId

DEADLINE_S = 2.0


async def silence() -> AsyncGenerator[TokenChunk, None]:
    await trio.sleep_forever()
    yield TokenChunk(0, (), "")


@pytest.mark.parametrize(("passes_s", "is_ours"), [(DEADLINE_S + 0.1, False), (DEADLINE_S + 60, True)])
def test_a_deadline_that_passed_while_this_node_slept_is_no_fault_of_the_replica(
    passes_s: float, is_ours: bool
) -> None:
    clock = trio.testing.MockClock()

    async def main() -> None:
        request = GenerateRequest(Digest(b"v" * 32), (1,), (), 8, 0, 1000, 0, 0)
        session = Session(request, Vocabulary(10, frozenset(), 100))
        waits = AdaptiveDeadline(1000 * DEADLINE_S, 1000 * DEADLINE_S)
        attempt = Attempt(PeerId("a"), session, request, silence(), Deadlines(waits, waits), ReplicaTable())

        async def receive() -> None:
            with pytest.raises(PeerUnreachable) as caught:
                await attempt.receive()
            assert isinstance(caught.value, Stalled) == is_ours
            await attempt.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            clock.jump(passes_s)

    trio.run(main, clock=clock)
