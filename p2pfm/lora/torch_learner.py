"""A Learner with torch: a frozen causal language model, one LoRA adapter, a private shard and the declared probe.

Knows torch, transformers and peft; nothing of peers, rounds' messages or compression. Loss is taken on completion
tokens only, in nats per token.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from torch.nn import functional

from p2pfm.config import NetworkConfig
from p2pfm.errors import OperatorError
from p2pfm.learner import Training
from p2pfm.lora.delta import subtract
from p2pfm.lora.layers import (
    adapter_shapes,
    build_peft,
    compute_initial,
    get_adapter_tensors,
    get_parameters,
    set_adapter_tensors,
)
from p2pfm.lora.samples import Probe, Sample, encode_lines
from p2pfm.types import Array, Round, Tensors, compute_digest

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


class TorchLearner:
    """`learner.Learner` on a transformer. Not thread-safe: one call at a time."""

    def __init__(
        self, backbone: Any, tokenizer: Any, config: NetworkConfig, samples: Sequence[Sample], probe: Probe
    ) -> None:
        """`backbone` (from `load_backbone`) is changed in place: it gets the adapter.

        Raises:
            OperatorError: no sample fits `training.tokens_max`, or the targets do not fit the backbone.
        """
        self._config = config
        self._device = next(backbone.parameters()).device
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if self._device.type == "cpu":
            # Short sequences in bf16: torch's flash attention on CPUs takes longer backward than plain products.
            backbone.set_attn_implementation("eager")
        self._model = build_peft(backbone, config.adapter)
        self._parameters = get_parameters(self._model)
        self._shapes = adapter_shapes(self._model)
        tokens_max = config.training.tokens_max
        self._samples = _encode_all(tokenizer, samples, tokens_max)
        self._probe = {topic: _encode_all(tokenizer, part, tokens_max) for topic, part in probe.probe.items()}
        self._test = {topic: _encode_all(tokenizer, part, tokens_max) for topic, part in probe.test.items()}
        self._data_digest = compute_digest(encode_lines(samples))

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The adapter's tensor names and shapes."""
        return self._shapes

    def initial(self) -> dict[str, Array]:
        """The adapter before round 0: the same bytes on every peer."""
        return compute_initial(self._shapes, self._config.adapter.seed)

    def train(self, base: Tensors, round: Round) -> Training:
        """`training.steps` AdamW steps from `base`, batches drawn by (data, round).

        Raises:
            OperatorError: the loss or the weights are no longer finite.
        """
        training = self._config.training
        set_adapter_tensors(self._model, base)
        optimizer = torch.optim.AdamW(list(self._parameters.values()), lr=training.learning_rate, weight_decay=0.0)
        draw = random.Random(self._data_digest + int(round).to_bytes(8, "big"))
        loss_sum, num_tokens = 0.0, 0
        for batch in _draw_batches(self._samples, training.batch, training.steps, draw):
            completion = sum(sample.num_completion for sample in batch)
            loss = self._summed_loss(batch) / completion
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss_sum += loss.item()
            num_tokens += sum(len(sample.tokens) for sample in batch)
        delta = subtract(get_adapter_tensors(self._model), base)
        if not all(np.isfinite(values).all() for values in delta.values()):
            raise OperatorError(f"training diverged in round {round}: lower network.training.learning_rate")
        return Training(delta=delta, num_tokens=num_tokens, loss_nats=loss_sum / training.steps)

    def gradient(self, at: Tensors, seed: int) -> tuple[float, dict[str, Array]]:
        """(loss, gradient) at `at` on `samples_per_stratum` fresh samples a topic.

        The loss is the mean over topics of each topic's mean over its completion tokens, so that no topic weighs more
        for being long.
        """
        draw = random.Random(seed)
        wanted = self._config.scoring.samples_per_stratum
        strata = [draw.sample(part, min(wanted, len(part))) for part in self._probe.values()]
        set_adapter_tensors(self._model, at)
        self._model.zero_grad(set_to_none=True)
        total = 0.0
        for batch, weights in _weigh(strata):
            loss = self._summed_loss(batch, weights)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        gradient = {
            name: parameter.grad.detach().to("cpu", torch.float32).numpy().copy()
            for name, parameter in self._parameters.items()
            if parameter.grad is not None
        }
        self._model.zero_grad(set_to_none=True)
        return total, gradient

    def evaluate(self, at: Tensors) -> float:
        """The same stratified mean on the fixed test split [nats/token]."""
        set_adapter_tensors(self._model, at)
        with torch.inference_mode():
            parts = [self._summed_loss(batch, weights).item() for batch, weights in _weigh(list(self._test.values()))]
        return sum(parts)

    def _summed_loss(self, batch: Sequence[Encoded], weights: Sequence[float] | None = None) -> torch.Tensor:
        """Sum over the batch's completion tokens of the loss, each sample's times its weight (default 1)."""
        length = max(len(sample.tokens) for sample in batch)
        tokens = np.full((len(batch), length), self._pad, np.int64)
        for row, sample in enumerate(batch):
            tokens[row, : len(sample.tokens)] = sample.tokens
        # Where a completion token is predicted: (num_completion,) each.
        rows = np.repeat(np.arange(len(batch)), [sample.num_completion for sample in batch])
        columns = np.concatenate([np.arange(sample.num_prompt - 1, len(sample.tokens) - 1) for sample in batch])
        # Padding is on the right of a causal model: no real token sees it, so no mask is needed.
        logits = self._logits(*(torch.from_numpy(part).to(self._device) for part in (tokens, rows, columns)))
        wanted = torch.from_numpy(tokens[rows, columns + 1]).to(self._device)
        each = functional.cross_entropy(logits.float(), wanted, reduction="none")  # (num_completion,)
        if weights is None:
            return each.sum()
        return (each * torch.tensor(weights, dtype=each.dtype)[rows].to(self._device)).sum()

    def _logits(self, tokens: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Logits (num_completion, vocabulary) at these positions only.

        The vocabulary's projection sees a contiguous matrix of just the wanted positions. On a slice of the batch
        torch copies the whole projection once a row, which took 60% of a step.
        """
        head = self._model.get_base_model().get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _module, inputs: (inputs[0][rows, columns],))
        try:
            logits: torch.Tensor = self._model(input_ids=tokens, use_cache=False).logits
        finally:
            hook.remove()
        return logits


def _encode_all(tokenizer: Any, samples: Sequence[Sample], tokens_max: int) -> tuple[Encoded, ...]:
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


def _draw_batches(
    samples: Sequence[Encoded], size: int, steps: int, draw: random.Random
) -> Iterator[Sequence[Encoded]]:
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


def _weigh(strata: Sequence[Sequence[Encoded]]) -> Iterator[tuple[list[Encoded], list[float]]]:
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
