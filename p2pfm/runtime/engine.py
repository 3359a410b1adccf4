"""Token generation of one replica: a frozen backbone, the adapters of a few versions, a KV cache for each stream.

Knows no peer, session bound or socket. Blocking; the gateway drives it from threads, one step at a time.

Exact resume: the prompt is prefilled in the same blocks as at first, then what was emitted is fed through the same
one-token step that made it. So every kernel sees the shapes of the undisturbed run and gives the same bits; prefilling
prompt and emitted tokens together would differ in bf16 and flip near ties.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads slow two processes 10-fold

import threading
from collections.abc import Iterator

import numpy as np
import torch
from transformers import DynamicCache

from p2pfm.config import AdapterConfig
from p2pfm.errors import Reject
from p2pfm.lora.layers import adapter_shapes, build_peft, extend, load_backbone, set_adapter_tensors
from p2pfm.messages import GenerateRequest, TokenChunk
from p2pfm.runtime.text import read_vocabulary
from p2pfm.serving.sampling import choose_token
from p2pfm.serving.session import BrokenLogits, UnknownVersion, validate_request
from p2pfm.types import Array, Digest, Tensors

PRIVATE_MAX = 2
"""Private adapters kept: the newest, and the one before for a stream that was asked for just before the swap."""

PREFILL_TOKENS = 128
"""Prompt tokens of one step: bounds how long a cancelled stream still works, and is part of what resumes repeat."""


class Engine:
    """One backbone on this machine and up to `versions_max` adapters by digest, newest first.

    Adapter weights are swapped only between steps, under a lock, so no step and no stream ever mixes two versions. A
    stream keeps its version's tensors until it ends, even when the version is no longer offered.

    Private adapters are held apart: they are in no list of versions, and `open` knows them only for a local asker.
    """

    def __init__(self, backbone: str, adapter: AdapterConfig, versions_max: int) -> None:
        """Load the backbone in folder `backbone` (its own instance: training another one never disturbs it).

        Raises:
            OperatorError: the folder holds no model, or the adapter does not fit it.
        """
        assert versions_max >= 1
        torch.set_num_threads(1)
        model, tokenizer = load_backbone(backbone)
        self.tokenizer = tokenizer
        self.vocabulary = read_vocabulary(model.config, model.generation_config, tokenizer, adapter.num_virtual)
        self.model = build_peft(model, adapter)
        self.model.eval()
        self.shapes = dict(adapter_shapes(self.model))
        self._versions_max = versions_max
        self._versions: dict[Digest, Tensors] = {}  # oldest first
        self._private: dict[Digest, Tensors] = {}  # oldest first
        self._active: Tensors | None = None
        self._model_lock = threading.Lock()  # held for a step
        self._versions_lock = threading.Lock()  # held for microseconds: the event loop may ask for versions

    def add_version(self, version: Digest, tensors: Tensors) -> None:
        """Offer `tensors` as the newest version; beyond the bound the oldest goes.

        Raises:
            Reject: not the names and shapes of this network's adapter.
        """
        self._offer(self._versions, version, tensors, self._versions_max)

    def add_private(self, version: Digest, tensors: Tensors) -> None:
        """Offer `tensors` under this name to local askers alone; of the earlier ones PRIVATE_MAX - 1 stay. Raises as
        `add_version`.
        """
        self._offer(self._private, version, tensors, PRIVATE_MAX)

    def _offer(self, held: dict[Digest, Tensors], version: Digest, tensors: Tensors, held_max: int) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != self.shapes:
            raise Reject(
                f"expected the {len(self.shapes)} tensors of this network's adapter, got other names or shapes"
            )
        with self._versions_lock:
            held.pop(version, None)
            held[version] = tensors
            while len(held) > held_max:
                del held[next(iter(held))]

    def versions(self) -> tuple[Digest, ...]:
        """What can be served now, newest first."""
        with self._versions_lock:
            return tuple(reversed(self._versions))

    def open(self, request: GenerateRequest, *, is_local: bool = False) -> "Stream":
        """A stream that goes on after `request.emitted`. Costs nothing until its first step.

        Args:
            is_local: this node's own client asks: private adapters exist for it, and for nobody else.

        Raises:
            UnknownVersion: the adapter version is not held.
            Reject: a request that this backbone cannot continue.
        """
        validate_request(request, self.vocabulary)
        with self._versions_lock:
            tensors = self._versions.get(request.version)
            if tensors is None and is_local:
                tensors = self._private.get(request.version)
        if tensors is None:
            raise UnknownVersion(f"expected an adapter version that is held here, got {request.version.hex()[:16]}")
        return Stream(self, request, tensors)

    def generate(self, request: GenerateRequest) -> Iterator[TokenChunk]:
        """All chunks of a stream, one token each (empty while prompt and emitted tokens are read). Raises as `open`."""
        stream = self.open(request)
        while (chunk := stream.step()) is not None:
            yield chunk

    @torch.inference_mode()
    def forward(self, tensors: Tensors, tokens: tuple[int, ...], cache: DynamicCache) -> Array:
        """Logits (vocab_size,) after `tokens`, which are appended to `cache`; with the adapter `tensors`."""
        with self._model_lock:
            if self._active is not tensors:
                self._active = None  # whatever happens inside, nobody trusts half a swap
                with torch.inference_mode(False):
                    set_adapter_tensors(self.model, tensors)
                self._active = tensors
            input_ids = torch.tensor([tokens], dtype=torch.long)  # (1, num_tokens)
            output = extend(self.model, input_ids, cache)
        logits: Array = output[0].float().numpy()  # (vocab_size,)
        return logits


class Stream:
    """One generation. A `step` is at most one forward pass, so a stream stops within a token if nobody steps it."""

    def __init__(self, engine: Engine, request: GenerateRequest, tensors: Tensors) -> None:
        """`Engine.open` makes it."""
        self._engine, self._request, self._tensors = engine, request, tensors
        self._cache = DynamicCache()
        self._blocks = [
            *(
                request.prompt[start : start + PREFILL_TOKENS]
                for start in range(0, len(request.prompt), PREFILL_TOKENS)
            ),
            *((token,) for token in request.emitted),
        ]
        self._next_block = 0
        self._position = len(request.emitted)
        self._finish = self._finish_after(request.emitted[-1]) if request.emitted else ""

    def step(self) -> TokenChunk | None:
        """The next token (with its finish); an empty chunk while earlier tokens are read; None after the end.

        Raises:
            BrokenLogits: the model gave no numbers.
        """
        if self._finish:
            return None
        logits = self._engine.forward(self._tensors, self._blocks[self._next_block], self._cache)
        self._next_block += 1
        if self._next_block < len(self._blocks):
            return TokenChunk(self._position, (), "")
        if not np.isfinite(logits).all():
            raise BrokenLogits(f"expected finite logits at position {self._position}; the adapter may have diverged")
        request = self._request
        token = choose_token(logits, request.temperature_milli, request.top_p_milli, request.seed, self._position)
        position, self._position = self._position, self._position + 1
        self._finish = self._finish_after(token)
        self._blocks = [(token,)]
        self._next_block = 0
        return TokenChunk(position, (token,), self._finish)

    def _finish_after(self, token: int) -> str:
        if token in self._engine.vocabulary.ends:
            return "stop"
        return "length" if self._position >= self._request.tokens_max else ""
