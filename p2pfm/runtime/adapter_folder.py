"""Users' adapters on disk: blobs by digest, and the names that this node's users gave them.

Blocking and safe to call from several threads; knows no network, no model, and not what a blob holds. Apart from the
node's store, so that no stranger's adapter ever pushes out what a round needs.
"""

import os
import re
import shutil
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from p2pfm.errors import OperatorError, Reject
from p2pfm.runtime.files import make_private_folder, write_durably
from p2pfm.types import DIGEST_BYTES, Digest, compute_digest

NAMES_FILE = "names.json"
NAMES_MAX = 64
UPLOAD_PREFIX = ".upload-"
"""Of folders in which an upload lies while it is read."""
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
BLOB_NAME = re.compile(rf"[0-9a-f]{{{2 * DIGEST_BYTES}}}")


class AdapterFolder:
    """One folder, which this process alone writes."""

    def __init__(self, folder: Path, bytes_max: int) -> None:
        """`bytes_max`: of all blobs together.

        Raises:
            OperatorError: the folder cannot be made, or its list of names is damaged.
        """
        make_private_folder(folder)
        self.path = folder
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        for leftover in folder.glob(".*.tmp"):  # of a writer that was killed
            leftover.unlink(missing_ok=True)
        for upload in folder.glob(f"{UPLOAD_PREFIX}*"):
            shutil.rmtree(upload, ignore_errors=True)
        self._used = {  # least recently used first
            Digest(bytes.fromhex(path.name)): path.stat().st_size
            for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
            if BLOB_NAME.fullmatch(path.name)
        }
        self._names = self._read_names()

    def names(self) -> Mapping[str, Digest]:
        """What users named, by name."""
        with self._lock:
            return dict(self._names)

    def held(self) -> tuple[Digest, ...]:
        """All blobs, least recently used first."""
        with self._lock:
            return tuple(self._used)

    def has(self, digest: Digest) -> bool:
        """Whether there is a blob of that digest."""
        return digest in self._used

    def put(self, data: bytes) -> Digest:
        """Keep `data`; returns its digest. Unnamed blobs that were not used for longest make room.

        Raises:
            Reject: there is no room beside the named ones.
            OSError: the disk is full.
        """
        digest = compute_digest(data)
        with self._lock:
            if digest in self._used:
                self._touch(digest)
                return digest
            named = set(self._names.values())
            excess = sum(self._used.values()) + len(data) - self._bytes_max
            for other in [other for other in self._used if other not in named]:
                if excess <= 0:
                    break
                excess -= self._used[other]
                self._remove(other)
            if excess > 0:
                raise Reject(
                    f"expected room for {len(data)} bytes beside the named adapters, {excess} are missing; delete one "
                    "(DELETE /v1/adapters/NAME), or raise serving.adapters_bytes_max"
                )
            write_durably(self._file(digest), data)
            self._used[digest] = len(data)
        return digest

    def remove(self, digest: Digest) -> None:
        """Forget a blob, unless a name means it."""
        with self._lock:
            if digest in self._used and digest not in self._names.values():
                self._remove(digest)

    def find(self, digest: Digest) -> bytes | None:
        """The bytes, checked, and used just now; None when not held. A damaged file is removed."""
        with self._lock:
            if digest not in self._used:
                return None
            with suppress(OSError):
                data = self._file(digest).read_bytes()
                if compute_digest(data) == digest:
                    self._touch(digest)
                    return data
            self._remove(digest)
            return None

    def get_part(self, digest: Digest, start: int, length: int) -> tuple[int, bytes]:
        """As `Store.get_part`."""
        if digest not in self._used:
            return 0, b""
        try:
            with self._file(digest).open("rb") as file:
                total = os.fstat(file.fileno()).st_size
                file.seek(min(start, total))
                return total, file.read(length)
        except FileNotFoundError:
            return 0, b""

    def set_name(self, name: str, digest: Digest) -> None:
        """From now on `name` means this blob, which stays until no name means it.

        Raises:
            Reject: no name, or too many of them.
        """
        validate_name(name)
        with self._lock:
            names = {**self._names, name: digest}
            if len(names) > NAMES_MAX:
                raise Reject(f"expected at most {NAMES_MAX} named adapters; delete one (DELETE /v1/adapters/NAME)")
            self._write_names(names)

    def drop_name(self, name: str) -> bool:
        """Forget a name; False: there is none. Its blob goes when there is need of its room."""
        with self._lock:
            if name not in self._names:
                return False
            self._write_names({other: digest for other, digest in self._names.items() if other != name})
            return True

    def _touch(self, digest: Digest) -> None:
        self._used[digest] = self._used.pop(digest)
        with suppress(OSError):
            os.utime(self._file(digest))

    def _remove(self, digest: Digest) -> None:
        del self._used[digest]
        self._file(digest).unlink(missing_ok=True)

    def _file(self, digest: Digest) -> Path:
        return self.path / digest.hex()

    def _write_names(self, names: dict[str, Digest]) -> None:
        hexes = {name: digest.hex() for name, digest in sorted(names.items())}
        write_durably(self.path / NAMES_FILE, msgspec.json.encode(hexes))
        self._names = names

    def _read_names(self) -> dict[str, Digest]:
        path = self.path / NAMES_FILE
        try:
            hexes = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
            names = {name: Digest(bytes.fromhex(text)) for name, text in hexes.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise OperatorError(f"cannot read {path}: {error}. Remove it: adapters then have no names") from error
        return {name: digest for name, digest in names.items() if digest in self._used}


def validate_name(name: str) -> None:
    """Refuse what cannot stand in a model's name. Raises: Reject."""
    if not NAME.fullmatch(name):
        raise Reject(f"expected a name of at most 64 of a-z, 0-9, '.', '_', '-', got {name[:80]!r}")
