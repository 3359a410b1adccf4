"""Token generation of one replica: a frozen backbone, adapters of several versions, many streams in each pass.

Knows no peer, session bound or socket. Blocking; `runtime.batcher` drives it from threads, one step at a time.

Continuous batching: a step reads one block of one stream's prompt, and one row of every stream that generates. Exact
resume: the prompt is read in the same blocks as at first, and what was emitted goes through the same rows that made it,
several at once, since a row's bits do not depend on its company (`lora.packed`). Reading prompt and emitted tokens as
one text would sum in another order and flip near ties.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads slow two processes 10-fold

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256

import numpy as np
import torch

from p2pfm.config import AdapterConfig
from p2pfm.errors import Reject
from p2pfm.lora.layers import describe_adapter, load_backbone
from p2pfm.lora.packed import PackedAdapter, PackedModel, Segment, StreamCache
from p2pfm.lora.user_adapter import BACKBONE_VERSION
from p2pfm.messages import GenerateRequest, TokenChunk
from p2pfm.runtime.text import read_vocabulary
from p2pfm.serving.sampling import choose_token, compute_logprobs
from p2pfm.serving.session import BrokenLogits, UnknownVersion, validate_request
from p2pfm.types import Array, Digest, Tensors

PRIVATE_MAX = 2
"""Private adapters kept: the newest, and the one before for a stream that was asked for just before the swap."""

BLOCK_TOKENS_MAX = 128
"""Prompt tokens of one step: bounds how long a cancelled stream still works, and how long others wait."""

BLOCK_TOKENS_MIN = 16
"""A shorter message is read together with the next one."""

ROWS_MAX = {"cpu": 16, "cuda": 64}
"""Tokens generated in one pass. More are no faster on a CPU, and sums there keep their order up to 24 rows only."""

DTYPES = {"stored": None, "bf16": torch.bfloat16, "fp32": torch.float32}

PREFIX_BYTES_MAX = 256 << 20
"""Keys and values of prompts' beginnings kept for those who begin alike: 11,000 tokens of the demo's backbone."""


class Engine:
    """One backbone on this machine and up to `versions_max` adapters by digest, newest first.

    A stream keeps its version's adapter until it ends, even when the version is no longer offered; no step and no
    stream ever mixes two. Private adapters are held apart: they are in no list of versions, and `open` knows them only
    for a local asker. Users' own LoRA (`add_lora`) are in no list either: who asks for one knows its digest. The
    backbone without any is always there, as BACKBONE_VERSION.
    """

    def __init__(
        self,
        backbone: str,
        adapter: AdapterConfig,
        versions_max: int,
        *,
        device: str = "cpu",
        dtype: str = "stored",
        prefix_bytes_max: int = PREFIX_BYTES_MAX,
    ) -> None:
        """Load the backbone in folder `backbone` (its own instance: training another one never disturbs it).

        `dtype`: "stored" as the weights are, "bf16" or "fp32" (`ServingConfig.dtype`).

        Raises:
            OperatorError: the folder holds no model, the adapter does not fit it, or its attention cannot be batched.
        """
        assert versions_max >= 1
        if device == "cpu":
            torch.set_num_threads(1)
        model, tokenizer = load_backbone(backbone, DTYPES[dtype], device)
        self.tokenizer = tokenizer
        self.vocabulary = read_vocabulary(model.config, model.generation_config, tokenizer, adapter.num_virtual)
        self.shapes, self._frozen = describe_adapter(model, adapter)
        self._adapter = adapter
        self._model = PackedModel(model, ROWS_MAX[device])
        self._prefixes = _Prefixes(prefix_bytes_max)
        self._versions_max = versions_max
        self._versions: dict[Digest, PackedAdapter] = {}  # oldest first
        self._private: dict[Digest, PackedAdapter] = {}  # oldest first
        self._lora: dict[Digest, PackedAdapter] = {BACKBONE_VERSION: PackedAdapter()}
        self._turn = 0
        self._model_lock = threading.Lock()  # held for a pass
        self._versions_lock = threading.Lock()  # held for microseconds: the event loop may ask for versions

    # --- adapters -----------------------------------------------------------------------------------------------------

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

    def add_lora(self, version: Digest, factors: Mapping[str, tuple[Array, Array]]) -> None:
        """Offer dW = B A of each named layer under this name, beside the versions; no factors: the bare backbone.

        Args:
            factors: A (rank, in) and B (out, rank) by module path; the scale is folded into B.

        Raises:
            Reject: a layer that the backbone has not, or factors that do not fit it.
        """
        for name, (down, up) in sorted(factors.items()):
            if name not in self._model.sizes:
                raise Reject(f"expected linear layers of this backbone, got {name[:100]!r}")
            fits = down.ndim == up.ndim == 2 and (up.shape[0], down.shape[1]) == self._model.sizes[name]
            if not fits or down.shape[0] != up.shape[1]:
                raise Reject(
                    f"expected factors of a layer {self._model.sizes[name]} (out, in) for {name}, got B {up.shape} and "
                    f"A {down.shape}"
                )
        tensors = {f"{name}.lora_A": down for name, (down, _) in factors.items()}
        tensors |= {f"{name}.lora_B": up for name, (_, up) in factors.items()}
        packed = self._model.load(tensors, "lora", 1.0, {})
        with self._versions_lock:
            self._lora[version] = packed

    def drop(self, version: Digest) -> None:
        """Offer a user's LoRA no longer. Streams that run with it go on."""
        with self._versions_lock:
            self._lora.pop(version, None)

    def lora_sizes(self) -> Mapping[str, tuple[int, int]]:
        """(out, in) of every linear layer that `add_lora` may change, by module path."""
        return self._model.sizes

    def _offer(self, held: dict[Digest, PackedAdapter], version: Digest, tensors: Tensors, held_max: int) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != self.shapes:
            raise Reject(
                f"expected the {len(self.shapes)} tensors of this network's adapter, got other names or shapes"
            )
        packed = self._pack(tensors)
        with self._versions_lock:
            held.pop(version, None)
            held[version] = packed
            while len(held) > held_max:
                del held[next(iter(held))]

    def _pack(self, tensors: Tensors) -> PackedAdapter:
        adapter = self._adapter
        return self._model.load(tensors, adapter.kind, adapter.alpha / adapter.rank, self._frozen)

    def versions(self) -> tuple[Digest, ...]:
        """What can be served now, newest first."""
        with self._versions_lock:
            return tuple(reversed(self._versions))

    # --- generation ---------------------------------------------------------------------------------------------------

    def open(self, request: GenerateRequest, *, is_local: bool = False) -> "Stream":
        """A stream that goes on after `request.emitted`. Costs nothing until its first step.

        Args:
            is_local: this node's own client asks: private adapters exist for it, and for nobody else.

        Raises:
            UnknownVersion: the adapter version is not held.
            Reject: a request that this backbone cannot continue.
        """
        validate_request(request, self.vocabulary)
        return Stream(self, request, self._find(request.version, is_local=is_local))

    def _find(self, version: Digest, *, is_local: bool) -> PackedAdapter:
        with self._versions_lock:
            found = self._versions.get(version) or self._lora.get(version)
            if found is None and is_local:
                found = self._private.get(version)
        if found is None:
            raise UnknownVersion(f"expected an adapter version that is held here, got {version.hex()[:16]}")
        return found

    def generate(self, request: GenerateRequest) -> Iterator[TokenChunk]:
        """All chunks of a stream alone (empty while prompt and emitted tokens are read). Raises as `open`."""
        stream = self.open(request)
        while (chunk := stream.step()) is not None:
            yield chunk

    def step(self, streams: Sequence["Stream"]) -> "list[tuple[Stream, TokenChunk | BrokenLogits]]":
        """Bring streams on: a block of the first whose prompt is not read, and a row of all that generate.

        Returns a chunk for each stream that was part of it: a token, or nothing but a sign of life. Who is left out for
        want of rows comes first the next time. Streams that ended are passed over.
        """
        running = [stream for stream in streams if not stream.is_ended]
        reading = next((stream for stream in running if stream.is_reading), None)
        rows = sorted((stream for stream in running if not stream.is_reading), key=lambda stream: stream.turn)
        chunks = [] if reading is None else [(reading, self._read_block(reading))]
        return chunks + self._read_rows(rows)

    def compute_logits(self, request: GenerateRequest) -> Iterator[Array]:
        """Logits (vocab_size,) that stood before each token of `request.emitted`: what its maker must have seen.

        In the very passes of generation, so that on a machine of the same kind they have the same bits. One pass at a
        time: serving goes on in between. Raises as `open`.
        """
        validate_request(request, self.vocabulary)
        cache, adapter = StreamCache(), self._find(request.version, is_local=False)
        logits: Array = np.empty(0, np.float32)
        for block in split_prompt(request.prompt, self.vocabulary.ends):
            logits = self._block_logits(Segment(cache, adapter, block))
        yield logits
        rows_max = self._model.rows_max
        known = request.emitted[:-1]
        for start in range(0, len(known), rows_max):
            part = known[start : start + rows_max]
            with self._model_lock:
                rows = self._model.read_rows([Segment(cache, adapter, part, len(part))]).cpu().numpy()
            yield from rows

    def logits(self, tensors: Tensors, tokens: tuple[int, ...]) -> Array:
        """Logits (vocab_size,) after `tokens`, with the network's adapter `tensors`."""
        return self._block_logits(Segment(StreamCache(), self._pack(tensors), tokens))

    def _block_logits(self, segment: Segment) -> Array:
        with self._model_lock:
            logits: Array = self._model.read_block(segment).cpu().numpy()
        return logits

    def _read_block(self, stream: "Stream") -> "TokenChunk | BrokenLogits":
        cache, adapter, blocks = stream.cache, stream.adapter, stream.blocks
        with self._model_lock:
            if stream.num_steps == 0:
                stream.num_blocks = self._prefixes.find(adapter, blocks[:-1], cache)
            start, num_blocks = cache.length, stream.num_blocks + 1
            logits: Array = self._model.read_block(Segment(cache, adapter, blocks[num_blocks - 1])).cpu().numpy()
            if num_blocks < len(blocks):
                self._prefixes.keep(adapter, blocks[:num_blocks], cache, start)
        return stream.on_block(logits)

    def _read_rows(self, streams: "Iterable[Stream]") -> "list[tuple[Stream, TokenChunk | BrokenLogits]]":
        self._turn += 1
        room, taken = self._model.rows_max, []
        for stream in streams:  # one row for each that there is room for; what is left helps resumes to catch up
            if room:
                stream.turn = self._turn
                taken.append(stream)
                room -= 1
        segments = []
        for stream in taken:
            tokens = stream.unread[: room + 1]
            room -= len(tokens) - 1
            segments.append(Segment(stream.cache, stream.adapter, tokens))
        if not segments:
            return []
        with self._model_lock:
            logits: Array = self._model.read_rows(segments).cpu().numpy()  # (num_streams, vocab_size)
        return [
            (stream, stream.on_rows(len(segment.tokens), row))
            for stream, segment, row in zip(taken, segments, logits, strict=True)
        ]


class Stream:
    """One generation. A step is at most one pass, so a stream stops within a token if nobody steps it."""

    def __init__(self, engine: Engine, request: GenerateRequest, adapter: PackedAdapter) -> None:
        """`Engine.open` makes it."""
        self._engine, self._request = engine, request
        self.adapter = adapter
        self.cache = StreamCache()
        self.blocks = split_prompt(request.prompt, engine.vocabulary.ends)
        self.num_blocks = 0
        """Of the prompt, read."""
        self.num_steps = 0
        self.turn = 0
        """When it was last among those that got a row."""
        self.unread: tuple[int, ...] = request.emitted
        """Tokens of the answer that are in no cache yet."""
        self._position = len(request.emitted)
        self._finish = self._finish_after(request.emitted[-1]) if request.emitted else ""

    @property
    def is_ended(self) -> bool:
        """Nothing more will come."""
        return bool(self._finish)

    @property
    def is_reading(self) -> bool:
        """Its prompt is not read to the end."""
        return self.num_blocks < len(self.blocks)

    def step(self) -> TokenChunk | None:
        """The next token (with its finish) of this stream alone; an empty chunk while earlier tokens are read; None
        after the end.

        Raises:
            BrokenLogits: the model gave no numbers.
        """
        if self.is_ended:
            return None
        ((_, chunk),) = self._engine.step([self])
        if isinstance(chunk, BrokenLogits):
            raise chunk
        return chunk

    def on_block(self, logits: Array) -> TokenChunk | BrokenLogits:
        """A block of the prompt was read; `logits` (vocab_size,) stand after it."""
        self.num_steps += 1
        self.num_blocks += 1
        if self.is_reading or self.unread:
            return TokenChunk(self._position, (), "")
        return self._choose(logits)

    def on_rows(self, num_tokens: int, logits: Array) -> TokenChunk | BrokenLogits:
        """So many unread tokens were read; `logits` (vocab_size,) stand after the last."""
        self.num_steps += 1
        self.unread = self.unread[num_tokens:]
        if self.unread:
            return TokenChunk(self._position, (), "")
        return self._choose(logits)

    def _choose(self, logits: Array) -> TokenChunk | BrokenLogits:
        if not np.isfinite(logits).all():
            self._finish = "broken"
            return BrokenLogits(f"expected finite logits at position {self._position}; the adapter may have diverged")
        request, position = self._request, self._position
        token = choose_token(logits, request.temperature_milli, request.top_p_milli, request.seed, position)
        self._position += 1
        self._finish = self._finish_after(token)
        num = request.num_logprobs
        logprobs = (compute_logprobs(logits, token, num - 1),) if num else ()
        self.unread = (token,)
        return TokenChunk(position, (token,), self._finish, logprobs)

    def _finish_after(self, token: int) -> str:
        if token in self._engine.vocabulary.ends:
            return "stop"
        return "length" if self._position >= self._request.tokens_max else ""


def split_prompt(prompt: tuple[int, ...], ends: frozenset[int]) -> list[tuple[int, ...]]:
    """Blocks of a prompt: they end with a message (a token of `ends`), or where they are full.

    A block's end depends on nothing that comes after it, so prompts that begin alike begin with the same blocks.
    """
    blocks, start = [], 0
    for index, token in enumerate(prompt):
        size = index + 1 - start
        if size == BLOCK_TOKENS_MAX or (size >= BLOCK_TOKENS_MIN and token in ends):
            blocks.append(prompt[start : index + 1])
            start = index + 1
    return [*blocks, prompt[start:]] if start < len(prompt) else blocks


class _Prefixes:
    """Keys and values of the blocks with which prompts began, by adapter and all tokens before; least used go first."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max, self._num_bytes = bytes_max, 0
        self._blocks: OrderedDict[bytes, list[torch.Tensor]] = OrderedDict()  # holds no adapter: they come and go

    def find(self, adapter: PackedAdapter, blocks: Sequence[tuple[int, ...]], cache: StreamCache) -> int:
        """Fill an empty `cache` with what is held of `blocks` from the first on; how many blocks that are."""
        key = b""
        for index, block in enumerate(blocks):
            key = _chain(key, adapter, block)
            if (held := self._blocks.get(key)) is None:
                return index
            self._blocks.move_to_end(key)
            cache.append(held)
        return len(blocks)

    def keep(self, adapter: PackedAdapter, blocks: Sequence[tuple[int, ...]], cache: StreamCache, start: int) -> None:
        """`cache` holds the last of `blocks` from place `start` on."""
        key = b""
        for block in blocks:
            key = _chain(key, adapter, block)
        if key in self._blocks:
            return
        part = cache.cut(start)
        self._blocks[key] = part
        self._num_bytes += sum(layer.nbytes for layer in part)
        while self._num_bytes > self._bytes_max:
            _, dropped = self._blocks.popitem(last=False)
            self._num_bytes -= sum(layer.nbytes for layer in dropped)


def _chain(before: bytes, adapter: PackedAdapter, block: tuple[int, ...]) -> bytes:
    data = before + adapter.serial.to_bytes(8, "big") + np.array(block, np.int64).tobytes()
    return sha256(data).digest()
