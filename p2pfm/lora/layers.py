"""Adapter tensors inside a peft model: how they are built, named, set and read.

Knows torch, transformers and peft; nothing of data, training or peers. Canonical names are those of `lora.kinds`,
whatever peft calls them inside.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from p2pfm.config import ALL_LINEAR, AdapterConfig
from p2pfm.errors import OperatorError
from p2pfm.lora.kinds import PROMPT, compute_frozen, compute_initial
from p2pfm.types import Array, Tensors

PREFIX = "base_model.model."
ADAPTER = "default"
FEED_FORWARD = frozenset({"down_proj", "fc2", "fc_out", "dense_4h_to_h", "wo", "w2"})
"""Targets whose input `ia3` scales, not their output: second layers of feed-forward blocks, as architectures call them.
Our own list, because peft's depends on its version, and every peer of a network must have the same shapes."""


def load_backbone(path: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer) of a Hugging Face folder or a hub's org/name, frozen, in eval mode.

    `dtype` None keeps the type in which the weights are stored (bf16 for the default demo's backbone).

    Raises:
        OperatorError: no such folder or hub model, or a tokenizer without a chat template.
    """
    is_hub_name = not Path(path).is_dir() and str(path).count("/") == 1 and not str(path).startswith((".", "/", "~"))
    if not is_hub_name and not Path(path).is_dir():
        raise OperatorError(f"no model folder {path}. Run `p2pfm models fetch NAME`, or give a hub's org/name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
        model = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype or "auto")
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise OperatorError(f"cannot load the model {path}: {first_line}. Run `p2pfm models fetch NAME`") from error
    if not getattr(tokenizer, "chat_template", None):
        raise OperatorError(f"the tokenizer of {path} has no chat template; choose an instruction-tuned model")
    model.requires_grad_(False)
    return model.to(device).eval(), tokenizer


def choose_device(wanted: Literal["auto", "cpu", "cuda"] = "auto") -> str:
    """Where a model runs: "cpu" or "cuda"; for "auto" on "cuda" where torch finds one.

    Raises:
        OperatorError: "cuda" is wanted, and torch finds none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise OperatorError('serving.device: torch finds no CUDA on this machine; set "auto" or "cpu"')
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


class Frozen(nn.Module):
    """A bias-free linear layer whose weight is no parameter: no optimizer, payload or base ever sees it."""

    weight: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        """`weight`: (out, in)."""
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return functional.linear(inputs, self.weight)


class CoreThenFrozen(nn.Module):
    """What stands for LoRA's B in `fed_sb`: a trained rank x rank core, then a frozen B."""

    def __init__(self, core: nn.Linear, frozen: Frozen) -> None:
        super().__init__()
        self.core = core
        self.frozen = frozen

    @property
    def weight(self) -> torch.Tensor:
        """B R, (out, rank): what plain LoRA would have as its B."""
        return self.frozen.weight @ self.core.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., rank) to (..., out)."""
        return self.frozen(self.core(inputs))  # type: ignore[no-any-return]


def build_peft(model: Any, config: AdapterConfig) -> PeftModel:
    """The backbone with its adapter (in place), at the network's start; adapter weights are float32, eval mode.

    Raises:
        OperatorError: the backbone has no layer of the names in `config.targets`, or they do not fit its kind.
    """
    peft_model = _wrap(model, config)
    set_adapter_tensors(peft_model, get_initial(peft_model, config))
    return peft_model.eval()


def describe_adapter(model: Any, config: AdapterConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, Array]]:
    """Names and shapes of what `config`'s kind trains on this backbone, and the factors that it freezes.

    The backbone stays as it is: a twin without weights is wrapped. Raises as `build_peft`.
    """
    form = describe_form(model.config, config)
    return form.shapes, form.frozen


class PeftForm(NamedTuple):
    """What a checkpoint of an adapter is made of, beside the base's tensors."""

    shapes: dict[str, tuple[int, ...]]
    frozen: dict[str, Array]
    config: PeftConfig


def describe_form(model_config: Any, config: AdapterConfig) -> PeftForm:
    """Of a backbone with this transformers config; needs none of its weights. Raises as `build_peft`."""
    with torch.device("meta"):
        peft_model = _wrap(AutoModelForCausalLM.from_config(model_config), config)
    frozen = compute_frozen(config, get_sizes(peft_model))
    return PeftForm(adapter_shapes(peft_model), frozen, peft_model.peft_config[ADAPTER])


def get_form(peft_model: PeftModel) -> PeftForm:
    """Of a model that has its adapter."""
    return PeftForm(adapter_shapes(peft_model), get_frozen(peft_model), peft_model.peft_config[ADAPTER])


def _wrap(model: Any, config: AdapterConfig) -> PeftModel:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and config.num_virtual >= context:
        raise OperatorError(f"network.adapter.prompt_tokens: this backbone has {context} positions in all")
    try:
        peft_model = get_peft_model(model, make_peft_config(model, config), adapter_name=ADAPTER)
    except ValueError as error:
        raise OperatorError(
            f"network.adapter.targets {list(config.targets)} do not fit this backbone: {error}"
        ) from error
    _freeze(peft_model, config)
    return peft_model


def make_peft_config(model: Any, config: AdapterConfig) -> PeftConfig:
    """peft's own configuration of an adapter (of the LoRA that it folds into, for `ffa` and `fed_sb`)."""
    targets = ALL_LINEAR if config.targets == (ALL_LINEAR,) else list(config.targets)
    if config.kind == "prompt":
        # What peft draws is replaced; RANDOM is only its cheapest.
        return PromptTuningConfig(
            num_virtual_tokens=config.prompt_tokens, prompt_tuning_init="RANDOM", task_type="CAUSAL_LM"
        )
    if config.kind == "ia3":
        named = FEED_FORWARD if targets == ALL_LINEAR else config.targets
        feed_forward = [target for target in sorted(named) if is_feed_forward(target)]
        return IA3Config(target_modules=targets, feedforward_modules=feed_forward, task_type="CAUSAL_LM")
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def is_feed_forward(target: str) -> bool:
    """`ia3` scales this layer's input, not its output."""
    return target.rsplit(".", 1)[-1] in FEED_FORWARD


def get_sizes(peft_model: PeftModel, adapter: str = ADAPTER) -> dict[str, tuple[int, int]]:
    """(out, in) of the layers that have LoRA factors, by module path; empty for other kinds."""
    return {
        name.removeprefix(PREFIX): (layer.out_features, layer.in_features)
        for name, layer in peft_model.named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.lora_B
    }


def get_initial(peft_model: PeftModel, config: AdapterConfig) -> dict[str, Array]:
    """The adapter before round 0 (`kinds.compute_initial`); a prompt's start is read from the backbone."""
    vocabulary = None
    if config.kind == "prompt":
        vocabulary = peft_model.get_input_embeddings().weight.detach().to("cpu", torch.float32).numpy()
    return compute_initial(adapter_shapes(peft_model), config.seed, vocabulary)


def get_frozen(peft_model: PeftModel) -> dict[str, Array]:
    """What the kind freezes, as `kinds.compute_frozen` made it: for those who fold it into plain LoRA."""
    layers = {
        name.removeprefix(PREFIX): layer
        for name, layer in peft_model.named_modules()
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_B
    }
    found = {f"{name}.lora_A": layer.lora_A[ADAPTER] for name, layer in layers.items()}
    found |= {f"{name}.lora_B": getattr(layer.lora_B[ADAPTER], "frozen", None) for name, layer in layers.items()}
    return {name: part.weight.cpu().numpy() for name, part in sorted(found.items()) if isinstance(part, Frozen)}


def get_parameters(peft_model: PeftModel, adapter: str = ADAPTER) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by canonical name, sorted: what its kind trains, and no frozen factor.

    Works for any peft method, since peft puts the adapter's name in every parameter of it.
    """
    found = {
        _canonical_name(name, adapter): parameter
        for name, parameter in peft_model.named_parameters()
        if adapter in name.split(".")
    }
    return {name: found[name] for name in sorted(found)}


def adapter_shapes(peft_model: PeftModel, adapter: str = ADAPTER) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapter's tensors, sorted: `lora.kinds` has the table."""
    return {name: tuple(parameter.shape) for name, parameter in get_parameters(peft_model, adapter).items()}


def set_adapter_tensors(peft_model: PeftModel, tensors: Tensors, adapter: str = ADAPTER) -> None:
    """Copy `tensors` into the adapter (values only: shapes and names must be `adapter_shapes`)."""
    parameters = get_parameters(peft_model, adapter)
    assert parameters.keys() == tensors.keys(), "tensors of another adapter"
    with torch.no_grad():
        for name, parameter in parameters.items():
            assert parameter.shape == tensors[name].shape, f"{name} of another shape"  # torch would broadcast it
            parameter.copy_(torch.from_numpy(np.array(tensors[name], np.float32)))


def get_adapter_tensors(peft_model: PeftModel, adapter: str = ADAPTER) -> dict[str, Array]:
    """The adapter's values as float32 arrays (copies)."""
    return {
        name: parameter.detach().to("cpu", torch.float32).numpy().copy()
        for name, parameter in get_parameters(peft_model, adapter).items()
    }


def predict(model: Any, tokens: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Logits (num_wanted, vocabulary) of a causal model at these positions of `tokens` only.

    The vocabulary's projection sees a contiguous matrix of just the wanted positions. On a slice of the batch torch
    copies the whole projection once a row, which took 60% of a step.
    """
    num_tokens = tokens.shape[1]

    def pick(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        hidden = inputs[0]  # (num_samples, virtual + num_tokens, hidden): a soft prompt stands before the text
        return (hidden[rows, columns + (hidden.shape[1] - num_tokens)],)

    hook = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
    return logits


def _freeze(peft_model: PeftModel, config: AdapterConfig) -> None:
    """Put the frozen factors of `ffa` and `fed_sb` in the place of peft's parameters."""
    sizes = get_sizes(peft_model)
    frozen = compute_frozen(config, sizes)
    for name in sizes if frozen else ():
        layer = peft_model.get_submodule(PREFIX + name)
        device = layer.lora_A[ADAPTER].weight.device
        layer.lora_A[ADAPTER] = Frozen(torch.from_numpy(frozen[f"{name}.lora_A"]).to(device))
        if config.kind == "fed_sb":
            core = nn.Linear(config.rank, config.rank, bias=False, device=device)
            layer.lora_B[ADAPTER] = CoreThenFrozen(core, Frozen(torch.from_numpy(frozen[f"{name}.lora_B"]).to(device)))


def _canonical_name(name: str, adapter: str) -> str:
    """A parameter's name without what peft puts around and between."""
    if name.startswith("prompt_encoder."):
        return PROMPT
    parts = [part for part in name.removeprefix(PREFIX).removesuffix(".weight").split(".") if part != adapter]
    return ".".join(parts).replace(".lora_B.core", ".lora_R")
