"""A node's private adapter: what its own data adds to the shared base, for itself alone.

Knows tensors and a learner on the node's own data; no peer, store or socket, so there is no way out of it. The private
adapter has the base's names and shapes; serving adds weight * private to the newest base, whatever the adapter's kind.
It outlives the base that it was trained on: after each merge it goes on from (new base + private), as FedPer's and
Ditto's personal parts do (Arivazhagan et al. 2019; Li et al. 2021), with nothing sent.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from p2pfm.errors import OperatorError, Reject, WorldError
from p2pfm.learner import Training
from p2pfm.lora.delta import Shapes, add, decode_tensors, encode_tensors, zeros
from p2pfm.lora.samples import Sample
from p2pfm.types import Array, Round, Tensors, compute_digest

MAGIC = b"p2pfm private adapter 1\n"
HELD_OUT_MAX = 64
"""Samples: a longer held-out part would cost more than the training that it judges."""
FRACTION_BYTES = 6
"""Bytes of a digest read as a number in [0, 1)."""


class Trainer(Protocol):
    """What of a Learner this needs."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The adapter's tensor names and shapes."""
        ...

    def train(self, base: Tensors, round: Round) -> Training:
        """Local steps from `base` on own data."""
        ...

    def evaluate(self, at: Tensors) -> float:
        """Loss [nats/token] on what is held out of the own data."""
        ...


@dataclass(frozen=True, slots=True)
class Refinement:
    """What a refinement gave: the private adapter to serve, and losses [nats/token] on the own held-out part."""

    private: dict[str, Array]
    base_nats: float
    """With the shared base alone."""
    mixed_nats: float
    """With the base and `private`: never more than with the base alone."""


def mix(base: Tensors, private: Tensors, weight: float) -> dict[str, Array]:
    """What is served: base + weight * private, tensor by tensor."""
    return add(base, private, weight)


def refine(learner: Trainer, base: Tensors, private: Tensors, weight: float, round: Round) -> Refinement:
    """Local steps from base + private, the base frozen; taken only if the own held-out loss says so.

    Kept is the best of three on the learner's test split: the refined adapter, the one before, none at all (zeros).
    So a private adapter that over-fits, or that a new base has made useless, costs nothing for longer than a round.
    The choice favours the figure a little: three candidates a round, one held-out part.

    Args:
        learner: on the node's own data, its test split held out of it.

    Raises:
        WorldError: the base itself gives no finite loss.
    """
    delta = learner.train(add(base, private), round).delta
    candidates = (zeros(learner.shapes()), dict(private), add(private, delta))
    losses = [learner.evaluate(mix(base, candidate, weight)) for candidate in candidates]
    if not math.isfinite(losses[0]):
        raise WorldError("the own held-out loss is no finite number at this base: nothing can be compared with it")
    best = min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
    return Refinement(candidates[best], losses[0], losses[best])


def split_samples(samples: Sequence[Sample], held_out: float) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """(for training, held out): about a part `held_out` of the prompts, at most HELD_OUT_MAX samples.

    At least one prompt is on each side. A prompt's hash decides: all answers to it are on one side, and what was
    trained on stays so when data is added.

    Raises:
        OperatorError: fewer than two different prompts.
    """
    fraction = {sample.prompt: _fraction(sample.prompt) for sample in samples}
    if len(fraction) < 2:
        raise OperatorError(
            f"personal: expected samples of at least 2 prompts (one is held out), got {len(fraction)}; "
            "add data, or set personal.enabled to false"
        )
    ranked = sorted(fraction, key=lambda prompt: fraction[prompt])
    count = Counter(sample.prompt for sample in samples)
    chosen, size = {ranked[0]}, count[ranked[0]]
    for prompt in ranked[1:-1]:
        size += count[prompt]
        if fraction[prompt] >= held_out or size > HELD_OUT_MAX:
            break
        chosen.add(prompt)
    inside = tuple(sample for sample in samples if sample.prompt not in chosen)
    return inside, tuple(sample for sample in samples if sample.prompt in chosen)


def encode_private(private: Tensors) -> bytes:
    """The bytes of the node's own file."""
    return MAGIC + encode_tensors(private)


def decode_private(data: bytes, shapes: Shapes) -> dict[str, Array]:
    """Inverse of `encode_private`.

    Raises:
        OperatorError: another format, damaged, or of another adapter.
    """
    if not data.startswith(MAGIC):
        raise OperatorError(f"private adapter: expected the header {MAGIC!r}, got {data[: len(MAGIC)]!r}")
    try:
        return decode_tensors(data[len(MAGIC) :], shapes)
    except Reject as error:
        raise OperatorError(f"private adapter: damaged, or of another network: {error}") from error


def _fraction(prompt: str) -> float:
    digest = compute_digest(b"p2pfm held out" + prompt.encode())
    return float(int.from_bytes(digest[:FRACTION_BYTES], "big") / 256**FRACTION_BYTES)
