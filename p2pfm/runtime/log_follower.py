"""Follows one contract's logs through outages and reorganisations: a cursor with block hashes, and a way back.

Knows an endpoint and addresses; not what a log means. Calls block.
"""

from collections import deque
from typing import Any, NamedTuple, Protocol

import msgspec

from p2pfm.errors import ChainError
from p2pfm.runtime.chain_rpc import Unreachable

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
    num_firm: int = 0
    """Of the logs that the last `update` left, how many stand: so that one that failed halfway is not forgotten."""

    def update(self) -> int:
        """Read what is new; returns how many of the logs known before still stand (all, unless blocks were replaced).

        Raises:
            ChainError: the endpoint does not answer. What was read so far stays.
        """
        self.num_firm = min(self.num_firm, self._rewind())
        self._read()
        kept, self.num_firm = self.num_firm, len(self.logs)
        return kept

    def forget(self) -> None:
        """Trust nothing that was read: the next update reads all anew."""
        self.logs.clear()
        self.checkpoints.clear()

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

    def _read(self) -> None:
        newest, digest, _ = self.endpoint.get_block()
        cursor = self.checkpoints[-1].number if self.checkpoints else self.first - 1
        size = BLOCKS_A_CALL
        while cursor < newest:
            end = min(newest, cursor + size)
            # The hash is taken first: were blocks replaced between the two calls, the next update goes back.
            mark = digest if end == newest else self.endpoint.get_block(end)[1]
            try:
                logs = self.endpoint.get_logs(self.address, cursor + 1, end)
            except Unreachable:
                raise
            except ChainError:
                if end == cursor + 1:
                    raise
                size = (end - cursor) // 2
                continue
            self.logs += logs
            self.checkpoints.append(Checkpoint(end, mark, len(self.logs)))
            cursor = end
