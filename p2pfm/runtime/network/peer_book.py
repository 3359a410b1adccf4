"""Who is where, and when to try again: addresses of peers with their good and bad times, bounded.

A plain data structure with the clock as an argument; knows no socket and no file.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from multiaddr import Multiaddr

from p2pfm.types import PeerId

RETRY_FIRST_S = 0.5
RETRY_MAX_S = 8.0  # a peer that restarts is found again within 10 s
RETRY_LONG_S = 60.0
PATIENT_FAILURES = 20  # after these (about two minutes) a peer is tried only every RETRY_LONG_S
FORGET_FAILURES = 200  # after these (about three hours) a peer that is no bootstrap is forgotten
YIELD_S = 0.7  # when two peers learn of each other at once, the one with the greater id lets the other dial


@dataclass(frozen=True)
class Address:
    """A TCP multiaddress, taken apart. `peer` is "" where it names none."""

    host: str
    port: int
    peer: PeerId


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


@dataclass
class _Entry:
    addresses: list[str] = field(default_factory=list)
    """Best first: what worked last, then the peer's own word, then hearsay."""
    is_bootstrap: bool = False
    failures: int = 0
    next_try_at: float = 0.0


class PeerBook:
    """Addresses by peer. Times are seconds of any one clock."""

    def __init__(self, own: PeerId, peers_max: int, addresses_max: int) -> None:
        self._own = own
        self._peers_max = peers_max
        self._addresses_max = addresses_max
        self._entries: dict[PeerId, _Entry] = {}

    def add_bootstrap(self, addresses: Sequence[str], now: float) -> None:
        """Addresses that are never forgotten."""
        for text in addresses:
            self.add(text, now, is_own_word=True)
            parsed = parse_address(text)
            if parsed is not None and parsed.peer in self._entries:
                self._entries[parsed.peer].is_bootstrap = True

    def add(self, text: str, now: float, *, is_own_word: bool = False) -> bool:
        """Learn an address with `/p2p/ID`; returns whether it was new. Hearsay never displaces what is known."""
        parsed = parse_address(text)
        if parsed is None or not parsed.peer or parsed.peer == self._own or parsed.port == 0:
            return False
        entry = self._entries.get(parsed.peer)
        if entry is None:
            if len(self._entries) >= self._peers_max and not self._make_room():
                return False
            entry = self._entries[parsed.peer] = _Entry()
            entry.next_try_at = now if is_own_word or self._own < parsed.peer else now + YIELD_S
        if text in entry.addresses:
            return False
        if is_own_word:
            entry.addresses.insert(0, text)
            entry.failures = 0
            entry.next_try_at = now
        elif len(entry.addresses) < self._addresses_max:
            entry.addresses.append(text)
            entry.next_try_at = min(entry.next_try_at, now + YIELD_S)
        del entry.addresses[self._addresses_max :]
        return True

    def _make_room(self) -> bool:
        for peer, entry in self._entries.items():
            if entry.failures > PATIENT_FAILURES and not entry.is_bootstrap:
                del self._entries[peer]
                return True
        return False

    def get_addresses(self, peer: PeerId) -> list[str]:
        """What is known of one peer, best first."""
        entry = self._entries.get(peer)
        return list(entry.addresses) if entry else []

    def get_all(self) -> tuple[str, ...]:
        """The best address of every peer that is not given up, for the next start's peer book."""
        return tuple(e.addresses[0] for e in self._entries.values() if e.addresses and e.failures < PATIENT_FAILURES)

    def get_due(self, now: float, busy: frozenset[PeerId]) -> list[PeerId]:
        """Peers to dial now: not `busy` (connected or being dialled), and past their delay; sorted."""
        return sorted(p for p, e in self._entries.items() if p not in busy and e.addresses and e.next_try_at <= now)

    def on_connected(self, peer: PeerId, now: float, address: str = "") -> None:
        """A connection stands; the address that led to it goes first."""
        entry = self._entries.get(peer)
        if entry is None:
            return
        entry.failures = 0
        entry.next_try_at = now
        if address in entry.addresses:
            entry.addresses.remove(address)
            entry.addresses.insert(0, address)

    def on_lost(self, peer: PeerId, now: float) -> None:
        """The connection ended: try again soon."""
        entry = self._entries.get(peer)
        if entry is not None:
            entry.failures = 0
            entry.next_try_at = now + RETRY_FIRST_S * random.uniform(0.5, 1.5)

    def on_failed(self, peer: PeerId, address: str, *, is_other_peer: bool) -> None:
        """One address did not work: it goes last, or away if another peer lives there."""
        entry = self._entries.get(peer)
        if entry is None or address not in entry.addresses:
            return
        entry.addresses.remove(address)
        if not is_other_peer or entry.is_bootstrap:
            entry.addresses.append(address)

    def on_unreachable(self, peer: PeerId, now: float) -> None:
        """No address worked: wait longer and longer."""
        entry = self._entries.get(peer)
        if entry is None:
            return
        entry.failures += 1
        if not entry.addresses or (entry.failures > FORGET_FAILURES and not entry.is_bootstrap):
            del self._entries[peer]
            return
        delay = min(RETRY_FIRST_S * 2 ** min(entry.failures - 1, 10), RETRY_MAX_S)
        if entry.failures > PATIENT_FAILURES and not entry.is_bootstrap:
            delay = RETRY_LONG_S
        entry.next_try_at = now + delay * random.uniform(0.7, 1.1)
