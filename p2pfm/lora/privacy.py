"""Example-level differential privacy of local training: DP-SGD on the adapter (Abadi et al. 2016), and its accounting.

Per-sample gradients by `torch.func`, clipping, noise and accounting by opacus (the extra `privacy`). One example is one
sample; two data sets are neighbours when one has a sample more. Whatever is computed from what training gives (the
optimizer's steps, compression, the error-feedback residual, merging, scoring, serving) is post-processing: it costs
nothing, and undoes nothing. The adapter's kind does not matter here, but fewer parameters take less noise in all.

Not covered: the number of samples counts as public; so does a choice of settings that looked at results on private
data. Noise comes from torch's Mersenne Twister, reseeded from the operating system before every step (32 bits a step),
not from a cryptographic generator; it is summed so that floating-point attacks find nothing (Mironov 2012).
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from p2pfm.config import PrivacyConfig, TrainingConfig
from p2pfm.errors import BudgetSpent, OperatorError
from p2pfm.learner import Guarantee, Spending, SpendingLog, Training
from p2pfm.lora.batches import PROBE_TOKENS_MAX, Encoded
from p2pfm.lora.layers import predict
from p2pfm.lora.torch_learner import TorchLearner
from p2pfm.types import Round, Tensors

try:
    from opacus.accountants import PRVAccountant, RDPAccountant
    from opacus.accountants.utils import get_noise_multiplier
    from opacus.optimizers import DPOptimizer
    from opacus.utils.uniform_sampler import UniformWithReplacementSampler
except ImportError as error:
    raise OperatorError("privacy needs opacus: pip install 'p2pfm[privacy]'") from error

ALPHAS = [*RDPAccountant.DEFAULT_ALPHAS, 80, 96, 128, 192, 256, 384, 512, 768, 1024]
"""Renyi orders: opacus' own end at 63, which is too few for small epsilons."""
EPSILON_FINE_MAX = 20.0
"""Up to this Renyi bound the tighter accountant runs too; above it needs gigabytes, and says nothing useful."""
EPSILON_ERROR = 0.004
"""What the tighter accountant may err [parts of epsilon]: always to the safe side."""
EPSILON_ERROR_MIN = 0.002
REFINEMENTS = 8
"""Halvings of the interval in which the least noise is looked for: to 3 parts in a thousand."""


class MemorySpendings:
    """A `SpendingLog` that forgets when the process ends: for studies. A node's is its store."""

    def __init__(self) -> None:
        self._spendings: list[Spending] = []

    def add_spending(self, spending: Spending) -> None:
        """Remember."""
        self._spendings.append(spending)

    def get_spendings(self) -> tuple[Spending, ...]:
        """All, in order."""
        return tuple(self._spendings)


# --- accounting


def compute_epsilon(spendings: Sequence[Spending], delta: float) -> float:
    """The epsilon of Poisson-sampled Gaussian steps at `delta`: the lesser of two upper bounds, both opacus'.

    Renyi (Mironov et al. 2019) always; composed privacy-loss variables (Gopi et al. 2021), 5 to 25% tighter, where
    they can be computed. Infinite once any step went without noise; 0 when there was none.
    """
    steps: dict[tuple[float, float], int] = {}
    for spent in spendings:
        steps[spent.noise_multiplier, spent.sample_rate] = (
            steps.get((spent.noise_multiplier, spent.sample_rate), 0) + spent.steps
        )
    history = [(noise, rate, count) for (noise, rate), count in sorted(steps.items()) if count > 0]
    if not history:
        return 0.0
    if any(noise <= 0 for noise, _, _ in history):
        return math.inf
    with np.errstate(all="ignore"):  # a rate of 1 takes log 0, and is right
        renyi = RDPAccountant()
        renyi.history = history
        bound = float(renyi.get_epsilon(delta, alphas=ALPHAS))
        if not bound <= EPSILON_FINE_MAX:
            return bound if math.isfinite(bound) else math.inf
        fine = PRVAccountant()
        fine.history = history
        return min(bound, float(fine.get_epsilon(delta, eps_error=max(EPSILON_ERROR_MIN, EPSILON_ERROR * bound))))


def compute_noise_multiplier(epsilon_max: float, delta: float, sample_rate: float, steps: int) -> float:
    """The least noise with which `steps` steps cost at most (epsilon_max, delta) by `compute_epsilon`.

    Raises:
        OperatorError: no noise up to opacus' limit is enough.
    """

    def is_enough(noise: float) -> bool:
        return compute_epsilon([Spending(noise, sample_rate, steps)], delta) <= epsilon_max

    try:
        with np.errstate(all="ignore"):
            enough = float(
                get_noise_multiplier(
                    target_epsilon=epsilon_max,
                    target_delta=delta,
                    sample_rate=sample_rate,
                    steps=steps,
                    alphas=ALPHAS,
                )
            )
    except ValueError as error:
        raise OperatorError(
            f"privacy.epsilon_max: no noise makes {steps} steps cost only {epsilon_max:g} at delta {delta:g}; "
            "raise it, or lower privacy.rounds"
        ) from error
    too_little = enough / 2
    for _ in range(REFINEMENTS):
        middle = math.sqrt(too_little * enough)
        if is_enough(middle):
            enough = middle
        else:
            too_little = middle
    return enough


def plan_spending(config: PrivacyConfig, training: TrainingConfig, num_samples: int) -> Spending:
    """What one round will cost a peer of so many samples.

    Raises:
        OperatorError: no samples, a delta that protects nobody, or an epsilon out of reach.
    """
    if num_samples < 1:
        raise OperatorError("privacy: no samples to train on")
    if num_samples > 1 and config.delta >= 1 / num_samples:
        raise OperatorError(
            f"privacy.delta: expected less than one over the number of samples ({1 / num_samples:g}), got "
            f"{config.delta:g}: with as much, publishing one of them would count as private"
        )
    rate = min(1.0, (config.batch or training.batch) / num_samples)
    noise = config.noise_multiplier or compute_noise_multiplier(
        config.epsilon_max, config.delta, rate, config.rounds * training.steps
    )
    return Spending(noise, rate, training.steps)


def spend(config: PrivacyConfig, log: SpendingLog, spending: Spending) -> Guarantee | None:
    """Write a round into the log before it is trained: the guarantee with it, or None where nothing guarantees.

    A crash between this and the announcement counts a round that nobody saw, never the other way round.

    Raises:
        BudgetSpent: the round would exceed `config.epsilon_max`. Nothing was written.
    """
    spent = log.get_spendings()
    epsilon = compute_epsilon([*spent, spending], config.delta)
    if config.epsilon_max and epsilon > config.epsilon_max:
        now = compute_epsilon(spent, config.delta)
        hint = (
            "this home has trained without noise before, so nothing bounds what it told; use a new home"
            if math.isinf(now)
            else "raise privacy.epsilon_max if your samples' owners agree"
        )
        raise BudgetSpent(
            f"the privacy budget is spent: epsilon is {now:.3g} and would be {epsilon:.3g} after this round, over "
            f"privacy.epsilon_max {config.epsilon_max:g}; {hint}"
        )
    log.add_spending(spending)
    return Guarantee(epsilon, config.delta) if math.isfinite(epsilon) else None


# --- training


class PrivateLearner:
    """A `TorchLearner` that trains by DP-SGD: every round is written into its log before it is trained."""

    def __init__(
        self,
        learner: TorchLearner,
        config: PrivacyConfig,
        training: TrainingConfig,
        log: SpendingLog,
        draw: random.Random,
    ) -> None:
        """Choose the noise for the learner's number of samples.

        Args:
            log: outlives the process, or else the guarantee does not (`MemorySpendings` is for studies).
            draw: seeds sampling and noise: `random.SystemRandom()`, or else the guarantee holds only against those who
                do not know the seed.

        Raises:
            OperatorError: as `plan_spending`.
        """
        self.round_cost = plan_spending(config, training, learner.num_samples)
        self._learner = learner
        self._config = config
        self._training = training
        self._log = log
        self._draw = draw

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As the learner's."""
        return self._learner.shapes()

    def initial(self) -> Tensors:
        """As the learner's."""
        return self._learner.initial()

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """A round of noised steps from `base`; then, without noise, those on the public batch that `work` draws.

        Raises:
            BudgetSpent: the privacy budget allows no further round; nothing was trained.
            OperatorError: the weights are no longer finite.
        """
        guarantee = spend(self._config, self._log, self.round_cost)
        delta = self._learner.train_by(self._take_steps, base, round, work)
        # What else training knows (its loss, the true number of tokens) is not noised: it stays here.
        samples = math.ceil(self.round_cost.sample_rate * self._learner.num_samples) * self._training.steps
        return Training(delta, samples * self._training.tokens_max, None, guarantee)

    def gradient(self, at: Tensors, seed: int) -> tuple[float, Tensors]:
        """As the learner's: the probe is public."""
        return self._learner.gradient(at, seed)

    def work_loss(self, at: Tensors, seed: int) -> float:
        """As the learner's: the work split is public."""
        return self._learner.work_loss(at, seed)

    def evaluate(self, at: Tensors) -> float:
        """As the learner's: the test split is public."""
        return self._learner.evaluate(at)

    def _take_steps(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], samples: Sequence[Encoded], pad: int
    ) -> None:
        optimizer = torch.optim.AdamW(parameters, lr=self._training.learning_rate, weight_decay=0.0)
        norm = self._config.max_grad_norm
        train_privately(model, parameters, samples, pad, self.round_cost, norm, optimizer, self._draw)


class Predictor(nn.Module):
    """`layers.predict` for one sample as a module, so that `torch.func` can put other parameters into its model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Logits (num_columns, vocabulary) of the one sample `tokens` (length,) at these positions."""
        return predict(self.model, tokens[None], torch.zeros_like(columns), columns)


def compute_sample_gradients(
    model: nn.Module, parameters: Sequence[nn.Parameter], batch: Sequence[Encoded], pad: int
) -> list[torch.Tensor]:
    """(num_samples, *shape) for each parameter: gradients of each sample's own mean completion loss [nats/token].

    One vectorised pass; any adapter kind. `parameters` must be parameters of `model`.
    """
    if not batch:
        return [parameter.detach().new_zeros((0, *parameter.shape)) for parameter in parameters]
    predictor = Predictor(model)
    names = {id(parameter): name for name, parameter in predictor.named_parameters()}
    values = {names[id(parameter)]: parameter.detach() for parameter in parameters}

    def compute_loss(
        values: Mapping[str, torch.Tensor],
        tokens: torch.Tensor,
        columns: torch.Tensor,
        wanted: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        logits = torch.func.functional_call(predictor, dict(values), (tokens, columns))
        return (functional.cross_entropy(logits.float(), wanted, reduction="none") * weights).sum()

    device = parameters[0].device
    inputs = tuple(torch.from_numpy(part).to(device) for part in _align(batch, pad))
    gradients = torch.func.vmap(torch.func.grad(compute_loss), in_dims=(None, 0, 0, 0, 0))(values, *inputs)
    return [gradients[names[id(parameter)]] for parameter in parameters]


def train_privately(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    samples: Sequence[Encoded],
    pad: int,
    spending: Spending,
    max_grad_norm: float,
    optimizer: torch.optim.Optimizer,
    draw: random.Random,
) -> None:
    """`spending.steps` DP-SGD steps on Poisson samples, in place. Account for them first (`spend`).

    Args:
        optimizer: of `parameters`; gets the noised mean of clipped gradients.
        draw: seeds sampling and noise: `random.SystemRandom()`, or else the guarantee holds only against those who
            do not know the seed.
    """
    noised = DPOptimizer(
        optimizer,
        noise_multiplier=spending.noise_multiplier,
        max_grad_norm=max_grad_norm,
        expected_batch_size=spending.sample_rate * len(samples),
        generator=torch.Generator(parameters[0].device),
        secure_mode=True,  # here: noise that floating-point attacks cannot take off
    )
    sampling = torch.Generator()
    batches = iter(
        UniformWithReplacementSampler(
            num_samples=len(samples), sample_rate=spending.sample_rate, generator=sampling, steps=spending.steps
        )
    )
    for _ in range(spending.steps):
        sampling.manual_seed(draw.getrandbits(32))
        noised.generator.manual_seed(draw.getrandbits(32))
        # A step without samples is a step all the same: it adds noise, and was paid for.
        chunks = list(_split([samples[index] for index in next(batches)])) or [[]]
        for left, chunk in zip(range(len(chunks) - 1, -1, -1), chunks, strict=True):
            noised.zero_grad()
            gradients = compute_sample_gradients(model, parameters, chunk, pad)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad_sample = gradient  # type: ignore[attr-defined]
            noised.signal_skip_step(left > 0)
            noised.step()
    noised.zero_grad(set_to_none=True)


def _split(batch: Sequence[Encoded]) -> Iterator[list[Encoded]]:
    """Samples of similar lengths together, so many that their per-sample gradients fit into memory."""
    chunk: list[Encoded] = []
    for sample in sorted(batch, key=lambda sample: len(sample.tokens)):
        if chunk and (len(chunk) + 1) * len(sample.tokens) > PROBE_TOKENS_MAX:
            yield chunk
            chunk = []
        chunk.append(sample)
    if chunk:
        yield chunk


def _align(batch: Sequence[Encoded], pad: int) -> tuple[np.ndarray[Any, Any], ...]:
    """(tokens, columns, wanted, weights) with one row a sample: what `collate` gives, but rectangular."""
    length = max(len(sample.tokens) for sample in batch)
    width = max(sample.num_completion for sample in batch)
    tokens = np.full((len(batch), length), pad, np.int64)
    columns, wanted = np.zeros((2, len(batch), width), np.int64)
    weights = np.zeros((len(batch), width), np.float32)
    for row, sample in enumerate(batch):
        count = sample.num_completion
        tokens[row, : len(sample.tokens)] = sample.tokens
        columns[row, :count] = np.arange(sample.num_prompt - 1, len(sample.tokens) - 1)
        wanted[row, :count] = sample.tokens[sample.num_prompt :]
        weights[row, :count] = 1 / count
    return tokens, columns, wanted, weights
