"""However a local network ends, nothing that it started lives on."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from nodes.ports import get_free_port

pytestmark = [pytest.mark.slow, pytest.mark.alone]

GONE_S = 20
HIDE_CURSOR, SHOW_CURSOR = b"\x1b[?25l", b"\x1b[?25h"
WORLD, INTERRUPTED = 1, 130
LOSES_ITS_INTERRUPT = """
import os, signal, sys, time
from nodes import cli

class Closed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)  # where the interrupt is raised, and dropped

@cli.app.command("lose")
def lose():
    Closed()
    time.sleep(60)

sys.argv = ["p2pfm", "lose"]
cli.main()
"""


HAS_A_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that its end reaches this process as a signal
from nodes import cli
cli.main()
"""


def wait_for(is_done: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_done():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def start(folder: Path, model: str = "tiny") -> tuple["subprocess.Popen[bytes]", list[psutil.Process]]:
    """`p2pfm localnet up` in a session of its own, and its children once chain and peers are there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nodes.cli", "localnet", "up", "--peers", "2", "--model", model, "--out", str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    children: list[psutil.Process] = []

    def are_there() -> bool:
        children[:] = psutil.Process(process.pid).children(recursive=True)
        return len(children) >= 3 and (folder / "peer-1" / "node.log").exists()

    wait_for(are_there, 90, "a chain and two peers were started")
    return process, children


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_lives_on_after(number: signal.Signals, tmp_path: Path) -> None:
    process, children = start(tmp_path / "net")
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C reaches the whole group
    else:
        process.send_signal(number)
    try:
        code = process.wait(GONE_S)
        wait_for(lambda: not any(child.is_running() for child in children), GONE_S, f"left behind: {children}")
    finally:
        process.kill()
        for child in children:
            if child.is_running():
                child.kill()
    assert code == (-number if number == signal.SIGKILL else 128 + number)


@pytest.mark.parametrize(("victim", "named"), [("nodes.testnet", "the chain"), ("peer-1", "node 1")])
def test_a_death_ends_a_local_network_with_an_error(victim: str, named: str, tmp_path: Path) -> None:
    process, children = start(tmp_path / "net", "toy")
    next(child for child in children if victim in " ".join(child.cmdline())).kill()
    try:
        _, told = process.communicate(timeout=GONE_S)
    finally:
        process.kill()
    assert process.returncode == WORLD
    assert f"error: {named} was ended by SIGKILL".encode() in told
    wait_for(lambda: not any(child.is_running() for child in children), GONE_S, f"left behind: {children}")


@pytest.mark.parametrize("how", ["SIGTERM", "SIGHUP", "its terminal is closed"])
def test_a_local_network_that_is_told_to_end_leaves_nothing_behind_but_the_cursor(how: str, tmp_path: Path) -> None:
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", HAS_A_TERMINAL, "localnet", "up", "--peers", "1", "--model", "toy"],
        stdin=its, stdout=its, stderr=its, start_new_session=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    os.close(its)
    told = b""
    try:
        while HIDE_CURSOR not in told:
            told += os.read(ours, 4096)
        if how.startswith("SIG"):
            process.send_signal(signal.Signals[how])
            with contextlib.suppress(OSError):  # the other side was closed
                while piece := os.read(ours, 4096):
                    told += piece
            assert SHOW_CURSOR in told
    finally:
        os.close(ours)
        code = end(process)
    assert code == 128 + (signal.SIGTERM if how == "SIGTERM" else signal.SIGHUP)
    assert list(tmp_path.iterdir()) == []


def end(process: "subprocess.Popen[bytes]") -> int:
    """The code with which it ends by itself, in time."""
    try:
        return process.wait(GONE_S)
    finally:
        process.kill()


def test_a_chain_that_dies_is_an_error_of_testnet_up(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "nodes.cli", "testnet", "up", "--model", "toy", "--out", str(tmp_path / "net"),
         "--port", str(get_free_port())],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        wait_for((tmp_path / "net" / "network.toml").exists, 60, "the network was written down")
        (chain,) = psutil.Process(process.pid).children()
        chain.kill()
        _, told = process.communicate(timeout=GONE_S)
    finally:
        process.kill()
    assert process.returncode == WORLD
    assert b"error: the chain was ended by SIGKILL" in told


def test_ctrl_c_within_a_destructor_is_not_lost() -> None:
    """urllib3 closes its sockets in one: without `nodes.signals` one in some forty went on."""
    done = subprocess.run([sys.executable, "-c", LOSES_ITS_INTERRUPT], capture_output=True, text=True, timeout=GONE_S)
    assert (done.returncode, done.stderr) == (INTERRUPTED, "")
