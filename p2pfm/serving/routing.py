"""Which replica answers a request: records of who serves what, how busy and how fast, and an order over them.

Knows no clock, socket or model. Every gateway decides for itself from signed, short-lived `Presence` records and from
what it measured; there is no elected master and no central list (Petals' routing records, NETWORK and FIELD).
"""

from collections import deque
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from hashlib import sha256
from math import ceil, inf
from statistics import median
from typing import Literal

import msgspec

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

STALE_SHARE = 0.5
"""Of its record's life: a replica that was silent for longer missed a record, and stands behind those that did not."""

BACKOFF_MS = Millis(1_000)
"""Pause after a replica's first failure; doubles with each further one."""

BACKOFF_MS_MAX = Millis(60_000)
"""The longest pause: a restarted replica comes back into use within a minute."""

BAN_MS = Millis(6 * 3_600_000)
"""A replica that was found to give wrong answers is not asked for so long; twice as long each time after."""

BAN_MS_MAX = Millis(30 * 24 * 3_600_000)

BANS_MAX = 1024
"""Bans remembered, the newest: a peer id is bound to a stake, so nobody has many."""

LATENCY_UNKNOWN_MS = 200.0
"""Assumed time to the first token before anything was measured [ms]."""

SMOOTHING = 0.3
"""Share of the newest measurement in the moving average."""

SPEED_UNKNOWN = 20.0
"""Assumed tokens a second before anything was measured."""

ANSWER_TOKENS = 64
"""Length of the answer for which replicas are compared: a near one and a fast one both count."""

LOCAL_MARGIN = 1.2
"""This node's own replica is preferred until it is expected to take so many times as long as the best other. What is
expected is a moving average of a few answers, which scatters about as much: at 1 the local replica would lose half of
all streams to one that is no faster. More would keep clients waiting for a replica that is known to be slower.
"""

FIRST_TOKENS_MAX = 256
FIRST_TOKENS_MIN = 10
"""First-token times remembered for a percentile, and without how many there is none."""

HEDGE_PERCENTILE = 0.95

STREAMS_PER_HEDGE = 10
"""One of so many streams at most is asked of two replicas: overload makes all late, and must not double itself."""

HEDGES_SAVED_MAX = 5
"""Hedges at once after a quiet time."""

PACE_TOKENS_MIN = 4
"""Tokens after the first that a stream must have brought for its speed to mean something."""

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
    """Moving average of the time to its first token, the round trip included; None: never measured."""
    round_trip_ms: float | None = None
    """To it and back, from whatever small request it answered; None: none yet."""
    speed: float | None = None
    """Moving average of the tokens a second that it gave us; None: never measured."""
    num_failures: int = 0
    """In a row."""
    paused_until_ms: Millis = NEVER_MS
    stale_ms: Millis = NEVER_MS
    """From then on it is stale, unless it speaks again."""
    num_running: int = 0
    """Streams that this gateway has open on it: newer than what its record says."""

    def is_full(self) -> bool:
        """Whether another session would be refused, as far as is known here."""
        return max(self.record.sessions, self.num_running) >= self.record.sessions_max

    def is_paused(self, now_ms: Millis) -> bool:
        """Whether it failed so lately that others come before it."""
        return self.paused_until_ms > now_ms

    def is_stale(self, now_ms: Millis) -> bool:
        """Whether it should have spoken since, or its connection ended: it is likely dead."""
        return now_ms >= self.stale_ms

    def load(self) -> float:
        """Used share of its sessions."""
        return max(self.record.sessions, self.num_running) / max(self.record.sessions_max, 1)

    def expected_ms(self, typical: "Typical") -> float:
        """Time to an answer of ANSWER_TOKENS: first token, who waits for theirs before us, and the rest.

        Our own measurements count more than the record, which is its word; the typical ones stand in for both, but for
        how far it is from here.
        """
        first_ms = self.latency_ms
        if first_ms is None:
            farther_ms = 0.0 if self.round_trip_ms is None else self.round_trip_ms - typical.round_trip_ms
            first_ms = max(typical.first_ms + farther_ms, 1.0)
        told = self.record.speed_milli / 1000
        speed = self.speed if self.speed is not None else told if told > 0 else typical.speed
        waiting = min(self.record.waiting, self.record.sessions_max)
        return first_ms * (1 + self.load() + waiting) + 1000 * ANSWER_TOKENS / speed


@dataclass(frozen=True, slots=True)
class Typical:
    """What is assumed of a replica of which something was not measured: the median of the others."""

    first_ms: float
    round_trip_ms: float
    speed: float


class Ban(msgspec.Struct, frozen=True):
    """A replica that gave wrong answers; plain data, to outlive a restart."""

    peer: PeerId
    until_ms: Millis
    num_bans: int
    """This one included."""


@dataclass(slots=True)
class ReplicaTable:
    """Who serves which adapter version right now. Bounded; deaf to replayed records."""

    replicas_max: int = REPLICAS_MAX
    _states: dict[PeerId, ReplicaState] = field(default_factory=dict)
    _bans: dict[PeerId, Ban] = field(default_factory=dict)  # oldest first

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
        life_ms = min(record.ttl_ms, TTL_MS_MAX)
        expires_ms, stale_ms = Millis(now_ms + life_ms), Millis(now_ms + round(STALE_SHARE * life_ms))
        if known is not None:
            known.record, known.expires_ms, known.stale_ms = record, expires_ms, stale_ms
            return True
        if len(self._states) >= self.replicas_max and not self._drop_expired(now_ms):
            return False
        self._states[record.peer] = ReplicaState(record, expires_ms, stale_ms=stale_ms)
        return True

    def on_started(self, peer: PeerId) -> None:
        """This gateway opened a stream on `peer`."""
        if (state := self._states.get(peer)) is not None:
            state.num_running += 1

    def on_ended(self, peer: PeerId) -> None:
        """A stream that this gateway opened on `peer` is over, for whatever reason."""
        if (state := self._states.get(peer)) is not None:
            state.num_running = max(0, state.num_running - 1)

    def on_gone(self, peer: PeerId) -> None:
        """The connection to `peer` ended: it is stale until it speaks again."""
        if (state := self._states.get(peer)) is not None:
            state.stale_ms = NEVER_MS

    def on_first_token(self, peer: PeerId, latency_ms: float | None) -> None:
        """`peer` gave its first token (after `latency_ms`, None: not measured): it works, its failures are forgiven."""
        if (state := self._states.get(peer)) is None:
            return
        if latency_ms is not None:
            state.latency_ms = smooth(state.latency_ms, latency_ms)
        state.num_failures, state.paused_until_ms = 0, NEVER_MS

    def on_round_trip(self, peer: PeerId, round_trip_ms: float) -> None:
        """`peer` answered a small request; a slow answer may have waited there, a fast one is the way itself."""
        if (state := self._states.get(peer)) is not None:
            state.round_trip_ms = min(smooth(state.round_trip_ms, round_trip_ms), round_trip_ms)

    def on_speed(self, peer: PeerId, tokens_per_s: float) -> None:
        """`peer` ended a stream whose tokens after the first came this fast."""
        if (state := self._states.get(peer)) is not None and tokens_per_s > 0:
            state.speed = smooth(state.speed, tokens_per_s)

    def on_failure(self, peer: PeerId, now_ms: Millis) -> None:
        """`peer` died, froze or answered nonsense: pause it, twice as long each time. Never for a fault of ours."""
        if (state := self._states.get(peer)) is None:
            return
        pause_ms = min(BACKOFF_MS << min(state.num_failures, 16), BACKOFF_MS_MAX)
        state.num_failures += 1
        state.paused_until_ms = Millis(now_ms + pause_ms)

    def on_cheat(self, peer: PeerId, now_ms: Millis) -> None:
        """`peer` was proven to give wrong answers: it is not live while its ban lasts, whatever it says."""
        num_bans = self._bans.pop(peer).num_bans + 1 if peer in self._bans else 1
        until_ms = Millis(now_ms + min(BAN_MS << min(num_bans - 1, 16), BAN_MS_MAX))
        self.restore_bans((Ban(peer, until_ms, num_bans),))

    def bans(self) -> tuple[Ban, ...]:
        """All that are remembered, also those that are over: the next one is longer."""
        return tuple(self._bans.values())

    def restore_bans(self, bans: Iterable[Ban]) -> None:
        """What `bans` gave in an earlier run; of too many the newest stay."""
        self._bans.update((ban.peer, ban) for ban in bans)
        while len(self._bans) > BANS_MAX:
            del self._bans[next(iter(self._bans))]

    def is_banned(self, peer: PeerId, now_ms: Millis) -> bool:
        """Whether it is found to cheat, and its ban lasts."""
        return peer in self._bans and self._bans[peer].until_ms > now_ms

    def live(self, now_ms: Millis) -> tuple[ReplicaState, ...]:
        """Replicas whose record has not expired and who are not banned, by peer."""
        return tuple(
            self._states[peer]
            for peer in sorted(self._states)
            if self._states[peer].expires_ms > now_ms and not self.is_banned(peer, now_ms)
        )

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
    *,
    is_local_warm: bool = True,
) -> tuple[PeerId, ...]:
    """Candidates for a stream of `version`, best first: not paused, not stale, not full, then by expected time.

    Paused, stale and full replicas stand last instead of missing, because a request has to finish while any replica
    lives. The own replica stands first while it is none of these, has the version in memory (`is_local_warm`), and is
    not slower than the best other by more than LOCAL_MARGIN. Equal ones are ordered differently by each gateway: not
    all run to the same.
    """
    candidates = [state for state in replicas if version in state.record.versions and state.record.peer not in exclude]
    if policy == "only":
        candidates = [state for state in candidates if state.record.peer == local]
    told = [state.record.speed_milli / 1000 or None for state in candidates]
    typical = Typical(
        _middle([state.latency_ms for state in candidates], LATENCY_UNKNOWN_MS),
        _middle([state.round_trip_ms for state in candidates], 0.0),
        _middle([state.speed for state in candidates] + told, SPEED_UNKNOWN),
    )

    def expect(state: ReplicaState) -> float:
        return state.expected_ms(typical)

    others_ms = [
        expect(s) for s in candidates if s.record.peer != local and not s.is_full() and not s.is_paused(now_ms)
    ]
    patience_ms = LOCAL_MARGIN * min(others_ms, default=inf)

    def rank(state: ReplicaState) -> tuple[bool, int, bool, bool, int, float, bytes]:
        peer = state.record.peer
        is_paused = state.is_paused(now_ms)
        place = 1
        if peer == local:
            is_first = is_local_warm and expect(state) <= patience_ms
            place = 2 if policy == "avoid" else 0 if is_first else 1
        tie = sha256(f"{local} {peer}".encode()).digest()
        paused_until_ms = state.paused_until_ms if is_paused else 0
        is_stale = state.is_stale(now_ms)
        return is_paused, paused_until_ms, is_stale, state.is_full(), place, expect(state), tie

    return tuple(state.record.peer for state in sorted(candidates, key=rank))


def smooth(old: float | None, new: float) -> float:
    """A moving average, `new` taken in."""
    return new if old is None else old + SMOOTHING * (new - old)


def _middle(values: Iterable[float | None], default: float) -> float:
    known = [value for value in values if value is not None]
    return median(known) if known else default


class FirstTokens:
    """How long streams lately waited for their first token: from when on one is late."""

    def __init__(self) -> None:
        """Nothing is late before FIRST_TOKENS_MIN are known."""
        self._waits_ms: deque[float] = deque(maxlen=FIRST_TOKENS_MAX)

    def on_first_token(self, wait_ms: float) -> None:
        """A stream had its first token so long after it asked, whoever gave it."""
        self._waits_ms.append(wait_ms)

    def late_ms(self) -> float:
        """HEDGE_PERCENTILE of the waits [ms]; infinite while too few are known."""
        if len(self._waits_ms) < FIRST_TOKENS_MIN:
            return inf
        return sorted(self._waits_ms)[ceil(HEDGE_PERCENTILE * len(self._waits_ms)) - 1]


class HedgeBudget:
    """Of STREAMS_PER_HEDGE streams one may be asked of two replicas."""

    def __init__(self) -> None:
        """Nothing is saved yet."""
        self._num_streams = 0

    def on_stream(self) -> None:
        """A stream began."""
        self._num_streams = min(self._num_streams + 1, STREAMS_PER_HEDGE * HEDGES_SAVED_MAX)

    def take(self) -> bool:
        """Whether one more stream may be hedged; then it counts."""
        if self._num_streams < STREAMS_PER_HEDGE:
            return False
        self._num_streams -= STREAMS_PER_HEDGE
        return True


class Pace:
    """How fast a stream's tokens come after its first."""

    def __init__(self) -> None:
        """Nothing came yet."""
        self._has_begun = False
        self._num_tokens, self._waited_s = 0, 0.0

    def on_tokens(self, num_tokens: int, wait_s: float) -> None:
        """So many came after a wait for them; the first ones only start the watch."""
        if self._has_begun:
            self._num_tokens += num_tokens
            self._waited_s += wait_s
        self._has_begun = self._has_begun or num_tokens > 0

    def compute_speed(self, elapsed_s: float) -> float | None:
        """Tokens a second, of a stream that took so long. None: too few, or its reader was slower than its maker."""
        if self._num_tokens < PACE_TOKENS_MIN or self._waited_s <= elapsed_s / 2:
            return None
        return self._num_tokens / self._waited_s


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
