"""Files that are whole or absent after a power cut, and folders that nobody else can read. Knows nothing of their
contents.
"""

import os
import stat
from pathlib import Path

from p2pfm.errors import OperatorError

PRIVATE_FOLDER = 0o700
PRIVATE_FILE = 0o600


def make_private_folder(folder: Path) -> None:
    """Create a folder (and its parents) that only its owner may enter. Raises: OperatorError."""
    try:
        folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
    except OSError as error:
        raise OperatorError(f"cannot create {folder}: {error.strerror}") from error


def refuse_shared(path: Path) -> None:
    """A file that holds a secret is its owner's alone. Raises: OperatorError if others can use it, OSError."""
    told = path.stat().st_mode
    mode = stat.S_IMODE(told)
    if stat.S_ISREG(told) and mode & ~PRIVATE_FILE:  # a pipe has no readers but the two at its ends
        raise OperatorError(f"{path} can be used by others (mode {mode:o}); run: chmod 600 {path}")


def write_durably(path: Path, data: bytes, *, is_new: bool = False) -> None:
    """Write `data` so that after any crash `path` holds all of it, or what it held before.

    A private temporary file is synced, moved into place, and the folder synced.

    Args:
        is_new: refuse to replace an existing file.

    Raises:
        FileExistsError: `is_new`, and there is such a file.
        OSError: the disk is full or refuses.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            os.link(temporary, path)  # fails if it exists, in one step
            temporary.unlink()
        else:
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
