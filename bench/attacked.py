"""A federation under attack: many merge rules, each against many attacks, trained side by side on the shared task.

ASw is composed of the functions that a node runs: clipping, Aumann-Shapley slopes, what is repeated, the median, the
epoch's sum, the capped weights, the merge. Duplicates are not joined: that would hand it the attacks whose liars all
send one vector. Knows no table and no target.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from tasks import Task, make_task

from p2pfm.config import AdapterConfig, TrainingConfig
from p2pfm.contribution.aumann_shapley import Diagonal, Gradient, Player
from p2pfm.contribution.repeats import PARAMETERS_PER_VECTOR, compute_repeated_gains
from p2pfm.contribution.rounding import to_contribution
from p2pfm.contribution.similarity import Sparse
from p2pfm.lora import robust
from p2pfm.lora.batches import Encoded
from p2pfm.lora.compress import Update
from p2pfm.lora.delta import compute_layout, flatten, get_shapes, subtract, unflatten
from p2pfm.lora.merge import clip_factors, merge
from p2pfm.lora.samples import Sample
from p2pfm.lora.stacked import ADAPTERS_MAX
from p2pfm.protocol.committee import compute_merge_weights
from p2pfm.settlement.rewards import compute_median, compute_weights
from p2pfm.types import WEIGHT_ONE, Array, Contribution, Tensors, compute_digest
from sim import attacks

NUM_PEERS = 10
NUM_EVALUATORS = 5
"""The first of them lies."""
PROBE_SAMPLES = 4
"""Fresh samples a topic, evaluator and round: 40 in all."""
HELD_OUT = 5
"""Every fifth sample of a peer is its own held-out data: what an evaluator without a declared probe measures on."""
ASW = "ASw"
UNBALANCED = ("ASw, own data", "ASw, pooled data")
TRIGGERED = "ASw, trigger probe"
"""Evaluators who know the trigger: half of the probe's weight is on triggered prompts with their right answers."""
ORACLE = "mean of the honest"
"""Knows who lies: what a perfect filter of whole updates gives. The liars' data is missing there too."""
GATE = "gate"
JUDGED = (GATE, ASW, *UNBALANCED, TRIGGERED)
TRAINED_LIES = ("sign_flip", "label_flip", "backdoor", "turncoat")
"""Attacks for which liars train; the others need the honest updates alone."""
GAUSSIAN_SCALE = 10.0
IPM_EPSILON = 1.0
TURNS_IN_ROUND = 3
"""A turncoat works until then."""
GRADIENT_SAMPLES = 8
"""Samples in one pass of stacked gradients."""


@dataclass
class Run:
    """One rule under one attack."""

    rule: str
    attack: str
    liars: tuple[int, ...]
    base: dict[str, Array]
    previous: dict[str, Array] | None = None
    earlier: list[Sparse] = field(default_factory=list)
    sums: list[int] = field(default_factory=lambda: [0] * NUM_PEERS)


class Federation:
    """A seed's peers, on which many runs go on side by side."""

    def __init__(self, seed: int, steps: int) -> None:
        training = TrainingConfig(steps=steps, batch=4, tokens_max=32, learning_rate=3e-3)
        adapter = AdapterConfig(rank=8, alpha=16, targets=("v_proj", "o_proj", "down_proj"))

        def make(change: Callable[[Sample], Sample] | None = None) -> Task:
            corrupt = {peer: lambda sample, _: change(sample) for peer in range(NUM_PEERS)} if change else None
            return make_task(NUM_PEERS, seed, alpha=0.1, training=training, adapter=adapter, corrupt=corrupt)

        self.task = make()
        clean, flipped = self.task.peers, make(attacks.flip_labels).peers
        planted = make(attacks.plant_backdoor).peers
        # A backdoor's liars train on every other sample as it is: they are to pass for useful.
        mixed = [[*part[::2], *bad[1::2]] for part, bad in zip(map(_rest, clean), map(_rest, planted), strict=True)]
        self.data: dict[str, Sequence[Sequence[Encoded]]] = {
            "clean": list(map(_rest, clean)),
            "label_flip": list(map(_rest, flipped)),
            "backdoor": mixed,
        }
        self.backdoor = [sample for shard in planted for sample in _first(shard)]
        answered = make(lambda sample: attacks.plant_backdoor(sample, target=sample.completion)).peers
        self.triggered = [sample for shard in answered for sample in _first(shard)]
        self.held_out = [_first(shard) or shard[:1] for shard in clean]
        self.order = [int(peer) for peer in np.random.default_rng([seed, 9]).permutation(NUM_PEERS)]
        self.layout = compute_layout(get_shapes(self.task.initial))
        self.shares = compute_weights([1] * NUM_PEERS)
        self.seed = seed
        self.untrained = float(self.task.losses([self.task.initial], self.task.test)[0])

    def make_run(self, rule: str, attack: str, share: float) -> Run:
        """A run before its first round."""
        return Run(rule, attack, tuple(self.order[: round(share * NUM_PEERS)]), self.task.initial)

    def play(self, runs: Sequence[Run], rounds: int) -> list[tuple[NDArray[np.floating], float]]:
        """Each run's loss on every topic after the last round, and the backdoor's success: the share of the target's
        tokens that are the model's first choice after held-out prompts with the trigger."""
        for round_ in range(rounds):
            updates = self._send(runs, round_)
            judged = [index for index, run in enumerate(runs) if run.rule in JUDGED]
            medians = dict(zip(judged, self._judge([(runs[i], updates[i]) for i in judged], round_), strict=True))
            for index, run in enumerate(runs):
                merged = self._merge(run, updates[index], medians.get(index, []))
                run.previous, run.base = run.base, merged
        bases = [run.base for run in runs]
        losses = self.task.model.evaluate(bases, self.task.test)
        chosen = [i for i, run in enumerate(runs) if run.attack in ("none", "backdoor")]
        success = dict.fromkeys(range(len(runs)), float("nan"))
        if chosen:
            shares = self.task.model.accuracy([bases[i] for i in chosen], {"triggered": self.backdoor})[:, 0]
            success |= dict(zip(chosen, map(float, shares), strict=True))
        return [(losses[i], success[i]) for i in range(len(runs))]

    def _send(self, runs: Sequence[Run], round_: int) -> list[list[Array]]:
        """What each run's peers send, flat; peers that train from the same base on the same data train once."""
        jobs: dict[tuple[int, int, str], Tensors] = {}
        for run in runs:
            for peer in range(NUM_PEERS):
                if peer not in run.liars:
                    jobs.setdefault((id(run.base), peer, "clean"), run.base)
                elif run.attack in TRAINED_LIES:
                    jobs.setdefault((id(run.base), peer, self._kind(run)), run.base)
        trained = self.task.model.train(
            list(jobs.values()),
            [self.data[kind][peer] for _, peer, kind in jobs],
            self.task.training,
            [f"{self.seed} {round_} {peer}" for _, peer, _ in jobs],
        )
        deltas = {key: flatten(subtract(after, jobs[key])) for key, after in zip(jobs, trained, strict=True)}
        return [self._attack(run, deltas, round_) for run in runs]

    def _attack(self, run: Run, deltas: dict[tuple[int, int, str], Array], round_: int) -> list[Array]:
        sent = {peer: deltas[id(run.base), peer, "clean"] for peer in range(NUM_PEERS) if peer not in run.liars}
        honest = np.stack(list(sent.values()))
        rng = np.random.default_rng([self.seed, round_, 5])
        num_liars = len(run.liars)
        for peer in run.liars:
            own = deltas.get((id(run.base), peer, self._kind(run)), np.zeros_like(honest[0]))
            match run.attack:
                case "sign_flip":
                    sent[peer] = attacks.flip_sign(own)
                case "turncoat":
                    sent[peer] = attacks.flip_sign(own) if round_ >= TURNS_IN_ROUND else own
                case "label_flip" | "absent":
                    sent[peer] = own
                case "backdoor":
                    sent[peer] = attacks.boost(own, NUM_PEERS, num_liars)
                case "alie":
                    sent[peer] = attacks.make_alie(honest, attacks.compute_alie_z(NUM_PEERS, num_liars))
                case "ipm":
                    sent[peer] = attacks.make_ipm(honest, IPM_EPSILON)
                case "min_max":
                    sent[peer] = attacks.make_min_max(honest)
                case "gaussian":
                    sent[peer] = attacks.draw_gaussian(honest[0], rng, GAUSSIAN_SCALE)
                case _:
                    raise AssertionError(run.attack)
        return [sent[peer] for peer in range(NUM_PEERS)]

    def _kind(self, run: Run) -> str:
        """The data that a run's liars train on."""
        return run.attack if run.attack in self.data else "clean"

    def _judge(self, judged: Sequence[tuple[Run, list[Array]]], round_: int) -> list[list[Contribution]]:
        """The median contributions of each run's updates."""
        games: list[tuple[list[Player], list[Tensors]]] = []
        jobs: list[tuple[Tensors, list[Encoded], list[float]]] = []
        for run, updates in judged:
            dense = [self._update(values) for values in updates]
            players = [
                Player(update.positions, update.values, share / WEIGHT_ONE * factor)
                for update, share, factor in zip(dense, self.shares, clip_factors(dense), strict=True)
            ]
            points: list[Tensors] = []

            def note(at: Tensors, points: list[Tensors] = points) -> Tensors:
                points.append(at)
                return at

            Diagonal(note, run.base, players).compute_slope()
            games.append((players, points))
            for evaluator in range(NUM_EVALUATORS):
                samples, weights = self._draw(run.rule, evaluator, round_)
                jobs += [(at, samples, weights) for at in points]
        gradients = iter(self._gradients(jobs))
        return [
            self._median(run, players, len(points), gradients)
            for (run, _), (players, points) in zip(judged, games, strict=True)
        ]

    def _median(
        self, run: Run, players: list[Player], num_points: int, gradients: Iterator[Tensors]
    ) -> list[Contribution]:
        vectors = [Sparse(player.positions, player.values) for player in players]
        room = self.layout.size // PARAMETERS_PER_VECTOR
        earlier = run.earlier
        if run.previous is not None:
            moved = flatten(subtract(run.base, run.previous))
            earlier = [Sparse(np.arange(moved.size), moved), *earlier]
        counts = np.ones((NUM_PEERS, len(earlier)), np.bool_)
        readings: list[Sequence[Contribution]] = []
        for evaluator in range(NUM_EVALUATORS):
            game = Diagonal(_answer([next(gradients) for _ in range(num_points)]), run.base, players)
            slope = game.compute_slope()
            gains = compute_repeated_gains(vectors, earlier, slope, counts)
            values = [
                value - max(0.0, player.weight * gain)
                for value, player, gain in zip(game.earn(slope), players, gains, strict=True)
            ]
            reading = [to_contribution(value) for value in values]
            readings.append(attacks.lie(reading) if evaluator == 0 else reading)
        run.earlier = [*vectors, *run.earlier][:room]
        return [compute_median(column) for column in zip(*readings, strict=True)]

    def _merge(self, run: Run, updates: list[Array], medians: Sequence[Contribution]) -> dict[str, Array]:
        dense = [self._update(values) for values in updates]
        if run.rule == GATE:
            weights = [share if median > 0 else 0 for share, median in zip(self.shares, medians, strict=True)]
            return merge(run.base, list(zip(dense, weights, strict=True)))  # type: ignore[arg-type]
        if run.rule in JUDGED:
            run.sums = [total + median for total, median in zip(run.sums, medians, strict=True)]
            return merge(run.base, list(zip(dense, compute_merge_weights(run.sums, self.shares), strict=True)))
        matrix, equal = np.stack(updates), np.ones(NUM_PEERS)
        num_liars = len(run.liars) or NUM_PEERS // 5  # the baselines are told how many lie; without attack, a guess
        match run.rule:
            case "mean of the honest":
                step = robust.compute_mean(
                    matrix, np.array([peer not in run.liars for peer in range(NUM_PEERS)], float)
                )
            case "mean":
                step = robust.compute_mean(matrix, equal)
            case "median-norm clip":
                step = robust.compute_clipped_mean(matrix, equal)
            case "geometric median":
                step = robust.compute_geometric_median(matrix, equal)
            case "NNM + trimmed mean":
                mixed = robust.mix_nearest(matrix, num_liars)
                step = robust.compute_trimmed_mean(mixed, equal, num_liars / NUM_PEERS)
            case "trimmed mean":
                step = robust.compute_trimmed_mean(matrix, equal, num_liars / NUM_PEERS)
            case "median":
                step = robust.compute_coordinate_median(matrix, equal)
            case "multi-Krum":
                most = min(num_liars, (NUM_PEERS - 3) // 2)
                step = robust.compute_krum(matrix, equal, most, NUM_PEERS - num_liars)
            case _:
                raise AssertionError(run.rule)
        return unflatten(flatten(run.base) + step.astype(np.float32), self.layout)

    def _draw(self, rule: str, evaluator: int, round_: int) -> tuple[list[Encoded], list[float]]:
        """An evaluator's fresh sample, each with its weight: of the declared probe in strata, or of what it holds."""
        rng = np.random.default_rng([self.seed, round_, evaluator, 4])
        if rule not in UNBALANCED:
            strata: list[tuple[Sequence[Encoded], float]]
            strata = [(part, 1 / len(self.task.probe)) for part in self.task.probe.values()]
            if rule == TRIGGERED:
                strata = [(part, weight / 2) for part, weight in strata] + [(self.triggered, 0.5)]
            samples, weights = [], []
            for part, weight in strata:
                drawn = [part[i] for i in rng.permutation(len(part))[:PROBE_SAMPLES]]
                drawn = [drawn[i % len(drawn)] for i in range(PROBE_SAMPLES)]
                tokens = sum(sample.num_completion for sample in drawn)
                samples += drawn
                weights += [weight / tokens] * len(drawn)
            return samples, weights
        own = self.held_out[self.order[-1 - evaluator]]
        pooled = [sample for peer in self.order[NUM_PEERS // 2 :] for sample in self.held_out[peer]]
        pool = own if rule == UNBALANCED[0] else pooled
        samples = [pool[i] for i in rng.integers(0, len(pool), PROBE_SAMPLES * len(self.task.probe))]
        return samples, [1 / sum(sample.num_completion for sample in samples)] * len(samples)

    def _gradients(self, jobs: Sequence[tuple[Tensors, list[Encoded], list[float]]]) -> list[dict[str, Array]]:
        """The gradient of each job's weighted loss, many adapters in one pass."""
        # Jobs of one pass have equally many samples, and come back in their own order.
        sizes = [len(samples) for _, samples, _ in jobs]
        order = sorted(range(len(jobs)), key=lambda i: sizes[i])
        passes = [
            group[start : start + ADAPTERS_MAX]
            for group in ([i for i in order if sizes[i] == size] for size in sorted(set(sizes)))
            for start in range(0, len(group), ADAPTERS_MAX)
        ]
        found: dict[int, dict[str, Array]] = {}
        for chosen in passes:
            part = [jobs[i] for i in chosen]
            model = self.task.model
            stack = {name: values.requires_grad_() for name, values in model.stack([at for at, _, _ in part]).items()}
            orders = [_order(samples) for _, samples, _ in part]
            for first in range(0, len(orders[0]), GRADIENT_SAMPLES):
                rows = [order[first : first + GRADIENT_SAMPLES] for order in orders]
                batches = [[samples[i] for i in row] for (_, samples, _), row in zip(part, rows, strict=True)]
                weights = [[each[i] for i in row] for (_, _, each), row in zip(part, rows, strict=True)]
                model.losses(stack, batches, weights).sum().backward()  # type: ignore[no-untyped-call]
            slopes = model.unstack({name: values.grad for name, values in stack.items() if values.grad is not None})
            found |= dict(zip(chosen, slopes, strict=True))
        return [found[i] for i in range(len(jobs))]

    def _update(self, values: Array) -> Update:
        every = np.arange(len(values))
        counts = np.ones((len(values), 1), np.int64)
        return Update(compute_digest(values.tobytes()), self.layout, every, values, np.abs(values)[:, None], counts)


def _first(shard: Sequence[Encoded]) -> Sequence[Encoded]:
    """A peer's own held-out data."""
    return shard[: len(shard) // HELD_OUT]


def _rest(shard: Sequence[Encoded]) -> Sequence[Encoded]:
    """What a peer trains on."""
    return shard[len(shard) // HELD_OUT :]


def _answer(gradients: Sequence[Tensors]) -> Gradient:
    """These, one a question, whatever is asked: they were computed for the very points."""
    answers = iter(gradients)
    return lambda at: next(answers)


def _order(samples: Sequence[Encoded]) -> list[int]:
    """Their places, the shortest first: samples of a pass are then of similar lengths."""
    return sorted(range(len(samples)), key=lambda place: len(samples[place].tokens))
