from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from p2pfm.errors import OperatorError
from p2pfm.lora.layers import load_backbone
from p2pfm.lora.packed import LowRank, PackedAdapter, PackedModel, Segment, StreamCache, compute_rows_min

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama"
LAYER = "model.layers.1.mlp.up_proj"


class ByHeight(nn.Linear):
    """Sums in another order below so many rows, as kernels do."""

    def __init__(self, rows_min: int) -> None:
        super().__init__(8, 8, bias=False)
        self.rows_min = rows_min

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result = 2 * inputs
        return result if len(inputs) >= self.rows_min else result + 1e-6


@pytest.mark.parametrize("rows_min", [1, 2, 5, 16])
def test_the_least_height_at_which_rows_keep_their_bits_is_found(rows_min: int) -> None:
    assert compute_rows_min(ByHeight(rows_min), 16) == rows_min


class SeldomByHeight(torch.nn.Linear):
    """A single row is now and then another: one of 14, as SmolLM2's down_proj has it in bf16."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result = 2 * inputs
        is_odd = len(inputs) == 1 and hash(float(inputs[0, 0])) % 14 == 0
        return result + 1e-6 if is_odd else result


def test_a_height_that_seldom_differs_is_found() -> None:
    assert compute_rows_min(SeldomByHeight(8, 8, bias=False), 16) == 2


def make_models() -> list[PackedModel]:
    """In the stored bf16, and in float32, whose kernels differ by height."""
    torch.set_num_threads(1)  # what is measured here holds for as many threads as now
    return [PackedModel(load_backbone(TINY, dtype)[0], 16) for dtype in (None, torch.float32)]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """As an engine has it; another file's tests may have changed it since the models were measured."""
    torch.set_num_threads(1)


MODELS = make_models()
GENERATOR = torch.Generator().manual_seed(3)
ADAPTERS = [
    PackedAdapter(),
    PackedAdapter({LAYER: LowRank(torch.randn(3, 128, generator=GENERATOR), torch.randn(384, 3, generator=GENERATOR))}),
    PackedAdapter({LAYER: LowRank(torch.randn(8, 128, generator=GENERATOR), torch.randn(384, 8, generator=GENERATOR))}),
]
TEXTS = st.lists(st.integers(0, 1023), min_size=1, max_size=40).map(tuple)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(MODELS), st.lists(st.tuples(TEXTS, TEXTS, st.sampled_from(ADAPTERS)), min_size=2, max_size=5))
def test_rows_have_the_same_bits_alone_and_in_company(
    model: PackedModel, streams: list[tuple[tuple[int, ...], tuple[int, ...], PackedAdapter]]
) -> None:
    """Prompts are blocks; the rest is read token by token alone, and in whatever portions fit beside the others."""
    alone = []
    for prompt, text, adapter in streams:
        cache = StreamCache()
        rows = [model.read_block(Segment(cache, adapter, prompt))]
        rows += [model.read_rows([Segment(cache, adapter, (token,))])[0] for token in text]
        alone.append(torch.stack(rows))
    caches = [StreamCache() for _ in streams]
    together = [
        [model.read_block(Segment(cache, adapter, prompt))]
        for cache, (prompt, _, adapter) in zip(caches, streams, strict=True)
    ]
    while any(len(rows) <= len(text) for rows, (_, text, _) in zip(together, streams, strict=True)):
        portions, room = [], model.rows_max
        for index, (rows, (_, text, adapter)) in enumerate(zip(together, streams, strict=True)):
            part = text[len(rows) - 1 :][: min(room, 1 + 2 * index)]
            if part:
                portions.append((rows, Segment(caches[index], adapter, part, len(part))))
                room -= len(part)
        logits = list(model.read_rows([segment for _, segment in portions]))
        for rows, segment in portions:
            rows += [logits.pop(0) for _ in segment.tokens]
    for one, rows in zip(alone, together, strict=True):
        assert torch.equal(one, torch.stack(rows))


def test_an_attention_that_is_not_the_architectures_own_is_noticed() -> None:
    model, _ = load_backbone(TINY)
    for layer in model.model.layers:
        layer.self_attn.layer_idx = 0  # all layers would write into one cache
    with pytest.raises(OperatorError, match="cannot be batched"):
        PackedModel(model, 4)


def test_a_cut_cache_goes_on_elsewhere() -> None:
    model, text = MODELS[0], tuple(range(40, 60))
    whole, cut = StreamCache(), StreamCache()
    model.read_block(Segment(whole, ADAPTERS[1], text))
    cut.append(whole.cut(0))
    again = model.read_rows([Segment(cache, ADAPTERS[1], (7,)) for cache in (whole, cut)])
    assert cut.length == whole.length == 21
    assert torch.equal(again[0], again[1])
