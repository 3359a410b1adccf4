"""The folder of a demonstration: how it is told from any other, and what of an earlier one is removed.

Knows the names of what a demonstration writes; a folder with anything else in it is refused and left as it is.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from p2pfm.errors import OperatorError

MARK = ".p2pfm-demo"
"""Written first, and by a demonstration only: a chain's log and peers' homes lie in other folders too."""
REWARDS_PICTURE, TRAINING_PICTURE = "rewards.png", "training.png"
MADE = re.compile(rf"peer-[0-4]|data|chain\.log|{re.escape(REWARDS_PICTURE)}|{re.escape(TRAINING_PICTURE)}")


@contextmanager
def claim_demo_folder(folder: Path, json_path: Path | None = None) -> Iterator[None]:
    """For the length of the block `folder` is this demonstration's, emptied of what an earlier one made.

    Args:
        json_path: where the figures will go: the one file of another name that may lie there, and is kept till then.

    Raises:
        OperatorError: there is something else, or a demonstration runs there; or the figures could not be written.
    """
    if json_path is not None:
        _check_json_path(json_path, folder)
    _check_contents(folder, json_path)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / MARK).open("a") as mark:
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with this process, however that ends
        except BlockingIOError:
            raise OperatorError(f"a demo is running in {folder}; end it, or choose another --out") from None
        for path in folder.iterdir():
            if MADE.fullmatch(path.name):
                _remove(path)
        yield


def _check_json_path(json_path: Path, folder: Path) -> None:
    """Before the run: after it, minutes of figures would be lost."""
    parent = json_path.absolute().parent
    is_there = parent.is_dir() or parent == folder.absolute()
    if not is_there or json_path.is_dir() or (parent.is_dir() and not os.access(parent, os.W_OK)):
        raise OperatorError(f"--json: expected a file in a folder that exists and can be written, got {json_path}")


def _check_contents(folder: Path, json_path: Path | None) -> None:
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()}
    if names and MARK not in names:
        raise OperatorError(f"{folder} holds something else than an earlier demo; choose another --out")
    if json_path is not None and json_path.absolute().parent == folder.absolute():
        names.discard(json_path.name)
    if foreign := sorted(name for name in names - {MARK} if not MADE.fullmatch(name)):
        raise OperatorError(f"{folder} holds {foreign[0]}, which no demo made; move it, or choose another --out")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
