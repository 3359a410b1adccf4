"""Streams of this node's own engine for an event loop: whoever waits for a token steps the engine for all.

Knows trio and the engine; no peer and no request's meaning. No task runs in the background: the one that finds no step
under way takes the next, and the others get what it brought. A stream whose reader is slow is not stepped further than
AHEAD_MAX tokens, and one that is closed is in no later step.
"""

from collections import deque
from collections.abc import AsyncGenerator, Iterator

import trio

from p2pfm.lora.user_adapter import BACKBONE_VERSION, Factors, Sizes
from p2pfm.messages import GenerateRequest, TokenChunk
from p2pfm.runtime.engine import Engine, Stream
from p2pfm.serving.session import BrokenLogits
from p2pfm.types import Array, Digest, Tensors

AHEAD_MAX = 4
"""Chunks that wait for a stream's reader: enough that no step goes without a stream because its reader was writing."""


class Batcher:
    """An engine shared by the tasks of one event loop: `runtime.backend.Backend` and `OwnEngine`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._waiting: dict[Stream, deque[TokenChunk | BrokenLogits]] = {}
        self._step_lock = trio.Lock()  # in the order of asking

    @property
    def own(self) -> "Batcher":
        """It does all."""
        return self

    def is_busy(self) -> bool:
        """Whether streams are open; may be asked from any thread."""
        return bool(self._waiting)

    def versions(self) -> tuple[Digest, ...]:
        """What anyone may ask for now: bases, newest first, then the bare backbone."""
        return (*self._engine.versions(), BACKBONE_VERSION)

    async def add_version(self, version: Digest, tensors: Tensors) -> None:
        """`Engine.add_version` in a thread."""
        await trio.to_thread.run_sync(self._engine.add_version, version, tensors)

    async def add_private(self, version: Digest, tensors: Tensors) -> None:
        """`Engine.add_private` in a thread."""
        await trio.to_thread.run_sync(self._engine.add_private, version, tensors)

    async def add_lora(self, version: Digest, factors: Factors) -> None:
        """`Engine.add_lora` in a thread."""
        await trio.to_thread.run_sync(self._engine.add_lora, version, factors)

    def drop(self, version: Digest) -> None:
        """`Engine.drop`."""
        self._engine.drop(version)

    def lora_sizes(self) -> Sizes:
        """`Engine.lora_sizes`."""
        return self._engine.lora_sizes()

    def compute_logits(self, request: GenerateRequest) -> Iterator[Array]:
        """`Engine.compute_logits`: blocking, for a thread."""
        return self._engine.compute_logits(request)

    async def generate(self, request: GenerateRequest, *, is_local: bool) -> AsyncGenerator[TokenChunk, None]:
        """Chunks after `request.emitted`, to the end. Close it to stop the work within a step.

        Raises:
            UnknownVersion: the adapter version is not held.
            Reject: a request that this backbone cannot continue.
            BrokenLogits: the model gave no numbers.
        """
        stream = self._engine.open(request, is_local=is_local)
        chunks = self._waiting[stream] = deque[TokenChunk | BrokenLogits]()
        try:
            while chunks or not stream.is_ended:
                if not chunks:
                    async with self._step_lock:
                        if not chunks and not stream.is_ended:
                            await self._step()
                    continue
                chunk = chunks.popleft()
                if isinstance(chunk, BrokenLogits):
                    raise chunk
                yield chunk
        finally:
            del self._waiting[stream]

    async def _step(self) -> None:
        streams = [stream for stream, chunks in self._waiting.items() if len(chunks) < AHEAD_MAX]
        with trio.CancelScope(shield=True):  # a step is for all: who goes away does not take it along
            results = await trio.to_thread.run_sync(self._engine.step, streams)
        for stream, chunk in results:
            if stream in self._waiting:
                self._waiting[stream].append(chunk)
