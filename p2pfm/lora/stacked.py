"""Many adapters on one frozen backbone at once: what a simulation or a study of many peers trains and measures with.

Knows torch and token batches; no peer, round or message. The backbone's products run once over all adapters' tokens;
only the small factors differ, as batched products (two to four times the speed of one peft model after another).
Numbers agree with `TorchLearner`'s up to the order of float32 sums: within 1e-5, but for single parameters whose
gradient is nearly 0 (AdamW makes a whole step of its sign; tests/core/test_stacked.py).
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from p2pfm.config import AdapterConfig, TrainingConfig
from p2pfm.errors import OperatorError
from p2pfm.lora.batches import Encoded, collate, draw_batches, weigh
from p2pfm.lora.layers import predict
from p2pfm.types import Array, Tensors

Stack = dict[str, torch.Tensor]
"""Tensors of several adapters: each (num_adapters, *shape)."""

ADAPTERS_MAX = 32
"""Adapters in one pass: more are no faster and take gigabytes (MODELS, measured)."""


class StackedLinear(nn.Module):
    """A frozen linear layer plus scale * (x F1^T F2^T ...) with factors of its own for each adapter."""

    def __init__(self, inner: nn.Linear, scale: float) -> None:
        super().__init__()
        self.inner = inner
        self.scale = scale
        self.factors: Sequence[torch.Tensor] = ()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(num_adapters * num_samples, length, in) to (..., out); samples of one adapter lie together."""
        result: torch.Tensor = self.inner(inputs)
        num_adapters = next(len(factor) for factor in self.factors if factor.dim() == 3)
        hidden = inputs.reshape(num_adapters, -1, inputs.shape[-1]).float()  # (num_adapters, samples * length, in)
        first, *rest = self.factors
        hidden = (hidden @ first.transpose(-1, -2)) * self.scale  # (num_adapters, samples * length, rank)
        for factor in rest:
            hidden = hidden @ factor.transpose(-1, -2)
        return result + hidden.view(result.shape).to(result.dtype)


class StackedModel:
    """A backbone whose target layers take stacked adapters. Not thread-safe: one call at a time."""

    def __init__(
        self,
        backbone: Any,
        pad: int,
        config: AdapterConfig,
        chain: Sequence[str] = ("lora_A", "lora_B"),
        shared: Tensors | None = None,
    ) -> None:
        """Change `backbone` in place.

        Args:
            pad: the token that fills short samples up.
            chain: a module's factors, first applied first; each is a tensor "<module>.<factor>" of (out, in).
            shared: factors that no adapter changes (the frozen ones of `ffa` and `fed_sb`).

        Raises:
            OperatorError: the backbone has no linear layer of the names in `config.targets`.
        """
        self._backbone = backbone.requires_grad_(False).eval()
        self._pad = pad
        self._chain = tuple(chain)
        device = next(backbone.parameters()).device
        self._shared = {name: torch.from_numpy(np.array(part)).to(device) for name, part in (shared or {}).items()}
        self._device = device
        if device.type == "cpu":
            backbone.set_attn_implementation("eager")
        found = {
            name: module
            for name, module in backbone.named_modules()
            if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in config.targets
        }
        if not found:
            raise OperatorError(f"network.adapter.targets {list(config.targets)} are no linear layers of this backbone")
        self._modules: dict[str, StackedLinear] = {}
        for name, module in sorted(found.items()):
            stacked = StackedLinear(module, config.alpha / config.rank)
            parent, _, child = name.rpartition(".")
            setattr(backbone.get_submodule(parent), child, stacked)
            self._modules[name] = stacked

    def sizes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every target layer by its name in the backbone."""
        return {name: (part.inner.out_features, part.inner.in_features) for name, part in self._modules.items()}

    def stack(self, adapters: Sequence[Tensors]) -> Stack:
        """Adapters side by side."""
        names = sorted(adapters[0])
        return {
            name: torch.from_numpy(np.stack([adapter[name] for adapter in adapters])).to(self._device) for name in names
        }

    def unstack(self, stack: Stack) -> list[dict[str, Array]]:
        """Inverse of `stack`: float32 copies."""
        arrays = {name: part.detach().to("cpu", torch.float32).numpy() for name, part in stack.items()}
        num_adapters = len(next(iter(arrays.values())))
        return [{name: part[i].copy() for name, part in arrays.items()} for i in range(num_adapters)]

    def losses(
        self,
        stack: Stack,
        batches: Sequence[Sequence[Encoded]],
        weights: Sequence[Sequence[float]],
    ) -> torch.Tensor:
        """(num_adapters,) weighted sums over completion tokens of each adapter's loss on its own batch [nats].

        Batches must have equally many samples; `weights` has one number a sample.
        """
        logits, wanted, rows = self._predict(stack, batches)
        each = functional.cross_entropy(logits, wanted, reduction="none")  # (num_completion,)
        return self._sum(each, rows, weights)

    def train(
        self,
        bases: Sequence[Tensors],
        data: Sequence[Sequence[Encoded]],
        config: TrainingConfig,
        draws: Sequence[Any],
        masks: Sequence[Tensors] | None = None,
    ) -> list[dict[str, Array]]:
        """Each adapter after `config.steps` AdamW steps from its base on its own data, as `TorchLearner.train`.

        Args:
            draws: what seeds each adapter's batches (`random.Random`'s argument).
            masks: 1 where an adapter trains, 0 where it stays as it is (`ranks.compute_nested_masks`).
        """
        trained: list[dict[str, Array]] = []
        for start in range(0, len(bases), ADAPTERS_MAX):
            part = slice(start, start + ADAPTERS_MAX)
            stack = {name: values.requires_grad_() for name, values in self.stack(bases[part]).items()}
            for name, mask in (self.stack(masks[part]) if masks else {}).items():
                stack[name].register_hook(mask.mul)  # type: ignore[no-untyped-call]
            optimizer = torch.optim.AdamW(list(stack.values()), lr=config.learning_rate, weight_decay=0.0)
            streams = [
                draw_batches(samples, config.batch, config.steps, random.Random(draw))
                for samples, draw in zip(data[part], draws[part], strict=True)
            ]
            for batches in zip(*streams, strict=True):
                shares = [[1 / sum(sample.num_completion for sample in batch)] * len(batch) for batch in batches]
                optimizer.zero_grad(set_to_none=True)
                self.losses(stack, batches, shares).sum().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            trained += self.unstack(stack)
        return trained

    def evaluate(self, adapters: Sequence[Tensors], strata: Mapping[str, Sequence[Encoded]]) -> Array:
        """(num_adapters, num_strata) mean loss of each adapter on each stratum [nats/token]."""
        return self._measure(adapters, strata, self.losses)

    def accuracy(self, adapters: Sequence[Tensors], strata: Mapping[str, Sequence[Encoded]]) -> Array:
        """(num_adapters, num_strata) share of completion tokens that are each adapter's first choice."""

        def hits(
            stack: Stack, batches: Sequence[Sequence[Encoded]], weights: Sequence[Sequence[float]]
        ) -> torch.Tensor:
            logits, wanted, rows = self._predict(stack, batches)
            return self._sum((logits.argmax(dim=-1) == wanted).float(), rows, weights)

        return self._measure(adapters, strata, hits)

    def gradient(self, at: Tensors, strata: Mapping[str, Sequence[Encoded]]) -> tuple[float, dict[str, Array]]:
        """Loss and gradient at one adapter; every stratum weighs the same [nats/token]."""
        stack = {name: values.requires_grad_() for name, values in self.stack([at]).items()}
        total = 0.0
        for batch, weights in weigh(list(strata.values())):
            loss = self.losses(stack, [batch], [weights]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total, self.unstack({name: part.grad for name, part in stack.items() if part.grad is not None})[0]

    def _measure(
        self, adapters: Sequence[Tensors], strata: Mapping[str, Sequence[Encoded]], sums_of: Callable[..., torch.Tensor]
    ) -> Array:
        """(num_adapters, num_strata) of `sums_of`(stack, batches, weights), which is `losses` or like it."""
        measured = np.zeros((len(adapters), len(strata)), np.float64)
        with torch.inference_mode():
            for start in range(0, len(adapters), ADAPTERS_MAX):
                part = slice(start, start + ADAPTERS_MAX)
                stack = self.stack(adapters[part])
                num_adapters = len(adapters[part])
                for column, stratum in enumerate(strata.values()):
                    for batch, weights in weigh([stratum]):
                        sums = sums_of(stack, [batch] * num_adapters, [weights] * num_adapters)
                        measured[part, column] += sums.cpu().numpy()
        return measured.astype(np.float32)

    def _predict(
        self, stack: Stack, batches: Sequence[Sequence[Encoded]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (num_completion, vocabulary), the tokens wanted there, and the sample that each belongs to."""
        assert all(len(batch) == len(batches[0]) for batch in batches), "batches of equal sizes"
        self._bind(stack)
        tokens, rows, columns, wanted = (
            torch.from_numpy(part).to(self._device)
            for part in collate([sample for batch in batches for sample in batch], self._pad)
        )
        return predict(self._backbone, tokens, rows, columns).float(), wanted, rows

    def _sum(self, each: torch.Tensor, rows: torch.Tensor, weights: Sequence[Sequence[float]]) -> torch.Tensor:
        """(num_adapters,) weighted sums of a number for each completion token."""
        flat = torch.tensor([weight for part in weights for weight in part], dtype=each.dtype, device=self._device)
        sums = torch.zeros(len(weights), dtype=each.dtype, device=self._device)
        return sums.index_add(0, rows // len(weights[0]), each * flat[rows])

    def _bind(self, stack: Stack) -> None:
        for name, module in self._modules.items():
            keys = [f"{name}.{factor}" for factor in self._chain]
            module.factors = [stack[key] if key in stack else self._shared[key] for key in keys]
