"""Many runs at once: on this machine's cores, or on a Ray cluster's. A run's result does not depend on where it ran.

Knows scenarios and reports; no world.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from typing import Literal

from p2pfm.errors import ConfigError, WorldError
from sim.estimate import compute_estimate, get_free_bytes
from sim.ray_engine import run_everywhere
from sim.report import SimReport, run_scenario
from sim.scenarios import Scenario, validate_scenario

Engine = Literal["local", "ray"]

OnDone = Callable[[int, SimReport], None]
"""Told a scenario's position and its report, in the order in which runs end."""


def run_sweep(
    scenarios: Sequence[Scenario], engine: Engine = "local", on_done: OnDone | None = None
) -> list[SimReport]:
    """Run every scenario, several at a time; the reports in the scenarios' order.

    Args:
        scenarios: what to run.
        engine: "local": as many processes as this machine has cores and memory for; "ray": a Ray cluster's, see
            `sim.ray_engine.open_ray`.
        on_done: see OnDone.

    Raises:
        ConfigError: a scenario that cannot run, told before any runs.
        Violation: an invariant does not hold; no further run is begun. A note names the scenario's position.
        OperatorError: no Ray where it is asked for.
        WorldError: a process of a run died.
    """
    for index, scenario in enumerate(scenarios):
        try:
            validate_scenario(scenario)
        except ConfigError as error:
            raise ConfigError(f"run {index} of the sweep (seed {scenario.seed}): {error}") from error
    reports: dict[int, SimReport] = {}

    def keep(index: int, report: SimReport) -> None:
        reports[index] = report
        if on_done:
            on_done(index, report)

    num_workers = compute_num_workers(scenarios) if engine == "local" else 0
    if engine == "ray":
        run_everywhere(scenarios, keep)
    elif num_workers > 1:
        _run_in_processes(scenarios, num_workers, keep)
    else:
        for index, scenario in enumerate(scenarios):
            with _naming(index, scenario):
                keep(index, run_scenario(scenario))
    return [reports[index] for index in range(len(scenarios))]


def compute_num_workers(scenarios: Sequence[Scenario]) -> int:
    """Processes: no more than runs, than cores that this process may use, or than the largest run fits in memory."""
    if not scenarios:
        return 0
    run_bytes = max(compute_estimate(scenario).memory_bytes for scenario in scenarios)
    return max(1, min(len(scenarios), len(os.sched_getaffinity(0)), int(get_free_bytes() / run_bytes)))


def _run_in_processes(scenarios: Sequence[Scenario], num_workers: int, on_done: OnDone) -> None:
    # Spawned: a fork would copy this process's threads' locks, torch's among them.
    before = set(active_children())
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), _follow_parent)
    try:
        running: dict[Future[SimReport], int] = {pool.submit(run_scenario, s): i for i, s in enumerate(scenarios)}
        for future in as_completed(running):
            index = running[future]
            with _naming(index, scenarios[index]):
                on_done(index, future.result())
    except BaseException:
        for process in set(active_children()) - before:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Ctrl-C and SIGTERM are for the process that was started: it ends the others, and they end if it was killed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "this is a child"
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _naming(index: int, scenario: Scenario) -> Iterator[None]:
    """Errors say which run they are of."""
    where = f"run {index} of the sweep (seed {scenario.seed})"
    try:
        yield
    except BrokenProcessPool as error:
        raise WorldError(f"{where}: its process was killed, perhaps for want of memory; run fewer at a time") from error
    except Exception as error:
        error.add_note(where)
        raise
