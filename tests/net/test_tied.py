"""A tied child ends with whoever started it, and so does the foreign program that it wraps."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from nodes.tied import start_tied, stop

GONE_S = 10
DEAF = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""
TOLD_TO_END_WHILE_IT_STARTS = """
import os, pathlib, signal, subprocess, sys
from nodes import tied

class Popen(subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        pathlib.Path(sys.argv[-1]).write_text(str(self.pid))
        os.kill(os.getpid(), signal.SIGTERM)

subprocess.Popen = Popen
tied.main()
"""


def wait_for(is_done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + GONE_S
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def read_pid(path: Path) -> int:
    wait_for(lambda: path.exists() and bool(path.read_text()))
    return int(path.read_text())


def expect_gone(pid: int) -> None:
    """Or end it, and fail."""
    try:
        wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except AssertionError:
        os.kill(pid, signal.SIGKILL)
        pytest.fail(f"{pid} was left behind")


def test_a_foreign_program_that_does_not_listen_is_killed_with_its_wrapper(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    wrapper = start_tied(
        [sys.executable, "-m", "nodes.tied", sys.executable, "-c", DEAF, str(path)], subprocess.DEVNULL
    )
    pid = read_pid(path)
    stop(wrapper, wait_s=0.2)
    expect_gone(pid)


def test_a_wrapper_told_to_end_while_it_starts_its_program_leaves_none(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    program = [sys.executable, "-c", "import time; time.sleep(60)", str(path)]
    with start_tied([sys.executable, "-c", TOLD_TO_END_WHILE_IT_STARTS, *program], subprocess.DEVNULL) as wrapper:
        wrapper.wait(GONE_S)
    expect_gone(read_pid(path))


def test_a_wrapper_tells_how_its_program_ended() -> None:
    for script, code in (("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 128 + 9)):
        command = [sys.executable, "-m", "nodes.tied", sys.executable, "-c", script]
        with start_tied(command, subprocess.DEVNULL) as wrapper:
            assert wrapper.wait(GONE_S) == code
