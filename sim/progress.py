"""A bar for a run under way, with an estimate of the time left that also moves within long rounds.

Reads a World's clock and changes nothing in it.
"""

from collections.abc import Iterable
from time import monotonic

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from p2pfm.protocol.phases import compute_round_start
from p2pfm.types import Round
from sim.world import World


class RunProgress(Progress):
    """One world's rounds. `on_round` is to be called at the end of each."""

    def __init__(self, world: World, estimate_s: float, screen: Console) -> None:
        """`estimate_s`: what all rounds are thought to take, which counts until the first has ended."""
        columns = (TextColumn("rounds"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
        super().__init__(*columns, console=screen, transient=True, disable=not screen.is_terminal)
        self._world = world
        self._estimate_s = estimate_s
        self._num_rounds = world.scenario.num_rounds
        self._num_done = 0
        self._started_s = self._round_started_s = monotonic()
        self._bar = self.add_task("rounds", total=self._num_rounds, left="")

    def on_round(self, _: Round) -> None:
        """A round is over."""
        self._num_done += 1
        self._round_started_s = monotonic()

    def get_renderables(self) -> Iterable[RenderableType]:
        """See Progress, whose thread asks for this several times a second."""
        if hasattr(self, "_bar"):
            share = self.compute_round_share()
            left = format_span(self.compute_left_s(monotonic(), share))
            self.update(self._bar, completed=self._num_done + share, left=f"about {left} left")
        return super().get_renderables()

    def compute_round_share(self) -> float:
        """How much of the present round has passed, in virtual time; after the last one there is none."""
        if self._num_done >= self._num_rounds:
            return 0.0
        start = compute_round_start(self._world.config, Round(self._num_done))
        end = compute_round_start(self._world.config, Round(self._num_done + 1))
        return min(1.0, max(0.0, (self._world.schedule.now_ms - start) / (end - start)))

    def compute_left_s(self, now_s: float, share: float) -> float:
        """Time left [s]: by the rounds so far; in the first round by the estimate, unless that is overdue."""
        if self._num_done >= self._num_rounds:
            return 0.0
        in_round_s = now_s - self._round_started_s
        if self._num_done:
            round_s = (self._round_started_s - self._started_s) / self._num_done
        else:
            round_s = self._estimate_s / self._num_rounds
        # A round that takes longer than those before it is judged by how far it is.
        this_s = max(round_s - in_round_s, in_round_s * (1 - share), 0.0)
        return this_s + round_s * max(0, self._num_rounds - self._num_done - 1)


def format_span(seconds: float) -> str:
    """A span of time for people: 45 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
