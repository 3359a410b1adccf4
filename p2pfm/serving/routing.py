"""Which replica answers a request: records of who serves what, how busy and how fast, and an order over them.

Knows no clock, socket or model. Every gateway decides for itself from signed, short-lived `Presence` records and from
what it measured; there is no elected master and no central list (Petals' routing records, NETWORK and FIELD).
"""

from collections import deque
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from hashlib import sha256
from statistics import median
from typing import Literal

from p2pfm.errors import Reject
from p2pfm.messages import Presence
from p2pfm.types import Digest, Millis, PeerId

Policy = Literal["prefer", "avoid", "only"]
"""This node's own replica: first choice, last choice, or the only one."""

NEVER_MS = Millis(0)

REPLICAS_MAX = 512
"""Records kept, live and expired: a network level has 128 peers, the rest is room for newcomers."""

TTL_MS_MAX = Millis(60_000)
"""No record lives longer, whatever it asks: a dead replica must not be believed for long (Psyche: 90 s)."""

BACKOFF_MS = Millis(1_000)
"""Pause after a replica's first failure; doubles with each further one."""

BACKOFF_MS_MAX = Millis(60_000)
"""The longest pause: a restarted replica comes back into use within a minute."""

LATENCY_UNKNOWN_MS = 200.0
"""Assumed time to the first token before anything was measured [ms]."""

LATENCY_SMOOTHING = 0.3
"""Share of the newest measurement in the moving average."""

DEADLINE_SAMPLES_MAX = 64
"""Waits remembered by an `AdaptiveDeadline`: enough for a steady median, few enough to follow a change."""

DEADLINE_MADS = 8.0
"""Median absolute deviations above the median that count as frozen; normal scatter stays below 5."""


@dataclass(slots=True)
class ReplicaState:
    """One replica as this gateway sees it: its newest record, and what was measured."""

    record: Presence
    expires_ms: Millis
    latency_ms: float | None = None
    """Moving average of the time to its first token; None: never measured."""
    num_failures: int = 0
    """In a row."""
    paused_until_ms: Millis = NEVER_MS
    num_running: int = 0
    """Streams that this gateway has open on it: newer than what its record says."""

    def is_full(self) -> bool:
        """Whether another session would be refused, as far as is known here."""
        return max(self.record.sessions, self.num_running) >= self.record.sessions_max

    def load(self) -> float:
        """Used share of its sessions."""
        return max(self.record.sessions, self.num_running) / max(self.record.sessions_max, 1)


@dataclass(slots=True)
class ReplicaTable:
    """Who serves which adapter version right now. Bounded; deaf to replayed records."""

    replicas_max: int = REPLICAS_MAX
    _states: dict[PeerId, ReplicaState] = field(default_factory=dict)

    def on_presence(self, author: PeerId, record: Presence, now_ms: Millis) -> bool:
        """Take a record in; `author` is who signed it. Returns False if it is old, or the table is full of live ones.

        A record that expired keeps its place while there is room, so that its sequence cannot be replayed.

        Raises:
            Reject: a record that speaks for another peer.
        """
        if record.peer != author:
            raise Reject(f"expected a presence record of its author {author}, got one that speaks for {record.peer}")
        known = self._states.get(record.peer)
        if known is not None and record.sequence <= known.record.sequence:
            return False
        expires_ms = Millis(now_ms + min(record.ttl_ms, TTL_MS_MAX))
        if known is not None:
            known.record, known.expires_ms = record, expires_ms
            return True
        if len(self._states) >= self.replicas_max and not self._drop_expired(now_ms):
            return False
        self._states[record.peer] = ReplicaState(record, expires_ms)
        return True

    def on_started(self, peer: PeerId) -> None:
        """This gateway opened a stream on `peer`."""
        if (state := self._states.get(peer)) is not None:
            state.num_running += 1

    def on_ended(self, peer: PeerId) -> None:
        """A stream that this gateway opened on `peer` is over, for whatever reason."""
        if (state := self._states.get(peer)) is not None:
            state.num_running = max(0, state.num_running - 1)

    def on_first_token(self, peer: PeerId, latency_ms: float | None) -> None:
        """`peer` gave its first token (after `latency_ms`, None: not measured): it works, its failures are forgiven."""
        if (state := self._states.get(peer)) is None:
            return
        if latency_ms is not None:
            old = latency_ms if state.latency_ms is None else state.latency_ms
            state.latency_ms = old + LATENCY_SMOOTHING * (latency_ms - old)
        state.num_failures, state.paused_until_ms = 0, NEVER_MS

    def on_failure(self, peer: PeerId, now_ms: Millis) -> None:
        """`peer` died, froze or answered nonsense: pause it, twice as long each time. Never for a fault of ours."""
        if (state := self._states.get(peer)) is None:
            return
        pause_ms = min(BACKOFF_MS << min(state.num_failures, 16), BACKOFF_MS_MAX)
        state.num_failures += 1
        state.paused_until_ms = Millis(now_ms + pause_ms)

    def live(self, now_ms: Millis) -> tuple[ReplicaState, ...]:
        """Replicas whose record has not expired, by peer."""
        return tuple(self._states[peer] for peer in sorted(self._states) if self._states[peer].expires_ms > now_ms)

    def versions(self, now_ms: Millis) -> tuple[Digest, ...]:
        """Every adapter version that some live replica serves, sorted."""
        return tuple(sorted({version for state in self.live(now_ms) for version in state.record.versions}))

    def _drop_expired(self, now_ms: Millis) -> bool:
        expired = [(state.expires_ms, peer) for peer, state in self._states.items() if state.expires_ms <= now_ms]
        if expired:
            del self._states[min(expired)[1]]
        return bool(expired)


def choose(
    replicas: Iterable[ReplicaState],
    version: Digest,
    local: PeerId,
    policy: Policy,
    now_ms: Millis,
    exclude: Set[PeerId] = frozenset(),
) -> tuple[PeerId, ...]:
    """Candidates for a stream of `version`, best first: not paused, not full, then by expected wait.

    Expected wait is measured latency grown by load. Paused and full replicas stand last instead of missing, because a
    request has to finish while any replica lives. Equal ones are ordered differently by each gateway, so that not all
    run to the same.
    """
    candidates = [state for state in replicas if version in state.record.versions and state.record.peer not in exclude]
    if policy == "only":
        candidates = [state for state in candidates if state.record.peer == local]
    measured = [state.latency_ms for state in candidates if state.latency_ms is not None]
    typical_ms = median(measured) if measured else LATENCY_UNKNOWN_MS

    def rank(state: ReplicaState) -> tuple[bool, int, bool, bool, float, bytes]:
        peer = state.record.peer
        is_paused = state.paused_until_ms > now_ms
        latency_ms = typical_ms if state.latency_ms is None else state.latency_ms
        is_second = (peer == local) == (policy == "avoid")
        tie = sha256(f"{local} {peer}".encode()).digest()
        paused_until_ms = state.paused_until_ms if is_paused else 0
        return is_paused, paused_until_ms, state.is_full(), is_second, latency_ms * (1 + state.load()), tie

    return tuple(state.record.peer for state in sorted(candidates, key=rank))


class AdaptiveDeadline:
    """How long a wait may last before the other side counts as frozen: median + k * MAD of past waits, in bounds."""

    def __init__(self, floor_ms: float, ceiling_ms: float) -> None:
        """Before three waits are known the deadline is `ceiling_ms`."""
        assert 0 < floor_ms <= ceiling_ms
        self._floor_ms, self._ceiling_ms = floor_ms, ceiling_ms
        self._waits_ms: deque[float] = deque(maxlen=DEADLINE_SAMPLES_MAX)

    def on_wait(self, wait_ms: float) -> None:
        """A wait ended. One that was cut off by the deadline counts too (else a slow network never adapts)."""
        self._waits_ms.append(min(wait_ms, self._ceiling_ms))

    def deadline_ms(self) -> float:
        """The longest wait that is still patient, between the floor and the ceiling [ms]."""
        if len(self._waits_ms) < 3:
            return self._ceiling_ms
        middle = median(self._waits_ms)
        mad = median(abs(wait - middle) for wait in self._waits_ms)
        return min(max(middle + DEADLINE_MADS * mad, self._floor_ms), self._ceiling_ms)
