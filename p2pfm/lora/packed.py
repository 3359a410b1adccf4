"""One forward pass over tokens of many streams, each with its adapter: what a replica's continuous batching runs on.

Knows torch, transformers and caches; no request, sampler, peer or clock. A token's numbers do not depend on what else
is in the pass: linear layers see a row count for which every row's sum runs in the same order (measured at the start:
`compute_rows_min`), attention runs stream by stream and row by row, and an adapter's factors see a matrix of one fixed
height. So a stream that another replica takes over, or that is alone again, goes on with the same bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

from p2pfm.errors import OperatorError
from p2pfm.lora.kinds import CHAINS, PROMPT
from p2pfm.types import Array, Tensors

ATTENTION = "p2pfm_packed"
"""Our attention's name among transformers' own."""

CACHE_STEP = 128
"""A cache grows by so many places at least, and by half: copies stay rare."""

ROWS_DRAWS = 8
"""Matrices on which a row count is tried: a kernel that differs in 1 row of 14 is missed once in 10,000 times."""

AGREEMENT = 0.05
"""Largest difference of a probe's log-probabilities from transformers' own attention [nats]; bf16 scatters by .01."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """dW = up @ down: (out, rank) and (rank, in), float32, the scale folded into `up`."""

    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True, slots=True)
class Scaling:
    """IA3: a layer's input or output times a vector, float32."""

    factor: torch.Tensor
    is_input: bool


@dataclass(frozen=True, eq=False, slots=True)
class PackedAdapter:
    """What one adapter changes, on the model's device."""

    changes: Mapping[str, LowRank | Scaling] = field(default_factory=dict)
    """By module path."""
    prompt: torch.Tensor | None = None
    """Soft prompt (num_virtual, hidden), or None."""
    serial: int = field(default_factory=count().__next__)
    """Its own, unlike an id for ever."""


class StreamCache:
    """Keys and values of one stream. Places before `length` are final."""

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, torch.Tensor] = {}

    def write(self, layer: int, start: int, new: torch.Tensor) -> torch.Tensor:
        """Put `new` (2, heads, num_tokens, dim) at `start`; returns the layer's whole buffer (2, heads, room, dim)."""
        held, end = self._layers.get(layer), start + new.shape[2]
        if held is None or held.shape[2] < end:
            room = max(end + end // 2, CACHE_STEP)
            grown = new.new_empty((2, new.shape[1], room, new.shape[3]))
            if held is not None:
                grown[:, :, :start] = held[:, :, :start]
            self._layers[layer] = held = grown
        held[:, :, start:end] = new
        return held

    def cut(self, start: int) -> list[torch.Tensor]:
        """Copies of all layers' places from `start` to the end, (2, heads, num_tokens, dim) each."""
        return [self._layers[layer][:, :, start : self.length].clone() for layer in sorted(self._layers)]

    def append(self, block: Sequence[torch.Tensor]) -> None:
        """What `cut` gave, at this cache's end."""
        for layer, part in enumerate(block):
            self.write(layer, self.length, part)
        self.length += block[0].shape[2]


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens to append to one stream's cache."""

    cache: StreamCache
    adapter: PackedAdapter
    tokens: tuple[int, ...]
    num_wanted: int = 1
    """Logits of so many last tokens."""


@dataclass(slots=True)
class _Pass:
    """What layers must know of the pass that runs."""

    segments: Sequence[Segment]
    starts: tuple[int, ...]
    """First row of each segment."""
    is_block: bool
    """One segment whose tokens attend together; else each row for itself."""
    rows: list[tuple[PackedAdapter, torch.Tensor | None]]
    """Rows of each adapter; None: all."""


class PackedLinear(nn.Module):
    """A frozen linear layer plus what each row's adapter adds."""

    def __init__(self, inner: nn.Module, name: str, model: "PackedModel") -> None:
        super().__init__()
        self.inner = inner
        self._name = name
        self._model = [model]  # in a list: no submodule of this one

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(1, num_rows, in) to (1, num_rows, out)."""
        model = self._model[0]
        changes = [
            (change, rows)
            for adapter, rows in model.running.rows
            if (change := adapter.changes.get(self._name)) is not None
        ]
        for change, rows in changes:
            if isinstance(change, Scaling) and change.is_input:
                inputs = _scale(inputs, change.factor, rows)
        result: torch.Tensor = self.inner(inputs)
        for change, rows in changes:
            if isinstance(change, LowRank):
                result = _add(result, inputs, change, rows, model.rows_max)
            elif not change.is_input:
                result = _scale(result, change.factor, rows)
        return result


class PackedModel:
    """A backbone whose passes mix streams and adapters. Not thread-safe: one call at a time."""

    def __init__(self, backbone: Any, rows_max: int) -> None:
        """Change `backbone` in place. `rows_max`: single tokens of a pass at most.

        Raises:
            OperatorError: an architecture whose attention this one does not reproduce.
        """
        assert rows_max >= 1
        self.rows_max = rows_max
        self.running = _Pass((), (), True, [])
        self._backbone = backbone.eval()
        self.device: torch.device = next(backbone.parameters()).device
        self._embed = backbone.get_input_embeddings()
        AttentionInterface.register(ATTENTION, _attend)
        head = backbone.get_output_embeddings()
        self.sizes: dict[str, tuple[int, int]] = {}
        """(out, in) of every linear layer that an adapter may change, by module path."""
        plain = self._probe() if hasattr(backbone, "set_attn_implementation") else None
        for name, module in list(backbone.named_modules()):
            if isinstance(module, nn.Linear) and module is not head:
                parent, _, child = name.rpartition(".")
                setattr(backbone.get_submodule(parent), child, PackedLinear(module, name, self))
                self.sizes[name] = (module.out_features, module.in_features)
        backbone.set_attn_implementation(ATTENTION)
        self.rows_min = self._measure_rows_min()
        packed = self._probe()
        if plain is None or not torch.allclose(packed, plain, atol=AGREEMENT, rtol=0):
            raise OperatorError(
                f"the attention of {type(backbone).__name__} cannot be batched here; set "
                "serving.enabled = false: this node then asks the others' replicas"
            )

    def load(self, tensors: Tensors, kind: str, scale: float, frozen: Tensors) -> PackedAdapter:
        """The adapter of canonical `tensors` (`lora.kinds`) for passes.

        Args:
            scale: alpha / rank of the kinds with factors.
            frozen: factors that the kind does not train.
        """
        every = {**frozen, **tensors}
        if kind == "prompt":
            return PackedAdapter(prompt=self._put(every[PROMPT]).to(self._embed.weight.dtype))
        changes: dict[str, LowRank | Scaling] = {}
        for name in sorted({key.rpartition(".")[0] for key in every}):
            if kind == "ia3":
                factor = self._put(every[f"{name}.ia3_l"])
                changes[name] = Scaling(factor.flatten(), is_input=factor.shape[0] == 1 and factor.shape[1] > 1)
                continue
            down, *rest = (self._put(every[f"{name}.{factor}"]) for factor in CHAINS[kind])
            up = rest[-1] @ rest[0] if len(rest) == 2 else rest[0]
            changes[name] = LowRank(down.contiguous(), (up * scale).contiguous())
        return PackedAdapter(changes)

    @torch.inference_mode()
    def read_block(self, segment: Segment) -> torch.Tensor:
        """Append a block of a prompt, its tokens attending together; logits (vocabulary,) after its last token.

        Its numbers depend on where it begins and how long it is: who repeats a prompt must cut it alike.
        """
        cache, prompt = segment.cache, segment.adapter.prompt
        embeds = self._embed(self._ids(segment.tokens))  # (1, num_tokens, hidden)
        if prompt is not None and cache.length == 0:
            embeds = torch.cat((prompt[None], embeds), dim=1)
        positions = torch.arange(cache.length, cache.length + embeds.shape[1], device=self.device)
        self.running = _Pass((segment,), (0,), True, [(segment.adapter, None)])
        logits = self._run(positions, torch.tensor([embeds.shape[1] - 1], device=self.device), inputs_embeds=embeds)
        cache.length += embeds.shape[1]
        return logits[0]

    @torch.inference_mode()
    def read_rows(self, segments: Sequence[Segment]) -> torch.Tensor:
        """Append each segment's tokens, at most `rows_max` together, one by one in effect but in one pass.

        Returns:
            Logits (num_wanted of all segments, vocabulary), in the segments' order.
        """
        tokens: list[int] = []
        places: list[int] = []
        wanted: list[int] = []
        starts: list[int] = []
        groups: dict[int, tuple[PackedAdapter, list[int]]] = {}
        for segment in segments:
            starts.append(len(tokens))
            _, rows = groups.setdefault(id(segment.adapter), (segment.adapter, []))
            rows += range(len(tokens), len(tokens) + len(segment.tokens))
            tokens += segment.tokens
            places += range(segment.cache.length, segment.cache.length + len(segment.tokens))
            wanted += range(len(tokens) - segment.num_wanted, len(tokens))
        assert 0 < len(tokens) <= self.rows_max
        num_padding = max(self.rows_min - len(tokens), 0)
        is_one = len(groups) == 1
        self.running = _Pass(
            segments,
            tuple(starts),
            False,
            [
                (adapter, None if is_one else torch.tensor(rows, device=self.device))
                for adapter, rows in groups.values()
            ],
        )
        num_rows, num_wanted = len(tokens), len(wanted)
        wanted += [num_rows - 1] * max(self.rows_min - num_wanted, 0)  # the head is a linear layer like the others
        logits = self._run(
            torch.tensor(places + [0] * num_padding, device=self.device),
            torch.tensor(wanted, device=self.device),
            input_ids=self._ids([*tokens, *[0] * num_padding]),
        )
        for segment in segments:
            segment.cache.length += len(segment.tokens)
        return logits[:num_wanted]

    def _run(self, positions: torch.Tensor, wanted: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        output = self._backbone(
            **inputs, position_ids=positions[None], use_cache=False, logits_to_keep=wanted, packed=self.running
        )
        logits: torch.Tensor = output.logits[0].float()  # (num_wanted, vocabulary)
        return logits

    def _ids(self, tokens: Sequence[int]) -> torch.Tensor:
        return torch.tensor([tokens], dtype=torch.long, device=self.device)

    def _put(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(array.astype("float32")).to(self.device)

    @torch.inference_mode()
    def _probe(self) -> torch.Tensor:
        """Log-probabilities (vocabulary,) after a few tokens, with whatever attention is set."""
        tokens = [token % self._embed.num_embeddings for token in (3, 7, 11, 19, 23)]
        if self._backbone.config._attn_implementation == ATTENTION:
            cache, adapter = StreamCache(), PackedAdapter()
            self.read_block(Segment(cache, adapter, tuple(tokens[:2])))
            logits = self.read_rows([Segment(cache, adapter, tuple(tokens[2:]))])[0]
        else:
            logits = self._backbone(input_ids=self._ids(tokens), use_cache=False).logits[0, -1].float()
        return functional.log_softmax(logits, dim=-1)

    @torch.inference_mode()
    def _measure_rows_min(self) -> int:
        """The least row count from which on every linear layer's rows keep their bits, up to `rows_max`."""
        shapes: dict[tuple[int, int], nn.Module] = {}
        for _, module in self._backbone.named_modules():
            if isinstance(module, nn.Linear):
                shapes.setdefault((module.out_features, module.in_features), module)
        found = (compute_rows_min(module, self.rows_max) for _, module in sorted(shapes.items()))
        return max(found, default=1)


@torch.inference_mode()
def compute_rows_min(linear: Any, rows_max: int) -> int:
    """The least n so that `linear` gives the same bits for a row in any matrix of n to `rows_max` rows.

    Kernels differ by height: a single row is often summed in another order than several. That shows in some rows only
    (SmolLM2's down_proj: 7% of them in bf16), so the least height is tried on many, of values as uneven as activations.
    """
    weight = linear.weight
    generator = torch.Generator().manual_seed(0)
    least = 1
    for draw in range(ROWS_DRAWS):
        uneven = torch.randn(linear.in_features, generator=generator).exp()
        rows = torch.randn(rows_max, linear.in_features, generator=generator) * uneven
        rows = rows.to(weight.device, weight.dtype)
        whole = linear(rows)
        for height in range(least if draw else rows_max - 1, least - 1, -1):
            starts = range(0, rows_max - height + 1, height)
            if any(not torch.equal(linear(rows[s : s + height]), whole[s : s + height]) for s in starts):
                least = height + 1
                break
    return least


def _add(
    result: torch.Tensor, inputs: torch.Tensor, change: LowRank, rows: torch.Tensor | None, rows_max: int
) -> torch.Tensor:
    """`result` plus dW x of `rows`. Factors see `rows_max` rows (a block: its own length), so heights never differ."""
    flat = inputs[0] if rows is None else inputs[0, rows]  # (num_rows, in)
    num_rows = flat.shape[0]
    flat = flat.float()
    if num_rows < rows_max:
        flat = functional.pad(flat, (0, 0, 0, rows_max - num_rows))
    delta = functional.linear(functional.linear(flat, change.down), change.up)[:num_rows]  # (num_rows, out)
    if rows is None:
        return (result.float() + delta).to(result.dtype)
    result = result.clone()
    result[0, rows] = (result[0, rows].float() + delta).to(result.dtype)
    return result


def _scale(values: torch.Tensor, factor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    if rows is None:
        return (values.float() * factor).to(values.dtype)
    scaled = values.clone()
    scaled[0, rows] = (values[0, rows].float() * factor).to(values.dtype)
    return scaled


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: _Pass,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each segment to its own cache. (1, heads, num_rows, dim) to (1, num_rows, heads, dim)."""
    if softcap is not None:
        raise OperatorError("attention with a soft cap cannot be batched here; set serving.enabled = false")
    new = torch.stack((key[0], value[0]))  # (2, kv_heads, num_rows, dim)
    num_heads, num_rows, dim = query.shape[1:]
    num_kv = new.shape[1]
    output = query.new_zeros((num_rows, num_heads, dim))
    layer = module.layer_idx
    for segment, first in zip(packed.segments, packed.starts, strict=True):
        start = segment.cache.length
        if packed.is_block:
            held = segment.cache.write(layer, start, new)
            output = _attend_block(query, held[:, :, : start + num_rows], start, scaling, sliding_window)
            continue
        last = first + len(segment.tokens)
        held = segment.cache.write(layer, start, new[:, :, first:last])
        for row in range(first, last):
            end = start + row - first + 1
            begin = 0 if sliding_window is None else max(end - sliding_window, 0)
            # heads that share keys stand as several queries: one small product instead of repeated keys
            grouped = query[:, :, row].view(1, num_kv, num_heads // num_kv, dim)
            one = functional.scaled_dot_product_attention(
                grouped, held[None, 0, :, begin:end], held[None, 1, :, begin:end], scale=scaling
            )
            output[row] = one.view(num_heads, dim)
    return output[None], None


def _attend_block(
    query: torch.Tensor, held: torch.Tensor, start: int, scaling: float | None, sliding_window: int | None
) -> torch.Tensor:
    """Causal attention of a block that begins at place `start`; (num_rows, heads, dim)."""
    num_places = held.shape[2]
    mask = None
    if start or sliding_window is not None:
        rows = torch.arange(start, num_places, device=query.device)[:, None]
        places = torch.arange(num_places, device=query.device)[None]
        mask = places <= rows  # (num_rows, num_places)
        if sliding_window is not None:
            mask &= places > rows - sliding_window
    result = functional.scaled_dot_product_attention(
        query, held[None, 0], held[None, 1], attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )
    return result[0].transpose(0, 1)
