"""Peers of one local network find each other without any address given: multicast DNS, by zeroconf.

Tells everybody in that network that this node is here, so that it is off unless the operator names the interface. What
it hears is nobody's proven word and goes into the peer book as hearsay. py-libp2p 0.8.1's own class multicasts on all
interfaces, asks the outside for its address, and takes any number of services; hence this file.
"""

import logging
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import trio
from zeroconf import Error as ZeroconfError
from zeroconf import ServiceBrowser, ServiceInfo, ServiceListener, Zeroconf

from p2pfm.errors import OperatorError
from p2pfm.runtime.network.peer_book import get_scope, parse_address
from p2pfm.types import Digest, PeerId

log = logging.getLogger(__name__)

TELLER = "mdns"
"""Who told, in the peer book: all of mDNS counts as one teller."""
SERVICES_MAX = 256  # other services looked at in one run
ADDRESSES_MAX = 8  # of one service
INFO_MS = 3000


class LocalPeers(ServiceListener):
    """Announces one peer on one interface, and tells `on_found` the addresses of others of the same network.

    Args:
        interface: the address of this machine in the local network.
        on_found: called in trio's thread with an address that ends in `/p2p/ID`.
    """

    def __init__(
        self,
        peer: PeerId,
        network_id: Digest,
        interface: str,
        addresses: Callable[[], Sequence[str]],
        on_found: Callable[[str], None],
    ) -> None:
        self.num_found = 0
        self._peer = peer
        self._type = f"_p2pfm-{network_id.hex()[:8]}._udp.local."
        self._name = f"{peer[-40:].lower()}.{self._type}"
        self._interface = interface
        self._addresses = addresses
        self._on_found = on_found
        self._seen: set[str] = set()
        self._token: trio.lowlevel.TrioToken | None = None
        self._service: Zeroconf | None = None

    async def __aenter__(self) -> Self:
        """Begin to announce and to listen.

        Raises:
            OperatorError: the interface cannot multicast.
        """
        self._token = trio.lowlevel.current_trio_token()
        self._service = await trio.to_thread.run_sync(self._open)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._service is not None
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._service.close)

    def _open(self) -> Zeroconf:
        texts = [self._make_dialable(text) for text in self._addresses()][:ADDRESSES_MAX]
        parsed = parse_address(texts[0])
        assert parsed is not None, "our own address"
        properties = {f"dnsaddr{number}": text for number, text in enumerate(texts)}
        info = ServiceInfo(
            self._type,
            self._name,
            port=parsed.port,
            properties=properties,
            server=f"{self._name.split('.')[0]}.local.",
            parsed_addresses=[self._interface],
        )
        try:
            service = Zeroconf(interfaces=[self._interface])
        except (OSError, ZeroconfError) as error:
            raise OperatorError(
                f"discovery.mdns: cannot multicast on {self._interface}: {error}. Give this machine's own address in "
                "the local network, or leave the key empty"
            ) from error
        service.register_service(info, cooperating_responders=True)
        ServiceBrowser(service, self._type, listener=self)
        return service

    def _make_dialable(self, text: str) -> str:
        return text.replace("/ip4/0.0.0.0/", f"/ip4/{self._interface}/", 1)

    # --- called by zeroconf, in a thread of its own ---

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """Somebody is there."""
        if name == self._name or len(self._seen | {name}) > SERVICES_MAX:
            return
        self._seen.add(name)
        self._read(zc, name)

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """Somebody has moved."""
        if name in self._seen:
            self._read(zc, name)

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """Somebody says it leaves; whoever is connected knows better."""

    def _read(self, service: Zeroconf, name: str) -> None:
        try:
            info = service.get_service_info(self._type, name, timeout=INFO_MS)
        except Exception as error:  # noqa: BLE001 - strangers' packets, in a library's thread that must live
            log.debug("mDNS service %s cannot be read: %r", name, error)
            return
        if info is not None:
            self._tell([value for _, value in sorted(info.properties.items())][:ADDRESSES_MAX])

    def _tell(self, values: Sequence[Any]) -> None:
        for value in values:
            text = value.decode(errors="replace") if isinstance(value, bytes) else ""
            parsed = parse_address(text)
            # Nobody in the network is to tell us what to dial on our own machine, unless we asked this machine.
            if parsed is None or parsed.peer == self._peer or get_scope(parsed.host) < get_scope(self._interface):
                continue
            assert self._token is not None
            try:
                trio.from_thread.run_sync(self._found, text, trio_token=self._token)
            except (trio.RunFinishedError, trio.Cancelled):
                return

    def _found(self, text: str) -> None:
        self.num_found += 1
        self._on_found(text)
