"""peft checkpoint folders (adapter_config.json, adapter_model.safetensors): read as a base, written from one.

Knows files, peft's format and adapter kinds; no peer, round or training. Reads safetensors only: a pickle would run its
author's code. What changes a layer's arithmetic and is not known here is refused by name, never left out.
"""

import copy
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from peft import PeftModel
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from p2pfm.config import AdapterConfig
from p2pfm.errors import OperatorError
from p2pfm.lora.delta import Shapes, get_shapes
from p2pfm.lora.kinds import PROMPT, compute_initial
from p2pfm.lora.layers import (
    PREFIX,
    PeftForm,
    adapter_shapes,
    build_peft,
    get_form,
    is_feed_forward,
    set_adapter_tensors,
)
from p2pfm.lora.user_adapter import CONFIG_NAME, WEIGHTS_NAME
from p2pfm.types import Array, Tensors

PICKLE_NAME = "adapter_model.bin"
CONFIG_BYTES_MAX = 1 << 20
"""An adapter's configuration has a few kilobytes."""
WEIGHTS_BYTES_MAX = 8 << 30
"""All of it is held in memory at once."""

MADE_HOW = frozenset(
    [
        *("peft_version", "auto_mapping", "revision", "inference_mode", "layers_pattern", "megatron_core"),
        *("fan_in_fan_out", "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("qalora_group_size", "runtime_config", "feedforward_modules", "init_ia3_weights", "num_attention_heads"),
        *("num_layers", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    ]
)
"""Fields that say how an adapter was made and not what it computes. Every other one that is not in `PeftFields` must be
off: peft adds variants of LoRA with every release."""

PLAIN_INITS = frozenset({None, True, False, "gaussian", "orthogonal", "eva"})
"""`init_lora_weights` that leave the backbone's own weights alone (PiSSA and its like change them)."""


class PeftFields(msgspec.Struct, frozen=True):
    """What is read of adapter_config.json; the names are peft's."""

    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    r: int = 8
    lora_alpha: float = 8
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = False
    init_lora_weights: bool | str | None = True
    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None


Stored = Mapping[str, torch.Tensor]
"""A checkpoint's tensors by their names in the file."""

Imported = tuple[AdapterConfig, dict[str, Array]]

Factors = dict[str, tuple[Array, Array]]
"""By module path: A (rank, in) and B (out, rank)."""


class Checkpoint(NamedTuple):
    """An adapter as a network's configuration and a base's tensors."""

    config: AdapterConfig
    tensors: dict[str, Array]
    backbone: str
    """The name that the checkpoint gives its backbone; may be empty."""


def import_checkpoint(folder: Path) -> Checkpoint:
    """The adapter in a peft checkpoint folder: LoRA, IA3 or prompt tuning.

    LoRA with several ranks or alphas, or rank-stabilised, becomes one of the largest rank: B is rescaled, and the
    directions that a narrower layer lacks are there with B = 0. Its dW is the same.

    Raises:
        OperatorError: no checkpoint, a pickle, an unknown method, or tensors that are damaged, not finite or misnamed.
    """
    fields = _read_fields(folder)
    stored = _read_weights(folder)
    if not stored:
        raise OperatorError(f"{folder / WEIGHTS_NAME} holds no tensor")
    config, tensors = KINDS[fields.peft_type](folder, fields, stored)
    return Checkpoint(config, dict(sorted(tensors.items())), fields.base_model_name_or_path or "")


def read_lora(folder: Path, bytes_max: int = WEIGHTS_BYTES_MAX) -> tuple[str, Factors]:
    """A LoRA checkpoint folder as it is: the name that it gives its backbone, and factors with dW = B A.

    Each layer keeps its own rank; what peft multiplies B A by is folded into B.

    Raises:
        OperatorError: as `import_checkpoint`, another method than LoRA, or more than `bytes_max` of weights.
    """
    fields = _read_fields(folder)
    if fields.peft_type != "LORA":
        raise OperatorError(f"{folder / CONFIG_NAME}: expected peft_type LORA, got {fields.peft_type!r}")
    stored = _read_weights(folder, bytes_max)
    if not stored:
        raise OperatorError(f"{folder / WEIGHTS_NAME} holds no tensor")
    factors, scales = _read_factors(folder, fields, stored)
    scaled = {name: (low, _scale_up(high, scales[name])) for name, (low, high) in sorted(factors.items())}
    for name, (_, high) in scaled.items():
        if not np.isfinite(high).all():
            raise OperatorError(f"{folder / WEIGHTS_NAME}: {name}: B times its scale is not finite in float32")
    return fields.base_model_name_or_path or "", scaled


def open_checkpoint(folder: Path, backbone: Any) -> tuple[PeftModel, Checkpoint]:
    """`backbone` (changed in place) with the adapter of a checkpoint folder, built as a network builds it.

    Raises:
        OperatorError: as `import_checkpoint`, or the adapter is of another backbone.
    """
    checkpoint = import_checkpoint(folder)
    model = build_peft(backbone, checkpoint.config)
    validate_tensors(checkpoint.tensors, adapter_shapes(model), str(folder))
    set_adapter_tensors(model, checkpoint.tensors)
    return model, checkpoint


def export_checkpoint(folder: Path, peft_model: PeftModel, tensors: Tensors, backbone: str = "") -> None:
    """Write a base as a checkpoint folder that plain `PeftModel.from_pretrained(model, folder)` loads.

    `ffa` and `fed_sb` become ordinary LoRA: the frozen A, and B (or B R). An older checkpoint there is replaced.

    Args:
        peft_model: of `build_peft`; it knows what the kind freezes. Not changed.
        backbone: the name to write as the checkpoint's backbone.

    Raises:
        OperatorError: tensors of another adapter, or not finite; or the folder cannot be written.
    """
    write_checkpoint(folder, get_form(peft_model), tensors, backbone)


def write_checkpoint(folder: Path, form: PeftForm, tensors: Tensors, backbone: str = "") -> None:
    """As `export_checkpoint`, by what `layers.describe_form` tells: for who has no model at hand."""
    validate_tensors(tensors, form.shapes, "the base")
    parts = fold(tensors, form.frozen)
    stored = {_stored_name(name): torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}
    config = copy.deepcopy(form.config)
    config.inference_mode = True
    config.base_model_name_or_path = backbone
    try:
        config.save_pretrained(str(folder))
        save_file(stored, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    except (OSError, AssertionError, SafetensorError) as error:
        raise OperatorError(f"cannot write a checkpoint to {folder}: {error}") from error


def fold(tensors: Tensors, frozen: Tensors) -> dict[str, Array]:
    """The tensors of plain peft: frozen factors beside trained ones, and B R in the place of R."""
    parts: dict[str, Array] = {name: np.asarray(part, np.float32) for name, part in {**frozen, **tensors}.items()}
    for name in [name for name in parts if name.endswith(".lora_R")]:
        factor = name.removesuffix("R") + "B"
        product = parts[factor].astype(np.float64) @ parts.pop(name).astype(np.float64)  # (out, rank)
        parts[factor] = product.astype(np.float32)
    return dict(sorted(parts.items()))


def validate_tensors(tensors: Tensors, shapes: Shapes, where: str) -> None:
    """Refuse tensors that are not an adapter of these names and shapes, or not finite.

    Raises:
        OperatorError: names the first tensor that is wrong.
    """
    found = get_shapes(tensors)
    for name in sorted(found.keys() ^ dict(shapes).keys()):
        what = "lacks" if name in shapes else "has, and this backbone's adapter has not,"
        raise OperatorError(f"{where} {what} the tensor {name}: is it of another backbone or adapter?")
    for name, shape in found.items():
        if shape != tuple(shapes[name]):
            raise OperatorError(f"{where}: expected {name} of shape {tuple(shapes[name])}, got {shape}")
        if not np.isfinite(tensors[name]).all():
            raise OperatorError(f"{where}: {name} has values that are not finite")


def _read_fields(folder: Path) -> PeftFields:
    """adapter_config.json. Raises OperatorError for whatever is no such file, or would compute something else."""
    path = folder / CONFIG_NAME
    try:
        with path.open("rb") as file:
            data = file.read(CONFIG_BYTES_MAX + 1)
        if len(data) > CONFIG_BYTES_MAX:
            raise OperatorError(f"{path}: expected at most {CONFIG_BYTES_MAX} bytes")
        values = msgspec.json.decode(data, type=dict[str, Any])
        fields = msgspec.convert(values, PeftFields)
    except OSError as error:
        raise OperatorError(f"no peft checkpoint in {folder}: {CONFIG_NAME}: {error.strerror}") from error
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise OperatorError(f"{path}: expected what peft writes: {error}") from error
    if fields.peft_type not in KINDS:
        raise OperatorError(f"{path}: expected peft_type to be one of {', '.join(KINDS)}, got {fields.peft_type!r}")
    if fields.task_type not in (None, "CAUSAL_LM"):
        raise OperatorError(f"{path}: expected task_type CAUSAL_LM, got {fields.task_type!r}")
    for name, value in sorted(values.items()):
        if name not in MADE_HOW and name not in PeftFields.__struct_fields__ and value and value != "none":
            raise OperatorError(f"{path}: {name} = {value!r} is not supported; expected it to be off")
    if fields.init_lora_weights not in PLAIN_INITS:
        raise OperatorError(
            f"{path}: init_lora_weights = {fields.init_lora_weights!r} changed the backbone's own weights; convert the "
            "adapter with peft's `path_initial_model_for_weight_conversion` first"
        )
    return fields


def _read_weights(folder: Path, bytes_max: int = WEIGHTS_BYTES_MAX) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        if (folder / PICKLE_NAME).exists():
            raise OperatorError(
                f"{folder / PICKLE_NAME} is a pickle, which would run its author's code, and is not opened; save the "
                "adapter again with `save_pretrained(folder, safe_serialization=True)`"
            )
        raise OperatorError(f"no peft checkpoint in {folder}: {WEIGHTS_NAME} is missing")
    size = path.stat().st_size
    if size > bytes_max:
        raise OperatorError(f"{path}: expected at most {bytes_max} bytes, got {size}")
    try:
        stored: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise OperatorError(f"{path}: not a safetensors file, or damaged: {error}") from error
    return stored


def _to_array(folder: Path, name: str, tensor: torch.Tensor) -> Array:
    where = f"{folder / WEIGHTS_NAME}: {name}"
    if not tensor.is_floating_point():
        raise OperatorError(f"{where}: expected floating point, got {tensor.dtype}")
    if tensor.dim() != 2 or not tensor.numel():
        raise OperatorError(f"{where}: expected two dimensions that are not empty, got {tuple(tensor.shape)}")
    array: Array = tensor.to(torch.float32).numpy()
    if not np.isfinite(array).all():
        raise OperatorError(f"{where} has values that are not finite in float32")
    return array


def _import_prompt(folder: Path, fields: PeftFields, stored: Stored) -> Imported:
    if set(stored) != {PROMPT}:
        raise OperatorError(f"{folder / WEIGHTS_NAME}: expected the one tensor {PROMPT}, got {sorted(stored)[:5]}")
    prompt = _to_array(folder, PROMPT, stored[PROMPT])
    num_tokens, width = prompt.shape
    expected = (fields.num_virtual_tokens, fields.token_dim or width)
    if (num_tokens, width) != expected or fields.num_transformer_submodules not in (None, 1):
        raise OperatorError(f"{folder}: {CONFIG_NAME} promises {expected} for one decoder, {PROMPT} is {prompt.shape}")
    return AdapterConfig(kind="prompt", prompt_tokens=num_tokens), {PROMPT: prompt}


def _import_ia3(folder: Path, fields: PeftFields, stored: Stored) -> Imported:
    modules = {}
    for key, tensor in sorted(stored.items()):
        module = _module_of(folder, key, "ia3_l")
        scales = _to_array(folder, key, tensor)
        if scales.shape[0 if is_feed_forward(module) else 1] != 1:
            where = "(1, in): it scales its input" if is_feed_forward(module) else "(out, 1): it scales its output"
            raise OperatorError(f"{folder / WEIGHTS_NAME}: {key}: expected {where}; got {scales.shape}")
        modules[module] = scales
    config = AdapterConfig(kind="ia3", targets=_targets(fields, modules))
    return config, {f"{module}.ia3_l": scales for module, scales in modules.items()}


def _import_lora(folder: Path, fields: PeftFields, stored: Stored) -> Imported:
    factors, scales = _read_factors(folder, fields, stored)
    rank = max(len(low) for low, _ in factors.values())
    is_whole = fields.lora_alpha >= 1 and fields.lora_alpha.is_integer()
    alpha = int(fields.lora_alpha) if is_whole else rank
    tensors: dict[str, Array] = {}
    for module, (low, high) in factors.items():
        tensors |= _widen(module, low, high, rank, scales[module] * rank / alpha)
    return AdapterConfig(kind="lora", rank=rank, alpha=alpha, targets=_targets(fields, factors)), tensors


def _read_factors(folder: Path, fields: PeftFields, stored: Stored) -> tuple[Factors, dict[str, float]]:
    """The factors as stored, and what peft multiplies each layer's B A by."""
    parts: dict[str, dict[str, Array]] = {}
    for key, tensor in sorted(stored.items()):
        role = "lora_A" if key.endswith(".lora_A.weight") else "lora_B"
        module = _module_of(folder, key, f"{role}.weight")
        parts.setdefault(module, {})[role] = _to_array(folder, key, tensor)
    factors: Factors = {}
    for module, pair in parts.items():
        shapes = {role: part.shape for role, part in pair.items()}
        if len(pair) != 2 or shapes["lora_A"][0] != shapes["lora_B"][1]:
            where = f"{folder / WEIGHTS_NAME}: {module}"
            raise OperatorError(f"{where}: expected A (rank, in) and B (out, rank), got {shapes}")
        factors[module] = pair["lora_A"], pair["lora_B"]
    return factors, {module: _scale_of(folder, fields, module, len(low)) for module, (low, _) in factors.items()}


def _scale_of(folder: Path, fields: PeftFields, module: str, rank: int) -> float:
    """What peft multiplies B A by in this layer. Raises OperatorError where configuration and tensors disagree."""
    ranks, alphas = fields.rank_pattern or {}, fields.alpha_pattern or {}
    try:
        expected = ranks.get(get_pattern_key(list(ranks), module), fields.r)
        alpha = alphas.get(get_pattern_key(list(alphas), module), fields.lora_alpha)
    except re.error as error:
        raise OperatorError(f"{folder / CONFIG_NAME}: a pattern is no regular expression: {error}") from error
    if expected != rank:
        raise OperatorError(f"{folder}: {CONFIG_NAME} promises rank {expected} for {module}, its tensors have {rank}")
    if alpha == 0:
        raise OperatorError(f"{folder / CONFIG_NAME}: expected an alpha other than 0 for {module}")
    return alpha / (math.sqrt(rank) if fields.use_rslora else rank)


def _widen(module: str, low: Array, high: Array, rank: int, factor: float) -> dict[str, Array]:
    """A and B of the common rank, B times `factor`: the same dW, and no direction that could not be trained."""
    names = f"{module}.lora_A", f"{module}.lora_B"
    more = rank - low.shape[0]
    if more:
        fresh = compute_initial({names[0]: (rank, low.shape[1])}, seed=0)[names[0]]
        low = np.concatenate([low, fresh[-more:]])  # (rank, in)
        high = np.concatenate([high, np.zeros((high.shape[0], more), np.float32)], axis=1)  # (out, rank)
    return dict(zip(names, (low, _scale_up(high, factor)), strict=True))


def _scale_up(high: Array, factor: float) -> Array:
    """B times `factor`, rounded once."""
    if factor == 1:
        return high
    with np.errstate(over="ignore"):  # what comes of it is looked at
        return (high.astype(np.float64) * factor).astype(np.float32)


def _module_of(folder: Path, key: str, suffix: str) -> str:
    if not key.startswith(PREFIX) or not key.endswith("." + suffix):
        raise OperatorError(f"{folder / WEIGHTS_NAME}: {key} is no tensor of this adapter's kind on a linear layer")
    return key.removeprefix(PREFIX).removesuffix("." + suffix)


def _targets(fields: PeftFields, modules: Iterable[str]) -> tuple[str, ...]:
    """The names that the checkpoint gives, where they alone say which layers; else every layer's path."""
    named = fields.target_modules
    if isinstance(named, list) and not fields.exclude_modules and fields.layers_to_transform is None:
        return tuple(sorted(set(named)))
    return tuple(sorted(modules))


def _stored_name(name: str) -> str:
    """Our tensor's name in peft's file."""
    return name if name == PROMPT else PREFIX + name + ("" if name.endswith(".ia3_l") else ".weight")


KINDS = {"LORA": _import_lora, "IA3": _import_ia3, "PROMPT_TUNING": _import_prompt}
"""How each of peft's types is read."""
