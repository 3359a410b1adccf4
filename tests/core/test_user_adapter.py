"""Users' LoRA as blobs: what goes in comes out, and nothing else comes in."""

import json
import struct
import warnings
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file

from p2pfm.errors import OperatorError, Reject
from p2pfm.lora.checkpoint import CONFIG_NAME, WEIGHTS_NAME, read_lora
from p2pfm.lora.layers import load_backbone
from p2pfm.lora.packed import PackedAdapter, PackedModel, Segment, StreamCache
from p2pfm.lora.user_adapter import (
    LENGTH_BYTES,
    MAGIC,
    VALUE_MAX,
    Header,
    Target,
    decode_adapter,
    encode_adapter,
    validate_factors,
)

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama"
SIZES = {"layers.0.q": (6, 4), "layers.0.v": (3, 4), "layers.1.q": (6, 4)}
PREFIX = len(MAGIC) + LENGTH_BYTES


def make_factors(ranks: dict[str, int], seed: int = 0):
    rng = np.random.default_rng(seed)
    shapes = {name: (SIZES[name], rank) for name, rank in ranks.items()}
    return {
        name: (
            rng.standard_normal((rank, fan_in)).astype(np.float32),
            rng.standard_normal((fan_out, rank)).astype(np.float32),
        )
        for name, ((fan_out, fan_in), rank) in shapes.items()
    }


def with_header(data: bytes, header: bytes) -> bytes:
    (size,) = struct.unpack(">I", data[len(MAGIC) : PREFIX])
    return MAGIC + len(header).to_bytes(LENGTH_BYTES, "big") + header + data[PREFIX + size :]


GOOD = encode_adapter("tiny", make_factors({"layers.0.q": 2, "layers.1.q": 1}))


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(SIZES)), st.integers(1, 8), min_size=1), st.integers(0, 9))
def test_any_ranks_and_any_layers_come_back_as_they_were(ranks, seed):
    factors = make_factors(ranks, seed)
    data = encode_adapter("tiny", factors)
    again = decode_adapter(data, "tiny", SIZES, 8)
    assert again.keys() == factors.keys()
    for name, pair in factors.items():
        assert all(np.array_equal(left, right) for left, right in zip(pair, again[name], strict=True))
    assert encode_adapter("tiny", dict(reversed(again.items()))) == data


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_are_rejected_or_mean_another_adapter_of_the_same_layers(data):
    blob = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(("flip", "cut", "grow")))
        if kind == "flip" and blob:
            blob[data.draw(st.integers(0, len(blob) - 1))] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del blob[data.draw(st.integers(0, len(blob))) :]
        else:
            blob += data.draw(st.binary(max_size=9))
    try:
        factors = decode_adapter(bytes(blob), "tiny", SIZES, 8)
    except Reject:
        return
    validate_factors(factors, SIZES, 8)
    assert encode_adapter("tiny", factors) == bytes(blob)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_of_a_stranger_do_more_than_be_rejected(noise):
    for data in (noise, MAGIC + noise, with_header(GOOD, noise)):
        with pytest.raises(Reject):
            decode_adapter(data, "tiny", SIZES, 8)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (Header("lora", "other", (Target("layers.0.q", 1),)), "of the backbone 'other'"),
        (Header("lora", "tiny", ()), "at least one layer"),
        (Header("lora", "tiny", (Target("head", 1),)), "no linear layer 'head'"),
        (Header("lora", "tiny", (Target("layers.0.q", 9),)), "rank from 1 to 8, got 9"),
        (Header("lora", "tiny", (Target("layers.0.q", 2**60),)), "rank from 1 to 8"),
        (Header("lora", "tiny", (Target("layers.0.q", -1),)), "rank from 1 to 8, got -1"),
        (Header("lora", "tiny", (Target("layers.1.q", 1), Target("layers.0.q", 1))), "sorted"),
        (Header("lora", "tiny", (Target("layers.0.q", 1), Target("layers.0.q", 1))), "each once"),
        (["ia3", "tiny", [["layers.0.q", 1]]], "header"),
        (["lora", "tiny", [["layers.0.q", 1, 7]]], "header"),
        ({"kind": "lora"}, "header"),
    ],
)
def test_a_header_that_fits_nothing_is_rejected_by_name(header, reason):
    with pytest.raises(Reject, match=reason):
        decode_adapter(with_header(GOOD, msgspec.msgpack.encode(header)), "tiny", SIZES, 8)


def test_a_header_that_promises_more_than_there_is_allocates_nothing():
    data = MAGIC + (2**32 - 1).to_bytes(4, "big") + b"\x93"
    with pytest.raises(Reject, match="header of at most"):
        decode_adapter(data, "tiny", SIZES, 8)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2 * VALUE_MAX])
def test_numbers_that_would_break_sums_are_rejected(value):
    factors = make_factors({"layers.0.v": 1})
    factors["layers.0.v"][1][2, 0] = value
    with pytest.raises(Reject, match=r"layers.0.v: expected finite values of B"):
        decode_adapter(encode_adapter("tiny", factors), "tiny", SIZES, 8)


def test_factors_of_another_shape_say_what_the_layer_is():
    factors = make_factors({"layers.0.q": 2})
    low, high = factors["layers.0.q"]
    with pytest.raises(Reject, match=r"\(6, 4\) \(out, in\), got A \(2, 3\)"):
        validate_factors({"layers.0.q": (low[:, :3], high)}, SIZES, 8)
    with pytest.raises(Reject, match="another backbone"):
        validate_factors({"layers.9.q": (low, high)}, SIZES, 8)


# --- peft folders ---


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "down_proj"], use_rslora=True),
        LoraConfig(r=2, target_modules=["v_proj", "o_proj"], rank_pattern={"v_proj": 5}, alpha_pattern={"v_proj": 7}),
    ],
    ids=["rank-stabilised", "several ranks"],
)
def test_a_peft_folder_computes_here_what_it_computes_in_peft(config, tmp_path):
    warnings.simplefilter("ignore")
    torch.manual_seed(1)
    tokens = (1, 300, 301, 302, 17, 400)
    model = get_peft_model(load_backbone(TINY, torch.float32)[0], config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
        truth = model(torch.tensor([tokens])).logits[0, -1]
    model.save_pretrained(str(tmp_path))

    packed = PackedModel(load_backbone(TINY, torch.float32)[0], 16)
    _, factors = read_lora(tmp_path)
    factors = decode_adapter(encode_adapter("tiny", factors), "tiny", packed.sizes, 16)
    tensors = {f"{name}.lora_A": low for name, (low, _) in factors.items()}
    tensors |= {f"{name}.lora_B": high for name, (_, high) in factors.items()}
    logits = packed.read_block(Segment(StreamCache(), packed.load(tensors, "lora", 1.0, {}), tokens))
    bare = packed.read_block(Segment(StreamCache(), PackedAdapter(), tokens))
    assert torch.allclose(logits, truth, atol=1e-4)
    assert not torch.allclose(bare, truth, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type"),
        ({"r": 7}, "promises rank 7"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"lora_alpha": 1e39}, "not finite"),
        ({"lora_alpha": "much"}, "expected what peft writes"),
    ],
)
def test_what_would_compute_something_else_is_refused_by_name(change, reason, tmp_path):
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    weights = {f"{layer}.lora_A.weight": np.ones((2, 4)), f"{layer}.lora_B.weight": np.ones((6, 2))}
    save_file({name: part.astype(np.float32) for name, part in weights.items()}, tmp_path / WEIGHTS_NAME)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config))
    assert load_file(tmp_path / WEIGHTS_NAME).keys() == weights.keys()
    _, factors = read_lora(tmp_path)
    assert np.array_equal(factors["model.layers.0.self_attn.q_proj"][1], np.full((6, 2), 2))
    with pytest.raises(OperatorError, match="at most 10 bytes"):
        read_lora(tmp_path, 10)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | change))
    with pytest.raises(OperatorError, match=reason):
        read_lora(tmp_path)
