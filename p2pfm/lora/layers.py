"""Adapter tensors inside a peft model: how they are built, named, set and read.

Knows torch, transformers and peft; nothing of data, training or peers. Canonical names are the backbone's module path
and `lora_A` or `lora_B` ("model.layers.0.self_attn.q_proj.lora_A"), whatever peft calls them inside.
"""

import math
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from p2pfm.config import AdapterConfig
from p2pfm.errors import OperatorError
from p2pfm.types import Array, Tensors

PREFIX = "base_model.model."
ADAPTER = "default"


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


def choose_device() -> str:
    """Where training runs: "cuda" where torch finds one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def build_peft(model: Any, config: AdapterConfig) -> PeftModel:
    """The backbone with LoRA modules injected (in place); adapter weights are float32, dropout is 0, eval mode.

    The weights are peft's own until `set_adapter_tensors`; the network's first ones are `compute_initial`.

    Raises:
        OperatorError: the backbone has no module of the names in `config.targets`.
    """
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        peft_model = get_peft_model(model, lora, adapter_name=ADAPTER, autocast_adapter_dtype=True)
    except ValueError as error:
        raise OperatorError(
            f"network.adapter.targets {list(config.targets)} do not fit this backbone: {error}"
        ) from error
    return peft_model.eval()


def get_parameters(peft_model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by canonical name, sorted."""
    suffix = f".{ADAPTER}.weight"
    found = {
        name.removeprefix(PREFIX).removesuffix(suffix): parameter
        for name, parameter in peft_model.named_parameters()
        if name.endswith((f".lora_A{suffix}", f".lora_B{suffix}"))
    }
    return {name: found[name] for name in sorted(found)}


def adapter_shapes(peft_model: PeftModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapter's tensors, sorted: A is (rank, in), B is (out, rank)."""
    return {name: tuple(parameter.shape) for name, parameter in get_parameters(peft_model).items()}


def set_adapter_tensors(peft_model: PeftModel, tensors: Tensors) -> None:
    """Copy `tensors` into the adapter (values only: shapes and names must be `adapter_shapes`)."""
    parameters = get_parameters(peft_model)
    assert parameters.keys() == tensors.keys(), "tensors of another adapter"
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(np.array(tensors[name], np.float32)))


def get_adapter_tensors(peft_model: PeftModel) -> dict[str, Array]:
    """The adapter's values as float32 arrays (copies)."""
    return {
        name: parameter.detach().to("cpu", torch.float32).numpy().copy()
        for name, parameter in get_parameters(peft_model).items()
    }


def predict(model: Any, tokens: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Logits (num_wanted, vocabulary) of a causal model at these positions of `tokens` only.

    The vocabulary's projection sees a contiguous matrix of just the wanted positions. On a slice of the batch torch
    copies the whole projection once a row, which took 60% of a step.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _module, inputs: (inputs[0][rows, columns],))
    try:
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
    return logits


def compute_initial(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Array]:
    """The adapter before round 0: B = 0, A uniform in +-1/sqrt(in) (peft's own law), the same bytes everywhere.

    Drawn from PCG64's raw words, whose stream numpy guarantees (it does not guarantee `Generator`'s), keyed by the
    network's seed and the tensor's name.
    """
    return {
        name: np.zeros(shape, np.float32) if name.endswith(".lora_B") else _uniform(name, shape, seed)
        for name, shape in sorted(shapes.items())
    }


def _uniform(name: str, shape: tuple[int, ...], seed: int) -> Array:
    key = sha256(b"p2pfm initial adapter" + seed.to_bytes(16, "big", signed=True) + name.encode()).digest()
    raw = np.random.PCG64(int.from_bytes(key, "big")).random_raw(math.prod(shape))
    centred = (raw >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1.0  # 24 bits, exact in [-1, 1)
    return (centred / math.sqrt(shape[1])).astype(np.float32).reshape(shape)
