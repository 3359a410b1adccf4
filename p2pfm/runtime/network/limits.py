"""What one node takes from any sender: bounds, rates, and the word for who breaks a rule.

Plain data; knows no socket.
"""

from collections.abc import Callable
from typing import TypeAlias

import msgspec
from libp2p.io.exceptions import IOException

Blame: TypeAlias = Callable[[str, str], None]
"""Called with a peer id (base58) and the rule that it broke."""


class TransportLimits(msgspec.Struct, frozen=True):
    """Bounds of one node against any sender; all local, none agreed on. Times in seconds, sizes in bytes."""

    gossip_bytes_max: int = 512 * 1024
    gossip_queue_max: int = 2048
    """Messages that wait for the node; beyond it the oldest is dropped and counted."""
    gossip_burst_max: int = 30
    """Own messages published at once; the stock queues lose what exceeds 32."""
    gossip_per_s: float = 100.0
    author_burst_max: int = 400
    """Messages of one author at once, half as many a second: twice what an honest author can publish. The excess is
    dropped and blames nobody."""
    forwarder_burst_max: int = 2000
    """The same for one forwarder, counted before the signature is checked."""
    forwarder_bytes_max: int = 32 * 1024 * 1024
    """The same in bytes."""
    peer_queue_max: int = 256
    """RPCs that wait for one slow gossip peer."""
    peer_queue_bytes_max: int = 16 * 1024 * 1024
    """The same in bytes: a whole burst of the largest messages fits."""
    request_bytes_max: int = 1_000_000
    reply_bytes_max: int = 8_000_000
    frame_bytes_max: int = 1_000_000
    requests_served_max: int = 64
    requests_served_per_peer_max: int = 16
    streams_served_max: int = 64
    streams_served_per_peer_max: int = 32
    held_bytes_max: int = 24 * 1024 * 1024
    """Requests half read and replies half written, of all peers together; beyond it the oldest are dropped."""
    connections_max: int = 300
    connections_per_address_max: int = 128
    handshakes_per_address_max: int = 32
    """Beyond it the oldest unfinished handshake of the same address is cut, so silent sockets block nobody."""
    handshakes_max: int = 256
    """The same for all addresses together: the address that has most loses its oldest."""
    streams_per_connection_max: int = 512
    syn_per_s: float = 500.0
    syn_burst_max: int = 1500
    buffered_per_connection_max: int = 24 * 1024 * 1024
    buffered_max: int = 96 * 1024 * 1024
    """What lies unread in the streams of all connections together; beyond it the connection with most of it ends."""
    window_slack_bytes: int = 256 * 1024
    negotiate_s: float = 10.0
    """For each step of a handshake. Not short: a short one turns a busy machine into one that only retries; silent
    sockets are cut by number, not by time."""
    ping_s: float = 3.0
    silent_s: float = 9.0
    """A connection that sends nothing, not even pongs, for this long is closed."""
    write_stall_s: float = 30.0
    """A writer waits this long for window credit (back-pressure), then its stream is reset."""
    write_bytes_per_s_min: int = 16 * 1024
    """A write of n bytes has n / this many seconds beside `write_stall_s`: credit in drips holds nothing for ever."""
    dials_max: int = 3
    dial_s: float = 10.0
    explore_s: float = 20.0
    """A node that has connections enough dials one further peer this often, so that no group keeps to itself."""
    visit_s: float = 5.0
    """A connection beyond three quarters of the bound is kept this long at least: enough to exchange peers."""
    known_peers_max: int = 1024
    addresses_per_peer_max: int = 8

    @property
    def inbound_max(self) -> int:
        """Connections that others may open here: the last eighth is for those that this node dials itself."""
        return self.connections_max - max(1, self.connections_max // 8)


class RuleBroken(IOException):  # type: ignore[misc]
    """A peer broke a rule of the wire; its connection ends."""


class TokenBucket:
    """`burst` events at once, `per_s` in the long run; the caller brings the time [s]."""

    def __init__(self, burst: float, per_s: float) -> None:
        self._burst = burst
        self._per_s = per_s
        self._tokens = burst
        self._at = 0.0

    def take(self, now: float, amount: int = 1) -> float:
        """Take tokens; returns 0.0 when there were so many, else the seconds until there are (nothing is taken)."""
        if self._at:
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_s)
        self._at = now
        if self._tokens >= amount:
            self._tokens -= amount
            return 0.0
        return (amount - self._tokens) / self._per_s
