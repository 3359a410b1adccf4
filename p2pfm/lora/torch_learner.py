"""A Learner with torch: a frozen causal language model, one adapter, a private shard and the declared probe.

Knows torch, transformers and peft; nothing of peers, rounds' messages or compression. Loss is taken on completion
tokens only, in nats per token.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional

from p2pfm.config import NetworkConfig, TrainingConfig
from p2pfm.errors import OperatorError
from p2pfm.learner import Spending, SpendingLog, Training
from p2pfm.lora.batches import Encoded, collate, draw_batches, encode_all, weigh
from p2pfm.lora.delta import subtract
from p2pfm.lora.layers import (
    ADAPTER,
    adapter_shapes,
    build_peft,
    get_adapter_tensors,
    get_parameters,
    predict,
    set_adapter_tensors,
)
from p2pfm.lora.ranks import compute_nested_masks
from p2pfm.lora.samples import Probe, Sample, encode_lines
from p2pfm.types import Array, Digest, Round, Tensors, compute_digest


class Data(NamedTuple):
    """What a learner trains and measures on, as tokens; `probe` and `test` by stratum."""

    samples: Sequence[Encoded]
    probe: Mapping[str, Sequence[Encoded]]
    test: Mapping[str, Sequence[Encoded]]
    digest: Digest
    """Of the private samples: batches are drawn by it."""
    work: Sequence[Encoded] = ()
    """Public samples for proofs of computation."""


Steps = Callable[[PeftModel, Sequence[nn.Parameter], Sequence[Encoded], int], None]
"""Optimizer steps, in place: (model, the adapter's parameters, samples, pad token)."""


class TorchLearner:
    """`learner.Learner` on a transformer. Not thread-safe: one call at a time."""

    def __init__(
        self,
        backbone: Any,
        tokenizer: Any,
        config: NetworkConfig,
        samples: Sequence[Sample],
        probe: Probe,
        spendings: SpendingLog | None = None,
        rank: int = 0,
    ) -> None:
        """`backbone` (from `load_backbone`) is changed in place: it gets the adapter.

        Args:
            spendings: gets a line for every round that `train` trains, since nothing bounds what that tells.
            rank: `NodeConfig.rank`; `train` moves only the first directions, the rest of a base stays in the model.

        Raises:
            OperatorError: no sample fits `training.tokens_max`, the targets do not fit the backbone, or the network
                asks for a proof of computation and its probe has nothing to draw it from.
        """
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if next(backbone.parameters()).device.type == "cpu":
            # Short sequences in bf16: torch's flash attention on CPUs takes longer backward than plain products.
            backbone.set_attn_implementation("eager")
        tokens_max = config.training.tokens_max
        data = Data(
            encode_all(tokenizer, samples, tokens_max),
            {topic: encode_all(tokenizer, part, tokens_max) for topic, part in probe.probe.items()},
            {topic: encode_all(tokenizer, part, tokens_max) for topic, part in probe.test.items()},
            compute_digest(encode_lines(samples)),
            encode_all(tokenizer, probe.work, tokens_max) if probe.work else (),
        )
        if config.scoring.work_steps and not data.work:
            raise OperatorError(
                'network.scoring.work_steps asks for a proof of computation, and the probe has no lines with "split": '
                '"work" that fit; set it to 0, or take the probe that the network declares'
            )
        self._start(build_peft(backbone, config.adapter), ADAPTER, pad, config, data, spendings, rank)

    @classmethod
    def on_peft(cls, model: PeftModel, adapter: str, pad: int, config: NetworkConfig, data: Data) -> "TorchLearner":
        """A learner on a peft model as it stands: its adapter of this name is trained from, and is `initial`.

        The model may be shared: every call sets the adapter's tensors first.
        """
        learner = cls.__new__(cls)
        learner._start(model, adapter, pad, config, data, None)
        return learner

    def beside(self, data: Data, training: TrainingConfig) -> "TorchLearner":
        """A learner on the same model with other data and local steps; one call at a time of both.

        Nothing is written into this one's spendings: what it trains must not leave this machine.
        """
        config = msgspec.structs.replace(self._config, training=training)
        return TorchLearner.on_peft(self._model, self._adapter, self._pad, config, data)

    def _start(
        self,
        model: PeftModel,
        adapter: str,
        pad: int,
        config: NetworkConfig,
        data: Data,
        spendings: SpendingLog | None,
        rank: int = 0,
    ) -> None:
        self._spendings = spendings
        self._config = config
        self._device = next(model.parameters()).device
        self._pad = pad
        self._model = model
        self._adapter = adapter
        self._parameters = get_parameters(model, adapter)
        self._shapes = adapter_shapes(model, adapter)
        self._initial = get_adapter_tensors(model, adapter)
        masks = compute_nested_masks(self._shapes, rank) if rank else {}
        self._masks = {name: torch.from_numpy(mask).to(self._device) for name, mask in masks.items()}
        self._samples, self._probe, self._test, self._data_digest, self._work = data

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The adapter's tensor names and shapes."""
        return self._shapes

    def initial(self) -> dict[str, Array]:
        """The adapter before round 0: the same bytes on every peer."""
        return dict(self._initial)

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """`training.steps` AdamW steps from `base`, batches drawn by (data, round), the last ones by `work`.

        Raises:
            OperatorError: the loss or the weights are no longer finite.
        """
        training = self._config.training
        if self._spendings is not None:
            self._spendings.add_spending(Spending(noise_multiplier=0.0, sample_rate=1.0, steps=training.steps))
        set_adapter_tensors(self._model, base, self._adapter)
        optimizer = torch.optim.AdamW(list(self._parameters.values()), lr=training.learning_rate, weight_decay=0.0)
        draw = random.Random(self.draw_seed(round))
        loss_sum, num_tokens = 0.0, 0
        public = self._draw_work(work)
        private = draw_batches(self._samples, training.batch, training.steps - len(public), draw)
        for batch in chain(private, public):
            loss_sum += self._step(optimizer, batch)
            num_tokens += sum(len(sample.tokens) for sample in batch)
        return Training(self._get_delta(base, round), num_tokens, loss_sum / training.steps)

    def train_by(self, steps: Steps, base: Tensors, round: Round, work: int | None = None) -> dict[str, Array]:
        """The delta of other steps than `train`'s, on the same model and samples; then those that `work` draws.

        Raises:
            OperatorError: the weights are no longer finite.
        """
        set_adapter_tensors(self._model, base, self._adapter)
        parameters = list(self._parameters.values())
        steps(self._model, parameters, self._samples, self._pad)
        optimizer = torch.optim.AdamW(parameters, lr=self._config.training.learning_rate, weight_decay=0.0)
        for batch in self._draw_work(work):
            self._step(optimizer, batch)
        return self._get_delta(base, round)

    @property
    def num_samples(self) -> int:
        """Private samples that fit into `training.tokens_max`."""
        return len(self._samples)

    def draw_seed(self, round: Round) -> bytes:
        """What a round's batches are drawn from: this peer's data and the round."""
        return self._data_digest + int(round).to_bytes(8, "big")

    def gradient(self, at: Tensors, seed: int) -> tuple[float, dict[str, Array]]:
        """(loss, gradient) at `at` on `samples_per_stratum` fresh samples a topic.

        The loss is the mean over topics of each topic's mean over its completion tokens, so that no topic weighs more
        for being long.
        """
        draw = random.Random(seed)
        wanted = self._config.scoring.samples_per_stratum
        strata = [draw.sample(part, min(wanted, len(part))) for part in self._probe.values()]
        set_adapter_tensors(self._model, at, self._adapter)
        self._model.zero_grad(set_to_none=True)
        total = 0.0
        for batch, weights in weigh(strata):
            loss = self._summed_loss(batch, weights)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        gradient = {
            name: np.zeros(self._shapes[name], np.float32)  # a user's own model may hold some of them still
            if parameter.grad is None
            else parameter.grad.detach().to("cpu", torch.float32).numpy().copy()
            for name, parameter in self._parameters.items()
        }
        self._model.zero_grad(set_to_none=True)
        return total, gradient

    def work_loss(self, at: Tensors, seed: int) -> float:
        """See Learner."""
        batch = self._draw_work(seed)[0]
        set_adapter_tensors(self._model, at, self._adapter)
        with torch.inference_mode():
            return self._summed_loss(batch).item() / sum(sample.num_completion for sample in batch)

    def evaluate(self, at: Tensors) -> float:
        """The same stratified mean on the fixed test split [nats/token]."""
        set_adapter_tensors(self._model, at, self._adapter)
        with torch.inference_mode():
            parts = [self._summed_loss(batch, weights).item() for batch, weights in weigh(list(self._test.values()))]
        return sum(parts)

    def _draw_work(self, seed: int | None) -> list[list[Encoded]]:
        """The public batch that a seed draws, once for every step that is to be taken on it; none for None."""
        if seed is None:
            return []
        size = min(self._config.training.batch, len(self._work))
        return [random.Random(seed).sample(self._work, size)] * self._config.scoring.work_steps

    def _step(self, optimizer: torch.optim.Optimizer, batch: Sequence[Encoded]) -> float:
        """One optimizer step; the batch's loss before it [nats/token]."""
        loss = self._summed_loss(batch) / sum(sample.num_completion for sample in batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for name, mask in self._masks.items():
            gradient = self._parameters[name].grad
            assert gradient is not None, "all of the adapter's parameters are in the loss"
            gradient *= mask  # AdamW without weight decay takes no step where all gradients were 0
        optimizer.step()
        return loss.item()

    def _get_delta(self, base: Tensors, round: Round) -> dict[str, Array]:
        delta = subtract(get_adapter_tensors(self._model, self._adapter), base)
        if not all(np.isfinite(values).all() for values in delta.values()):
            raise OperatorError(f"training diverged in round {round}: lower network.training.learning_rate")
        return delta

    def _summed_loss(self, batch: Sequence[Encoded], weights: Sequence[float] | None = None) -> torch.Tensor:
        """Sum over the batch's completion tokens of the loss, each sample's times its weight (default 1)."""
        tokens, rows, columns, wanted = (torch.from_numpy(part).to(self._device) for part in collate(batch, self._pad))
        logits = predict(self._model, tokens, rows, columns)
        each = functional.cross_entropy(logits.float(), wanted, reduction="none")  # (num_completion,)
        if weights is None:
            return each.sum()
        return (each * torch.tensor(weights, dtype=each.dtype, device=self._device)[rows]).sum()
