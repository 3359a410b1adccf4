"""Who broke rules, how often lately, and until when it is not heard: offences that decay, bans that grow.

A plain data structure with the clock as an argument; knows no socket and no file. It judges peer ids, and an id costs
nothing: bans keep a faulty peer from doing harm for ever; against many ids stand the bounds by address and connection.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import msgspec

HALF_LIFE_S = 600.0
"""An offence counts half after this. Three in a few minutes ban; three in a month do not."""
THROTTLE_SCORE = 1.5
"""From here on a peer is answered slowly: two offences close together."""
BAN_SCORE = 2.5
"""From here on a peer is banned: three offences within about three minutes."""
BAN_S = 60.0
"""The first ban; each further one lasts twice as long."""
BAN_MAX_S = BAN_S * 1024
"""Seventeen hours."""
FORGIVE_S = 86_400.0
"""A day without offence makes the next ban half as long."""


class BanRecord(msgspec.Struct, frozen=True):
    """What outlives a restart. Times are wall clock [s]."""

    peer: str
    score: float
    level: int
    """How many bans there were."""
    offended_at: float
    until: float
    """0: not banned."""


@dataclass
class _Offender:
    score: float = 0.0
    level: int = 0
    offended_at: float = 0.0
    until: float = 0.0


class Bans:
    """Offences by peer. Times are seconds of any one clock."""

    def __init__(self, peers_max: int) -> None:
        self._peers_max = peers_max
        self._offenders: dict[str, _Offender] = {}
        self.until: dict[str, float] = {}
        """Peer to the time until which it is banned; the swarm reads it."""
        self.seen: Counter[str] = Counter()
        """Offences of each peer in this run, for people; bounded."""

    def add_offence(self, peer: str, now: float) -> bool:
        """Count one; returns whether it brings a new ban."""
        offender = self._offenders.setdefault(peer, _Offender(offended_at=now))
        quiet_s = max(0.0, now - offender.offended_at)
        offender.score = _decay(offender, now) + 1
        offender.level = max(0, offender.level - int(quiet_s / FORGIVE_S))
        offender.offended_at = now
        self.seen[peer] += 1
        is_banned = offender.score >= BAN_SCORE
        if is_banned:
            offender.until = max(offender.until, now + min(BAN_S * 2.0**offender.level, BAN_MAX_S))
            offender.level = min(offender.level + 1, 10)
            offender.score = 0.0
            self.until[peer] = offender.until
        self._forget(peer, now)
        return is_banned

    def is_banned(self, peer: str, now: float) -> bool:
        """Whether nothing is to be had with this peer."""
        return self.until.get(peer, 0.0) > now

    def is_throttled(self, peer: str, now: float) -> bool:
        """Whether this peer has offended so much lately that it is answered slowly."""
        offender = self._offenders.get(peer)
        if offender is None:
            return False
        return _decay(offender, now) >= THROTTLE_SCORE

    def count(self, now: float) -> int:
        """Peers banned now."""
        return sum(until > now for until in self.until.values())

    def _forget(self, newest: str, now: float) -> None:
        # Who is banned longest is forgotten last, so that a flood of new ids frees no old offender.
        if len(self._offenders) > self._peers_max:
            others = (peer for peer in self._offenders if peer != newest)
            self._remove(min(others, key=lambda peer: self._rank(peer, now)))
        if len(self.seen) > self._peers_max:
            self.seen = Counter(dict(self.seen.most_common(self._peers_max // 2)))

    def _rank(self, peer: str, now: float) -> tuple[float, int, float]:
        offender = self._offenders[peer]
        return max(offender.until, now), offender.level, offender.offended_at

    def _remove(self, peer: str) -> None:
        del self._offenders[peer]
        self.until.pop(peer, None)

    def get_records(self, now: float, wall: float) -> tuple[BanRecord, ...]:
        """What a next start must know; `wall` is the wall clock at `now`."""
        shift = wall - now
        return tuple(
            BanRecord(peer, o.score, o.level, o.offended_at + shift, o.until + shift if o.until > now else 0.0)
            for peer, o in self._offenders.items()
            if o.level or o.until > now or _decay(o, now) > 0.5
        )

    def restore(self, records: Collection[BanRecord], now: float, wall: float) -> None:
        """Take up an earlier run's records. A clock that was set back does not shorten a ban, nor lengthen it beyond
        what it was."""
        for record in list(records)[: self._peers_max]:
            passed_s = max(0.0, wall - record.offended_at)
            offended_at = now - passed_s
            lasted_s = min(record.until - record.offended_at, BAN_MAX_S) if record.until else 0.0
            until = offended_at + lasted_s
            self._offenders[record.peer] = _Offender(
                record.score, min(max(record.level, 0), 10), offended_at, until if until > now else 0.0
            )
            if until > now:
                self.until[record.peer] = until


def _decay(offender: _Offender, now: float) -> float:
    return float(offender.score * 0.5 ** (max(0.0, now - offender.offended_at) / HALF_LIFE_S))
