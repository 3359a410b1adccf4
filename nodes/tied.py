"""Child processes that end with whoever started them, however that one ended: its end closes their standard input.

python -m nodes.tied COMMAND...      runs a foreign program so tied
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

STOP_S = 5.0
"""A child that does not end in this time after being asked is killed."""


def end_with_stdin() -> None:
    """From now on, end this process (SIGTERM) when its standard input closes."""
    threading.Thread(target=_wait_for_end, daemon=True).start()


def start_tied(command: Sequence[str], output: Any, **options: Any) -> "subprocess.Popen[bytes]":
    """Start a program that calls `end_with_stdin`, out of reach of the terminal's Ctrl-C: we end it in order.

    Args:
        output: file or descriptor for its output and errors.
    """
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True, **options
    )


def stop(process: "subprocess.Popen[bytes]", wait_s: float = STOP_S) -> None:
    """End a child of `start_tied`, by force if it does not listen: then with all that it started."""
    process.terminate()
    try:
        process.wait(wait_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its session's group
        process.wait()


def describe_end(code: int) -> str:
    """A child's exit code in words that follow its name."""
    return f"ended with code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


def _wait_for_end() -> None:
    while os.read(0, 4096):  # not sys.stdin: its lock would be held when the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Run the command given on the command line; its exit code is ours, 128 + N where signal N ended it."""
    asked = threading.Event()
    child: list[subprocess.Popen[bytes]] = []

    def end(number: int, frame: object) -> None:
        asked.set()
        for process in child:
            process.terminate()

    signal.signal(signal.SIGTERM, end)  # first: a child that starts while we are told to end would be left behind
    child.append(subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL))
    if asked.is_set():
        child[0].terminate()
    end_with_stdin()
    code = child[0].wait()
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
