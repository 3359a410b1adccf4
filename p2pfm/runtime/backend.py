"""What generates a replica's tokens, as the rest of a node sees it: our own engine, or a foreign server.

`runtime.batcher` has the one on this machine's torch, `runtime.upstream` the one that asks a vLLM or llama.cpp server.
No torch here: a node that serves nothing starts without it.
"""

from collections.abc import AsyncGenerator, Iterator
from typing import Protocol

from p2pfm.errors import WorldError
from p2pfm.lora.user_adapter import Factors, Sizes
from p2pfm.messages import GenerateRequest, TokenChunk
from p2pfm.types import Array, Digest, Tensors


class BackendFailed(WorldError):
    """What generates did not answer, or with nonsense: the stream goes on at another replica."""


class Backend(Protocol):
    """What gateway and node need of it. Streams are asked for and cancelled; nothing outlives them."""

    @property
    def own(self) -> "OwnEngine | None":
        """Itself where it does all that our own engine does; None: it serves `versions`, and nothing else."""
        ...

    def is_busy(self) -> bool:
        """Whether streams are open; may be asked from any thread."""
        ...

    def versions(self) -> tuple[Digest, ...]:
        """What anyone may ask for now: bases, newest first, then the bare backbone."""
        ...

    async def add_version(self, version: Digest, tensors: Tensors) -> None:
        """`tensors` are the newest base. One that cannot be served here is in no `versions`. Raises: Reject."""
        ...

    def generate(self, request: GenerateRequest, *, is_local: bool) -> AsyncGenerator[TokenChunk, None]:
        """Chunks after `request.emitted`, to the end. Close it to stop the work.

        Raises:
            UnknownVersion: the adapter version is not held.
            Reject: a request that this backbone cannot continue.
            BrokenLogits: the model gave no numbers.
            BackendFailed: it did not answer.
        """
        ...


class OwnEngine(Protocol):
    """What besides only an engine can that holds the model itself."""

    def versions(self) -> tuple[Digest, ...]:
        """As `Backend.versions`."""
        ...

    async def add_private(self, version: Digest, tensors: Tensors) -> None:
        """Offer `tensors` to local askers alone. Raises: Reject."""
        ...

    async def add_lora(self, version: Digest, factors: Factors) -> None:
        """Offer a user's LoRA. Raises: Reject."""
        ...

    def drop(self, version: Digest) -> None:
        """Offer it no longer."""
        ...

    def lora_sizes(self) -> Sizes:
        """(out, in) of the layers that it may change."""
        ...

    def compute_logits(self, request: GenerateRequest) -> Iterator[Array]:
        """Logits (vocab_size,) that stood before each token of `request.emitted`; blocking, a pass at a time."""
        ...

    def generate(self, request: GenerateRequest, *, is_local: bool) -> AsyncGenerator[TokenChunk, None]:
        """As `Backend.generate`."""
        ...
