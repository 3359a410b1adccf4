"""Aggregation of LoRA adapters, beside its references, on a real task, in one run.

    python bench/aggregation.py [--json FILE] [--check] [--quick]

1. Mixed ranks 4, 8 and 16: exact sums in product space (p2pfm.lora.ranks) against naive averaging of zero-padded
   factors; nested ranks (what a running network does) and everybody at rank 16 beside them. NVFlare reports 0.8955
   naive and 0.9414 exact on a task of its own.
2. Dec-LoRA (Ghiasvand et al., arXiv 2501.15361: factors averaged with neighbours) against one shared base and against
   the exact kinds fed_sb and ffa, all at 1024 parameters a module. Learning rates were chosen on seed 0 for each.
3. What the cross term costs: the drop of held-out loss lost by averaging factors instead of products, by step size.
4. Laws in float64, and the CPU seconds of QR and small SVD against the dense sum and its SVD.

Peers are topics of ChatterBot; the backbone is a Llama of 1M parameters. Two processes, one thread each.
"""

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from harness import Target, finish, parse_options, print_table
from tasks import BACKBONE, Task, make_task

from p2pfm.config import AdapterConfig, TrainingConfig
from p2pfm.lora.cross_term import compute_dense_ratio
from p2pfm.lora.delta import add, get_shapes, subtract
from p2pfm.lora.kinds import CHAINS, compute_frozen, compute_initial, compute_shapes
from p2pfm.lora.layers import load_backbone
from p2pfm.lora.ranks import Factors, compute_nested_masks, compute_sum, merge_adapters, start_adapter
from p2pfm.lora.stacked import StackedModel
from p2pfm.types import Array, Tensors

Adapter = dict[str, Array]
Found = dict[str, Any]

RANKS = (4, 8, 16)
TARGETS = ("q_proj", "v_proj")
NEIGHBOURS_SEED = 7
BANDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
"""Of the cross term; ALGORITHMS, part 3, puts its alarm at the first."""
NVFLARE = (0.8955, 0.9414)
"""Accuracy, naive and exact: another task, so only the sign of the difference can be compared."""


class Size(NamedTuple):
    """How much is run."""

    seeds: tuple[int, ...]
    peers: int
    rounds: int
    steps: int
    step_sizes: tuple[float, ...]
    cost_rounds: int
    dense: int
    """out and in of the matrices whose sum is timed."""
    laws: int


FULL = Size((1, 2, 3), 9, 8, 10, (1e-3, 2e-3, 5e-3, 1e-2, 2e-2), 3, 4096, 20)
QUICK = Size((1,), 3, 2, 2, (1e-3, 1e-2), 1, 96, 2)


class Mode(NamedTuple):
    """One line of the second table: an adapter kind, its learning rate, and who averages with whom."""

    adapter: AdapterConfig
    learning_rate: float
    graph: str = ""
    """Empty: all share one base."""


LORA = AdapterConfig(rank=4, alpha=8, targets=TARGETS)
MODES = {
    "LoRA, shared base": Mode(LORA, 2e-2),
    "Dec-LoRA, ring": Mode(LORA, 1e-2, "ring"),
    "Dec-LoRA, fresh 4-regular": Mode(LORA, 1e-2, "regular"),
    "fed_sb, rank 32": Mode(AdapterConfig(kind="fed_sb", rank=32, alpha=32, targets=TARGETS), 4e-2),
    "ffa, rank 8": Mode(AdapterConfig(kind="ffa", rank=8, alpha=16, targets=TARGETS), 4e-2),
}
DEC_LORA = ("Dec-LoRA, ring", "Dec-LoRA, fresh 4-regular")


def main() -> None:
    """Measure, print, compare."""
    options = parse_options(__doc__ or "")
    size = QUICK if options.quick else FULL
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        # The longest first, so that neither process waits for the other at the end.
        speed = pool.submit(time_sums, size)
        modes = {seed: pool.submit(compare_modes, size, seed) for seed in size.seeds}
        ranks = {seed: pool.submit(compare_ranks, size, seed) for seed in size.seeds}
        costs = {seed: pool.submit(price_cross_term, size, seed) for seed in size.seeds}
        laws = pool.submit(check_laws, size)
        targets = [*report_ranks(collect(ranks)), *report_modes(collect(modes))]
        report_costs(collect(costs))
        targets += report_laws(laws.result(), speed.result())
        figures = {
            "mixed_ranks": collect(ranks),
            "modes": collect(modes),
            "cross_term": collect(costs),
            "laws": laws.result(),
            "speed": speed.result(),
        }
    finish(options, figures, targets)


def collect(jobs: Mapping[int, "Future[Found]"]) -> dict[int, Found]:
    return {seed: job.result() for seed, job in jobs.items()}


# --- 1. mixed ranks


def compare_ranks(size: Size, seed: int) -> Found:
    """Each way of merging ranks 4, 8, 16, by name: losses after every round, accuracy at the end."""
    training = TrainingConfig(steps=size.steps, batch=4, tokens_max=48, learning_rate=5e-3)
    adapter = AdapterConfig(rank=max(RANKS), alpha=2 * max(RANKS), targets=TARGETS, seed=seed)
    task = make_task(size.peers, seed, num_topics=size.peers, training=training, adapter=adapter, dtype=torch.float32)
    ranks = [RANKS[peer % len(RANKS)] for peer in range(size.peers)]
    found = {}
    ways = {"naive": merge_naive, "nested": merge_nested, "exact": merge_exact, "all rank 16": merge_nested}
    for name, way in ways.items():
        own = [max(RANKS)] * size.peers if name == "all rank 16" else ranks
        base, losses = task.initial, [task.losses([task.initial], task.test)[0]]
        for round in range(size.rounds):
            base = way(task, base, own, round)
            losses.append(task.losses([base], task.test)[0])
        accuracy = task.model.accuracy([base], task.test).mean()
        found[name] = {"losses": [float(loss) for loss in losses], "accuracy": float(accuracy)}
    return found


def merge_naive(task: Task, base: Adapter, ranks: Sequence[int], round: int) -> Adapter:
    """FedIT with zero padding: a peer trains the first rows alone, and what it lacks counts as 0 in the mean."""
    trained = train_ranks(task, [cut(base, rank) for rank in ranks], round)
    return mean([pad(adapter, get_shapes(base)) for adapter in trained])


def merge_nested(task: Task, base: Adapter, ranks: Sequence[int], round: int) -> Adapter:
    """A running network's way: a peer trains the first rows of the whole base, and its delta is an ordinary one."""
    masks = [compute_nested_masks(get_shapes(base), rank) for rank in ranks]
    trained = task.model.train([base] * len(ranks), task.peers, task.training, draws(task, round), masks)
    return mean(trained)


def merge_exact(task: Task, base: Adapter, ranks: Sequence[int], round: int) -> Adapter:
    """Each peer starts from the best approximation of its rank; products are summed and cut back to the base's rank."""
    starts = {rank: start_adapter(base, rank, task.initial) for rank in sorted(set(ranks))}
    trained = train_ranks(task, [starts[rank] for rank in ranks], round)
    return merge_adapters(base, [(1 / len(ranks), adapter) for adapter in trained], max(RANKS))


def train_ranks(task: Task, starts: Sequence[Adapter], round: int) -> list[Adapter]:
    """All peers from their starts; equal ranks side by side."""
    seeds = draws(task, round)
    shapes = [tuple(part.shape for part in start.values()) for start in starts]
    trained: list[Adapter] = [{} for _ in starts]
    for shape in sorted(set(shapes)):
        peers = [peer for peer, own in enumerate(shapes) if own == shape]
        bases, data = [starts[peer] for peer in peers], [task.peers[peer] for peer in peers]
        after = task.model.train(bases, data, task.training, [seeds[peer] for peer in peers])
        for peer, adapter in zip(peers, after, strict=True):
            trained[peer] = adapter
    return trained


def draws(task: Task, round: int) -> list[str]:
    """What seeds each peer's batches, the same in every way of merging."""
    return [f"{task.seed} {round} {peer}" for peer in range(len(task.peers))]


def cut(adapter: Tensors, rank: int) -> Adapter:
    return {
        name: np.ascontiguousarray(part[:rank] if name.endswith("A") else part[:, :rank])
        for name, part in adapter.items()
    }


def pad(adapter: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    padded = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for name, part in adapter.items():
        padded[name][tuple(slice(length) for length in part.shape)] = part
    return padded


def mean(adapters: Sequence[Tensors]) -> Adapter:
    return {name: np.mean([adapter[name] for adapter in adapters], axis=0, dtype=np.float32) for name in adapters[0]}


def report_ranks(found: Mapping[int, Found]) -> list[Target]:
    rows = []
    gains: dict[str, list[float]] = {"exact": [], "nested": []}
    for seed, ways in found.items():
        naive = ways["naive"]["losses"]
        for name, way in ways.items():
            losses = way["losses"]
            share = (naive[-1] - losses[-1]) / (naive[0] - naive[-1])
            rows.append(
                (
                    seed,
                    name,
                    losses[0],
                    losses[len(losses) // 2],
                    losses[-1],
                    losses[0] - losses[-1],
                    f"{share:+.1%}",
                    way["accuracy"],
                )
            )
        for name, part in gains.items():
            part.append(naive[-1] - ways[name]["losses"][-1])
    print_table(
        f"Mixed ranks 4/8/16, held-out loss (NVFlare's accuracy, another task: naive {NVFLARE[0]}, exact {NVFLARE[1]})",
        ("seed", "merge", "start", "half-way", "end", "drop", "drop over naive's", "next token right"),
        rows,
    )
    targets = []
    for name, part in gains.items():
        spread = float(np.std(part, ddof=1)) if len(part) > 1 else 0.0
        print(f"\n{name} below naive by {np.mean(part):.4f} nats/token, standard deviation over seeds {spread:.4f}")
        targets.append(
            Target(f"mixed ranks: naive's loss less {name}, worst seed [nats/token]", min(part), 0.0, "more")
        )
    return targets


# --- 2. Dec-LoRA against one shared base and the exact kinds


def compare_modes(size: Size, seed: int) -> Found:
    """Each mode of MODES by name: mean loss over the peers' adapters, loss of their mean, accuracy, cross term."""
    plain = make_task(size.peers, seed, num_topics=size.peers, dtype=torch.float32)
    return {name: run_mode(with_kind(plain, mode, size, seed), mode, size) for name, mode in MODES.items()}


def with_kind(task: Task, mode: Mode, size: Size, seed: int) -> Task:
    """The same peers with another adapter kind."""
    adapter = msgspec.structs.replace(mode.adapter, seed=seed)
    backbone, tokenizer = load_backbone(BACKBONE, torch.float32)
    sizes = task.model.sizes()
    frozen = compute_frozen(adapter, sizes)
    return replace(
        task,
        model=StackedModel(backbone, tokenizer.pad_token_id, adapter, CHAINS[adapter.kind], frozen),
        initial=compute_initial(compute_shapes(adapter, sizes), adapter.seed),
        training=TrainingConfig(steps=size.steps, batch=4, tokens_max=48, learning_rate=mode.learning_rate),
    )


def run_mode(task: Task, mode: Mode, size: Size) -> Found:
    rng = np.random.default_rng([task.seed, NEIGHBOURS_SEED])
    own = [task.initial] * size.peers
    ratios: list[float] = []
    for round in range(size.rounds):
        trained = task.model.train(own, task.peers, task.training, draws(task, round))
        groups = draw_groups(mode.graph, size.peers, rng)
        mixed = [mean([trained[peer] for peer in group]) for group in groups]
        if mode.graph:
            # Adapters of many bases: what is averaged is all that they hold, not a round's steps.
            each = [compute_ratio([trained[p] for p in group], task.initial) for group in groups]
            ratios.append(float(np.mean(each)))
        else:
            ratios.append(compute_ratio(trained, own[0]))
        own = mixed if mode.graph else mixed * size.peers
    distinct = own if mode.graph else own[:1]
    return {
        "parameters": sum(part.size for part in task.initial.values()),
        "peers": float(task.losses(distinct, task.test).mean()),
        "mean": float(task.losses([mean(distinct)], task.test)[0]),
        "accuracy": float(task.model.accuracy(distinct, task.test).mean()),
        "ratios": ratios,
    }


def compute_ratio(adapters: Sequence[Tensors], base: Tensors) -> float:
    return compute_dense_ratio([(1 / len(adapters), subtract(adapter, base)) for adapter in adapters], base)


def draw_groups(graph: str, num_peers: int, rng: np.random.Generator) -> list[list[int]]:
    """Who averages with equal weights; each peer is in as many groups as its own has members (doubly stochastic)."""
    if not graph:
        return [list(range(num_peers))]
    cycles = [np.arange(num_peers)] if graph == "ring" else [rng.permutation(num_peers) for _ in range(2)]
    groups = [[peer] for peer in range(num_peers)]
    for cycle in cycles:
        for left, right in zip(cycle.tolist(), np.roll(cycle, 1).tolist(), strict=True):
            groups[left].append(right)
            groups[right].append(left)
    return groups


def report_modes(found: Mapping[int, Found]) -> list[Target]:
    rows = []
    for seed, modes in found.items():
        rows += [
            (
                seed,
                name,
                m["parameters"],
                MODES[name].learning_rate,
                m["peers"],
                m["mean"],
                m["accuracy"],
                max(m["ratios"]),
                m["ratios"][-1],
            )
            for name, m in modes.items()
        ]
    print_table(
        "Decentralised LoRA, held-out loss after the last round",
        (
            "seed",
            "mode",
            "parameters",
            "lr",
            "peers' mean loss",
            "loss of the mean",
            "next token right",
            "cross term, most",
            "last",
        ),
        rows,
    )

    def average(names: Sequence[str]) -> float:
        """Over seeds, of the best of these modes by their own average."""
        return min(float(np.mean([modes[name]["peers"] for modes in found.values()])) for name in names)

    dec_lora = average(DEC_LORA)
    exact = max(modes[name]["ratios"][-1] for modes in found.values() for name in ("fed_sb, rank 32", "ffa, rank 8"))
    return [
        Target(
            "fed_sb's loss over the best Dec-LoRA's (ALGORITHMS: 2.243 / 2.239)",
            average(["fed_sb, rank 32"]) / dec_lora,
            1.01,
            "less",
        ),
        Target("ffa's loss over the best Dec-LoRA's", average(["ffa, rank 8"]) / dec_lora, 1.01, "less"),
        Target("shared base's loss over the best Dec-LoRA's", average(["LoRA, shared base"]) / dec_lora, 1.0, "less"),
        Target("cross term of exact kinds", exact, 0.0, "less"),
    ]


# --- 3. what the cross term costs


def price_cross_term(size: Size, seed: int) -> Found:
    """By step size, of every round: the cross term, and the loss drops of both merges from the same base."""
    found: Found = {}
    for step_size in size.step_sizes:
        training = TrainingConfig(steps=size.steps, batch=4, tokens_max=48, learning_rate=step_size)
        task = make_task(size.peers, seed, num_topics=size.peers, training=training, dtype=torch.float32)
        strata = {topic: (*task.test[topic], *task.probe[topic]) for topic in task.test}
        base, rounds = task.initial, []
        for round in range(size.cost_rounds):
            deltas = task.train(base, round)
            merged = add(base, mean(deltas))
            ratio = compute_dense_ratio([(1 / len(deltas), delta) for delta in deltas], base)
            ideal = sum_products(base, deltas)
            before, factors, products = (float(task.losses([at], strata)[0]) for at in (base, merged, ideal))
            rounds.append((ratio, before - factors, before - products))
            base = merged
        found[f"{step_size:g}"] = rounds
    return found


def sum_products(base: Tensors, deltas: Sequence[Tensors]) -> Adapter:
    """The mean of products as one adapter of num_peers * rank directions."""
    made = {}
    for name in base:
        parts = [base[name] + delta[name] for delta in deltas]
        is_a = name.endswith("A")
        made[name] = np.concatenate(parts if is_a else [part / len(parts) for part in parts], axis=0 if is_a else 1)
    return made


def report_costs(found: Mapping[int, Found]) -> None:
    columns = ("cross term", "rounds", "drop, factors", "drop, products", "lost", "products better in")
    steps = {name: [r for seeds in found.values() for r in seeds[name]] for name in next(iter(found.values()))}
    print_table(
        "What averaging factors instead of products costs: drops of held-out loss a round, from the same bases",
        ("step size", *columns),
        [(name, *summarise(rounds)) for name, rounds in steps.items()],
    )
    every = [r for rounds in steps.values() for r in rounds]
    bands = [(low, high, [r for r in every if low <= r[0] < high]) for low, high in pairwise(BANDS)]
    print_table(
        "The same rounds by their cross term",
        ("band", *columns),
        [(f"{low:.0%} to {high:.0%}", *summarise(rounds)) for low, high, rounds in bands if rounds],
    )


def summarise(rounds: Sequence[tuple[float, float, float]]) -> tuple[str, int, float, float, str, str]:
    """`columns` of `report_costs` for rounds of (cross term, drop by factors, drop by products)."""
    ratios, factors, products = np.array(rounds).T
    return (
        f"{ratios.min():.1%} to {ratios.max():.1%}",
        len(rounds),
        float(factors.mean()),
        float(products.mean()),
        f"{1 - factors.sum() / products.sum():+.1%}",
        f"{int((products > factors).sum())} of {len(rounds)}",
    )


# --- 4. laws and speed


def check_laws(size: Size) -> Found:
    """Largest errors over some draws, in float64: untruncated against the dense sum, truncated against its tail."""
    whole, tail = 0.0, 0.0
    for draw in range(size.laws):
        terms = draw_terms(256, 192, draw)
        dense = np.sum([weight * (b @ a) for weight, (b, a) in terms], axis=0)
        exact, truncated = compute_sum(terms).factors, compute_sum(terms, 16)
        whole = max(whole, float(np.linalg.norm(exact.b @ exact.a - dense) / np.linalg.norm(dense)))
        error = float(np.linalg.norm(truncated.factors.b @ truncated.factors.a - dense))
        wanted = float(np.linalg.norm(np.linalg.svd(dense, compute_uv=False)[16:]))
        tail = max(tail, abs(error / wanted - 1), abs(truncated.error() / wanted - 1))
    return {"untruncated": whole, "truncated_over_tail": tail}


def draw_terms(size_out: int, size_in: int, seed: int) -> list[tuple[float, Factors]]:
    """Ten peers of ranks 8 to 16 with equal weights."""
    rng = np.random.default_rng(seed)
    ranks = rng.integers(8, 17, 10)
    return [(0.1, Factors(rng.standard_normal((size_out, r)), rng.standard_normal((r, size_in)))) for r in ranks]


def time_sums(size: Size) -> Found:
    """CPU seconds of a sum cut to rank 16, both ways, and how far their results are apart."""
    terms = draw_terms(size.dense, size.dense, 0)
    ours_s, ours = take_time(lambda: compute_sum(terms, 16).factors)

    def sum_densely() -> Factors:
        dense = np.sum([weight * (b @ a) for weight, (b, a) in terms], axis=0)
        left, values, right = np.linalg.svd(dense, full_matrices=False)
        return Factors(left[:, :16] * values[:16], right[:16])

    dense_s, dense = take_time(sum_densely)
    apart = compute_sum([(1.0, ours), (-1.0, dense)]).singular_values
    norm = compute_sum([(1.0, dense)]).singular_values
    relative = float(np.linalg.norm(apart) / np.linalg.norm(norm))
    return {"size": size.dense, "ours_s": ours_s, "dense_s": dense_s, "relative_difference": relative}


def take_time(work: Callable[[], Factors]) -> tuple[float, Factors]:
    start = time.process_time()
    made = work()
    return time.process_time() - start, made


def report_laws(laws: Found, speed: Found) -> list[Target]:
    ratio = speed["dense_s"] / speed["ours_s"]
    print_table(
        f"Ten peers of rank 8 to 16, cut to rank 16, out = in = {speed['size']}, float64, one core",
        ("QR and small SVD [CPU s]", "dense sum and SVD [CPU s]", "ratio", "relative difference"),
        [(speed["ours_s"], speed["dense_s"], ratio, speed["relative_difference"])],
    )
    return [
        Target("untruncated error, relative, float64", laws["untruncated"], 1e-12, "less"),
        Target("truncated error over the tail, less 1", laws["truncated_over_tail"], 1e-9, "less"),
        Target("dense sum's CPU seconds over ours", ratio, 50.0, "more"),
    ]


if __name__ == "__main__":
    main()
