"""Merge rules under attack: LoRA on a transformer, non-IID peers, liars among peers and among evaluators.

    python bench/robustness.py [--json FILE] [--check] [--quick] [--full]

Ten peers hold Dirichlet(0.1) shares of ten topics; none, two or four of them lie, and one of five evaluators reports
the opposite of what it measured. A figure is how far the loss on held-out prompts (every topic of equal weight) fell
below the untrained adapter's [nats/token], mean over seeds. ASw is composed of the functions that a node runs:
clipping, Aumann-Shapley slopes, what is repeated, the median, the epoch's sum, the capped weights, the merge.

"liars absent": the same peers are liars and send nothing. Their data is missing whatever the rule, so an attack can be
judged against this too. A backdoor that is neutral on clean data cannot show in a held-out loss, whatever the rule.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context

import harness
import numpy as np
from harness import Target
from numpy.typing import NDArray
from tasks import Task, make_task

from p2pfm.config import AdapterConfig, TrainingConfig
from p2pfm.contribution.aumann_shapley import Diagonal, Player
from p2pfm.contribution.repeats import PARAMETERS_PER_VECTOR, compute_repeated_gains
from p2pfm.contribution.rounding import to_contribution
from p2pfm.contribution.similarity import Sparse
from p2pfm.lora import robust
from p2pfm.lora.batches import Encoded
from p2pfm.lora.compress import Update
from p2pfm.lora.delta import compute_layout, flatten, get_shapes, subtract, unflatten
from p2pfm.lora.merge import clip_factors, merge
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
SHARDS = (0.2, 0.4)
ATTACKS = ("sign_flip", "alie", "ipm", "gaussian", "label_flip", "min_max")
BASELINES = ("mean", "median-norm clip", "geometric median", "NNM + trimmed mean")
MORE_BASELINES = ("trimmed mean", "median", "multi-Krum")
ASW = "ASw"
UNBALANCED = ("ASw, own data", "ASw, pooled data")
GATE = "gate"
JUDGED = (GATE, ASW, *UNBALANCED)
GAUSSIAN_SCALE = 10.0
IPM_EPSILON = 1.0
GRADIENT_SAMPLES = 8
"""Samples in one pass of stacked gradients."""


@dataclass
class Size:
    """How much is run."""

    seeds: tuple[int, ...] = (1, 2, 3)
    rounds: int = 6
    rules: tuple[str, ...] = (*BASELINES, ASW)
    attacks: tuple[str, ...] = ATTACKS
    shares: tuple[float, ...] = SHARDS
    samples: int = 1000
    steps: int = 10


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

    def __init__(self, seed: int, size: Size) -> None:
        training = TrainingConfig(steps=size.steps, batch=4, tokens_max=32, learning_rate=2e-3)
        adapter = AdapterConfig(rank=8, alpha=16, targets=("v_proj", "o_proj", "down_proj"))

        def make(**changes: object) -> Task:
            return make_task(NUM_PEERS, seed, alpha=0.1, training=training, adapter=adapter, **changes)  # type: ignore[arg-type]

        self.task = make()
        flipped = make(corrupt={peer: lambda sample, _: attacks.flip_labels(sample) for peer in range(NUM_PEERS)})
        parts = {"clean": self.task.peers, "label_flip": flipped.peers}
        self.data = {kind: [shard[len(shard) // HELD_OUT :] for shard in shards] for kind, shards in parts.items()}
        self.held_out = [shard[: len(shard) // HELD_OUT] or shard[:1] for shard in self.task.peers]
        self.order = [int(peer) for peer in np.random.default_rng([seed, 9]).permutation(NUM_PEERS)]
        self.layout = compute_layout(get_shapes(self.task.initial))
        self.shares = compute_weights([1] * NUM_PEERS)
        self.seed = seed
        self.untrained = float(self.task.losses([self.task.initial], self.task.test)[0])

    def make_run(self, rule: str, attack: str, share: float) -> Run:
        """A run before its first round."""
        return Run(rule, attack, tuple(self.order[: round(share * NUM_PEERS)]), self.task.initial)

    def play(self, runs: Sequence[Run], rounds: int) -> list[NDArray[np.floating]]:
        """Each run's loss on every topic after the last round."""
        for round_ in range(rounds):
            updates = self._send(runs, round_)
            judged = [index for index, run in enumerate(runs) if run.rule in JUDGED]
            medians = dict(zip(judged, self._judge([(runs[i], updates[i]) for i in judged], round_), strict=True))
            for index, run in enumerate(runs):
                merged = self._merge(run, updates[index], medians.get(index, []))
                run.previous, run.base = run.base, merged
        return list(self.task.model.evaluate([run.base for run in runs], self.task.test))

    def _send(self, runs: Sequence[Run], round_: int) -> list[list[Array]]:
        """What each run's peers send, flat; peers that train from the same base on the same data train once."""
        jobs: dict[tuple[int, int, str], Tensors] = {}
        for run in runs:
            for peer in range(NUM_PEERS):
                kind = "label_flip" if peer in run.liars and run.attack == "label_flip" else "clean"
                if peer not in run.liars or run.attack in ("label_flip", "sign_flip"):
                    jobs.setdefault((id(run.base), peer, kind), run.base)
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
            match run.attack:
                case "sign_flip":
                    sent[peer] = attacks.flip_sign(deltas[id(run.base), peer, "clean"])
                case "label_flip":
                    sent[peer] = deltas[id(run.base), peer, "label_flip"]
                case "alie":
                    sent[peer] = attacks.make_alie(honest, attacks.compute_alie_z(NUM_PEERS, num_liars))
                case "ipm":
                    sent[peer] = attacks.make_ipm(honest, IPM_EPSILON)
                case "min_max":
                    sent[peer] = attacks.make_min_max(honest)
                case "gaussian":
                    sent[peer] = attacks.draw_gaussian(honest[0], rng, GAUSSIAN_SCALE)
                case "absent":
                    sent[peer] = np.zeros_like(honest[0])
                case _:
                    raise AssertionError(run.attack)
        return [sent[peer] for peer in range(NUM_PEERS)]

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

    def _median(self, run: Run, players: list[Player], num_points: int, gradients: object) -> list[Contribution]:
        vectors = [Sparse(player.positions, player.values) for player in players]
        earlier = run.earlier[: self.layout.size // PARAMETERS_PER_VECTOR]
        if run.previous is not None:
            moved = flatten(subtract(run.base, run.previous))
            earlier = [Sparse(np.arange(moved.size), moved), *earlier]
        counts = np.ones((NUM_PEERS, len(earlier)), np.bool_)
        readings: list[Sequence[Contribution]] = []
        for evaluator in range(NUM_EVALUATORS):
            answers = iter([next(gradients) for _ in range(num_points)])  # type: ignore[call-overload]
            game = Diagonal(lambda _, answers=answers: next(answers), run.base, players)
            slope = game.compute_slope()
            gains = compute_repeated_gains(vectors, earlier, slope, counts)
            values = [
                value - max(0.0, player.weight * gain)
                for value, player, gain in zip(game.earn(slope), players, gains, strict=True)
            ]
            reading = [to_contribution(value) for value in values]
            readings.append(attacks.lie(reading) if evaluator == 0 else reading)
        run.earlier = [*vectors, *run.earlier]
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
            samples, weights = [], []
            for part in self.task.probe.values():
                drawn = [part[i] for i in rng.permutation(len(part))[:PROBE_SAMPLES]]
                drawn = [drawn[i % len(drawn)] for i in range(PROBE_SAMPLES)]
                tokens = sum(sample.num_completion for sample in drawn)
                samples += drawn
                weights += [1 / (len(self.task.probe) * tokens)] * len(drawn)
            return samples, weights
        own = self.held_out[self.order[-1 - evaluator]]
        pooled = [sample for peer in self.order[NUM_PEERS // 2 :] for sample in self.held_out[peer]]
        pool = own if rule == UNBALANCED[0] else pooled
        samples = [pool[i] for i in rng.integers(0, len(pool), PROBE_SAMPLES * len(self.task.probe))]
        return samples, [1 / sum(sample.num_completion for sample in samples)] * len(samples)

    def _gradients(self, jobs: Sequence[tuple[Tensors, list[Encoded], list[float]]]) -> list[dict[str, Array]]:
        """The gradient of each job's weighted loss, many adapters in one pass."""
        found: list[dict[str, Array]] = []
        for start in range(0, len(jobs), 32):
            part = jobs[start : start + 32]
            model = self.task.model
            stack = {name: values.requires_grad_() for name, values in model.stack([at for at, _, _ in part]).items()}
            orders = [sorted(range(len(s)), key=lambda i, s=s: len(s[i].tokens)) for _, s, _ in part]
            for first in range(0, len(orders[0]), GRADIENT_SAMPLES):
                rows = [order[first : first + GRADIENT_SAMPLES] for order in orders]
                batches = [[samples[i] for i in row] for (_, samples, _), row in zip(part, rows, strict=True)]
                weights = [[each[i] for i in row] for (_, _, each), row in zip(part, rows, strict=True)]
                model.losses(stack, batches, weights).sum().backward()
            found += model.unstack({name: values.grad for name, values in stack.items() if values.grad is not None})
        return found

    def _update(self, values: Array) -> Update:
        every = np.arange(len(values))
        counts = np.ones((len(values), 1), np.int64)
        return Update(compute_digest(values.tobytes()), self.layout, every, values, np.abs(values)[:, None], counts)


def work(job: tuple[int, Size, tuple[str, ...]]) -> dict[tuple[str, str, float], tuple[float, float, float]]:
    """(drop of the mean loss, worst topic's loss, CPU seconds a run) by (rule, attack, share of liars) for one seed."""
    seed, size, rules = job
    used: dict[str, float] = {}
    with harness.cpu_seconds(used, "all"):
        federation = Federation(seed, size)
        setups = [("none", 0.0)]
        setups += [(attack, share) for share in size.shares for attack in (*size.attacks, "absent")]
        keys = [
            (rule, attack, share) for rule in rules for attack, share in setups if attack != "absent" or rule == ASW
        ]
        losses = federation.play([federation.make_run(*key) for key in keys], size.rounds)
    return {
        key: (federation.untrained - float(loss.mean()), float(loss.max()), used["all"] / len(keys))
        for key, loss in zip(keys, losses, strict=True)
    }


def main() -> None:
    """Measure, print, compare."""
    is_full = "--full" in sys.argv
    if is_full:
        sys.argv.remove("--full")
    options = harness.parse_options(__doc__ or "")
    size = Size()
    if is_full:
        size = Size(rules=(*BASELINES, *MORE_BASELINES, GATE, ASW, *UNBALANCED))
    if options.quick:
        size = Size(seeds=(1,), rounds=2, rules=("mean", ASW), attacks=("ipm", "label_flip"), shares=(0.4,), steps=2)
    jobs = [(seed, size, (rule,)) for rule in (ASW, *[r for r in size.rules if r != ASW]) for seed in size.seeds]
    results: dict[int, dict[tuple[str, str, float], tuple[float, float, float]]] = {seed: {} for seed in size.seeds}
    if options.quick:
        answers = [work(job) for job in jobs]
    else:
        with get_context("spawn").Pool(2) as pool:
            answers = pool.map(work, jobs, chunksize=1)
    for (seed, *_), answer in zip(jobs, answers, strict=True):
        results[seed] |= answer
    finish(options, size, results)


def finish(
    options: harness.Options,
    size: Size,
    results: dict[int, dict[tuple[str, str, float], tuple[float, float, float]]],
) -> None:
    """Tables and targets."""

    def drops(rule: str, attack: str, share: float) -> NDArray[np.float64]:
        return np.array([results[seed][rule, attack, share][0] for seed in size.seeds])

    def worst_topic(rule: str, attack: str, share: float) -> float:
        return float(np.mean([results[seed][rule, attack, share][1] for seed in size.seeds]))

    free = drops(ASW, "none", 0.0)
    for share in size.shares:
        rows = []
        for rule in size.rules:
            cells = [drops(rule, "none", 0.0), *(drops(rule, attack, share) for attack in size.attacks)]
            rows.append([rule, *(f"{cell.mean():.3f} ({cell.std(ddof=min(1, cell.size - 1)):.3f})" for cell in cells)])
        rows.append([f"{ASW}, liars absent", f"{drops(ASW, 'absent', share).mean():.3f}", *["" for _ in size.attacks]])
        title = f"Drop of the held-out loss [nats/token], {share:.0%} liars: mean of seeds {size.seeds} (deviation)"
        harness.print_table(title, ["rule", "no attack", *size.attacks], rows)
    rows = []
    for share in size.shares:
        for rule in size.rules:
            cells = [worst_topic(rule, attack, share) for attack in size.attacks]
            rows.append([rule, f"{share:.0%}", worst_topic(rule, "none", 0.0), *cells])
    harness.print_table("The worst topic's loss [nats/token]", ["rule", "liars", "no attack", *size.attacks], rows)

    targets: list[Target] = []
    shortfalls = []
    for share in size.shares:
        worst = min(float((drops(ASW, attack, share) / free).mean()) for attack in size.attacks)
        targets.append(Target(f"worst drop under attack by {share:.0%} to attack-free", worst, 0.97, "more"))
        absent = drops(ASW, "absent", share)
        worst = min(float((drops(ASW, attack, share) / absent).mean()) for attack in size.attacks)
        targets.append(Target(f"worst drop under attack by {share:.0%} to liars absent", worst, 0.97, "more"))
        for attack in size.attacks:
            for rule in size.rules:
                if rule in JUDGED:
                    continue
                behind = drops(rule, attack, share) - drops(ASW, attack, share)
                spread = float(behind.std(ddof=min(1, behind.size - 1)))
                shortfalls.append((float(behind.mean()) - spread, f"{rule}, {attack}, {share:.0%}"))
    targets.append(
        Target("drop without attack to the mean rule's", float((free / drops("mean", "none", 0.0)).mean()), 1.0, "more")
    )
    worst_gap, where = max(shortfalls)
    targets.append(Target("behind the best baseline beyond the spread, worst", worst_gap, 0.0, "less"))
    worst_strata = max(
        worst_topic(ASW, attack, share) / worst_topic("mean", attack, share)
        for attack, share in [("none", 0.0), *((a, s) for s in size.shares for a in size.attacks)]
    )
    targets.append(Target("worst topic's loss to the mean rule's, worst", worst_strata, 1.05, "less"))
    cost = float(np.mean([cell[2] for cells in results.values() for cell in cells.values()]))
    print(f"\nnearest baseline: {where}; {cost:.1f} CPU seconds a run")
    figures = {
        "drops": {
            str(seed): {" | ".join(map(str, key)): cell[0] for key, cell in cells.items()}
            for seed, cells in results.items()
        },
        "worst_topic": {
            str(seed): {" | ".join(map(str, key)): cell[1] for key, cell in cells.items()}
            for seed, cells in results.items()
        },
    }
    harness.finish(options, figures, targets)


if __name__ == "__main__":
    main()
