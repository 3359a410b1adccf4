"""What no run is meant to raise: told with seed, step, peer and the command that shows it again, as a violation is.

Knows a scenario and hosts; no world, and no rule.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from p2pfm.errors import ChainError, OperatorError, WorldError
from sim.checks import Violation, replay_command
from sim.host import Host
from sim.scenarios import Scenario


class Breakdown(Violation):
    """Code of ours raised in the middle of a run: a bug in p2pfm, found."""

    def __init__(self, text: str, kind: str) -> None:
        """Args: text: all of it; kind: which exception came from where, without numbers: the same for one bug."""
        super().__init__(text, kind)
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def telling_breakdowns(
    scenario: Scenario, tell_moment: Callable[[], str] = lambda: "outside of all steps"
) -> Iterator[None]:
    """The driver's top: what is raised in here and has no fate of its own (a person's, the world's) is a Breakdown.

    Args:
        scenario: what runs; tell_moment: how far it has come, as in "step 5, 1000 ms", where there is a world.

    Raises:
        Breakdown: from what was raised.
    """
    try:
        yield
    except (Violation, OperatorError, OSError, MemoryError):
        raise
    except Exception as error:  # whatever a world raises is a bug of ours, and is to be seen again
        if isinstance(error, WorldError) and not isinstance(error, ChainError):
            raise  # a machine of a cluster was lost
        frame = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__} in {frame.name} of {Path(frame.filename).name}"
        where = f"seed {scenario.seed}, {tell_moment()}, peers {_find_peer(error)}"
        text = f"{where}: {kind}, line {frame.lineno}: {error}. Replay: {replay_command(scenario)}"
        raise Breakdown(text, kind) from error


def _find_peer(error: Exception) -> str:
    """Whose step it was: read from the calls under way, so that a step itself pays nothing for it."""
    found = "none"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        host = frame.f_locals.get("host")
        if isinstance(host, Host):
            found = host.me
    return found
