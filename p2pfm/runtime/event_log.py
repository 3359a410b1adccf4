"""Writes what happens to a peer into files that `p2pfm sim replay` replays (`p2pfm.protocol.log` is their format).

One file a start of the node and, beyond a size, another, which goes on where the one before ends. Not synced: a log
explains, it does not restore.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from p2pfm.config import NetworkConfig
from p2pfm.protocol.events import AnyAction, AnyEvent, Durable
from p2pfm.protocol.log import LogHeader, LogRecord, encode_header, encode_record
from p2pfm.protocol.log import read_log as read_log_bytes
from p2pfm.runtime.files import make_private_folder
from p2pfm.types import Millis, PeerId

SUFFIX = ".events"
FILE_BYTES_MAX = 64 * 1024 * 1024
FILES_MAX = 8  # the oldest go


class EventLogWriter:
    """Appends to `folder/NNNNNN.events`. A start opens a new file, and so does a file that is full."""

    def __init__(
        self,
        folder: Path,
        network: NetworkConfig,
        peer: PeerId,
        durable: Durable,
        file_bytes_max: int = FILE_BYTES_MAX,
        files_max: int = FILES_MAX,
    ) -> None:
        make_private_folder(folder)
        self._folder = folder
        self._start = (network, peer, durable)
        self._part = 0
        self._file_bytes_max = file_bytes_max
        self._files_max = files_max
        self._file: BinaryIO
        self._size = 0
        self._begin()

    def append(self, now_ms: Millis, event: AnyEvent, actions: Sequence[AnyAction]) -> None:
        """One event, and the digest of what the peer did about it."""
        data = encode_record(now_ms, event, actions)
        if self._size + len(data) > self._file_bytes_max:
            self._file.close()
            self._begin()
        self._file.write(data)
        self._size += len(data)

    def close(self) -> None:
        """End the log."""
        self._file.close()

    def _begin(self) -> None:
        names = sorted(self._folder.glob(f"*{SUFFIX}"))
        number = int(names[-1].stem) + 1 if names else 0
        for path in names[: max(0, len(names) + 1 - self._files_max)]:
            path.unlink(missing_ok=True)
        # Unbuffered: a record is with the operating system when append returns, so SIGKILL loses none.
        self._file = (self._folder / f"{number:06d}{SUFFIX}").open("xb", buffering=0)
        header = encode_header(*self._start, part=self._part)
        self._part += 1
        self._file.write(header)
        self._size = len(header)


def read_log(path: Path) -> tuple[LogHeader, Iterator[LogRecord]]:
    """A log file's header and records; tolerates a cut tail. Raises: OperatorError, OSError."""
    return read_log_bytes(path.read_bytes())
