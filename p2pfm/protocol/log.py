"""The format of a peer's event log: bytes in, structs out, so that any driver can replay what happened to a peer.

A log is a sequence of length-prefixed JSON records (wei exceed MessagePack's 64 bits): one `LogHeader`, then one
`LogRecord` for each event. Knows no file. A log that ends in the middle of a record (the process was killed) reads up
to the record before.
"""

from collections.abc import Iterator, Sequence

import msgspec

from p2pfm.config import NetworkConfig
from p2pfm.errors import OperatorError
from p2pfm.protocol.events import AnyAction, AnyEvent, Durable
from p2pfm.types import Digest, Millis, PeerId, compute_digest

FORMAT = 1
LENGTH_BYTES = 4  # big endian
RECORD_BYTES_MAX = 64 * 1024 * 1024  # a length above this is damage, not a record
DAMAGE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding says of bytes that were not written here."""


class LogHeader(msgspec.Struct, frozen=True, array_like=True):
    """Where the peer stood when its node started. A log in several files has the same header in each but for `part`."""

    format: int
    network: NetworkConfig
    peer: PeerId
    durable: Durable
    part: int
    """0 for the file that replays from the start, then counting up: later parts go on where the one before ends."""


class LogRecord(msgspec.Struct, frozen=True, array_like=True):
    """`Peer.handle(event, now_ms)` gave actions whose `digest_actions` is `actions`."""

    now_ms: Millis
    event: AnyEvent
    actions: Digest


_header = msgspec.json.Decoder(LogHeader)
_record = msgspec.json.Decoder(LogRecord)
_actions = msgspec.msgpack.Encoder()


def digest_actions(actions: Sequence[AnyAction]) -> Digest:
    """SHA-256 of the actions' MessagePack: what a replay compares."""
    return compute_digest(_actions.encode(list(actions)))


def encode_header(network: NetworkConfig, peer: PeerId, durable: Durable, part: int = 0) -> bytes:
    """The first record of a log."""
    return _frame(msgspec.json.encode(LogHeader(FORMAT, network, peer, durable, part)))


def encode_record(now_ms: Millis, event: AnyEvent, actions: Sequence[AnyAction]) -> bytes:
    """One event and the digest of its actions."""
    return _frame(msgspec.json.encode(LogRecord(now_ms, event, digest_actions(actions))))


def read_log(data: bytes) -> tuple[LogHeader, Iterator[LogRecord]]:
    """A log's header, and its records in order.

    Raises:
        OperatorError: not a log, of another format, or damaged before its end (also while iterating).
    """
    frames = _frames(data)
    try:
        header = _header.decode(next(frames))
    except StopIteration:
        raise OperatorError("the event log is empty: expected a header record") from None
    except DAMAGE as error:
        raise OperatorError(f"not an event log of this version: {error}") from error
    if header.format != FORMAT:
        raise OperatorError(f"an event log of format {header.format}, expected {FORMAT}")
    return header, _records(frames)


def _records(frames: Iterator[bytes]) -> Iterator[LogRecord]:
    for position, frame in enumerate(frames):
        try:
            yield _record.decode(frame)
        except DAMAGE as error:
            raise OperatorError(f"record {position} of the event log is damaged: {error}") from error


def _frame(data: bytes) -> bytes:
    assert len(data) <= RECORD_BYTES_MAX
    return len(data).to_bytes(LENGTH_BYTES, "big") + data


def _frames(data: bytes) -> Iterator[bytes]:
    start = 0
    while start + LENGTH_BYTES <= len(data):
        size = int.from_bytes(data[start : start + LENGTH_BYTES], "big")
        start += LENGTH_BYTES
        if size > RECORD_BYTES_MAX:
            raise OperatorError(f"the event log is damaged: a record of {size} bytes")
        if start + size > len(data):
            return
        yield data[start : start + size]
        start += size
