"""Whom a node is connected to: dials what the peer book says, again and again, and makes room for newcomers.

Own dials are counted apart from what dials in: strangers who take every place that is open to them neither stop a node
from dialling nor keep it apart from the rest. Knows nothing of what the connections carry.
"""

import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.peer.id import ID
from libp2p.rcmgr import Direction
from multiaddr import Multiaddr

from p2pfm.config import TransportLimits
from p2pfm.errors import PeerUnreachable
from p2pfm.runtime.network.bans import Bans
from p2pfm.runtime.network.peer_book import NOWHERE, PeerBook, get_scope
from p2pfm.types import PeerId, short

log = logging.getLogger(__name__)

DIAL_TICK_S = 0.5
DIALLING_MAX = 16  # peers whose turn has come or is waited for; the rest stay in the book
LOOKUP_S = 30.0  # between two searches for one peer of which no address works
LOOKUPS_MAX = 256

Lookup = Callable[[PeerId], Awaitable[object]]


class Dialer:
    """Keeps connections to the peers of a book.

    Args:
        network: the host's swarm.
        on_dialled: told the peer after each own dial that succeeded.
    """

    def __init__(
        self,
        network: Any,
        book: PeerBook,
        bans: Bans,
        limits: TransportLimits,
        counters: Counter[str],
        on_dialled: Callable[[PeerId], Awaitable[None]],
    ) -> None:
        self.lookup: Lookup | None = None
        """Searches for a peer of which no address works, and puts what it finds into the book."""
        self.inbound_scope = NOWHERE
        """From how far away somebody has ever dialled in."""
        self._network = network
        self._book = book
        self._bans = bans
        self._limits = limits
        self._counters = counters
        self._on_dialled = on_dialled
        self._slots = trio.CapacityLimiter(limits.dials_max)
        self._doubtful_slots = trio.CapacityLimiter(max(1, limits.dials_max - 1))
        self._dialling: dict[PeerId, trio.Event] = {}
        """Set when the dial has ended."""
        self._dialled: set[PeerId] = set()
        """Connected by a dial of our own."""
        self._since: dict[PeerId, float] = {}
        self._searched: dict[PeerId, float] = {}
        self._explore_at = 0.0
        self._wake = trio.Event()
        self._nursery: trio.Nursery | None = None

    def connected(self) -> tuple[PeerId, ...]:
        """Peers with a live connection, sorted."""
        connections = self._network.get_connections_map()
        return tuple(sorted(PeerId(str(k)) for k, v in connections.items() if any(not c.is_closed for c in v)))

    def get_remote_host(self, peer: PeerId) -> str:
        """The address from which a connected peer speaks; "" when it is gone."""
        for connection in self._network.get_connections(ID.from_base58(peer)):
            remote = connection.muxed_conn.get_remote_address()
            if remote is not None:
                return str(remote[0])
        return ""

    @property
    def num_dialling(self) -> int:
        """Peers that are being dialled, or wait for it."""
        return len(self._dialling)

    def wake(self) -> None:
        """Something new is in the book."""
        self._wake.set()

    async def run(self) -> None:
        """Dial and make room, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            while True:
                now = trio.current_time()
                for peer in self._choose(now):
                    nursery.start_soon(self.dial_quietly, peer)
                for peer in self._choose_to_leave(now):
                    nursery.start_soon(self.disconnect, peer)
                with trio.move_on_after(DIAL_TICK_S):
                    await self._wake.wait()
                self._wake = trio.Event()

    def _choose(self, now: float) -> list[PeerId]:
        connected = self.connected()
        busy = {*connected, *self._dialling, *(PeerId(p) for p, until in self._bans.until.items() if until > now)}
        due = self._book.get_due(now, busy)
        own_min = self._limits.connections_max - self._limits.inbound_max
        wanted = max(self._limits.connections_max // 2 - len(connected), own_min - len(self._dialled))
        if wanted > 0:
            self._explore_at = now + self._limits.explore_s * random.uniform(0.7, 1.3)
            return due[: max(0, min(wanted, DIALLING_MAX) - len(self._dialling))]
        if due and now >= self._explore_at:
            self._explore_at = now + self._limits.explore_s * random.uniform(0.7, 1.3)
            return [random.choice((due[0], random.choice(due)))]  # the most trusted, or any
        return []

    def _choose_to_leave(self, now: float) -> list[PeerId]:
        """Beyond three quarters of the bound, some of the younger half of the connections: who came first stays, so
        that a crowd of newcomers does not push out those that have long been there."""
        connected = self.connected()
        surplus = len(connected) - self._limits.connections_max * 3 // 4
        if surplus <= 0:
            return []
        by_age = sorted(connected, key=lambda peer: self._since.get(peer, now))
        young = [
            peer
            for peer in by_age[len(by_age) // 2 :]
            if now - self._since.get(peer, now) >= self._limits.visit_s and not self._book.is_anchor(peer)
        ]
        self._counters["left_for_room"] += min(surplus, len(young))
        return random.sample(young, min(surplus, len(young)))

    async def dial_quietly(self, peer: PeerId) -> None:
        """The same as `dial` for who does not wait for it."""
        try:
            await self.dial(peer)
        except PeerUnreachable as error:
            log.debug("%s", error)

    async def dial(self, peer: PeerId, *, is_needed: bool = False) -> None:
        """Connect to a peer, trying its addresses one by one; while it is being dialled, wait for how that ends.

        `is_needed`: somebody waits for this very peer, so that one whom no dial has ever reached is searched for, too.

        Goes around the library's dialling, which tries one address and then locks the peer out for 60 s.

        Raises:
            PeerUnreachable: no address works now; the peer book will try again with growing delays.
        """
        if peer in self._dialling:
            await self._dialling[peer].wait()
            if peer in self.connected():
                return
            raise PeerUnreachable(f"no address of {short(peer)} answers")
        self._dialling[peer] = trio.Event()
        try:
            if self._book.is_proven(peer):
                is_there = await self._try_addresses(peer)
            else:  # however much strangers have told, one slot stays for those who were there before
                async with self._doubtful_slots:
                    is_there = await self._try_addresses(peer)
        finally:
            self._dialling.pop(peer).set()
        if not is_there:
            if is_needed or self._book.is_proven(peer):
                self._search(peer)
            raise PeerUnreachable(f"no address of {short(peer)} answers")

    async def _try_addresses(self, peer: PeerId) -> bool:
        async with self._slots:
            for address in self._book.get_addresses(peer):
                if peer in self.connected():
                    return True
                if await self._try(peer, address):
                    self._book.on_connected(peer, trio.current_time(), address)
                    self._dialled.add(peer)
                    self._start(self._on_dialled, peer)  # who dials asks; who is dialled learns from the question
                    return True
            self._book.on_unreachable(peer, trio.current_time())
        return False

    async def _try(self, peer: PeerId, address: str) -> bool:
        self._counters["dials"] += 1
        with trio.move_on_after(self._limits.dial_s) as scope:
            try:
                await self._network.dial_addr(Multiaddr(address), ID.from_base58(peer))
                return True
            except Exception as error:  # noqa: BLE001 - the library raises anything a stranger causes
                log.debug("dialling %s failed: %r", address, error)
                self._book.on_failed(peer, address, is_other_peer="mismatch" in repr(error).lower())
        if scope.cancelled_caught:
            self._book.on_failed(peer, address, is_other_peer=False)
        return False

    def _search(self, peer: PeerId) -> None:
        now = trio.current_time()
        if self.lookup is None or now < self._searched.get(peer, 0.0):
            return
        if len(self._searched) >= LOOKUPS_MAX:
            del self._searched[min(self._searched, key=lambda name: self._searched[name])]
        self._searched[peer] = now + LOOKUP_S
        self._start(self.lookup, peer)

    def _start(self, task: Lookup, peer: PeerId) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(task, peer)

    async def disconnect(self, peer: str) -> None:
        """End all connections to a peer."""
        try:
            await self._network.close_peer(ID.from_base58(peer))
        except Exception as error:  # noqa: BLE001 - the connection may be gone, in any of the library's ways
            log.debug("closing the connections of %s failed: %r", peer, error)

    def on_changed(self, came: set[PeerId], went: set[PeerId]) -> None:
        """The set of connected peers has changed."""
        now = trio.current_time()
        for peer in came:
            self._since[peer] = now
            self._book.on_connected(peer, now)
            if any(c._direction is Direction.INBOUND for c in self._network.get_connections(ID.from_base58(peer))):
                self._counters["inbound"] += 1
                self.inbound_scope = max(self.inbound_scope, get_scope(self.get_remote_host(peer) or "0.0.0.0"))
        for peer in went:
            self._since.pop(peer, None)
            self._dialled.discard(peer)
            self._book.on_lost(peer, now)
            self.wake()
