"""Replays a node's event log into a fresh Peer and compares what it does with what the node did.

Knows the log's format and the core; no world, no model. The same events give the same actions on every machine, so a
difference means other code, a damaged log, or a core that is not pure.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import msgspec

from p2pfm.config import validate_network
from p2pfm.errors import ConfigError, OperatorError
from p2pfm.protocol.events import Durable
from p2pfm.protocol.log import LogHeader, LogRecord, digest_actions, read_log
from p2pfm.protocol.peer import Peer
from p2pfm.types import Millis, PeerId, Round, compute_digest

SUFFIX = ".events"


class Difference(msgspec.Struct, frozen=True):
    """The first step at which the replayed peer did something else."""

    position: int
    """Of the record, from 0."""
    now_ms: Millis
    event: str
    """The event's kind."""
    expected: str
    """Digest of the actions that the log holds (hex)."""
    got: str
    """Digest of the actions here (hex)."""
    actions: tuple[str, ...]
    """Kinds of the actions here, in order."""


class ReplayReport(msgspec.Struct, frozen=True):
    """What came of one replay."""

    peer: PeerId
    network: str
    num_events: int
    """Events replayed: up to the first difference, where there is one."""
    first_round: Round
    last_round: Round
    head_round: int
    """The newest certified round at the end; -1: none."""
    state: str
    """SHA-256 (hex) of the durable state at the end: that of what the node saved, if it saved since its last change."""
    difference: Difference | None


def digest_state(durable: Durable) -> str:
    """What `ReplayReport.state` is of a durable state."""
    return compute_digest(msgspec.msgpack.encode(durable)).hex()


def replay(*parts: bytes) -> ReplayReport:
    """Feed the log in these parts (bytes of its files, in order) to a fresh Peer.

    Raises:
        OperatorError: not a log, damaged, parts of different logs, or its beginning is missing.
    """
    read = [read_log(part) for part in parts]
    if not read:
        raise OperatorError("expected at least one event log")
    header = read[0][0]
    try:
        validate_network(header.network)
    except ConfigError as error:
        raise OperatorError(f"the event log's header is damaged: {error}") from error
    _validate_parts([head for head, _ in read])
    return _replay_records(header, chain.from_iterable(records for _, records in read))


def replay_path(path: Path) -> tuple[ReplayReport, ...]:
    """Replay a log file, or every log in a folder (a node's home or its `events`, or one of homes): one report a start
    of a node.

    Raises:
        OperatorError: no log there, or see `replay`.
    """
    if path.is_file():
        return (replay(path.read_bytes()),)
    homes = [path, *sorted(home for home in path.glob("*") if (home / "events").is_dir())]
    found = {home: _list_logs(home) for home in homes}
    if not any(found.values()):
        raise OperatorError(f"no event log at {path}: expected a *{SUFFIX} file, or a node's home folder")
    return tuple(report for files in found.values() if files for report in _replay_files(files))


def _list_logs(home: Path) -> list[Path]:
    folder = home / "events" if (home / "events").is_dir() else home
    return sorted(folder.glob(f"*{SUFFIX}"))


def _replay_files(files: Sequence[Path]) -> list[ReplayReport]:
    """One node's logs, in order."""
    starts: list[list[bytes]] = []
    for file in files:
        data = file.read_bytes()
        part = read_log(data)[0].part
        if part == 0:
            starts.append([data])
        elif starts:
            starts[-1].append(data)
        # Else the beginning of the oldest start was rotated away: that start cannot be replayed.
    if not starts:
        raise OperatorError(f"no log in {files[0].parent} replays from its beginning: older files were rotated away")
    return [replay(*parts) for parts in starts]


def _validate_parts(headers: Sequence[LogHeader]) -> None:
    for number, header in enumerate(headers):
        if header.part != number:
            raise OperatorError(f"expected part {number} of the event log, got part {header.part}")
        if msgspec.structs.replace(header, part=0) != headers[0]:
            raise OperatorError(f"part {number} is of another start of the node")


def _replay_records(header: LogHeader, records: Iterator[LogRecord]) -> ReplayReport:
    peer = Peer(header.peer, header.network, header.durable)
    num_events, first_round = 0, Round(-1)
    difference = None
    for position, record in enumerate(records):
        actions = peer.handle(record.event, record.now_ms)
        num_events += 1
        if position == 0:
            first_round = peer.round
        got = digest_actions(actions)
        if got != record.actions:
            difference = Difference(
                position,
                record.now_ms,
                type(record.event).__name__,
                record.actions.hex(),
                got.hex(),
                tuple(type(action).__name__ for action in actions),
            )
            break
    head = peer.durable.head
    return ReplayReport(
        peer=header.peer,
        network=header.network.name,
        num_events=num_events,
        first_round=first_round,
        last_round=peer.round,
        head_round=head.proposal.round if head else -1,
        state=digest_state(peer.durable),
        difference=difference,
    )
