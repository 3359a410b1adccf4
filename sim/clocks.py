"""What peers' clocks say: the true time, an offset and a drift of their own, in whole milliseconds. Knows no peer."""

from random import Random

import msgspec

from p2pfm.errors import ConfigError
from p2pfm.types import Millis

BILLION = 1_000_000_000

DRIFT_MAX_PPM = 100_000
"""A clock that is off by more than a tenth of the time is broken; no drift of a quartz exceeds 100 ppm."""


class ClockModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How peers' clocks differ from the true time, each drawn once."""

    skew_ms: int = 100
    """Off by at most this at the start, to either side."""
    drift_ppm: float = 0.0
    """Faster or slower by at most this [millionths]: 100 is 8.6 s a day."""


def validate_clock_model(model: ClockModel) -> None:
    """Refuse clocks that cannot be. Raises: ConfigError: names the field, what is allowed, and what it was."""
    checks = (("skew_ms", model.skew_ms, 86_400_000), ("drift_ppm", model.drift_ppm, DRIFT_MAX_PPM))
    for key, value, most in checks:
        if not 0 <= value <= most:
            raise ConfigError(f"scenario clocks.{key}: expected 0 to {most:g}, got {value:g}")


class Clocks:
    """The clocks of all hosts; one never goes back, and shows every host its own time."""

    def __init__(self, model: ClockModel, num_hosts: int, rng: Random, start_ms: int = 0) -> None:
        """Args: start_ms: when a clock is off by its offset alone."""
        drift_ppb = int(model.drift_ppm * 1_000)
        self._start_ms = start_ms
        self._offsets_ms = [rng.randint(-model.skew_ms, model.skew_ms) for _ in range(num_hosts)]
        self._drifts_ppb = [rng.randint(-drift_ppb, drift_ppb) for _ in range(num_hosts)]

    def tell(self, index: int, true_ms: int) -> Millis:
        """What a host's clock shows at the true time; it never goes back."""
        local_ms, drift_ppb = true_ms + self._offsets_ms[index], self._drifts_ppb[index]
        if drift_ppb:
            local_ms += (true_ms - self._start_ms) * drift_ppb // BILLION
        return Millis(local_ms)

    def to_true(self, index: int, local_ms: int) -> Millis:
        """The first true time at which a host's clock shows `local_ms` or more."""
        if not self._drifts_ppb[index]:
            return Millis(local_ms - self._offsets_ms[index])
        elapsed_ms = local_ms - self._offsets_ms[index] - self._start_ms
        true_ms = self._start_ms + elapsed_ms * BILLION // (BILLION + self._drifts_ppb[index])
        # The quotient is right to a millisecond: the clock's own rounding comes on top.
        while self.tell(index, true_ms) < local_ms:
            true_ms += 1
        while self.tell(index, true_ms - 1) >= local_ms:
            true_ms -= 1
        return Millis(true_ms)
