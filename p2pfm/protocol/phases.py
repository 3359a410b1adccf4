"""Where a moment lies in a round. Rounds follow the clock from the network's genesis; no leader starts them.

phase     ends when        what a peer does in it
--------  ---------------  ------------------------------------------------------------------------------
TRAIN     train_ms         local steps; announce the digest of the update
EXCHANGE  exchange_ms      payloads are served and pulled from here on, never before
SCORE     score_ms         committee measures contributions; gossips a hash of its vector
REVEAL    reveal_ms        committee gossips the vectors
ATTEST    attest_ms        first-ranked member proposes; members recompute and sign at most one proposal
MERGE     merge_ms         more than 2/3 of the signatures make a certificate; its base is adopted, its root settled

In a network that may have shards a round holds these phases twice. The shards' round comes first; to the level above it
is one long TRAIN, which ends with the shards' certificates, and the other phases follow (the shards' MERGE lasts as
long).
"""

import itertools
from bisect import bisect_right
from enum import IntEnum
from typing import NamedTuple

from p2pfm.config import NetworkConfig, PhaseConfig
from p2pfm.types import Millis, Round


class Phase(IntEnum):
    """In the order in which they come: a phase never goes backwards."""

    TRAIN = 0
    EXCHANGE = 1
    SCORE = 2
    REVEAL = 3
    ATTEST = 4
    MERGE = 5


PHASES = tuple(Phase)


class Level(IntEnum):
    """Which of a round's two sequences of phases."""

    SHARD = 0
    """Where peers are members. The only one in a network without shards."""
    TOP = 1
    """Where shards are members."""


class Position(NamedTuple):
    """A place in the schedule; `round` is -1 before genesis (then `ends_ms` is genesis)."""

    round: Round
    phase: Phase
    ends_ms: Millis


class Timetable:
    """When what begins and ends in a network: computed once, for it is asked at every event."""

    __slots__ = ("_durations", "_ends", "_genesis_ms", "round_ms")

    def __init__(self, config: NetworkConfig) -> None:
        self._genesis_ms = config.genesis_ms
        self._durations = [_compute_durations(config.phases, config.has_shards, level) for level in Level]
        self._ends = [list(itertools.accumulate(durations)) for durations in self._durations]
        """By level: when each phase ends [ms since the round's beginning]."""
        self.round_ms = Millis(self._ends[0][-1])

    def get_durations(self, level: Level) -> tuple[Millis, ...]:
        """Each phase's duration [ms], in the order of `Phase`; both levels' sums are the round's length."""
        return self._durations[level]

    def locate(self, now_ms: Millis, level: Level = Level.SHARD) -> Position:
        """The round and phase at `now_ms`, and when the phase ends."""
        elapsed = now_ms - self._genesis_ms
        if elapsed < 0:
            return Position(Round(-1), Phase.MERGE, self._genesis_ms)
        ends_ms = self._ends[level]
        number, within_ms = divmod(elapsed, self.round_ms)
        place = bisect_right(ends_ms, within_ms)
        return Position(Round(number), PHASES[place], Millis(now_ms - within_ms + ends_ms[place]))

    def get_start(self, round: Round, phase: Phase = Phase.TRAIN, level: Level = Level.SHARD) -> Millis:
        """When a phase of a round begins [ms since the Unix epoch]."""
        before_ms = self._ends[level][phase - 1] if phase else 0
        return Millis(self._genesis_ms + round * self.round_ms + before_ms)


def _compute_durations(phases: PhaseConfig, has_shards: bool, level: Level) -> tuple[Millis, ...]:
    train, *later = (
        phases.train_ms,
        phases.exchange_ms,
        phases.score_ms,
        phases.reveal_ms,
        phases.attest_ms,
        phases.merge_ms,
    )
    if not has_shards:
        return (train, *later)
    if level == Level.TOP:
        return (Millis(train + sum(later)), *later)
    return (train, *later[:-1], Millis(later[-1] + sum(later)))


def get_durations(config: NetworkConfig, level: Level = Level.SHARD) -> tuple[Millis, ...]:
    """See Timetable."""
    return Timetable(config).get_durations(level)


def compute_position(config: NetworkConfig, now_ms: Millis, level: Level = Level.SHARD) -> Position:
    """See Timetable."""
    return Timetable(config).locate(now_ms, level)


def is_first_half(config: NetworkConfig, now_ms: Millis) -> bool:
    """Whether the round that it is now, by the clock, is not half over."""
    timetable = Timetable(config)
    round = timetable.locate(now_ms).round
    return now_ms < (timetable.get_start(round) + timetable.get_start(Round(round + 1))) // 2


def compute_round_start(config: NetworkConfig, round: Round) -> Millis:
    """See Timetable."""
    return Timetable(config).get_start(round)
