"""How a command ends by a signal: children ended, the cursor shown, files removed, and no signal lost.

For what runs in the main thread; a process that serves on trio has `nodes/ending.py`.
"""

import errno
import os
import signal
import sys
import threading

AGAIN_S = 0.05
"""Until a signal that Python dropped comes again."""


def hear_interrupts() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, whoever started us, and none is lost."""
    # A shell that runs us in the background starts us with Ctrl-C ignored; what we started must end by it all the same.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = _interrupt_again


def end_in_order() -> None:
    """From now on SIGTERM and SIGHUP end this process as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup asked for that
            signal.signal(number, _end)


def _interrupt_again(lost: "sys.UnraisableHookArgs") -> None:
    """A signal within a destructor is dropped by Python (urllib3 closes sockets in one): it comes once more."""
    if isinstance(lost.exc_value, KeyboardInterrupt):
        number: int = signal.SIGINT
    elif isinstance(lost.exc_value, _Ended):
        number = lost.exc_value.number
    else:
        sys.__unraisablehook__(lost)
        return
    threading.Timer(AGAIN_S, os.kill, (os.getpid(), number)).start()


class _Ended(SystemExit):
    """By a signal, with its exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def _end(number: int, frame: object) -> None:
    for descriptor in (1, 2):
        if _is_hung_up(descriptor):  # what is still said on the way out would be an error
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), descriptor)
    raise _Ended(number)


def _is_hung_up(descriptor: int) -> bool:
    """It was a terminal, and that was closed."""
    try:
        os.get_terminal_size(descriptor)
    except OSError as error:
        return error.errno == errno.EIO
    return False
