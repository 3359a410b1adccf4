"""Samples as tokens, and batches of them: what a causal language model is trained and measured on.

Knows a tokenizer and numbers; no model, adapter or peer. Loss is taken on completion tokens only.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from p2pfm.errors import OperatorError
from p2pfm.lora.samples import Sample

PROBE_TOKENS_MAX = 512
"""Padded tokens in one batch of a probe pass: bounds memory (logits are tokens x vocabulary)."""
WINDOW_BATCHES = 4
"""Training batches among which samples are sorted by length."""


class Encoded(msgspec.Struct, frozen=True):
    """A sample as tokens: the prompt in the chat template, then the completion and its end mark."""

    tokens: tuple[int, ...]
    num_prompt: int

    @property
    def num_completion(self) -> int:
        """Tokens that the loss is taken on."""
        return len(self.tokens) - self.num_prompt


class Collated(NamedTuple):
    """A batch as arrays: `tokens` (num_samples, length), and where each completion token is predicted."""

    tokens: NDArray[np.int64]
    rows: NDArray[np.int64]
    """(num_completion,) the sample of each wanted token."""
    columns: NDArray[np.int64]
    """(num_completion,) the position that predicts it."""
    wanted: NDArray[np.int64]
    """(num_completion,) the tokens themselves."""


def collate(batch: Sequence[Encoded], pad: int) -> Collated:
    """Samples padded on the right: in a causal model no real token sees the padding, so no mask is needed."""
    length = max(len(sample.tokens) for sample in batch)
    tokens = np.full((len(batch), length), pad, np.int64)
    for row, sample in enumerate(batch):
        tokens[row, : len(sample.tokens)] = sample.tokens
    rows = np.repeat(np.arange(len(batch)), [sample.num_completion for sample in batch])
    columns = np.concatenate([np.arange(sample.num_prompt - 1, len(sample.tokens) - 1) for sample in batch])
    return Collated(tokens, rows, columns, tokens[rows, columns + 1])


def encode_all(tokenizer: Any, samples: Sequence[Sample], tokens_max: int) -> tuple[Encoded, ...]:
    """Samples as tokens; one whose prompt leaves no room for a completion token is left out, a long completion cut."""
    encoded = [_encode(tokenizer, sample, tokens_max) for sample in samples]
    fitting = tuple(sample for sample in encoded if sample.num_completion > 0)
    if not fitting:
        raise OperatorError(
            f"none of {len(samples)} samples fits in {tokens_max} tokens: raise network.training.tokens_max"
        )
    return fitting


def _encode(tokenizer: Any, sample: Sample, tokens_max: int) -> Encoded:
    chat = [{"role": "user", "content": sample.prompt}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    completion = [*tokenizer(sample.completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    tokens = tuple((prompt + completion)[:tokens_max])
    return Encoded(tokens, min(len(prompt), len(tokens)))


def draw_batches(samples: Sequence[Encoded], size: int, steps: int, draw: random.Random) -> Iterator[Sequence[Encoded]]:
    """`steps` batches: pass after pass over shuffled samples, a new order each pass.

    Samples are sorted by length within a window of a few batches, whose order is drawn: a third less padding.
    """
    queue: list[Encoded] = []
    batches: list[list[Encoded]] = []
    for _ in range(steps):
        if not batches:
            while len(queue) < WINDOW_BATCHES * size:
                queue += draw.sample(samples, len(samples))
            window = sorted(queue[: WINDOW_BATCHES * size], key=lambda sample: len(sample.tokens))
            queue = queue[WINDOW_BATCHES * size :]
            batches = [window[start : start + size] for start in range(0, len(window), size)]
            draw.shuffle(batches)
        yield batches.pop()


def weigh(strata: Sequence[Sequence[Encoded]]) -> Iterator[tuple[list[Encoded], list[float]]]:
    """Batches of similar lengths; each sample with the weight that its tokens have in the stratified mean."""
    weighted = [
        (sample, 1 / (len(strata) * sum(other.num_completion for other in stratum)))
        for stratum in strata
        for sample in stratum
    ]
    weighted.sort(key=lambda item: len(item[0].tokens))
    batch: list[tuple[Encoded, float]] = []
    for item in weighted:
        if batch and (len(batch) + 1) * len(item[0].tokens) > PROBE_TOKENS_MAX:
            yield [sample for sample, _ in batch], [weight for _, weight in batch]
            batch = []
        batch.append(item)
    if batch:
        yield [sample for sample, _ in batch], [weight for _, weight in batch]
