"""One replica's try to go on with a stream: its chunks within deadlines, and what they tell of the replica.

Knows trio, and no other replica: which are asked, and what becomes of a failure, is the gateway's.
"""

from collections.abc import AsyncGenerator, Callable

import trio

from p2pfm.errors import PeerUnreachable, Reject
from p2pfm.messages import GenerateRequest, TokenChunk, TokenLogprobs
from p2pfm.serving.routing import AdaptiveDeadline, Pace, ReplicaTable
from p2pfm.serving.session import FAILED, REFUSALS, Session
from p2pfm.types import PeerId

NewTokens = tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]


class Refused(Exception):
    """A replica declined: busy, version gone, or it finds the request impossible. Its good right: no blame."""

    def __init__(self, reason: str) -> None:
        """`reason`: as the replica gave it."""
        super().__init__(reason)
        self.reason = reason


STALL_S = 0.5
"""A deadline that is noticed so much too late was missed by this node itself, which was stopped or asleep."""


class Stalled(PeerUnreachable):
    """This node did not run while it waited: nothing is known of the replica."""


class Deadlines:
    """How long a replica may leave a stream waiting, learnt from all of them: for the first chunk, and between two."""

    def __init__(self, first: AdaptiveDeadline, following: AdaptiveDeadline) -> None:
        """Shared by all attempts of a gateway."""
        self.first, self.following = first, following


class Attempt:
    """Reads one replica's chunks into a session. May pass from task to task; `close` it."""

    def __init__(
        self,
        peer: PeerId,
        session: Session,
        request: GenerateRequest,
        chunks: AsyncGenerator[TokenChunk, None],
        deadlines: Deadlines | None,
        table: ReplicaTable,
    ) -> None:
        """`chunks`: its answer to `request`; `deadlines` None: the local engine, which freezes only with ourselves."""
        self.peer, self.request = peer, request
        self._session, self._chunks, self._deadlines, self._table = session, chunks, deadlines, table
        self._started_s = trio.current_time()
        self._first_s: float | None = None
        self._pace = Pace()
        self._num_empty_left = len(request.prompt) + len(request.emitted) + 1
        table.on_started(peer)

    async def receive(self, is_beaten: Callable[[], bool] = lambda: False) -> NewTokens | None:
        """The next new tokens, taken into the session; None once another attempt was faster (`is_beaten`).

        Raises:
            Refused: the replica cannot take it now.
            Reject: nonsense.
            PeerUnreachable: dead or frozen.
        """
        started_s = trio.current_time()
        while True:
            chunk = await self._next_chunk()
            if is_beaten():
                return None
            if chunk.finish == FAILED:
                raise Reject("the replica broke while it generated")
            if chunk.finish in REFUSALS:
                raise Refused(chunk.finish)
            new = self._session.on_chunk(chunk)
            if new:
                self._on_tokens(len(new), trio.current_time() - started_s)
                return new, chunk.logprobs[-len(new) :]
            self._num_empty_left -= 1
            if self._num_empty_left < 0:
                raise Reject("expected tokens, got only signs of life")

    async def close(self) -> None:
        """End it, whatever it still does; the replica stops within a step."""
        self._table.on_ended(self.peer)
        if self._first_s is not None:
            speed = self._pace.compute_speed(trio.current_time() - self._first_s)
            if speed is not None:
                self._table.on_speed(self.peer, speed)
        await self._chunks.aclose()

    def _on_tokens(self, num_tokens: int, wait_s: float) -> None:
        self._pace.on_tokens(num_tokens, wait_s)
        if self._first_s is None:
            self._first_s = trio.current_time()
            # a resumed stream reads more than a prompt: no fair measure of the replica
            latency_ms = None if self.request.emitted else (self._first_s - self._started_s) * 1000
            self._table.on_first_token(self.peer, latency_ms)

    async def _next_chunk(self) -> TokenChunk:
        """Within the adaptive deadline."""
        if self._deadlines is None:
            return await self._read()
        waits = self._deadlines.first if self._first_s is None else self._deadlines.following
        started_s, deadline_ms = trio.current_time(), waits.deadline_ms()
        with trio.move_on_after(deadline_ms / 1000):
            chunk = await self._read()
            waits.on_wait((trio.current_time() - started_s) * 1000)
            return chunk
        if trio.current_time() > started_s + deadline_ms / 1000 + STALL_S:
            raise Stalled("this node was not running while it waited")
        waits.on_wait(2 * deadline_ms)
        raise PeerUnreachable(f"the replica gave nothing for {deadline_ms:.0f} ms")

    async def _read(self) -> TokenChunk:
        try:
            return await anext(self._chunks)
        except StopAsyncIteration:
            raise PeerUnreachable("the replica closed the stream before its end") from None
