"""A node's two sides of serving: the replica that generates, and the gateway that keeps every client's stream alive.

Knows no HTTP and no libp2p: other peers' replicas come through `ReplicaTransport`. All that must survive a failure is
in `serving.session`; replicas keep nothing worth saving.
"""

import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Protocol

import trio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from p2pfm.config import ServingConfig
from p2pfm.errors import PeerUnreachable, Reject, WorldError
from p2pfm.lora.personal import mix
from p2pfm.lora.user_adapter import BACKBONE_VERSION
from p2pfm.messages import GenerateRequest, Presence, TokenChunk, TokenLogprobs
from p2pfm.runtime.attempt import Attempt, Deadlines, NewTokens, Refused, Stalled
from p2pfm.runtime.backend import Backend, BackendFailed
from p2pfm.serving.recheck import Answer
from p2pfm.serving.routing import AdaptiveDeadline, FirstTokens, HedgeBudget, Pace, ReplicaTable, choose, smooth
from p2pfm.serving.session import (
    BUSY,
    FAILED,
    INVALID,
    UNKNOWN_VERSION,
    BrokenLogits,
    Finish,
    Session,
    UnknownVersion,
    Vocabulary,
)
from p2pfm.types import DIGEST_BYTES, Digest, Millis, PeerId, Tensors, short

PRESENCE_TTL_MS = Millis(15_000)
"""Life of this node's record: three times the interval, so that two lost messages do not hide it."""

PRESENCE_INTERVAL_MS = Millis(5_000)
"""How often a node should publish `Gateway.presence()`."""

VERSIONS_ANNOUNCED_MAX = 64
"""`Presence.versions` holds no more."""


PRIVATE_NAMES_MAX = 64
"""Names of private adapters remembered, so that no request for one is ever sent to a peer: an hour of merges."""


class UserAdapterSource(Protocol):
    """What of the users' adapters a gateway needs."""

    def names(self) -> Mapping[str, Digest]:
        """By the names that this node's users gave."""
        ...

    def held(self) -> tuple[Digest, ...]:
        """All that lie here, named or not."""
        ...

    def is_known(self, version: Digest) -> bool:
        """It is a user's adapter, and lies here."""
        ...

    def is_loaded(self, version: Digest) -> bool:
        """It is in the engine now."""
        ...

    async def prepare(self, version: Digest, asker: PeerId | None = None) -> None:
        """Return when the engine can serve it. Raises: UnknownVersion, WorldError, or Reject: it is no such adapter."""
        ...


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

    first_floor_ms: float = 3_000
    first_ceiling_ms: float = 30_000
    next_floor_ms: float = 1_000
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
    finish: Finish
    """"" while more come, else "stop" or "length"."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One a token, where they were asked for."""


class Gateway:
    """Serves this node's clients from any replica, and other peers' gateways from the local engine."""

    def __init__(
        self,
        local: PeerId,
        config: ServingConfig,
        engine: Backend | None,
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
        self.on_answer: list[Callable[[Answer], None]] = []
        """Told of every answer when it ends or is given up: who made which token."""
        self.adapters: UserAdapterSource | None = None
        """Where users' own adapters come from; None: nobody can ask for one."""
        self._config = config
        self._engine = engine
        self._transport = transport
        self._now_ms = now_ms
        self._patience = patience
        self._deadlines = Deadlines(
            AdaptiveDeadline(patience.first_floor_ms, patience.first_ceiling_ms),
            AdaptiveDeadline(patience.next_floor_ms, patience.next_ceiling_ms),
        )
        self._first_tokens = FirstTokens()
        self._hedges = HedgeBudget()
        self._num_waiting = 0
        self._connected: frozenset[PeerId] = frozenset()
        self._speed: float | None = None
        self._base: Digest | None = None
        self._base_tensors: Tensors | None = None
        self._private: tuple[Tensors, float] | None = None
        self._private_names: deque[Digest] = deque(maxlen=PRIVATE_NAMES_MAX)  # newest last
        self._mixing = trio.Lock()  # a base and a private adapter may come at once: the last mix is of the newest two
        self._num_sessions = 0
        self._sequence = 0
        self._metrics = _Metrics(registry)

    # --- what the node tells it ---------------------------------------------------------------------------------------

    async def adopt(self, version: Digest, tensors: Tensors) -> None:
        """`version` is the newest certified base. Running streams keep the version that they began with.

        Raises:
            Reject: `tensors` are not this network's adapter.
        """
        if self._engine is not None:
            await self._engine.add_version(version, tensors)
        self._base, self._base_tensors = version, tensors
        self.table.on_presence(self.local, self.presence(), self._now_ms())  # what it served before may be gone
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
            own = None if self._engine is None else self._engine.own
            if own is None or self._base_tensors is None or self._private is None:
                return
            name = Digest(secrets.token_bytes(DIGEST_BYTES))
            mixed = await trio.to_thread.run_sync(mix, self._base_tensors, *self._private)
            await own.add_private(name, mixed)
            self._private_names.append(name)

    def on_presence(self, author: PeerId, record: Presence) -> bool:
        """Another peer's signed record came by gossip. False: old, or no room. Raises: Reject, if it is not its own."""
        return author != self.local and self.table.on_presence(author, record, self._now_ms())

    def on_connected(self, peers: Collection[PeerId]) -> None:
        """Peers that this node is connected with now: who was and is not seems dead until it speaks again."""
        for peer in self._connected.difference(peers):
            self.table.on_gone(peer)
        self._connected = frozenset(peers)

    def live_gateways(self) -> tuple[PeerId, ...]:
        """Nodes that seem to live; this one may be among them."""
        now_ms = self._now_ms()
        live = self.table.live(now_ms)
        return tuple(state.record.peer for state in live if not state.is_stale(now_ms))

    def presence(self) -> Presence:
        """This node's record, to be signed and gossiped every PRESENCE_INTERVAL_MS and after each `adopt`.

        Its sequence is the wall clock (or one more than the last), so that it grows over restarts.
        """
        self._sequence = max(self._sequence + 1, self._now_ms())
        versions = self._engine.versions()[:VERSIONS_ANNOUNCED_MAX] if self._engine is not None else ()
        sessions_max = self._config.sessions_max if self._engine is not None else 0
        speed_milli = round(1000 * (self._speed or 0))
        return Presence(
            self.local,
            versions,
            self._num_sessions,
            sessions_max,
            PRESENCE_TTL_MS,
            self._sequence,
            self._num_waiting,
            speed_milli,
        )

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

    async def serve(self, request: GenerateRequest, asker: PeerId | None = None) -> AsyncGenerator[TokenChunk, None]:
        """Continue another peer's stream: empty chunks while the local engine reads, then one token each.

        Whoever iterates must close it (`aclosing`); then the work stops within a step. Ends in one chunk with a refusal
        (`serving.session.REFUSALS`) if it cannot serve. A private adapter is refused as one that does not exist. A
        user's adapter that is not here is fetched first, from `asker` before others.
        """
        async with aclosing(self._prepare_and_replicate(request, asker, is_local=False)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _prepare_and_replicate(
        self, request: GenerateRequest, asker: PeerId | None, *, is_local: bool
    ) -> AsyncGenerator[TokenChunk, None]:
        refusal = await self.prepare(request.version, asker)
        if refusal:
            yield TokenChunk(len(request.emitted), (), refusal)
            return
        async with aclosing(self._replicate(request, is_local=is_local)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def prepare(self, version: Digest, asker: PeerId | None) -> str:
        """Have a user's adapter in the engine, for a stream or a check. Returns the refusal, or "": it may be asked.

        `asker`: the peer that wants it; None: this node itself.
        """
        if self.adapters is None or self._engine is None or self.is_private(version):
            return ""
        if version in self._engine.versions():
            return ""
        if self._engine.own is None:
            return UNKNOWN_VERSION
        try:
            await self.adapters.prepare(version, asker)
        except (UnknownVersion, WorldError):
            return UNKNOWN_VERSION
        except Reject:
            return INVALID
        return ""

    async def _replicate(self, request: GenerateRequest, *, is_local: bool) -> AsyncGenerator[TokenChunk, None]:
        """`_generate`, measured for this node's record: who waits for a first token, and how fast the others come."""
        pace, first_s = Pace(), None
        self._num_waiting += 1
        try:
            async with aclosing(self._generate(request, is_local=is_local)) as chunks:
                asked_s = trio.current_time()
                async for chunk in chunks:
                    pace.on_tokens(len(chunk.tokens), trio.current_time() - asked_s)
                    if first_s is None and (chunk.tokens or chunk.finish):
                        first_s = trio.current_time()
                        self._num_waiting -= 1
                    yield chunk
                    asked_s = trio.current_time()
        finally:
            if first_s is None:
                self._num_waiting -= 1
            elif (speed := pace.compute_speed(trio.current_time() - first_s)) is not None:
                self._speed = smooth(self._speed, speed)

    async def _generate(self, request: GenerateRequest, *, is_local: bool) -> AsyncGenerator[TokenChunk, None]:
        position = len(request.emitted)
        if self._engine is None or self._num_sessions >= self._config.sessions_max:
            yield TokenChunk(position, (), BUSY)
            return
        self._num_sessions += 1
        self._metrics.sessions.set(self._num_sessions)
        try:
            async with aclosing(self._engine.generate(request, is_local=is_local)) as chunks:
                async for chunk in chunks:
                    position = chunk.position + len(chunk.tokens)
                    self._metrics.generated.inc(len(chunk.tokens))
                    yield chunk
        except UnknownVersion:
            yield TokenChunk(position, (), UNKNOWN_VERSION)
        except Reject:
            yield TokenChunk(position, (), INVALID)
        except BrokenLogits:  # of a user's adapter that is its user's fault, no replica's
            yield TokenChunk(position, (), INVALID if self.is_users(request.version) else FAILED)
        except BackendFailed:
            yield TokenChunk(position, (), FAILED)
        finally:
            self._num_sessions -= 1
            self._metrics.sessions.set(self._num_sessions)

    # --- the gateway's side -------------------------------------------------------------------------------------------

    async def complete(self, request: GenerateRequest, client: str = "") -> AsyncGenerator[Tokens, None]:
        """Tokens of `request`, each position once, from as many replicas as it takes. Close it to cancel.

        `client`: the name of the API key that asks, for receipts.

        Raises:
            Reject: the request cannot be served by any replica (tokens, limits).
            Busy: nothing generated yet, and every replica is at its bound.
            NoReplica: no replica of this version answers.
        """
        answer = Answer(request, client=client)
        try:
            async with aclosing(self._complete(request)) as pieces:
                async for piece in pieces:
                    answer.add(piece.tokens, piece.replica, piece.logprobs)
                    yield piece
        finally:
            for hear in self.on_answer:
                hear(answer)

    async def _complete(self, request: GenerateRequest) -> AsyncGenerator[Tokens, None]:
        session = Session(request, self.vocabulary)
        await self._find_users(session.version)
        self._hedges.on_stream()
        num_replaced = 0
        can_hedge = session.version not in self._private_names
        tried: dict[PeerId, str] = {}
        """Refusals and failures since the last pause."""
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
            race = _Race(peer, can_hedge)
            attempt = await self._run_race(session, race, tried)
            can_hedge = can_hedge and not race.is_hedged
            num_replaced += race.num_failed
            if attempt is None:
                continue
            new = race.first
            try:
                while new is not None:
                    idle_since = trio.current_time()
                    retry_ms = self._patience.retry_ms
                    yield Tokens(new[0], attempt.peer, session.version, num_replaced, session.finish, new[1])
                    new = None if session.finish else await attempt.receive()
            except Refused as refusal:
                tried[attempt.peer] = refusal.reason
            except (Reject, PeerUnreachable) as error:
                self._on_failure(attempt.peer, error, tried)
                num_replaced += 1
            finally:
                await attempt.close()

    async def _run_race(self, session: Session, race: "_Race", tried: dict[PeerId, str]) -> Attempt | None:
        """The attempt that gave the first tokens (`race.first`); None: all failed, which `tried` tells.

        Asks a second replica when the first token is late. The slower one is cancelled, without blame.
        """
        started_s = trio.current_time()
        running = {race.peer}
        winner: Attempt | None = None
        try:
            async with trio.open_nursery() as nursery:

                async def run(peer: PeerId) -> None:
                    nonlocal winner
                    attempt = self._open(peer, session)
                    try:
                        new = await attempt.receive(lambda: winner is not None)
                        if new is not None:
                            winner, race.first = attempt, new
                    except Refused as refusal:
                        tried[peer] = refusal.reason
                    except (Reject, PeerUnreachable) as error:
                        self._on_failure(peer, error, tried)
                        race.num_failed += 1
                    finally:
                        running.discard(peer)
                        if winner is not attempt:
                            await attempt.close()
                    if winner is attempt or not running:
                        nursery.cancel_scope.cancel()

                async def hedge() -> None:
                    await trio.sleep(self._first_tokens.late_ms() / 1000)
                    second = self._choose(session, {*tried, race.peer}, is_free=True)
                    if second is not None and self._hedges.take():
                        self._metrics.hedged.inc()
                        race.is_hedged = True
                        running.add(second)
                        nursery.start_soon(run, second)

                nursery.start_soon(run, race.peer)
                if race.can_hedge:
                    nursery.start_soon(hedge)
        except BaseException:
            if winner is not None:  # cancelled in the very moment
                await winner.close()
            raise
        if winner is not None and not winner.request.emitted:
            wait_ms = (trio.current_time() - started_s) * 1000
            self._metrics.first_token.observe(wait_ms / 1000)
            self._first_tokens.on_first_token(wait_ms)
        return winner

    def _open(self, peer: PeerId, session: Session) -> Attempt:
        request = session.resume_request()
        is_local = peer == self.local
        chunks = (
            self._prepare_and_replicate(request, None, is_local=True)
            if is_local
            else self._transport.generate(peer, request)
        )
        return Attempt(peer, session, request, chunks, None if is_local else self._deadlines, self.table)

    def _on_failure(self, peer: PeerId, error: Exception, tried: dict[PeerId, str]) -> None:
        if isinstance(error, Stalled):  # an error of ours: it is asked again like any other
            return
        self.table.on_failure(peer, self._now_ms())
        if isinstance(error, PeerUnreachable):
            self.table.on_gone(peer)  # asked last until it speaks again: a frozen one does not
        self._metrics.replaced.inc()
        tried[peer] = str(error)

    def is_private(self, version: Digest) -> bool:
        """Whether it exists for this node's own clients only, so that no other node may hear of its streams."""
        return version in self._private_names

    async def _find_users(self, version: Digest) -> None:
        """Have a user's adapter that nobody announces: a stream may come from another gateway that held it.

        One that lies here is not loaded for that: it may be warm at another replica.
        """
        if self.adapters is None or self.is_private(version) or self.is_users(version) or version in self.versions():
            return
        with suppress(Reject, WorldError):  # without it no replica is found, which says so
            await self.adapters.prepare(version)

    def is_users(self, version: Digest) -> bool:
        """Whether it is a user's own adapter, and lies here."""
        return self.adapters is not None and self.adapters.is_known(version)

    def to_announced(self, version: Digest) -> Digest:
        """What a replica that can serve or check `version` announces.

        That is `version` itself, but for a user's adapter the bare backbone: it is fetched where it is not.
        """
        return BACKBONE_VERSION if self.is_users(version) else version

    def _choose(self, session: Session, tried: Collection[PeerId], *, is_free: bool = False) -> PeerId | None:
        """The best replica that was not tried; with `is_free` none that is full or has just failed."""
        if session.version in self._private_names:  # whatever others announce: its prompts go nowhere else
            return None if self.local in tried else self.local
        now_ms = self._now_ms()
        self.table.on_presence(self.local, self.presence(), now_ms)
        live = self.table.live(now_ms)
        if is_free:
            live = tuple(
                state for state in live if not (state.is_full() or state.is_stale(now_ms) or state.is_paused(now_ms))
            )
        version = self.to_announced(session.version)
        is_warm = self.adapters is None or version == session.version or self.adapters.is_loaded(session.version)
        candidates = choose(
            live, version, self.local, self._config.local, now_ms, frozenset(tried), is_local_warm=is_warm
        )
        return candidates[0] if candidates else None

    def _check_hope(self, session: Session, tried: dict[PeerId, str], idle_s: float) -> None:
        """Raise unless it makes sense to wait for a replica."""
        name = session.version.hex()[:16]
        if self.is_users(session.version) and INVALID in tried.values():
            raise Reject(f"the adapter {name} gives no numbers on this text, or does not fit the backbone")
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


@dataclass(slots=True)
class _Race:
    """Up to the first token of a stream, or of its continuation: who is asked first, and how it went."""

    peer: PeerId
    can_hedge: bool
    first: NewTokens | None = None
    is_hedged: bool = False
    num_failed: int = 0


class _Metrics:
    """What /metrics tells about serving."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.sessions = Gauge("p2pfm_sessions", "Streams that the local engine generates now", registry=registry)
        self.generated = Counter("p2pfm_generated_tokens", "Tokens generated by the local engine", registry=registry)
        self.hedged = Counter("p2pfm_hedged_streams", "Streams asked of a second replica", registry=registry)
        self.replaced = Counter("p2pfm_replaced_replicas", "Replicas replaced in mid-stream", registry=registry)
        self.first_token = Histogram("p2pfm_first_token_seconds", "Wait for a stream's first token", registry=registry)
