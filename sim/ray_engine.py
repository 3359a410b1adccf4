"""A Ray cluster as the simulator's machines: whole runs spread over it, or the training of one run's peers.

Knows Ray, which is an extra and imported only here, and the Workshop that it spreads; no event and no rule. Every
machine needs this same p2pfm.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

from p2pfm.config import NetworkConfig
from p2pfm.errors import ConfigError, OperatorError, WorldError
from p2pfm.lora.compress import Update
from p2pfm.protocol.events import Condense, Evaluate, Evaluated, Merge, Merged, Scored, ScoreUpdates, Train, Trained
from p2pfm.types import Digest, PeerId
from sim.disk import Disk, Ghost
from sim.faults import CABALS
from sim.report import SimReport, run_scenario
from sim.scenarios import AdversaryKind, Scenario, compute_kinds, make_network
from sim.workshop import make_tensor_workshop


@contextmanager
def open_ray() -> Iterator[Any]:
    """The module `ray`, connected: to the cluster of $RAY_ADDRESS, else one on this machine, else one of its own.

    Raises:
        OperatorError: no Ray here, or no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise OperatorError("--engine ray needs Ray, which is an extra: pip install 'p2pfm[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    # Ray would give each worker one thread, and a sum's last bits may depend on how many share it.
    num_threads = os.environ.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    try:
        # Its remarks would be printed into the results.
        ray.init(
            log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": {"OMP_NUM_THREADS": num_threads}}
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise OperatorError(f"no Ray cluster at {os.environ.get('RAY_ADDRESS', 'auto')!r}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def run_everywhere(scenarios: Sequence[Scenario], on_done: Callable[[int, SimReport], None]) -> None:
    """Run every scenario, each as one task of one core.

    Raises:
        ConfigError: one of them runs in this process only.
        OperatorError: see `open_ray`.
        Violation: an invariant does not hold; a note names the scenario's position.
        WorldError: a machine was lost.
    """
    for scenario in scenarios:
        _validate_ledger(scenario)
    with open_ray() as ray:
        task = ray.remote(num_cpus=1, max_retries=0)(run_scenario)
        running = {task.remote(scenario): index for index, scenario in enumerate(scenarios)}
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            index = running.pop(done)
            on_done(index, _get(ray, done, f"run {index} of the sweep (seed {scenarios[index].seed})"))


@contextmanager
def spread(scenario: Scenario) -> Iterator["RayWorkshop"]:
    """A scenario's workshop with its training on all cores of a Ray cluster: for `World(scenario, workshop=...)`.

    Raises:
        ConfigError: peers of this scenario train nothing.
        OperatorError: see `open_ray`.
    """
    _validate_ledger(scenario)
    if scenario.learner.kind == "digests":
        raise ConfigError("--engine ray spreads the peers' training, and with the learner digests nobody trains")
    with open_ray() as ray:
        yield RayWorkshop(ray, scenario)


@dataclass(slots=True)
class Job:
    """One host's training of one round, with all that it reads."""

    index: int
    action: Train
    residual: bytes | None


@dataclass(slots=True)
class Done:
    """What came of it, with the blobs that it wrote."""

    trained: Trained
    blobs: dict[Digest, bytes]
    kept: tuple[PeerId, Update] | None
    """Who made the payload and what is in it, where that is not coded."""


class Bench:
    """One core's part of a workshop, in a process of its own: it trains always the same hosts, whose learners it has.

    A learner may remember (who replays an update must have seen it), so no host changes its bench.
    """

    def __init__(self, scenario: Scenario, config: NetworkConfig, kinds: Sequence[AdversaryKind | None]) -> None:
        self._workshop = make_tensor_workshop(scenario, config, kinds)

    def train(self, jobs: Sequence[Job], base: bytes) -> list[Done]:
        """All jobs from one base, in order."""
        desks = [_Desk(job, base) for job in jobs]
        for job, desk in zip(jobs, desks, strict=True):
            self._workshop.expect(job.index, desk, job.action)
        return [self._train(job, desk) for job, desk in zip(jobs, desks, strict=True)]

    def _train(self, job: Job, desk: "_Desk") -> Done:
        trained = self._workshop.train(job.index, desk, job.action)
        kept = self._workshop.get_kept(trained.payload)
        self._workshop.forget({trained.payload})
        return Done(trained, desk.written, kept)

    def get_machine(self) -> str:
        """The Ray node that it is on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())


class _Desk(Disk):
    """What one job reads, and what it writes."""

    def __init__(self, job: Job, base: bytes) -> None:
        super().__init__({})
        self.put_as(job.action.base, base)
        if job.action.residual is not None and job.residual is not None:
            self.put_as(job.action.residual, job.residual)
        self.written: dict[Digest, bytes] = {}

    def put_as(self, digest: Digest, data: bytes) -> Digest:
        """See Disk."""
        if hasattr(self, "written") and not isinstance(data, Ghost):
            self.written[digest] = data
        return super().put_as(digest, data)


class RayWorkshop:
    """A workshop whose hosts train on a cluster's benches; all else is done here. Implements Workshop.

    All training that is expected when the first result is asked for begins then, everywhere at once. Peers that train
    together share a bench, and so do those of a cabal: each needs what all of them learn.
    """

    def __init__(self, ray: Any, scenario: Scenario) -> None:
        """`ray`: the connected module, which must stay connected as long as this is used."""
        config, kinds = make_network(scenario), compute_kinds(scenario)
        num_benches = max(1, min(int(ray.cluster_resources().get("CPU", 1)), scenario.num_peers))
        make_bench = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(Bench)
        self._ray = ray
        self._inner = make_tensor_workshop(scenario, config, kinds)
        self._benches = [make_bench.remote(scenario, config, kinds) for _ in range(num_benches)]
        size = self._inner.group_size
        self._bench_of = [0 if kind in CABALS else index // size % num_benches for index, kind in enumerate(kinds)]
        self._expected: dict[tuple[int, Train], Job] = {}
        self._bases: dict[Digest, bytes] = {}
        self._begun: dict[tuple[int, Train], _Begun] = {}

    def get_machines(self) -> list[str]:
        """The Ray node of each bench."""
        return [str(machine) for machine in self._ray.get([bench.get_machine.remote() for bench in self._benches])]

    def get_genesis(self) -> bytes:
        """See Workshop."""
        return self._inner.get_genesis()

    def expect(self, index: int, disk: Disk, action: Train) -> None:
        """See Workshop."""
        residual = None if action.residual is None else disk.get(action.residual)
        self._expected[index, action] = Job(index, action, residual)
        self._bases[action.base] = disk.get(action.base)

    def train(self, index: int, disk: Disk, action: Train) -> Trained:
        """See Workshop."""
        if (index, action) in self._expected:
            self._begin()
        begun = self._begun.pop((index, action))
        if begun.batch.done is None:
            begun.batch.done = _get(self._ray, begun.batch.result, "training on the cluster")
        done = begun.batch.done[begun.position]
        for digest, data in done.blobs.items():
            disk.put_as(digest, data)
        if done.kept:
            self._inner.keep(disk, done.trained.payload, done.trained.payload_bytes, *done.kept)
        return done.trained

    def score(self, index: int, disk: Disk, action: ScoreUpdates, rng: Random) -> Scored:
        """See Workshop."""
        return self._inner.score(index, disk, action, rng)

    def merge(self, index: int, disk: Disk, action: Merge | Condense) -> Merged:
        """See Workshop."""
        return self._inner.merge(index, disk, action)

    def evaluate(self, disk: Disk, action: Evaluate) -> Evaluated:
        """See Workshop."""
        return self._inner.evaluate(disk, action)

    def validate(self, kind: str, digest: Digest, disk: Disk) -> tuple[bool, PeerId | None]:
        """See Workshop."""
        return self._inner.validate(kind, digest, disk)

    def make_empty_payload(self, maker: PeerId) -> bytes:
        """See Workshop."""
        return self._inner.make_empty_payload(maker)

    def get_optimum_loss(self) -> float | None:
        """See Workshop."""
        return self._inner.get_optimum_loss()

    def get_backdoor(self, base: Digest) -> float | None:
        """See Workshop."""
        return self._inner.get_backdoor(base)

    def forget(self, digests: Set[Digest]) -> None:
        """See Workshop."""
        self._inner.forget(digests)

    def _begin(self) -> None:
        """Send all that is expected to its benches, one batch a base and bench."""
        batches: dict[tuple[int, Digest], list[Job]] = {}
        for job in self._expected.values():
            batches.setdefault((self._bench_of[job.index], job.action.base), []).append(job)
        bases = {digest: self._ray.put(data) for digest, data in self._bases.items()}
        newest = max(job.action.round for job in self._expected.values())
        # Hosts that died never asked for theirs.
        self._begun = {key: begun for key, begun in self._begun.items() if key[1].round >= newest - 1}
        for (number, digest), jobs in batches.items():
            batch = _Batch(self._benches[number].train.remote(jobs, bases[digest]))
            for position, job in enumerate(jobs):
                self._begun[job.index, job.action] = _Begun(batch, position)
        self._expected, self._bases = {}, {}


@dataclass(slots=True)
class _Batch:
    result: Any
    """Ray's promise of it."""
    done: list[Done] | None = field(default=None)


@dataclass(slots=True)
class _Begun:
    batch: _Batch
    position: int


def _validate_ledger(scenario: Scenario) -> None:
    if scenario.ledger == "evm":
        raise ConfigError("--engine ray: a real EVM runs in this process only: take ledger memory, or --engine local")


def _get(ray: Any, promise: Any, what: str) -> Any:
    """What a promise came to, or the error of the code behind it."""
    try:
        return ray.get(promise)
    except ray.exceptions.RayTaskError as error:
        error.cause.add_note(what)
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise WorldError(f"{what}: the cluster lost it: {error}") from error
