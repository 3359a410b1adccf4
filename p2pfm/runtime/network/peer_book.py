"""Who is where, and when to try again: addresses of peers with their good and bad times, bounded.

A plain data structure with the clock as an argument; knows no socket and no file.

What somebody tells is worth nothing until a dial has proven it. Strangers may tell what they like, so that what is not
proven is bounded by who told it, by the net in which it lies and by the socket that it names, and never displaces what
is proven. Bootstrap addresses stay for ever.
"""

import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import TypeVar

import msgspec
from multiaddr import Multiaddr

from p2pfm.types import PeerId

RETRY_FIRST_S = 0.5
RETRY_MAX_S = 8.0  # a peer that restarts is found again within 10 s
RETRY_LONG_S = 60.0
PATIENT_FAILURES = 20  # after these (about two minutes) a peer is tried only every RETRY_LONG_S
FORGET_FAILURES = 200  # after these (about three hours) a peer that is no bootstrap is forgotten
FORGET_UNPROVEN = 10  # the same where no dial has ever succeeded (about a minute)
FORGET_S = 30 * 86_400.0  # proven so long ago, an address of an earlier run is not taken up
YIELD_S = 0.7  # when two peers learn of each other at once, the one with the greater id lets the other dial
SPREAD_S = 1.5  # dials of an earlier run's peers, after bootstrap and anchors, at a start
TOLD_MAX = 64  # unproven addresses that one peer may have brought; more find room as these are proven or dropped
TOLD_PER_PEER_MAX = 2  # of these for any one other peer
NET_MAX = 32  # unproven addresses in one public /24 (ip4) or /48 (ip6)
SOCKET_MAX = 4  # unproven peers said to live at one host and port: nobody is made to knock there for many names
ANCHORS_MAX = 8  # peers of long standing that are dialled first at a start, and never dropped for room
OPERATOR = ""  # the teller of bootstrap addresses and of what was proven on this machine

_Key = TypeVar("_Key")

LOOPBACK, PRIVATE, PUBLIC, NOWHERE = 0, 1, 2, -1
_SHARED = ip_network("100.64.0.0/10")  # behind carriers' NAT: as private as 10.0.0.0/8


@dataclass(frozen=True)
class Address:
    """A TCP multiaddress, taken apart. `peer` is "" where it names none."""

    host: str
    port: int
    peer: PeerId


@lru_cache(maxsize=4096)  # the same few come with every exchange, and the library takes 0.2 ms for each
def parse_address(text: str) -> Address | None:
    """A `/ip4|ip6|dns.../tcp/PORT[/p2p/ID]` address; None for anything else."""
    if len(text) > 256:
        return None
    try:
        parsed = Multiaddr(text)
        parts = [(p.name, parsed.value_for_protocol(p.code)) for p in parsed.protocols()]
    except Exception:  # noqa: BLE001 - the library raises many classes on malformed text
        return None
    names = [name for name, _ in parts]
    if names[:2] not in (["ip4", "tcp"], ["ip6", "tcp"], ["dns4", "tcp"], ["dns6", "tcp"], ["dns", "tcp"]):
        return None
    if names[2:] not in ([], ["p2p"]):
        return None
    return Address(str(parts[0][1]), int(str(parts[1][1])), PeerId(str(parts[2][1]) if len(parts) == 3 else ""))


def get_scope(host: str) -> int:
    """How far an address reaches: LOOPBACK, PRIVATE, PUBLIC (names too), or NOWHERE that one could dial."""
    try:
        ip = ip_address(host)
    except ValueError:
        return PUBLIC
    if ip.is_unspecified or ip.is_multicast or (ip.is_reserved and ip.version == 4):
        return NOWHERE
    if ip.is_loopback:
        return LOOPBACK
    return PRIVATE if ip.is_private or ip.is_link_local or (ip.version == 4 and ip in _SHARED) else PUBLIC


def is_credible(host: str, teller: str) -> bool:
    """Whether a peer that speaks to us from `teller` can know about `host`.

    Nobody is told by a stranger from afar what to dial on its own machine or in its own network.
    """
    return get_scope(host) >= max(get_scope(teller), LOOPBACK)


def get_net(host: str) -> str:
    """The net whose owner can invent this address at no cost; "" where a whole LAN is one net."""
    if get_scope(host) != PUBLIC:
        return ""
    try:
        ip = ip_address(host)
    except ValueError:
        return ".".join(host.lower().rsplit(".", 2)[-2:])
    return str(ip_network(f"{ip}/{24 if ip.version == 4 else 48}", strict=False))


class KnownAddress(msgspec.Struct, frozen=True):
    """What outlives a restart. Times are wall clock [s]."""

    address: str
    told_by: str
    first_success: float
    """0: no dial to it has succeeded yet."""
    last_success: float
    failures: int
    """Since the last success."""
    is_anchor: bool = False


@dataclass
class _Known:
    text: str
    parsed: Address
    told_by: str
    first_success: float | None = None
    last_success: float | None = None
    failures: int = 0


@dataclass
class _Entry:
    addresses: list[_Known] = field(default_factory=list)
    """Best first: what worked last, then the peer's own word, then hearsay."""
    is_bootstrap: bool = False
    is_anchor: bool = False
    is_connected: bool = False
    failures: int = 0
    next_try_at: float = 0.0

    @property
    def proven_since(self) -> float | None:
        """When the first of the dials succeeded that make this peer a known one."""
        return min((a.first_success for a in self.addresses if a.first_success is not None), default=None)


class PeerBook:
    """Addresses by peer. Times are seconds of any one clock."""

    def __init__(self, own: PeerId, peers_max: int, addresses_max: int) -> None:
        self._own = own
        self._peers_max = peers_max
        self._addresses_max = addresses_max
        self._entries: dict[PeerId, _Entry] = {}
        # Unproven addresses of peers that are not connected, by what may be invented at no cost.
        self._by_teller: Counter[str] = Counter()
        self._by_net: Counter[str] = Counter()
        self._by_socket: Counter[tuple[str, int]] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def count_proven(self) -> int:
        """Peers to which a dial has ever succeeded."""
        return sum(entry.proven_since is not None for entry in self._entries.values())

    # --- learning ---

    def add_bootstrap(self, addresses: Sequence[str], now: float) -> None:
        """Addresses that are never forgotten."""
        for text in addresses:
            self.add(text, now, OPERATOR)
            parsed = parse_address(text)
            if parsed is not None and parsed.peer in self._entries:
                entry = self._entries[parsed.peer]
                self._tally(entry, -1)
                entry.is_bootstrap = True

    def add(self, text: str, now: float, told_by: str, *, is_connected: bool = False) -> bool:
        """Learn an address with `/p2p/ID`; returns whether it was new and is kept.

        told_by: a peer id. Its word on itself goes before hearsay, and only OPERATOR's before that.
        is_connected: the peer that lives there is connected now. Connections have bounds of their own, so that those by
        net and socket wait until it is gone.
        """
        parsed = parse_address(text)
        if parsed is None or not parsed.peer or parsed.peer == self._own or parsed.port == 0:
            return False
        if get_scope(parsed.host) == NOWHERE:
            return False
        entry = self._entries.get(parsed.peer)
        if entry is not None and any(known.text == text for known in entry.addresses):
            return False
        is_hearsay = told_by not in (OPERATOR, parsed.peer)
        is_free = is_connected or (entry is not None and (entry.is_connected or entry.is_bootstrap))
        if told_by != OPERATOR and not is_free and not self._has_quota(parsed, told_by):
            return False
        if entry is None:
            if len(self._entries) >= self._peers_max and not self._make_room(is_hearsay=is_hearsay):
                return False
            entry = self._entries[parsed.peer] = _Entry()
            entry.next_try_at = now if not is_hearsay or self._own < parsed.peer else now + YIELD_S
        elif is_hearsay and not self._has_place(entry, told_by):
            return False
        self._tally(entry, -1)
        entry.is_connected = entry.is_connected or is_connected
        self._insert(entry, _Known(text, parsed, told_by), now, is_hearsay=is_hearsay)
        self._tally(entry, +1)
        return True

    def _insert(self, entry: _Entry, known: _Known, now: float, *, is_hearsay: bool) -> None:
        if is_hearsay:
            entry.addresses.append(known)
            entry.next_try_at = min(entry.next_try_at, now + YIELD_S)
            return
        entry.addresses.insert(0, known)
        entry.failures = 0
        entry.next_try_at = now
        while len(entry.addresses) > self._addresses_max:
            # Hearsay goes first, then the oldest word of the peer; what the operator gave stays while it can.
            entry.addresses.remove(max(reversed(entry.addresses), key=_get_doubt))

    def _has_quota(self, parsed: Address, told_by: str) -> bool:
        net = get_net(parsed.host)
        if net and self._by_net[net] >= NET_MAX:
            return False
        if not net and self._by_net[net] >= self._peers_max // 2:  # public addresses always find room beside a LAN
            return False
        return self._by_socket[parsed.host, parsed.port] < SOCKET_MAX and self._by_teller[told_by] < TOLD_MAX

    def _has_place(self, entry: _Entry, told_by: str) -> bool:
        told = sum(known.told_by == told_by for known in entry.addresses)
        return len(entry.addresses) < self._addresses_max and told < TOLD_PER_PEER_MAX

    def _tally(self, entry: _Entry, sign: int) -> None:
        if entry.is_connected or entry.is_bootstrap:
            return
        for known in entry.addresses:
            if known.last_success is not None or known.told_by == OPERATOR:
                continue
            _count(self._by_teller, known.told_by, sign)
            _count(self._by_net, get_net(known.parsed.host), sign)
            _count(self._by_socket, (known.parsed.host, known.parsed.port), sign)

    def _make_room(self, *, is_hearsay: bool) -> bool:
        """Hearsay displaces only what has failed; a peer's own word also hearsay not tried yet; nothing the proven."""
        worst, worst_failures = None, 2 if is_hearsay else -1
        for peer, entry in self._entries.items():
            if entry.is_bootstrap or entry.is_connected:
                continue
            is_proven = entry.proven_since is not None
            failures = entry.failures - PATIENT_FAILURES if is_proven else entry.failures
            if failures > worst_failures and (not is_proven or failures > 0):
                worst, worst_failures = peer, failures
        if worst is None:
            return False
        self._remove(worst)
        return True

    def _remove(self, peer: PeerId) -> None:
        self._tally(self._entries[peer], -1)
        del self._entries[peer]

    # --- asking ---

    def get_addresses(self, peer: PeerId) -> list[str]:
        """What is known of one peer, best first."""
        entry = self._entries.get(peer)
        return [known.text for known in entry.addresses] if entry else []

    def is_anchor(self, peer: PeerId) -> bool:
        """Whether this peer is a bootstrap node or of long standing."""
        entry = self._entries.get(peer)
        return entry is not None and (entry.is_bootstrap or entry.is_anchor)

    def is_proven(self, peer: PeerId) -> bool:
        """Whether a dial to this peer has ever succeeded, or the operator named it."""
        entry = self._entries.get(peer)
        return entry is not None and (entry.is_bootstrap or entry.proven_since is not None)

    def get_due(self, now: float, busy: Collection[PeerId]) -> list[PeerId]:
        """Peers to dial now: not `busy` (connected, being dialled, banned), past their delay. Bootstrap and anchors
        first, then proven peers, then a peer's own word, then hearsay."""
        due = [
            (_get_rank(peer, entry), random.random(), peer)
            for peer, entry in self._entries.items()
            if peer not in busy and entry.addresses and entry.next_try_at <= now
        ]
        return [peer for _, _, peer in sorted(due)]

    # --- experience ---

    def on_connected(self, peer: PeerId, now: float, address: str = "") -> None:
        """A connection stands; the address that led to it, if we dialled, is proven and goes first."""
        entry = self._entries.get(peer)
        if entry is None:
            return
        self._tally(entry, -1)
        entry.is_connected = True
        entry.failures = 0
        entry.next_try_at = now
        for known in entry.addresses:
            if known.text == address:
                known.first_success = now if known.first_success is None else known.first_success
                known.last_success = now
                known.failures = 0
                entry.addresses.remove(known)
                entry.addresses.insert(0, known)
                break

    def on_lost(self, peer: PeerId, now: float) -> None:
        """The connection ended: try again soon. What was only told is kept as far as its bounds let it."""
        entry = self._entries.get(peer)
        if entry is None:
            return
        self._tally(entry, -1)
        entry.is_connected = False
        entry.failures = 0
        entry.next_try_at = now + RETRY_FIRST_S * random.uniform(0.5, 1.5)
        addresses, entry.addresses = entry.addresses, []
        for known in addresses:
            is_kept = entry.is_bootstrap or known.last_success is not None or known.told_by == OPERATOR
            if is_kept or self._has_quota(known.parsed, known.told_by):
                self._tally(entry, -1)
                entry.addresses.append(known)
                self._tally(entry, +1)
        if not entry.addresses:
            self._remove(peer)

    def on_failed(self, peer: PeerId, address: str, *, is_other_peer: bool) -> None:
        """One address did not work: it goes last, or away if another peer lives there."""
        entry = self._entries.get(peer)
        if entry is None:
            return
        for known in list(entry.addresses):
            if known.text == address:
                self._tally(entry, -1)
                entry.addresses.remove(known)
                known.failures += 1
                if not is_other_peer or entry.is_bootstrap:
                    entry.addresses.append(known)
                self._tally(entry, +1)

    def on_unreachable(self, peer: PeerId, now: float) -> None:
        """No address worked: wait longer and longer."""
        entry = self._entries.get(peer)
        if entry is None:
            return
        entry.failures += 1
        is_proven = entry.proven_since is not None or any(k.told_by == OPERATOR for k in entry.addresses)
        failures_max = FORGET_FAILURES if is_proven else FORGET_UNPROVEN
        if not entry.addresses or (entry.failures > failures_max and not entry.is_bootstrap):
            self._remove(peer)
            return
        delay = min(RETRY_FIRST_S * 2 ** min(entry.failures - 1, 10), RETRY_MAX_S)
        if entry.failures > PATIENT_FAILURES and not entry.is_bootstrap:
            delay = RETRY_LONG_S
        entry.next_try_at = now + delay * random.uniform(0.7, 1.1)

    # --- over restarts ---

    def get_records(self, now: float, wall: float) -> tuple[KnownAddress, ...]:
        """What a next start must know, best first; `wall` is the wall clock at `now`."""
        anchors = self._choose_anchors()
        shift = wall - now
        records = []
        for peer, entry in self._entries.items():
            for position, known in enumerate(entry.addresses):
                last = known.last_success
                if last is not None and entry.is_connected and position == 0:
                    last = now
                records.append(
                    KnownAddress(
                        known.text,
                        known.told_by,
                        known.first_success + shift if known.first_success is not None else 0.0,
                        last + shift if last is not None else 0.0,
                        known.failures,
                        peer in anchors,
                    )
                )
        records.sort(key=lambda record: (not record.is_anchor, -record.last_success, record.failures))
        return tuple(records)

    def _choose_anchors(self) -> set[PeerId]:
        """Of the peers connected now, or else known longest, those proven first, one from a public net."""
        aged = sorted(
            (not entry.is_connected, entry.proven_since, peer)
            for peer, entry in self._entries.items()
            if entry.proven_since is not None and entry.failures < PATIENT_FAILURES
        )
        anchors: set[PeerId] = set()
        nets: set[str] = set()
        for _, _, peer in aged:
            net = get_net(self._entries[peer].addresses[0].parsed.host)
            if len(anchors) < ANCHORS_MAX and net not in nets:
                anchors.add(peer)
                nets |= {net} - {""}
        return anchors

    def restore(self, records: Collection[KnownAddress], now: float, wall: float) -> None:
        """Take up an earlier run's records; its bounds hold for them too."""
        for record in reversed(list(records)):  # the best is inserted last, so that it stands first
            parsed = parse_address(record.address)
            is_proven = record.last_success > 0
            if parsed is None or (is_proven and wall - record.last_success > FORGET_S):
                continue
            if not self.add(record.address, now, OPERATOR if is_proven else record.told_by):
                continue
            entry = self._entries[parsed.peer]
            known = next(k for k in entry.addresses if k.text == record.address)
            self._tally(entry, -1)
            known.told_by = record.told_by
            known.failures = record.failures
            if is_proven:
                known.last_success = now - max(0.0, wall - record.last_success)
                known.first_success = min(known.last_success, now - max(0.0, wall - record.first_success))
            self._tally(entry, +1)
            entry.is_anchor = entry.is_anchor or record.is_anchor
            if not entry.is_bootstrap:
                entry.failures = min(record.failures, 5)
                entry.next_try_at = (
                    now if record.is_anchor else now + random.uniform(0, SPREAD_S * (1 + record.failures))
                )


def _count(counter: Counter[_Key], key: _Key, sign: int) -> None:
    counter[key] += sign
    if not counter[key]:
        del counter[key]


def _get_doubt(known: _Known) -> int:
    if known.last_success is not None:
        return 0
    return 1 if known.told_by == OPERATOR else 2 if known.told_by == known.parsed.peer else 3


def _get_rank(peer: PeerId, entry: _Entry) -> int:
    if entry.is_bootstrap or entry.is_anchor:
        return 0
    if entry.proven_since is not None:
        return 1
    return 2 if entry.addresses[0].told_by in (OPERATOR, peer) else 3
