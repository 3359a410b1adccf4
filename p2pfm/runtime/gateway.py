"""A node's two sides of serving: the replica that generates, and the gateway that keeps every client's stream alive.

Knows no HTTP and no libp2p: other peers' replicas come through `ReplicaTransport`. All that must survive a failure is
in `serving.session`; replicas keep nothing worth saving.
"""

import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import trio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from p2pfm.config import ServingConfig
from p2pfm.errors import PeerUnreachable, Reject, WorldError
from p2pfm.lora.personal import mix
from p2pfm.messages import GenerateRequest, Presence, TokenChunk
from p2pfm.serving.routing import AdaptiveDeadline, ReplicaTable, choose
from p2pfm.serving.session import (
    BUSY,
    FAILED,
    INVALID,
    REFUSALS,
    UNKNOWN_VERSION,
    BrokenLogits,
    Session,
    UnknownVersion,
    Vocabulary,
)
from p2pfm.types import DIGEST_BYTES, Digest, Millis, PeerId, Tensors, short

if TYPE_CHECKING:  # a node that serves nothing starts without torch
    from p2pfm.runtime.engine import Engine

PRESENCE_TTL_MS = Millis(15_000)
"""Life of this node's record: three times the interval, so that two lost messages do not hide it."""

PRESENCE_INTERVAL_MS = Millis(5_000)
"""How often a node should publish `Gateway.presence()`."""

VERSIONS_ANNOUNCED_MAX = 64
"""`Presence.versions` holds no more."""


PRIVATE_NAMES_MAX = 64
"""Names of private adapters remembered, so that no request for one is ever sent to a peer: an hour of merges."""


class NoReplica(WorldError):
    """No replica of the version answered within the gateway's patience."""


class Busy(WorldError):
    """Every replica of the version has all its sessions taken; ask again later."""


class ReplicaTransport(Protocol):
    """Streaming requests to other peers' replicas; the node implements it on libp2p."""

    def generate(self, peer: PeerId, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Send `request` to `peer`, yield its chunks as they come, end when it closes the stream.

        The gateway cancels a waiting `anext` when its deadline passes and always calls `aclose`, which must reset the
        stream so that the replica stops working. The generator may not hold a nursery or a cancel scope across a
        `yield` (the gateway enters one around each `anext`).

        Raises:
            PeerUnreachable: no connection, or it broke.
            Reject: the peer's bytes are not a chunk.
        """
        ...


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the gateway waits [ms]: for a stream's first token, for each next one, and for any replica at all."""

    first_floor_ms: float = 5_000
    first_ceiling_ms: float = 30_000
    next_floor_ms: float = 2_000
    next_ceiling_ms: float = 15_000
    retry_ms: float = 200
    retry_ms_max: float = 2_000
    replica_ms: float = 30_000


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of a stream, who made them with which adapter, and how many replicas failed before."""

    tokens: tuple[int, ...]
    replica: PeerId
    version: Digest
    num_replaced: int
    finish: str
    """"" while more come, else "stop" or "length"."""


class Gateway:
    """Serves this node's clients from any replica, and other peers' gateways from the local engine."""

    def __init__(
        self,
        local: PeerId,
        config: ServingConfig,
        engine: "Engine | None",
        vocabulary: Vocabulary,
        transport: ReplicaTransport,
        registry: CollectorRegistry,
        now_ms: Callable[[], Millis],
        patience: Patience = Patience(),
    ) -> None:
        """`engine` None: this node only routes (`serving.enabled` false). `now_ms`: the wall clock."""
        self.local = local
        self.vocabulary = vocabulary
        self.table = ReplicaTable()
        self._config = config
        self._engine = engine
        self._transport = transport
        self._now_ms = now_ms
        self._patience = patience
        self._first = AdaptiveDeadline(patience.first_floor_ms, patience.first_ceiling_ms)
        self._next = AdaptiveDeadline(patience.next_floor_ms, patience.next_ceiling_ms)
        self._base: Digest | None = None
        self._base_tensors: Tensors | None = None
        self._private: tuple[Tensors, float] | None = None
        self._private_names: deque[Digest] = deque(maxlen=PRIVATE_NAMES_MAX)  # newest last
        self._mixing = trio.Lock()  # a base and a private adapter may come at once: the last mix is of the newest two
        self._num_sessions = 0
        self._sequence = 0
        # one step at a time, in the order of asking: sessions take turns at the one backbone
        self._turns = trio.CapacityLimiter(1)
        self._metrics = _Metrics(registry)

    # --- what the node tells it ---------------------------------------------------------------------------------------

    async def adopt(self, version: Digest, tensors: Tensors) -> None:
        """`version` is the newest certified base. Running streams keep the version that they began with.

        Raises:
            Reject: `tensors` are not this network's adapter.
        """
        if self._engine is not None:
            await trio.to_thread.run_sync(self._engine.add_version, version, tensors)
        self._base, self._base_tensors = version, tensors
        await self._mix()

    async def adopt_private(self, private: Tensors, weight: float) -> None:
        """From now on this node's own clients may ask for base + weight * private, on this base and those to come.

        It is never announced, and `serve` knows nothing of it. Each mix gets a random name: a digest of its tensors
        would let others check guesses.
        """
        self._private = private, weight
        await self._mix()

    async def _mix(self) -> None:
        async with self._mixing:
            if self._engine is None or self._base_tensors is None or self._private is None:
                return
            name = Digest(secrets.token_bytes(DIGEST_BYTES))
            mixed = await trio.to_thread.run_sync(mix, self._base_tensors, *self._private)
            self._engine.add_private(name, mixed)
            self._private_names.append(name)

    def on_presence(self, author: PeerId, record: Presence) -> bool:
        """Another peer's signed record came by gossip. False: old, or no room. Raises: Reject, if it is not its own."""
        return author != self.local and self.table.on_presence(author, record, self._now_ms())

    def presence(self) -> Presence:
        """This node's record, to be signed and gossiped every PRESENCE_INTERVAL_MS and after each `adopt`.

        Its sequence is the wall clock (or one more than the last), so that it grows over restarts.
        """
        self._sequence = max(self._sequence + 1, self._now_ms())
        versions = self._engine.versions()[:VERSIONS_ANNOUNCED_MAX] if self._engine is not None else ()
        sessions_max = self._config.sessions_max if self._engine is not None else 0
        return Presence(self.local, versions, self._num_sessions, sessions_max, PRESENCE_TTL_MS, self._sequence)

    # --- what people ask ----------------------------------------------------------------------------------------------

    @property
    def base(self) -> Digest | None:
        """The newest certified base that this node has adopted."""
        return self._base

    @property
    def base_tensors(self) -> Tensors | None:
        """Its tensors."""
        return self._base_tensors

    @property
    def private(self) -> Digest | None:
        """What the newest private adapter on the newest base is called here; it means nothing to anyone else."""
        return self._private_names[-1] if self._private_names else None

    @property
    def num_sessions(self) -> int:
        """Streams that the local engine generates now."""
        return self._num_sessions

    def versions(self) -> tuple[Digest, ...]:
        """Versions that can be asked for now: the base, this node's others (newest first), then the other peers'."""
        held = self._engine.versions() if self._engine is not None else ()
        servable = (*held, *self.table.versions(self._now_ms()))
        first = (self._base,) if self._base in servable and self._base is not None else ()
        return tuple(dict.fromkeys((*first, *servable)))

    # --- the replica's side -------------------------------------------------------------------------------------------

    async def serve(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Continue another peer's stream: empty chunks while the local engine reads, then one token each.

        Whoever iterates must close it (`aclosing`); then the work stops within a step. Ends in one chunk with a refusal
        (`serving.session.REFUSALS`) if it cannot serve. A private adapter is refused as one that does not exist.
        """
        async with aclosing(self._generate(request, is_local=False)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _generate(self, request: GenerateRequest, *, is_local: bool) -> AsyncGenerator[TokenChunk, None]:
        position = len(request.emitted)
        if self._engine is None or self._num_sessions >= self._config.sessions_max:
            yield TokenChunk(position, (), BUSY)
            return
        self._num_sessions += 1
        self._metrics.sessions.set(self._num_sessions)
        try:
            stream = self._engine.open(request, is_local=is_local)
            while (chunk := await trio.to_thread.run_sync(stream.step, limiter=self._turns)) is not None:
                position = chunk.position + len(chunk.tokens)
                self._metrics.generated.inc(len(chunk.tokens))
                yield chunk
        except UnknownVersion:
            yield TokenChunk(position, (), UNKNOWN_VERSION)
        except Reject:
            yield TokenChunk(position, (), INVALID)
        except BrokenLogits:
            yield TokenChunk(position, (), FAILED)
        finally:
            self._num_sessions -= 1
            self._metrics.sessions.set(self._num_sessions)

    # --- the gateway's side -------------------------------------------------------------------------------------------

    async def complete(self, request: GenerateRequest) -> AsyncGenerator[Tokens, None]:
        """Tokens of `request`, each position once, from as many replicas as it takes. Close it to cancel.

        Raises:
            Reject: the request cannot be served by any replica (tokens, limits).
            Busy: nothing generated yet, and every replica is at its bound.
            NoReplica: no replica of this version answers.
        """
        session = Session(request, self.vocabulary)
        num_replaced = 0
        tried: dict[PeerId, str] = {}
        retry_ms = self._patience.retry_ms
        idle_since = trio.current_time()
        while not session.finish:
            peer = self._choose(session, tried)
            if peer is None:
                self._check_hope(session, tried, trio.current_time() - idle_since)
                await trio.sleep(retry_ms / 1000)
                retry_ms = min(2 * retry_ms, self._patience.retry_ms_max)
                tried = {}
                continue
            try:
                async with aclosing(self._attempt(peer, session)) as pieces:
                    async for new in pieces:
                        idle_since = trio.current_time()
                        retry_ms = self._patience.retry_ms
                        yield Tokens(new, peer, session.version, num_replaced, session.finish)
            except _Refused as refusal:  # its good right: no blame
                tried[peer] = refusal.reason
            except (Reject, PeerUnreachable) as error:
                self.table.on_failure(peer, self._now_ms())
                self._metrics.replaced.inc()
                tried[peer] = str(error)
                num_replaced += 1

    def _choose(self, session: Session, tried: dict[PeerId, str]) -> PeerId | None:
        if session.version in self._private_names:  # whatever others announce: its prompts go nowhere else
            return None if self.local in tried else self.local
        now_ms = self._now_ms()
        self.table.on_presence(self.local, self.presence(), now_ms)
        candidates = choose(
            self.table.live(now_ms), session.version, self.local, self._config.local, now_ms, tried.keys()
        )
        return candidates[0] if candidates else None

    def _check_hope(self, session: Session, tried: dict[PeerId, str], idle_s: float) -> None:
        """Raise unless it makes sense to wait for a replica."""
        name = session.version.hex()[:16]
        if session.version in self._private_names and tried.get(self.local) == UNKNOWN_VERSION:
            raise NoReplica("this private adapter was replaced by newer ones before its stream began; ask again")
        if not tried and not session.emitted:
            raise NoReplica(
                f"expected a replica of version {name}, none is known here; /v1/models lists what is served"
            )
        if tried and not session.emitted and set(tried.values()) == {BUSY}:
            raise Busy(f"all {len(tried)} replicas of version {name} are busy; try again in a moment")
        if idle_s * 1000 > self._patience.replica_ms:
            reasons = "; ".join(f"{short(peer)}: {reason}" for peer, reason in sorted(tried.items()))
            raise NoReplica(f"no replica of version {name} answered for {idle_s:.0f} s ({reasons or 'none known'})")

    async def _attempt(self, peer: PeerId, session: Session) -> AsyncGenerator[tuple[int, ...], None]:
        """New tokens from one replica, until the session is finished.

        Raises:
            _Refused: the replica cannot take it now.
            Reject: nonsense.
            PeerUnreachable: dead or frozen.
        """
        request = session.resume_request()
        is_local = peer == self.local
        source = self._generate(request, is_local=True) if is_local else self._transport.generate(peer, request)
        started = trio.current_time()
        is_first = True
        num_empty_left = len(request.prompt) + len(request.emitted) + 1
        self.table.on_started(peer)
        try:
            async with aclosing(source) as chunks:
                while not session.finish:
                    chunk = await self._receive(chunks, is_first, is_local)
                    if chunk.finish == FAILED:
                        raise Reject("the replica broke while it generated")
                    if chunk.finish in REFUSALS:
                        raise _Refused(chunk.finish)
                    new = session.on_chunk(chunk)
                    if not new:
                        num_empty_left -= 1
                        if num_empty_left < 0:
                            raise Reject("expected tokens, got only signs of life")
                        continue
                    if is_first:
                        is_first = False
                        latency_ms = (trio.current_time() - started) * 1000
                        self._metrics.first_token.observe(latency_ms / 1000)
                        # a resumed stream reads more than a prompt: no fair measure of the replica
                        self.table.on_first_token(peer, None if request.emitted else latency_ms)
                    yield new
        finally:
            self.table.on_ended(peer)

    async def _receive(self, chunks: AsyncGenerator[TokenChunk, None], is_first: bool, is_local: bool) -> TokenChunk:
        """The next chunk, within the adaptive deadline. The local engine has none: it freezes only with ourselves."""
        waits = self._first if is_first else self._next
        started = trio.current_time()
        deadline_ms = float("inf") if is_local else waits.deadline_ms()
        with trio.move_on_after(deadline_ms / 1000) as scope:
            try:
                chunk = await anext(chunks)
            except StopAsyncIteration:
                raise PeerUnreachable("the replica closed the stream before its end") from None
        if scope.cancelled_caught:
            waits.on_wait(2 * deadline_ms)
            raise PeerUnreachable(f"the replica gave nothing for {deadline_ms:.0f} ms")
        if not is_local:
            waits.on_wait((trio.current_time() - started) * 1000)
        return chunk


class _Refused(Exception):
    """A replica declined: busy, version gone, or it finds the request impossible."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Metrics:
    """What /metrics tells about serving."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.sessions = Gauge("p2pfm_sessions", "Streams that the local engine generates now", registry=registry)
        self.generated = Counter("p2pfm_generated_tokens", "Tokens generated by the local engine", registry=registry)
        self.replaced = Counter("p2pfm_replaced_replicas", "Replicas replaced in mid-stream", registry=registry)
        self.first_token = Histogram("p2pfm_first_token_seconds", "Wait for a stream's first token", registry=registry)
