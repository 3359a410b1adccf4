"""Merge rules under attack: LoRA on a transformer, non-IID peers, liars among peers and among evaluators.

    python bench/robustness.py [--json FILE] [--check] [--quick] [--full]

Ten peers hold Dirichlet(0.1) shares of ten topics; none, two or four of them lie, and one of five evaluators reports
the opposite of what it measured. A figure is how far the loss on held-out prompts (every topic of equal weight) fell
below the untrained adapter's [nats/token], mean over seeds. `attacked` says what a rule sees and what ASw is.

"mean of the honest": a rule that knows who lies. The liars' data is missing whatever the rule, so an attack is judged
against this too. "turncoat": honest for three rounds, then sign-flip; it is no target, but shows what weights cost that
remember an epoch.

A backdoor that is neutral on clean data cannot show in a held-out loss on clean data, whatever the rule: the table of
its success shows how far each rule lets it in, and what a probe does of which half is triggered prompts with their
right answers. Such a probe needs somebody who knows the trigger.

--full adds rules (trimmed mean, median, multi-Krum, gate, ASw on unbalanced data) and turncoats for all.
"""

import sys
from dataclasses import dataclass
from multiprocessing import get_context
from typing import NamedTuple

import harness
import numpy as np
from attacked import ASW, GATE, JUDGED, ORACLE, TRIGGERED, TURNS_IN_ROUND, UNBALANCED, Federation
from harness import Target
from numpy.typing import NDArray

ATTACKS = ("sign_flip", "alie", "ipm", "gaussian", "label_flip", "min_max", "backdoor")
BASELINES = ("mean", "median-norm clip", "geometric median", "NNM + trimmed mean")
MORE_BASELINES = ("trimmed mean", "median", "multi-Krum")
PARTS = 2
"""Each seed's runs are dealt to so many jobs; one process takes a job at a time."""

Setup = tuple[str, float]
"""(attack, share of liars)."""
Key = tuple[str, str, float]
"""(rule, attack, share of liars)."""


@dataclass(frozen=True)
class Size:
    """How much is run."""

    seeds: tuple[int, ...] = (1, 2, 3)
    rounds: int = 6
    steps: int = 5
    rules: tuple[str, ...] = (*BASELINES, ASW)
    attacks: tuple[str, ...] = ATTACKS
    shares: tuple[float, ...] = (0.2, 0.4)
    is_full: bool = False

    def runs(self) -> list[Key]:
        """Every run of a seed, in the tables' order."""
        setups: list[Setup] = [("none", 0.0), *((a, s) for s in self.shares for a in self.attacks)]
        keys = [(rule, *setup) for setup in setups for rule in self.rules]
        most = max(self.shares)
        if self.is_full:
            keys += [(rule, "turncoat", share) for share in self.shares for rule in self.rules]
        else:
            keys.append((ASW, "turncoat", most))
        keys += [(ORACLE, "absent", share) for share in self.shares]
        if "backdoor" in self.attacks:
            keys.append((TRIGGERED, "backdoor", most))
        return keys


DEFAULT = Size()
FULL = Size(rules=(*BASELINES, *MORE_BASELINES, GATE, ASW, *UNBALANCED), is_full=True)
QUICK = Size(
    seeds=(1,), rounds=2, steps=2, rules=("mean", *UNBALANCED[:1], ASW), attacks=("ipm", "backdoor"), shares=(0.4,)
)


class Cell(NamedTuple):
    """What came of one run."""

    drop: float
    """Of the held-out loss, every topic of equal weight [nats/token]."""
    worst_topic: float
    """The topic of the greatest loss [nats/token]."""
    success: float
    """Of the backdoor; not a number where nobody tried it."""


class Results:
    """All cells, over seeds."""

    def __init__(self, seeds: tuple[int, ...], cells: dict[tuple[int, Key], Cell]) -> None:
        self.seeds = seeds
        self.cells = cells

    def drops(self, rule: str, attack: str, share: float) -> NDArray[np.float64]:
        """(num_seeds,)."""
        return np.array([self.cells[seed, (rule, attack, share)].drop for seed in self.seeds])

    def worst_topic(self, rule: str, attack: str, share: float) -> float:
        """Mean over seeds."""
        return float(np.mean([self.cells[seed, (rule, attack, share)].worst_topic for seed in self.seeds]))

    def success(self, rule: str, share: float) -> float:
        """Of the backdoor, mean over seeds."""
        return float(np.mean([self.cells[seed, (rule, "backdoor", share)].success for seed in self.seeds]))


def spread(values: NDArray[np.float64]) -> float:
    """Standard deviation over seeds; 0 of one."""
    return float(values.std(ddof=1)) if values.size > 1 else 0.0


def work(job: tuple[int, int, Size]) -> tuple[dict[tuple[int, Key], Cell], float]:
    """(cells, CPU seconds) of one part of a seed's runs; those from one base share what honest peers train there."""
    seed, part, size = job
    used: dict[str, float] = {}
    with harness.cpu_seconds(used, "all"):
        federation = Federation(seed, size.steps)
        # Whole attacks, all rules: the costly rules are then dealt out evenly.
        setups = sorted({key[1:] for key in size.runs()})
        keys = [key for key in size.runs() if setups.index(key[1:]) % PARTS == part]
        played = federation.play([federation.make_run(*key) for key in keys], size.rounds)
    cells = {
        (seed, key): Cell(federation.untrained - float(losses.mean()), float(losses.max()), success)
        for key, (losses, success) in zip(keys, played, strict=True)
    }
    return cells, used["all"]


def main() -> None:
    """Measure, print, compare."""
    is_full = "--full" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--full"]
    options = harness.parse_options(__doc__ or "")
    size = QUICK if options.quick else FULL if is_full else DEFAULT
    jobs = [(seed, part, size) for seed in size.seeds for part in range(PARTS)]
    if options.quick:
        answers = [work(job) for job in jobs]
    else:
        with get_context("spawn").Pool(2) as pool:
            answers = pool.map(work, jobs, chunksize=1)
    results = Results(size.seeds, {key: cell for cells, _ in answers for key, cell in cells.items()})
    print_tables(size, results)
    seconds = sum(used for _, used in answers)
    print(f"\n{len(results.cells)} runs, {seconds:.0f} CPU seconds")
    cells = {f"{seed} | {' | '.join(map(str, key))}": cell._asdict() for (seed, key), cell in results.cells.items()}
    harness.finish(options, {"cells": cells, "cpu_s": seconds}, judge(size, results))


def print_tables(size: Size, results: Results) -> None:
    """Drops, worst topics, backdoors."""
    for share in size.shares:
        attacks = [*size.attacks, *(["turncoat"] if size.is_full else [])]
        rows: list[list[object]] = []
        for rule in size.rules:
            drops = [results.drops(rule, "none", 0.0), *(results.drops(rule, attack, share) for attack in attacks)]
            rows.append([rule, *(f"{drop.mean():.3f} ({spread(drop):.3f})" for drop in drops)])
        title = f"Drop of the held-out loss [nats/token], {share:.0%} liars: mean of seeds {size.seeds} (deviation)"
        harness.print_table(title, ["rule", "no attack", *attacks], rows)
        oracle = results.drops(ORACLE, "absent", share)
        print(f"\nThe mean of the honest alone: {oracle.mean():.3f} ({spread(oracle):.3f})")
    most = max(size.shares)
    turned = results.drops(ASW, "turncoat", most)
    print(f"\nASw where {most:.0%} turn in round {TURNS_IN_ROUND}: {turned.mean():.3f} ({spread(turned):.3f})")
    rows = [
        [rule, f"{share:.0%}", results.worst_topic(rule, "none", 0.0)]
        + [results.worst_topic(rule, attack, share) for attack in size.attacks]
        for share in size.shares
        for rule in size.rules
    ]
    harness.print_table("The worst topic's loss [nats/token]", ["rule", "liars", "no attack", *size.attacks], rows)
    if "backdoor" in size.attacks:
        rows = [
            [rule, f"{share:.0%}", results.success(rule, share), float(results.drops(rule, "backdoor", share).mean())]
            for share in size.shares
            for rule in (*size.rules, *([TRIGGERED] if share == most else []))
        ]
        title = "Backdoor: share of the target's tokens that come first after held-out prompts with the trigger"
        harness.print_table(title, ["rule", "liars", "success", "drop [nats/token]"], rows)


def judge(size: Size, results: Results) -> list[Target]:
    """ALGORITHMS, part 5."""
    free, mean = results.drops(ASW, "none", 0.0), results.drops("mean", "none", 0.0)
    setups = [(attack, share) for share in size.shares for attack in size.attacks]
    targets = []
    for share in size.shares:
        for name, reference in (("attack-free", free), ("the honest alone", results.drops(ORACLE, "absent", share))):
            worst, attack = min(
                (float(results.drops(ASW, attack, share).mean() / reference.mean()), attack) for attack in size.attacks
            )
            targets.append(Target(f"drop under {share:.0%} {attack} (the worst) to {name}", worst, 0.97, "more"))
    targets.append(Target("drop without attack to the mean rule's", float(free.mean() / mean.mean()), 1.0, "more"))
    behind = []
    for attack, share in [("none", 0.0), *setups]:
        for rule in size.rules:
            if rule not in JUDGED:
                gap = results.drops(rule, attack, share) - results.drops(ASW, attack, share)
                behind.append((float(gap.mean()) - spread(gap), f"{rule}, {attack} {share:.0%}"))
    worst, where = max(behind)
    targets.append(Target(f"behind a baseline beyond the spread, worst ({where})", worst, 0.0, "less"))
    worst = max(
        results.worst_topic(ASW, attack, share) / results.worst_topic("mean", attack, share)
        for attack, share in [("none", 0.0), *setups]
    )
    targets.append(Target("worst topic's loss to the mean rule's, worst", worst, 1.05, "less"))
    return targets


if __name__ == "__main__":
    main()
