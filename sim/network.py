"""How messages travel: latency, loss, partitions, and the moments at which a broadcast arrives. Knows no message.

A broadcast is a wave: receivers that it reaches within one quantum of time share one entry of the schedule, so that a
gossip message costs tens of entries and not one a receiver.
"""

from collections.abc import Iterable
from random import Random

import msgspec

from p2pfm.types import Millis


class Partition(msgspec.Struct, frozen=True):
    """From `start_ms` to `end_ms` after genesis, the first `num_hosts` hosts and the others do not hear each other."""

    start_ms: int
    end_ms: int
    num_hosts: int


class NetworkModel(msgspec.Struct, frozen=True):
    """What a scenario says of its network."""

    latency_ms: tuple[int, int] = (20, 200)
    """Least and greatest time from one peer to another, a few gossip hops included [ms]."""
    loss: float = 0.0
    """Share of deliveries that never arrive: each receiver of a broadcast, each request."""
    bytes_per_ms: int = 12_500
    """Bandwidth of a transfer between two peers: 100 Mbit/s [bytes/ms]."""
    quantum_ms: int = 10
    """Receivers of a broadcast are gathered in steps of this [ms]."""
    partitions: tuple[Partition, ...] = ()


class Network:
    """One world's network: a model and the randomness it draws from."""

    def __init__(self, model: NetworkModel, genesis_ms: Millis, rng: Random) -> None:
        self._model = model
        self._genesis_ms = genesis_ms
        self._rng = rng

    def is_cut(self, left: int, right: int, now_ms: Millis) -> bool:
        """Whether a partition lies between two hosts now."""
        elapsed = now_ms - self._genesis_ms
        return any(
            part.start_ms <= elapsed < part.end_ms and (left < part.num_hosts) != (right < part.num_hosts)
            for part in self._model.partitions
        )

    def draw_delay(self, source: int, target: int, num_bytes: int, now_ms: Millis) -> int | None:
        """How long `num_bytes` take from one host to another [ms]; None: they do not arrive."""
        if self.is_cut(source, target, now_ms) or self._rng.random() < self._model.loss:
            return None
        low, high = self._model.latency_ms
        return self._rng.randint(low, high) + num_bytes // self._model.bytes_per_ms

    def draw_wave(
        self, source: int, targets: Iterable[int], num_bytes: int, now_ms: Millis
    ) -> list[tuple[int, list[int]]]:
        """A broadcast as (delay [ms], hosts that it reaches then), in order of time."""
        steps: dict[int, list[int]] = {}
        quantum = self._model.quantum_ms
        for target in targets:
            delay = self.draw_delay(source, target, num_bytes, now_ms)
            if delay is not None:
                steps.setdefault(-(-delay // quantum) * quantum, []).append(target)
        return sorted(steps.items())
