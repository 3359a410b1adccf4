"""What is said of the time a run will take: by the estimate, then by its own rounds."""

from io import StringIO

import pytest
from rich.console import Console

from p2pfm.protocol.phases import compute_round_start
from p2pfm.types import Millis, Round
from sim.estimate import Estimate, describe
from sim.progress import RunProgress, format_span
from sim.scenarios import Scenario
from sim.world import World


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("sim.progress.monotonic", clock)
    return clock


def make_progress(estimate_s: float) -> RunProgress:
    world = World(Scenario(num_peers=1, num_rounds=4))
    return RunProgress(world, estimate_s, Console(file=StringIO()))


def test_before_the_first_round_ends_the_estimate_counts(clock: Clock) -> None:
    progress = make_progress(40)
    assert progress.compute_left_s(clock(), 0.0) == 40
    assert progress.compute_left_s(clock() + 4, 0.5) == 36


def test_a_first_round_that_is_overdue_is_judged_by_how_far_it_is(clock: Clock) -> None:
    progress = make_progress(40)
    assert progress.compute_left_s(clock() + 30, 0.5) == 15 + 3 * 10


def test_after_a_round_the_rounds_so_far_count(clock: Clock) -> None:
    progress = make_progress(40)
    for took_s in (20, 40):
        clock.now_s += took_s
        progress.on_round(Round(0))
    assert progress.compute_left_s(clock(), 0.0) == 60
    assert progress.compute_left_s(clock() + 10, 0.4) == 50
    for _ in range(2):
        progress.on_round(Round(0))
    assert progress.compute_left_s(clock(), 0.0) == 0
    assert progress.compute_round_share() == 0  # what is left is the time to cool down


def test_within_a_round_the_bar_follows_virtual_time(clock: Clock) -> None:
    progress = make_progress(40)
    world = progress._world
    start_ms, next_ms = (compute_round_start(world.config, Round(number)) for number in (0, 1))
    assert progress.compute_round_share() == 0  # genesis is still to come
    world.schedule.run(Millis((start_ms + next_ms) // 2))
    assert progress.compute_round_share() == pytest.approx(0.5)
    world.schedule.run(Millis(next_ms + 5))
    assert progress.compute_round_share() == 1
    progress.on_round(Round(0))
    assert progress.compute_round_share() < 0.01


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (45.4, "45 s"), (60, "1 min 0 s"), (200, "3 min 20 s"), (3_600, "1 h 0 min"), (7_530, "2 h 5 min")],
)
def test_a_span_of_time_is_told_in_two_units(seconds: float, text: str) -> None:
    assert format_span(seconds) == text


@pytest.mark.parametrize(
    ("cpu_s", "text"),
    [(45, "about 45 s of CPU time"), (600, "about 10 min of CPU time"), (9_000, "about 2.5 h of CPU time")],
)
def test_an_estimate_is_told_in_one_unit(cpu_s: float, text: str) -> None:
    assert describe(Estimate(memory_bytes=1.25e9, cpu_s=cpu_s)) == f"{text} and 1.2 GB of memory"
