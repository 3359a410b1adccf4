"""What the network remembers over restarts. Plain data."""

import msgspec

from p2pfm.runtime.network.bans import BanRecord
from p2pfm.runtime.network.peer_book import KnownAddress


class NetworkMemory(msgspec.Struct, frozen=True):
    """Addresses best first, and who is banned or near it."""

    addresses: tuple[KnownAddress, ...] = ()
    bans: tuple[BanRecord, ...] = ()


EMPTY_MEMORY = NetworkMemory()
