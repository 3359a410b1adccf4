"""Adapter kinds as named sets of tensors: what each kind trains, what it freezes, and where both start.

Knows names, shapes and numbers; no torch, model or peer. Whatever a kind trains goes the same way (delta, compression,
score, merge, serving); what it freezes is no part of any payload or base, so every peer makes it from the network's
seed. Names are the backbone's module path and the tensor's role: "model.layers.0.self_attn.q_proj.lora_A".

    kind     trained                                        frozen, seeded                start
    lora     lora_A (rank, in), lora_B (out, rank)          -                             B = 0: dW = 0
    ffa      lora_B (out, rank)                             lora_A                        B = 0
    fed_sb   lora_R (rank, rank)                            lora_A, lora_B orthogonal     R = 0
    ia3      ia3_l (out, 1), or (1, in) of a feed-forward   -                             1: scales by one
    prompt   prompt_embeddings (prompt_tokens, hidden)      -                             tokens of the vocabulary

The first three add dW = alpha / rank * B [R] A to a layer. `lora` averages factors, so a mean of adapters is not the
adapter of the mean dW; `ffa` and `fed_sb` are linear in what they train, so there it is, exactly.
"""

import math
from collections.abc import Mapping
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from p2pfm.config import AdapterConfig
from p2pfm.errors import OperatorError
from p2pfm.types import Array

PROMPT = "prompt_embeddings"
"""The one tensor of a soft prompt (peft's name for it)."""

Sizes = Mapping[str, tuple[int, int]]
"""(out, in) of the layers that an adapter changes, by their module path."""

CHAINS = {
    "lora": ("lora_A", "lora_B"),
    "ffa": ("lora_A", "lora_B"),
    "fed_sb": ("lora_A", "lora_R", "lora_B"),
}
"""A layer's factors in the order in which they are applied."""

TRAINED = {"lora": ("lora_A", "lora_B"), "ffa": ("lora_B",), "fed_sb": ("lora_R",)}
"""Those of them that a payload carries."""

GRID = 2.0**-16
"""Orthogonal factors are rounded to multiples of this: LAPACK's last bits, which differ between machines, go away (but
for about one number in 10**9, by one step, which changes nothing that can be measured)."""


def compute_shapes(config: AdapterConfig, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a kind with factors (lora, ffa, fed_sb) trains on layers of these sizes, sorted."""
    return _shapes(config, sizes, TRAINED[config.kind])


def compute_frozen(config: AdapterConfig, sizes: Sizes) -> dict[str, Array]:
    """The frozen factors of `ffa` and `fed_sb` on layers of these sizes; nothing for other kinds.

    Raises:
        OperatorError: fed_sb with a rank that a layer is too narrow for.
    """
    if config.kind == "ffa":
        return compute_initial(_shapes(config, sizes, ("lora_A",)), config.seed)
    if config.kind != "fed_sb":
        return {}
    for name, size in sorted(sizes.items()):
        if config.rank > min(size):
            raise OperatorError(
                f"network.adapter.rank: fed_sb takes at most the width of the narrowest layer, and {name} has {size}; "
                f"got {config.rank}"
            )
    shapes = _shapes(config, sizes, ("lora_A", "lora_B"))
    return {name: _orthogonal(name, shape, config.seed) for name, shape in shapes.items()}


def compute_initial(
    shapes: Mapping[str, tuple[int, ...]], seed: int, vocabulary: NDArray[np.floating] | None = None
) -> dict[str, Array]:
    """What is trained, before round 0: the same bytes on every peer, whatever the kind.

    A is uniform in +-1/sqrt(in) (peft's own law), B and R are 0, scales are 1. All but a prompt leave the backbone's
    answers as they were. A prompt starts as rows of `vocabulary` (num_tokens, hidden), the backbone's input embeddings
    (Lester et al. 2021 find real tokens the better start, above all for small backbones).
    """
    made: dict[str, Array] = {}
    for name, shape in sorted(shapes.items()):
        role = name.rsplit(".", 1)[-1]
        if role == "lora_A":
            made[name] = _uniform(name, shape, seed)
        elif role == "ia3_l":
            made[name] = np.ones(shape, np.float32)
        elif role == PROMPT:
            assert vocabulary is not None, "a soft prompt starts from the backbone's vocabulary"
            rows = _draw(name, shape[0], seed) % np.uint64(len(vocabulary))
            made[name] = np.asarray(vocabulary[rows.astype(np.int64)], np.float32)
        else:
            assert role in ("lora_B", "lora_R"), f"no adapter kind has a tensor {name}"
            made[name] = np.zeros(shape, np.float32)
    return made


def _shapes(config: AdapterConfig, sizes: Sizes, roles: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    made: dict[str, tuple[int, ...]] = {}
    for name, (fan_out, fan_in) in sizes.items():
        rank = config.rank
        shape = {"lora_A": (rank, fan_in), "lora_R": (rank, rank), "lora_B": (fan_out, rank)}
        made |= {f"{name}.{role}": shape[role] for role in roles}
    return dict(sorted(made.items()))


def _uniform(name: str, shape: tuple[int, ...], seed: int) -> Array:
    return (_centred(name, shape, seed) / math.sqrt(shape[1])).astype(np.float32)


def _orthogonal(name: str, shape: tuple[int, ...], seed: int) -> Array:
    """A with orthonormal rows, or B with orthogonal columns of norm sqrt(out / rank).

    With that norm one Adam step on R moves dW about as far as one on LoRA's B does, so that learning rates carry over.
    """
    is_tall = name.endswith(".lora_B")
    tall = shape if is_tall else shape[::-1]
    basis, triangle = np.linalg.qr(_centred(name, tall, seed))
    basis = basis * np.sign(np.diagonal(triangle))  # the one factorisation with a positive diagonal
    if is_tall:
        basis = basis * math.sqrt(shape[0] / shape[1])
    rounded: Array = (np.rint(basis / GRID) * GRID).astype(np.float32)
    return rounded if is_tall else np.ascontiguousarray(rounded.T)


def _centred(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float64]:
    """Uniform in [-1, 1): 24 bits each, exact."""
    raw = _draw(name, math.prod(shape), seed)
    return ((raw >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1.0).reshape(shape)


def _draw(name: str, count: int, seed: int) -> NDArray[np.uint64]:
    """PCG64's raw words, whose stream numpy guarantees (it does not guarantee `Generator`'s)."""
    key = sha256(b"p2pfm initial adapter" + seed.to_bytes(16, "big", signed=True) + name.encode()).digest()
    words: NDArray[np.uint64] = np.random.PCG64(int.from_bytes(key, "big")).random_raw(count)
    return words
