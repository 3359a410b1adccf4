"""Peers tell one another who is there, and the time: `/p2pfm/peers/2`, one question and one answer.

What is told is hearsay and goes into the peer book as such; knows no socket.
"""

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio

from p2pfm.config import TransportLimits
from p2pfm.errors import PeerUnreachable, Reject
from p2pfm.messages import PeersReply, PeersRequest, decode_reply, decode_request, encode
from p2pfm.runtime.clock import PeerClocks, now_ms
from p2pfm.runtime.network.dialer import Dialer
from p2pfm.runtime.network.frames import end_stream, read_frame, write_frame
from p2pfm.runtime.network.limits import Blame, RuleBroken
from p2pfm.runtime.network.peer_book import PeerBook, is_credible, parse_address
from p2pfm.types import PeerId

PEERS_PROTOCOL = "/p2pfm/peers/2"
EXCHANGE_S = 10.0  # between two exchanges; the first follows each own dial at once
ASK_S = 5.0
REQUEST_BYTES_MAX = 16 * 1024
RECOMMENDED_MAX = 256
TAKEN_MAX = 64  # addresses of one answer that are looked at

Ask = Callable[[str, PeerId, bytes, float], Awaitable[bytes]]


class PeerExchange:
    """Asks and answers. `ask(protocol, peer, data, timeout_s)` raises PeerUnreachable."""

    def __init__(
        self,
        book: PeerBook,
        dialer: Dialer,
        limits: TransportLimits,
        own_addresses: Callable[[], Sequence[str]],
        ask: Ask,
        blame: Blame,
        clocks: PeerClocks,
    ) -> None:
        self._book = book
        self._dialer = dialer
        self._limits = limits
        self._own_addresses = own_addresses
        self._ask = ask
        self._blame = blame
        self._clocks = clocks

    async def run(self) -> None:
        """Ask one peer after the other who else is there, so that knowledge spreads even where nobody reconnects."""
        while True:
            interval_s = EXCHANGE_S if len(self._dialer.connected()) > 8 else EXCHANGE_S / 2
            await trio.sleep(interval_s * random.uniform(0.7, 1.3))
            peers = self._dialer.connected()
            if peers:
                await self.exchange(random.choice(peers))

    async def exchange(self, peer: PeerId) -> None:
        """Tell a peer our addresses, and learn those that it recommends."""
        own = tuple(self._own_addresses()[:8])
        asked_at = trio.current_time()
        try:
            reply = decode_reply(await self._ask(PEERS_PROTOCOL, peer, encode(PeersRequest(own)), ASK_S))
        except PeerUnreachable:
            return
        except Reject as error:
            self._blame(peer, str(error))
            return
        if isinstance(reply, PeersReply):
            self._clocks.hear(peer, reply.clock_ms, asked_at * 1000, trio.current_time() * 1000)
            self._learn(peer, random.sample(reply.addresses, min(TAKEN_MAX, len(reply.addresses))))

    def _learn(self, teller: PeerId, addresses: Sequence[str]) -> None:
        where = self._dialer.get_remote_host(teller)
        is_news = False
        for address in addresses:
            parsed = parse_address(address)
            if parsed is not None and where and parsed.peer != teller and is_credible(parsed.host, where):
                is_news |= self._book.add(address, trio.current_time(), teller)
        if is_news:
            self._dialer.wake()

    async def serve(self, stream: Any) -> None:
        """Answer one question."""
        peer = PeerId(str(stream.muxed_conn.peer_id))
        try:
            data = await read_frame(stream, REQUEST_BYTES_MAX)
            if data is None:
                return
            request = decode_request(data)
            if not isinstance(request, PeersRequest):
                raise Reject("expected a PeersRequest")
            self._learn_own(peer, request.addresses)
            await write_frame(stream, encode(PeersReply(self._recommend(peer), now_ms())))
        except (RuleBroken, Reject) as error:
            self._blame(peer, str(error))
        finally:
            await end_stream(stream, is_clean=True)

    def _recommend(self, asker: PeerId) -> tuple[str, ...]:
        """Addresses of the peers connected now that the asker can dial, one or two each."""
        where = self._dialer.get_remote_host(asker)
        chosen: list[str] = []
        for peer in self._dialer.connected():
            if peer != asker and where:
                parsed = [(text, parse_address(text)) for text in self._book.get_addresses(peer)]
                chosen += [text for text, address in parsed if address and is_credible(address.host, where)][:2]
        return tuple(random.sample(chosen, min(RECOMMENDED_MAX, len(chosen))))

    def _learn_own(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """A peer's statement about itself; what it says about others in that place is ignored."""
        where = self._dialer.get_remote_host(peer)
        for text in reversed(addresses[: self._limits.addresses_per_peer_max]):  # what is added last goes first
            parsed = parse_address(text)
            if parsed is None or parsed.peer != peer or not where:
                continue
            if parsed.host == "0.0.0.0" and ":" not in where:
                text = text.replace("/ip4/0.0.0.0/", f"/ip4/{where}/", 1)
            elif not is_credible(parsed.host, where):
                continue
            is_connected = peer in self._dialer.connected()
            self._book.add(text, trio.current_time(), peer, is_connected=is_connected)
