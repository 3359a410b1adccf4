"""peft checkpoint folders as bases, and bases as folders that plain peft loads; on the tiny Llama fixture."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from p2pfm.config import AdapterConfig
from p2pfm.errors import OperatorError
from p2pfm.lora.checkpoint import CONFIG_NAME, WEIGHTS_NAME, export_checkpoint, import_checkpoint, open_checkpoint
from p2pfm.lora.delta import decode_tensors, encode_tensors, get_shapes
from p2pfm.lora.layers import adapter_shapes, build_peft, get_adapter_tensors, load_backbone, set_adapter_tensors

TINY = Path(__file__).parent.parent / "fixtures" / "tiny-llama"
TOKENS = torch.tensor([[1, 300, 301, 302, 17, 400, 23, 5]])
CONFIGS = {
    "lora": AdapterConfig(kind="lora", rank=4, alpha=12),
    "all-linear": AdapterConfig(kind="lora", rank=2, targets=("all-linear",)),
    "ffa": AdapterConfig(kind="ffa", rank=4, seed=3),
    "fed_sb": AdapterConfig(kind="fed_sb", rank=16, alpha=8, seed=3),
    "ia3": AdapterConfig(kind="ia3", targets=("down_proj", "k_proj", "v_proj")),
    "prompt": AdapterConfig(kind="prompt", prompt_tokens=6),
}
PEFT = {
    "plain": LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"]),
    "all-linear": LoraConfig(r=2, target_modules="all-linear"),
    "a pattern of names": LoraConfig(r=2, target_modules=r".*layers\.[12]\..*o_proj"),
    "some layers": LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0, 3]),
    "not all": LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=r".*layers\.1\..*"),
    "rank-stabilised": LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], use_rslora=True),
    "several ranks": LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 5, r"layers\.0\.self_attn\.q_proj": 1},
        alpha_pattern={"v_proj": 7},
    ),
    "a fraction as alpha": LoraConfig(r=4, lora_alpha=0.5, target_modules=["q_proj"]),
    "other starts": LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="gaussian", lora_dropout=0.1),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": PromptTuningConfig(num_virtual_tokens=5),
}


def load():
    return load_backbone(TINY, torch.float32)[0]


def disturb(tensors, seed: int = 0, size: float = 0.1):
    rng = np.random.default_rng(seed)
    return {
        name: (part + size * rng.standard_normal(part.shape)).astype(np.float32)
        for name, part in sorted(tensors.items())
    }


@torch.inference_mode()
def compute_logits(model) -> np.ndarray:
    return model.eval()(input_ids=TOKENS, use_cache=False).logits[0].numpy()


def make_peft_checkpoint(folder: Path, config) -> np.ndarray:
    """A checkpoint as peft users have it; returns its logits."""
    torch.manual_seed(1)
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(load(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return compute_logits(model)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_plain_peft_loads_what_is_exported_and_answers_alike(name, tmp_path):
    model = build_peft(load(), CONFIGS[name])
    base = disturb(get_adapter_tensors(model))
    set_adapter_tensors(model, base)
    export_checkpoint(tmp_path, model, base, "some/backbone")
    theirs = PeftModel.from_pretrained(load(), tmp_path)
    np.testing.assert_allclose(compute_logits(theirs), compute_logits(model), atol=2e-5)
    moved = np.abs(compute_logits(theirs)[-TOKENS.shape[1] :] - compute_logits(load())).max()
    assert moved > 0.05, "an adapter that changes nothing proves nothing"
    checkpoint = import_checkpoint(tmp_path)
    assert checkpoint.backbone == "some/backbone"
    if name in ("lora", "ia3", "prompt"):
        assert checkpoint.config == CONFIGS[name]
    if name in ("lora", "all-linear", "ia3", "prompt"):
        assert encode_tensors(checkpoint.tensors) == encode_tensors(base)


@pytest.mark.parametrize("name", sorted(PEFT))
def test_a_peft_checkpoint_becomes_a_base_that_answers_alike(name, tmp_path):
    expected = make_peft_checkpoint(tmp_path, PEFT[name])
    model, checkpoint = open_checkpoint(tmp_path, load())
    np.testing.assert_allclose(compute_logits(model), expected, atol=2e-5)
    assert encode_tensors(get_adapter_tensors(model)) == encode_tensors(checkpoint.tensors)
    data = encode_tensors(checkpoint.tensors)
    assert encode_tensors(decode_tensors(data, adapter_shapes(model))) == data


def test_directions_that_a_narrow_layer_lacks_can_be_trained(tmp_path):
    make_peft_checkpoint(tmp_path, PEFT["several ranks"])
    checkpoint = import_checkpoint(tmp_path)
    assert checkpoint.config.rank == 5
    low = checkpoint.tensors["model.layers.0.self_attn.q_proj.lora_A"]
    high = checkpoint.tensors["model.layers.0.self_attn.q_proj.lora_B"]
    assert low.shape == (5, 128)
    assert (high[:, 1:] == 0).all()
    assert (np.abs(low[1:]).max(axis=1) > 0).all()


def test_a_checkpoint_of_half_precision_is_read(tmp_path):
    make_peft_checkpoint(tmp_path, PEFT["plain"])
    stored = load_file(tmp_path / WEIGHTS_NAME)
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in stored.items()}, tmp_path / WEIGHTS_NAME)
    found = import_checkpoint(tmp_path).tensors
    assert all(part.dtype == np.float32 for part in found.values())
    name = "model.layers.0.self_attn.q_proj.lora_A"
    wanted = stored[f"base_model.model.{name}.weight"].to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(found[name], wanted)


def change_tensors(folder: Path, change) -> None:
    stored = load_file(folder / WEIGHTS_NAME)
    first = min(stored)
    (folder / WEIGHTS_NAME).unlink()
    save_file({name: part.contiguous().clone() for name, part in change(stored, first).items()}, folder / WEIGHTS_NAME)


BAD_TENSORS = {
    "a value that is no number": (lambda s, n: s | {n: s[n] * float("nan")}, "not finite"),
    "an infinite value": (lambda s, n: s | {n: s[n] + float("inf")}, "not finite"),
    "beyond float32": (lambda s, n: s | {n: s[n].double() + 1e300}, "not finite"),
    "integers": (lambda s, n: s | {n: s[n].to(torch.int8)}, "expected floating point"),
    "one dimension": (lambda s, n: s | {n: s[n].flatten()}, "two dimensions"),
    "an empty tensor": (lambda s, n: s | {n: s[n][:0]}, "not empty"),
    "another rank": (lambda s, n: s | {n: s[n][:3]}, r"expected A \(rank, in\) and B"),
    "factors the wrong way round": (lambda s, n: s | {n: s[n].T}, r"expected A \(rank, in\) and B"),
    "half a pair": (lambda s, n: {k: v for k, v in s.items() if k != n}, r"expected A \(rank, in\) and B"),
    "another rank in both": (
        lambda s, n: {k: v[:2] if "_A" in k else v[:, :2] for k, v in s.items()},
        "promises rank 4",
    ),
    "a stranger's tensor": (lambda s, n: s | {"base_model.model.lm_head.weight": s[n]}, "lm_head.weight is no tensor"),
    "a vector of DoRA": (lambda s, n: s | {n.replace("lora_A", "lora_magnitude_vector"): s[n]}, "magnitude.* is no"),
    "nothing": (lambda s, n: {}, "holds no tensor"),
}


@pytest.mark.parametrize("case", sorted(BAD_TENSORS))
def test_a_checkpoint_rejects_bad_tensors(case, tmp_path):
    change, message = BAD_TENSORS[case]
    make_peft_checkpoint(tmp_path, PEFT["plain"])
    change_tensors(tmp_path, change)
    with pytest.raises(OperatorError, match=message):
        import_checkpoint(tmp_path)


BAD_FIELDS = {
    "another method": ({"peft_type": "VERA"}, "peft_type"),
    "no method": ({"peft_type": None}, "peft_type"),
    "another task": ({"task_type": "SEQ_CLS"}, "task_type"),
    "DoRA": ({"use_dora": True}, "use_dora"),
    "biases": ({"bias": "all"}, "bias"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "what peft may invent": ({"use_next_years_lora": {"depth": 3}}, "use_next_years_lora"),
    "a changed backbone": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "a rank that is text": ({"r": "four"}, "expected what peft writes"),
    "another rank": ({"r": 5}, "promises rank 5"),
    "alpha zero": ({"lora_alpha": 0}, "alpha"),
    "a broken pattern": ({"rank_pattern": {"(": 4}}, "regular expression"),
}


@pytest.mark.parametrize("case", sorted(BAD_FIELDS))
def test_a_checkpoint_rejects_what_would_compute_something_else(case, tmp_path):
    fields, message = BAD_FIELDS[case]
    make_peft_checkpoint(tmp_path, PEFT["plain"])
    values = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(values | fields))
    with pytest.raises(OperatorError, match=message):
        import_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"peft_type": ' + b" " * (1 << 20) + b"1}"]
)
def test_a_checkpoint_rejects_a_configuration_that_is_none(data, tmp_path):
    make_peft_checkpoint(tmp_path, PEFT["plain"])
    (tmp_path / CONFIG_NAME).write_bytes(data)
    with pytest.raises(OperatorError, match=CONFIG_NAME):
        import_checkpoint(tmp_path)


@pytest.mark.parametrize("data", [b"", b"garbage", b"\xff" * 8, (8).to_bytes(8, "little") + b"{}      "])
def test_a_checkpoint_rejects_weights_that_are_none(data, tmp_path):
    make_peft_checkpoint(tmp_path, PEFT["plain"])
    (tmp_path / WEIGHTS_NAME).write_bytes(data)
    with pytest.raises(OperatorError, match=WEIGHTS_NAME):
        import_checkpoint(tmp_path)


def test_a_pickle_is_never_opened(tmp_path):
    make_peft_checkpoint(tmp_path, PEFT["plain"])
    (tmp_path / WEIGHTS_NAME).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path).encode() + b"/ran'\ntR.")
    with pytest.raises(OperatorError, match=r"adapter_model.bin is a pickle.*save_pretrained"):
        import_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(OperatorError, match=CONFIG_NAME):
        import_checkpoint(tmp_path / "nothing")
    make_peft_checkpoint(tmp_path, PEFT["plain"])
    (tmp_path / WEIGHTS_NAME).unlink()
    with pytest.raises(OperatorError, match="is missing"):
        import_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["ia3", "prompt"])
def test_other_kinds_reject_tensors_that_their_configuration_does_not_promise(name, tmp_path):
    make_peft_checkpoint(tmp_path, PEFT[name])
    change_tensors(tmp_path, lambda stored, first: stored | {first: stored[first].T})
    with pytest.raises(OperatorError, match=r"expected|promises"):
        import_checkpoint(tmp_path)


def test_a_checkpoint_of_another_backbone_is_refused(tmp_path):
    make_peft_checkpoint(tmp_path, PEFT["plain"])
    change_tensors(tmp_path, lambda stored, first: stored | {first: stored[first][:, :64]})
    with pytest.raises(OperatorError, match=r"expected .*lora_A of shape \(4, 128\), got \(4, 64\)"):
        open_checkpoint(tmp_path, load())
    change_tensors(tmp_path, lambda stored, _: {k: v for k, v in stored.items() if "layers.3" not in k})
    with pytest.raises(OperatorError, match=r"lacks the tensor model.layers.3"):
        open_checkpoint(tmp_path, load())


@pytest.mark.parametrize("case", ["a name", "a shape", "a number"])
def test_an_export_rejects_what_is_no_base_of_the_model(case, tmp_path):
    model = build_peft(load(), CONFIGS["lora"])
    good = get_adapter_tensors(model)
    name = next(iter(good))
    bad = {
        "a name": {**good, "other": good[name]},
        "a shape": {**good, name: good[name].T},
        "a number": {**good, name: good[name] * np.float32(np.nan)},
    }[case]
    with pytest.raises(OperatorError):
        export_checkpoint(tmp_path, model, bad)
    assert list(tmp_path.iterdir()) == []


def test_an_export_to_a_place_that_is_no_folder_is_one_clear_error(tmp_path):
    model = build_peft(load(), CONFIGS["lora"])
    (tmp_path / "file").write_text("")
    with pytest.raises(OperatorError, match="cannot write a checkpoint"):
        export_checkpoint(tmp_path / "file", model, get_adapter_tensors(model))
    assert get_shapes(get_adapter_tensors(model)) == adapter_shapes(model)
