"""What an estimator of contributions costs and how far it is from the truth, on a transformer with LoRA.

    python bench/contribution.py [--json FILE] [--check] [--quick]

The truth is exact enumeration of all 1024 coalitions at n = 10 (3 seeds, 2 step sizes; then GTG-Shapley's five
scenarios), and a long antithetic permutation run, its standard error beside, at n = 20 and 50. Updates are real ones:
second-round LoRA deltas of the tests' Llama on ChatterBot, with error feedback through the codec, clipped to the median
norm, as a node scores them (`p2pfm.work`). Training runs in bf16, as on nodes, but measuring in float32: in bf16 one
loss is good to 2e-3, which is a tenth of a marginal (a row shows that gradients do not mind).

A pass is a forward over the probe; a gradient counts as three. CPU seconds are passes times what each kind costs here.
GTG-Shapley is also played on its authors' game, whose weights are renormalised over the coalition, and is measured
there against that game's own exact values.
"""

import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

from harness import Target, finish, parse_options, print_table  # isort: skip  (sets how OpenMP waits, before torch)

import msgspec
import numpy as np
import torch
import transformers
from scipy.stats import spearmanr
from tasks import TRAINING, MergedModel, Task, make_task, train_second_round

from p2pfm.contribution.aumann_shapley import Player, compute_aumann_shapley
from p2pfm.contribution.permutation import compute_gtg, compute_permutation
from p2pfm.contribution.round_game import RoundGame
from p2pfm.contribution.shapley import compute_exact, compute_leave_one_out, compute_singleton
from p2pfm.contribution.utility import Estimate, SmoothGame
from p2pfm.lora.batches import Encoded
from p2pfm.lora.merge import clip_factors

STEP_SIZES = (5e-3, 1e-2)
"""Learning rates of the local steps; the first is the shared task's."""
STEP_SIZE_TOO_LARGE = 2e-2
"""Shown, not judged: here the loss is no longer near a cubic between the base and the merge."""
ALPHA = 0.3
"""How topics are dealt where there are more peers than topics."""
GRADIENT_PASSES = 3
"""A backward takes twice a forward's products."""
TRUNCATED_SHARE = 0.05
"""TMC stops where less than this share of u(N) is missing."""
GTG_BOUND = 1e-2
PAPER_SIZES = (0.10, 0.15, 0.20, 0.25, 0.30)
PAPER_NOISE = (0.00, 0.05, 0.10, 0.15, 0.20)
"""By fifth of the peers (GTG-Shapley's five participants; two of ours each)."""
SKEW = "topic skew"
SCENARIOS = ("same distribution", SKEW, "different sizes", "noisy labels", "noisy features")
AUMANN, AUMANN_BF16 = "Aumann-Shapley, 2 points", "Aumann-Shapley, 2 points, bf16"
AUMANN_1, AUMANN_3 = "Aumann-Shapley, 1 point", "Aumann-Shapley, 3 points"
GTG, GTG_OWN, GTG_ACROSS = "GTG-Shapley, our game", "GTG-Shapley, its game", "GTG-Shapley, its game, against ours"


class Size(NamedTuple):
    """How much is run."""

    num_peers: int
    seeds: tuple[int, ...]
    large: tuple[tuple[int, int, int], ...]
    """(peers, pairs of permutations of the reference, of the estimators)."""
    num_topics: int
    num_probe: int
    """Probe samples a topic: its shortest."""
    steps: int


FULL = Size(10, (0, 1, 2), ((50, 6, 2), (20, 12, 4)), 10, 2, TRAINING.steps)
QUICK = Size(4, (0,), ((6, 3, 1),), 4, 1, 2)


class Job(NamedTuple):
    """One game to estimate: what a worker process is given."""

    size: Size
    num_peers: int
    seed: int
    step_size: float
    scenario: str
    num_pairs: int
    """Of the estimators' permutations."""
    num_reference_pairs: int = 0
    """0: the truth is exact."""
    is_renormalised_too: bool = False


class Distance(NamedTuple):
    """Between values and the truth."""

    relative: float
    """Euclidean, over the truth's norm."""
    cosine: float
    spearman: float
    normalised: float
    """Euclidean, each divided by its sum: GTG-Shapley's D_E."""


class Row(NamedTuple):
    """An estimator's answer, its distance to the truth of the game that it was given, and its price."""

    name: str
    estimate: Estimate
    error: Distance
    cpu_s: float

    @property
    def num_passes(self) -> int:
        """Forward equivalents."""
        return self.estimate.num_evaluations + GRADIENT_PASSES * self.estimate.num_gradients


class Outcome(NamedTuple):
    """What a worker brings back."""

    job: Job
    truth: Estimate
    rows: list[Row]
    total_nats: float
    """u(N)."""
    loss_s: float
    gradient_s: float

    def find(self, name: str) -> Row:
        """The row of an estimator."""
        return next(row for row in self.rows if row.name == name)


# --- the game ---------------------------------------------------------------------------------------------------------


class Remembered:
    """A game whose utilities are computed once for all estimators (each still counts what it asked for), timed."""

    def __init__(self, game: RoundGame) -> None:
        self._game = game
        self._known: dict[int, float] = {}
        self.num_players = game.num_players
        self.losses_s, self.gradients_s, self.num_gradients = 0.0, 0.0, 0

    def utilities(self, coalitions: Sequence[int]) -> list[float]:
        """Of each coalition."""
        missing = [coalition for coalition in coalitions if coalition not in self._known]
        start = time.process_time()
        self._known |= zip(missing, self._game.utilities(missing), strict=True)
        self.losses_s += time.process_time() - start
        return [self._known[coalition] for coalition in coalitions]

    def slopes(self, place: float) -> list[float]:
        """On the diagonal."""
        start = time.process_time()
        answer = self._game.slopes(place)
        self.gradients_s += time.process_time() - start
        self.num_gradients += 1
        return answer

    @property
    def loss_s(self) -> float:
        """CPU seconds of one coalition's utility."""
        return self.losses_s / len(self._known)

    @property
    def gradient_s(self) -> float:
        """CPU seconds of one gradient."""
        return self.gradients_s / self.num_gradients


def make_scenario(job: Job, dtype: torch.dtype | None) -> tuple[Task, list[float]]:
    """The job's federation and its weights p_i. Scenarios share the samples; all but topic skew deal them at random."""
    task = make_task(
        job.num_peers,
        job.seed,
        num_topics=job.size.num_topics,
        alpha=None if job.num_peers <= job.size.num_topics else ALPHA,
        training=msgspec.structs.replace(TRAINING, learning_rate=job.step_size, steps=job.size.steps),
        dtype=dtype,
    )
    probe = {
        topic: tuple(sorted(part, key=lambda sample: len(sample.tokens))[: job.size.num_probe])
        for topic, part in task.probe.items()
    }
    task = dataclasses.replace(task, probe=probe)
    shares = [1 / job.num_peers] * job.num_peers
    if job.scenario == SKEW:
        return task, shares
    rng = np.random.default_rng([job.seed, 2])
    pool = [sample for peer in task.peers for sample in peer]
    pool = [pool[index] for index in rng.permutation(len(pool))]
    fifth = [peer * 5 // job.num_peers for peer in range(job.num_peers)]
    if job.scenario == "different sizes":  # and weights by size, as federated averaging has them
        total = sum(PAPER_SIZES[part] for part in fifth)
        shares = [PAPER_SIZES[part] / total for part in fifth]
    cuts = (np.cumsum(shares)[:-1] * len(pool)).astype(int)
    peers = [[pool[index] for index in part] for part in np.split(np.arange(len(pool)), cuts)]
    if job.scenario in CORRUPTIONS:
        change = CORRUPTIONS[job.scenario]
        peers = [
            [change(sample, pool, PAPER_NOISE[part], rng) for sample in peer]
            for peer, part in zip(peers, fifth, strict=True)
        ]
    return dataclasses.replace(task, peers=tuple(tuple(peer) for peer in peers)), shares


def _mislabel(sample: Encoded, pool: Sequence[Encoded], share: float, rng: np.random.Generator) -> Encoded:
    """With probability `share`, the completion of another sample."""
    other = pool[int(rng.integers(len(pool)))]
    if rng.random() >= share:
        return sample
    tokens = sample.tokens[: sample.num_prompt] + other.tokens[other.num_prompt :]
    return Encoded(tokens[: TRAINING.tokens_max], sample.num_prompt)


def _blur(sample: Encoded, pool: Sequence[Encoded], share: float, rng: np.random.Generator) -> Encoded:
    """Each prompt token replaced with probability `share` by one of another sample's."""
    other = pool[int(rng.integers(len(pool)))].tokens
    prompt, completion = sample.tokens[: sample.num_prompt], sample.tokens[sample.num_prompt :]
    blurred = [other[rng.integers(len(other))] if rng.random() < share else token for token in prompt]
    return Encoded((*blurred, *completion), sample.num_prompt)


CORRUPTIONS = {"noisy labels": _mislabel, "noisy features": _blur}


# --- one job ----------------------------------------------------------------------------------------------------------


def run(job: Job) -> Outcome:
    """Train, enumerate, estimate."""
    transformers.utils.logging.disable_progress_bar()
    stored, shares = make_scenario(job, None)  # the backbone's products as it is stored: bf16
    base, updates = train_second_round(stored)
    task, _ = make_scenario(job, torch.float32)
    players = [
        Player(update.positions, (factor * update.values).astype(np.float32), share)
        for update, factor, share in zip(updates, clip_factors(updates), shares, strict=True)
    ]
    losses = MergedModel(task.probe).losses
    game = Remembered(RoundGame(base, players, losses, task.gradient))
    pairs = job.num_reference_pairs
    truth = compute_permutation(game, 2 * pairs, 0, is_antithetic=True) if pairs else compute_exact(game)
    total = game.utilities([(1 << job.num_peers) - 1])[0]
    answers = {name: estimate(game) for name, estimate in make_estimators(job, total).items()}
    truths = dict.fromkeys(answers, truth)
    if job.is_renormalised_too:
        other = Remembered(RoundGame(base, players, losses, task.gradient, is_renormalised=True))
        answers[GTG_OWN] = answers[GTG_ACROSS] = compute_gtg(other, job.seed + 100)
        truths[GTG_OWN], truths[GTG_ACROSS] = compute_exact(other), truth
    costs = {
        name: answer.num_evaluations * game.loss_s + answer.num_gradients * game.gradient_s
        for name, answer in answers.items()
    }
    rough = Remembered(RoundGame(base, players, losses, lambda at: stored.gradient(at, task.probe)))
    answers[AUMANN_BF16], truths[AUMANN_BF16] = compute_aumann_shapley(rough), truth
    costs[AUMANN_BF16] = rough.gradients_s
    rows = [Row(name, answer, measure(answer, truths[name]), costs[name]) for name, answer in answers.items()]
    return Outcome(job, truth, rows, total, game.loss_s, game.gradient_s)


def make_estimators(job: Job, total_nats: float) -> dict[str, Callable[[SmoothGame], Estimate]]:
    """Every estimator, by name. Their seed is not the reference's."""
    seed, orders = job.seed + 100, 2 * job.num_pairs
    truncation = TRUNCATED_SHARE * abs(total_nats)
    return {
        "first order (gradient at the base)": lambda game: Estimate(tuple(game.slopes(0.0)), None, 0, 1),
        AUMANN_1: lambda game: compute_aumann_shapley(game, 1),
        AUMANN: compute_aumann_shapley,
        AUMANN_3: lambda game: compute_aumann_shapley(game, 3),
        "leave-one-out": compute_leave_one_out,
        "singleton": compute_singleton,
        f"{orders} permutations": lambda game: compute_permutation(game, orders, seed),
        f"{orders} permutations in pairs": lambda game: compute_permutation(game, orders, seed, is_antithetic=True),
        f"{orders} permutations, truncated": lambda game: compute_permutation(
            game, orders, seed, truncation=truncation
        ),
        GTG: lambda game: compute_gtg(game, seed),
    }


def measure(estimate: Estimate, truth: Estimate) -> Distance:
    """How far the values are from the truth."""
    mine, right = np.array(estimate.values), np.array(truth.values)
    length, right_length = np.linalg.norm(mine), np.linalg.norm(right)
    if length == 0:  # GTG-Shapley on a round that it finds too small
        return Distance(1.0, 1.0, 0.0, float(right_length / abs(right.sum())))
    return Distance(
        relative=float(np.linalg.norm(mine - right) / right_length),
        cosine=1 - float(mine @ right / (length * right_length)),
        spearman=float(spearmanr(mine, right).statistic),
        normalised=float(np.linalg.norm(mine / mine.sum() - right / right.sum())),
    )


# --- the tables -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run all jobs in two processes, print, compare."""
    options = parse_options(__doc__ or "")
    start = time.monotonic()
    num_processes = 1 if options.quick else 2
    outcomes = run_all(make_jobs(QUICK if options.quick else FULL), num_processes)
    large = sorted((o for o in outcomes if o.job.num_reference_pairs), key=lambda o: o.job.num_peers)
    exact = [o for o in outcomes if o.job.scenario == SKEW and o not in large]
    settings = [o for o in exact if o.job.step_size in STEP_SIZES]
    scenarios = sorted(
        (o for o in outcomes if o.job.is_renormalised_too and o.job.step_size == STEP_SIZES[0]),
        key=lambda o: SCENARIOS.index(o.job.scenario),
    )
    print_settings(settings)
    print_games(exact)
    print_scenarios(scenarios)
    for outcome in large:
        print_large(outcome)
    print(f"\n{time.monotonic() - start:.0f} s wall, {num_processes} processes")
    aumann = [outcome.find(AUMANN) for outcome in settings]
    targets = [
        Target("worst relative L2, 2 gradients", max(row.error.relative for row in aumann), 0.02, "less"),
        Target("worst Spearman, 2 gradients", min(row.error.spearman for row in aumann), 0.99, "more"),
        Target("worst cosine distance, 2 gradients", max(row.error.cosine for row in aumann), 2e-4, "less"),
    ]
    judged = [*settings, *(outcome for outcome in scenarios if outcome not in settings)]
    for name in (GTG_OWN, GTG):
        rivals = [(outcome.find(AUMANN), row) for outcome in judged for row in outcome.rows if row.name == name]
        fewest = min(gtg.num_passes / ours.num_passes for ours, gtg in rivals)
        most = max(ours.error.relative / gtg.error.relative for ours, gtg in rivals)
        targets += [
            Target(f"{name}: fewest passes over 2 gradients'", fewest, 50, "more"),
            Target(f"{name}: most error of 2 gradients over its", most, 1, "less"),
        ]
    finish(options, {"outcomes": [to_figures(outcome) for outcome in outcomes]}, targets)


def make_jobs(size: Size) -> list[Job]:
    """All of them, longest first."""
    first, usual = size.seeds[0], STEP_SIZES[0]
    jobs = [Job(size, n, first, usual, SKEW, pairs, reference) for n, reference, pairs in size.large]
    jobs += [
        Job(size, size.num_peers, first, usual, scenario, 8, is_renormalised_too=True)
        for scenario in SCENARIOS
        if scenario != SKEW
    ]
    jobs += [
        Job(size, size.num_peers, seed, step_size, SKEW, 8, is_renormalised_too=seed == first)
        for seed in size.seeds
        for step_size in STEP_SIZES
    ]
    return [*jobs, Job(size, size.num_peers, first, STEP_SIZE_TOO_LARGE, SKEW, 8)]


def run_all(jobs: Sequence[Job], num_processes: int) -> list[Outcome]:
    """All of them, in their order; a line to stderr for each that ends."""
    context = multiprocessing.get_context("spawn")
    outcomes = []
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        for outcome in pool.map(run, jobs):
            job = outcome.job
            print(f"n {job.num_peers}, seed {job.seed}, {job.scenario}, {job.step_size:g}: done", file=sys.stderr)
            outcomes.append(outcome)
    return outcomes


def print_settings(outcomes: Sequence[Outcome]) -> None:
    job = outcomes[0].job
    losses = np.mean([outcome.loss_s for outcome in outcomes])
    gradients = np.mean([outcome.gradient_s for outcome in outcomes])
    rows: list[list[object]] = []
    for name in [row.name for row in outcomes[0].rows]:
        found = [row for outcome in outcomes for row in outcome.rows if row.name == name]
        rows.append(
            [
                name,
                len(found),
                float(np.median([row.error.relative for row in found])),
                max(row.error.relative for row in found),
                max(row.error.cosine for row in found),
                min(row.error.spearman for row in found),
                *_price(found),
            ]
        )
    columns = ["estimator", "games", "L2", "worst L2", "worst cosine", "worst Spearman", *PRICE]
    print_table(
        f"n = {job.num_peers}, against all {1 << job.num_peers} coalitions: {len(outcomes)} games "
        f"(seeds x step sizes); a loss {1e3 * losses:.0f} ms of CPU, a gradient {1e3 * gradients:.0f} ms",
        columns,
        rows,
    )


def print_games(outcomes: Sequence[Outcome]) -> None:
    rows: list[list[object]] = []
    for outcome in outcomes:
        one, two, three, gtg = (outcome.find(name) for name in (AUMANN_1, AUMANN, AUMANN_3, GTG))
        rows.append(
            [
                outcome.job.seed,
                outcome.job.step_size,
                outcome.total_nats,
                abs(sum(two.estimate.values) / outcome.total_nats - 1),
                *(row.error.relative for row in (one, two, three, gtg)),
                two.error.spearman,
                gtg.error.spearman,
                gtg.num_passes / two.num_passes,
            ]
        )
    columns = ["seed", "step size", "u(N) nats", "sum off", "1 point L2", "2 points L2", "3 points L2", "GTG L2"]
    print_table(
        f"Each game; {STEP_SIZE_TOO_LARGE:g} is beyond what is claimed (`sum off`: how far two points' values are from "
        "u(N), which anyone can check with two forwards)",
        [*columns, "2 points Spearman", "GTG Spearman", "GTG passes / 2 points'"],
        rows,
    )


def print_scenarios(outcomes: Sequence[Outcome]) -> None:
    print_table(
        f"GTG-Shapley's scenarios, n = {outcomes[0].job.num_peers}, against exact values of the game named. Its "
        f"paper's bound: D_E and D_C below {GTG_BOUND:g}",
        ["scenario: estimator", "D_E", "D_C", "L2", "Spearman", "within", *PRICE],
        [
            [
                f"{outcome.job.scenario}: {name}",
                row.error.normalised,
                row.error.cosine,
                row.error.relative,
                row.error.spearman,
                "yes" if max(row.error.normalised, row.error.cosine) < GTG_BOUND else "no",
                *_price([row]),
            ]
            for outcome in outcomes
            for name in (AUMANN, GTG, GTG_OWN, GTG_ACROSS)
            for row in [outcome.find(name)]
        ],
    )


def print_large(outcome: Outcome) -> None:
    truth, job = outcome.truth, outcome.job
    spread = np.linalg.norm(truth.standard_errors or ()) / np.linalg.norm(truth.values)
    print_table(
        f"n = {job.num_peers}, against {job.num_reference_pairs} antithetic pairs ({truth.num_evaluations} passes), "
        f"whose own relative standard error is {spread:.2g}; u(N) {outcome.total_nats:.3g} nats",
        ["estimator", "L2", "cosine", "Spearman", *PRICE],
        [[row.name, *row.error[:3], *_price([row])] for row in outcome.rows],
    )


PRICE = ("forwards", "gradients", "passes", "CPU s")


def _price(rows: Sequence[Row]) -> list[object]:
    """Means."""
    return [
        float(np.mean([row.estimate.num_evaluations for row in rows])),
        rows[0].estimate.num_gradients,
        float(np.mean([row.num_passes for row in rows])),
        float(np.mean([row.cpu_s for row in rows])),
    ]


def to_figures(outcome: Outcome) -> dict[str, Any]:
    """All of it, for --json."""
    return {
        **{name: value for name, value in outcome.job._asdict().items() if name != "size"},
        "total_nats": outcome.total_nats,
        "truth": outcome.truth._asdict(),
        "rows": [
            {"name": row.name, **row.estimate._asdict(), **row.error._asdict(), "cpu_s": row.cpu_s}
            for row in outcome.rows
        ],
    }


if __name__ == "__main__":
    main()
