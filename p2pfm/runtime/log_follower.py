"""Follows one contract's logs through outages and reorganisations: a cursor with block hashes, and a way back.

Knows an endpoint and addresses; not what a log means. Calls block.
"""

from collections import deque
from typing import Any, NamedTuple, Protocol

import msgspec

from p2pfm.errors import ChainError

BLOCKS_A_CALL = 5_000
"""Public endpoints refuse longer ranges; one that refuses this too is asked for halves."""

CHECKPOINTS_MAX = 256
"""Places remembered to go back to when the chain changes its mind; beyond them everything is read anew."""


class Endpoint(Protocol):
    """What a follower needs of a chain; `chain_rpc.Rpc` is one."""

    def get_block(self, number: int | None = None) -> tuple[int, str, int]:
        """Number, hash and time of a block; None: the newest."""
        ...

    def get_logs(self, address: str, first: int, last: int) -> list[Any]:
        """Raw logs of these blocks."""
        ...


class Checkpoint(NamedTuple):
    """Up to this block, of this hash, the first `num_logs` logs were read."""

    number: int
    digest: str
    num_logs: int


class LogFollower(msgspec.Struct):
    """All logs of `address` from block `first` on, as the chain has them now."""

    endpoint: Endpoint
    address: str
    first: int
    logs: list[Any] = msgspec.field(default_factory=list)
    checkpoints: deque[Checkpoint] = msgspec.field(default_factory=lambda: deque(maxlen=CHECKPOINTS_MAX))

    def update(self) -> int:
        """Read what is new; returns how many of the logs known before still stand (all, unless blocks were replaced).

        Raises:
            ChainError: the endpoint does not answer. What was read so far stays.
        """
        kept = self._rewind()
        newest, digest, _ = self.endpoint.get_block()
        cursor = self.checkpoints[-1].number if self.checkpoints else self.first - 1
        if newest > cursor:
            # The hash was taken first: were blocks replaced between the two calls, the next update goes back.
            self.logs += self._read(cursor + 1, newest)
            self.checkpoints.append(Checkpoint(newest, digest, len(self.logs)))
        return kept

    def _rewind(self) -> int:
        """Forget what lies after the last block that is still in the chain."""
        num_known = len(self.logs)
        while self.checkpoints and not self._stands(self.checkpoints[-1]):
            self.checkpoints.pop()
            num_known = self.checkpoints[-1].num_logs if self.checkpoints else 0
        del self.logs[num_known:]
        return num_known

    def _stands(self, checkpoint: Checkpoint) -> bool:
        newest, digest, _ = self.endpoint.get_block()
        if newest == checkpoint.number:
            return digest == checkpoint.digest
        if newest < checkpoint.number:
            return False
        return self.endpoint.get_block(checkpoint.number)[1] == checkpoint.digest

    def _read(self, first: int, last: int) -> list[Any]:
        logs: list[Any] = []
        size = BLOCKS_A_CALL
        while first <= last:
            end = min(last, first + size - 1)
            try:
                logs += self.endpoint.get_logs(self.address, first, end)
            except ChainError:
                if end == first:
                    raise
                size = (end - first + 1) // 2
                continue
            first = end + 1
        return logs
