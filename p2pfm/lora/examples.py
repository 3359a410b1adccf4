"""A Python user's data as tokens: text with a tokenizer, or what is tokenised already, from lists or Hugging Face sets.

Knows tokenizers and numbers; no file, model or peer. Nodes read their samples from files (`samples`); here data comes
from other people's code, so its shape is checked example by example.
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfm.errors import OperatorError
from p2pfm.lora.batches import Encoded, encode_all
from p2pfm.lora.samples import Sample

Example = Mapping[str, Any] | Sample
"""A sample, {"prompt", "completion"}, or {"input_ids"}; also "labels" (-100: no loss), "attention_mask"."""

EXAMPLES_MAX = 1_000_000
"""In one dataset: all of it is held in memory, and a stream without an end is noticed."""
NO_LABEL = -100
"""What transformers puts where no loss is taken."""


def encode_examples(
    examples: Iterable[Example], where: str, tokenizer: Any, tokens_max: int, num_tokens: int
) -> tuple[Encoded, ...]:
    """All examples as tokens, in order, cut to `tokens_max`; one that then has nothing to learn is left out.

    Text is put in the tokenizer's chat template; where it has none, prompt, completion and end follow one another.

    Args:
        where: names the dataset in errors.
        tokenizer: of transformers; None will do for examples that are tokens.
        num_tokens: size of the model's vocabulary.

    Raises:
        OperatorError: nothing to learn from, or an example that cannot be read (says which).
    """
    found = _listed(examples, where)
    if _is_text(found[0]):
        samples = [_read_text(example, f"{where}, example {index}") for index, example in enumerate(found)]
        encoded = _encode_texts(samples, where, tokenizer, tokens_max)
    else:
        tokens = [_read_tokens(example, f"{where}, example {index}") for index, example in enumerate(found)]
        encoded = tuple(_cut(part, tokens_max) for part in tokens)
    fitting = tuple(part for part in encoded if part.num_completion > 0)
    if not fitting:
        raise OperatorError(f"{where}: none of {len(found)} examples has something to learn within {tokens_max} tokens")
    ids = [token for part in fitting for token in part.tokens]
    if min(ids) < 0 or max(ids) >= num_tokens:
        raise OperatorError(f"{where}: tokens from {min(ids)} to {max(ids)}, but the model has {num_tokens} of them")
    return fitting


def _listed(examples: Iterable[Example], where: str) -> list[Example]:
    if isinstance(examples, str | bytes | Mapping) or not isinstance(examples, Iterable):
        raise OperatorError(f"{where}: expected a list or dataset of examples, got {type(examples).__name__}")
    found = list(islice(examples, EXAMPLES_MAX + 1))
    if not found:
        raise OperatorError(f"{where}: expected at least one example, got none")
    if len(found) > EXAMPLES_MAX:
        raise OperatorError(f"{where}: expected at most {EXAMPLES_MAX} examples")
    return found


def _is_text(example: Example) -> bool:
    return isinstance(example, Sample) or (isinstance(example, Mapping) and "prompt" in example)


def _read_text(example: Example, where: str) -> Sample:
    if isinstance(example, Sample):
        return example
    prompt, completion = (
        example.get(key) if isinstance(example, Mapping) else None for key in ("prompt", "completion")
    )
    if not isinstance(prompt, str) or not isinstance(completion, str) or not prompt.strip() or not completion.strip():
        raise OperatorError(f'{where}: expected {{"prompt": text, "completion": text}}, got {_shown(example)}')
    return Sample("", prompt, completion)


def _encode_texts(samples: list[Sample], where: str, tokenizer: Any, tokens_max: int) -> tuple[Encoded, ...]:
    if tokenizer is None:
        raise OperatorError(f"{where}: text needs a tokenizer; give one, or examples with input_ids")
    if getattr(tokenizer, "chat_template", None):
        try:
            return encode_all(tokenizer, samples, tokens_max)
        except OperatorError as error:
            raise OperatorError(f"{where}: {error}") from error
    return tuple(_cut(_encode_plain(tokenizer, sample), tokens_max) for sample in samples)


def _encode_plain(tokenizer: Any, sample: Sample) -> Encoded:
    prompt = tokenizer(sample.prompt)["input_ids"]
    completion = tokenizer(sample.completion, add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Encoded((*prompt, *completion, *end), max(1, len(prompt)))


def _read_tokens(example: Example, where: str) -> Encoded:
    """Tokens of which a last part is learned: what is padded or has no label after it is cut off."""
    if not isinstance(example, Mapping) or "input_ids" not in example:
        raise OperatorError(f'{where}: expected "prompt" and "completion", or "input_ids", got {_shown(example)}')
    ids = _integers(example["input_ids"], f"{where}: input_ids")
    labels, mask = (
        _integers(example[key], f"{where}: {key}") if example.get(key) is not None else default
        for key, default in (("labels", ids), ("attention_mask", np.ones_like(ids)))
    )
    if not len(ids) == len(labels) == len(mask):
        raise OperatorError(f"{where}: {len(ids)} input_ids, {len(labels)} labels, attention_mask of {len(mask)}")
    ids, labels = ids[mask != 0], labels[mask != 0]
    learned = np.flatnonzero(labels != NO_LABEL)
    if not len(learned):
        return Encoded(tuple(ids.tolist()), len(ids))
    first, last = int(learned[0]), int(learned[-1])
    if len(learned) != last - first + 1:
        raise OperatorError(f"{where}: labels have gaps; split it, so that what is learned is one part")
    if (labels[learned] != ids[learned]).any():
        raise OperatorError(f"{where}: labels other than the input_ids (or {NO_LABEL}); give them unshifted")
    return Encoded(tuple(ids[: last + 1].tolist()), max(1, first))


def _integers(values: Any, where: str) -> NDArray[np.int64]:
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists; tensors on another device
        raise OperatorError(f"{where}: expected a list of integers: {error}") from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        raise OperatorError(f"{where}: expected a list of integers, got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64)


def _cut(part: Encoded, tokens_max: int) -> Encoded:
    return Encoded(part.tokens[:tokens_max], min(part.num_prompt, tokens_max, len(part.tokens)))


def _shown(example: object) -> str:
    return f"keys {sorted(map(str, example))}" if isinstance(example, Mapping) else type(example).__name__
