"""A fleet of real nodes for minutes or hours: does memory grow, do descriptors leak, is a message lost, a round void?

    python bench/soak.py --minutes 30 [--nodes 6]

Every node is a process with chain, libp2p, store, HTTP and core as anywhere; only the learner is the simulator's
regression (the preset "toy"), so that six fit on two cores. Memory and descriptors are read from the system, messages
and rounds from the nodes' own /status, /metrics, stores and logs.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import httpx
import numpy as np
import psutil
from harness import Target, finish, make_parser, print_table, read_options

from nodes.fleet import count_complaints, read_rounds
from nodes.localnet import PRESETS, Localnet, LocalNode, Role, localnet
from p2pfm.protocol.phases import compute_position
from p2pfm.types import Millis, Round

MB = 1 << 20
SAMPLE_S = 5.0
"""Often enough for a trend; each sample costs a node a /status."""

WARM_UP_SHARE, WARM_UP_S_MAX = 0.3, 300.0
"""Before trends are taken: caches and the allocator's arenas fill, threads start. A third of a short run, five minutes
of a long one."""

RSS_NOISE_MB = 4.0
RSS_MB_PER_HOUR = 8.0
"""What resident memory may grow by in a run, beside this much an hour. Both are of what was measured (docs/LOG.md): the
allocator gives a process its arenas in steps of a megabyte or so, whenever threads first meet, so that a short run's
trend times an hour means nothing; and a node remembers its newest 64 to 256 rounds, which take hours to fill. A leak of
one payload or one connection's buffers a round is over the bound within half an hour."""

DESCRIPTOR_NOISE, THREAD_NOISE = 1.0, 2.0
"""On average: a pooled connection or a worker thread more or less. One leaked a minute is over it in three minutes."""

QUIET_S = 0.4
"""Without a message from anybody: then all counters may be compared."""
QUIET_TRIES_MAX = 100

COUNTED = ("rss_mb", "descriptors", "sockets", "threads")


class Sample(NamedTuple):
    """One process at one moment."""

    at_s: float
    rss_mb: float
    descriptors: int
    sockets: int
    threads: int


class Traffic(NamedTuple):
    """All nodes' counters at a moment when nobody spoke."""

    published: int
    received: int


def take_sample(node: LocalNode, at_s: float) -> Sample:
    """What the system knows of a node's process."""
    assert node.process is not None
    process = psutil.Process(node.process.pid)
    with process.oneshot():
        rss = process.memory_info().rss / MB
        return Sample(at_s, rss, process.num_fds(), len(process.net_connections("tcp")), process.num_threads())


def wait_until_quiet(net: Localnet) -> Traffic:
    """Messages published and heard, once all counters have stood still for a moment."""
    for _ in range(QUIET_TRIES_MAX):
        first = count_traffic(net)
        time.sleep(QUIET_S)
        if first == count_traffic(net):
            return first
    raise RuntimeError("no moment without a message: a node talks without end")


def count_traffic(net: Localnet) -> Traffic:
    """Of all nodes together, by their own counters."""
    traffic = [net.get_status(node)["traffic"] for node in net.nodes]
    return Traffic(*(sum(told.get(f"gossip_{what}", 0) for told in traffic) for what in Traffic._fields))


def compute_growth(values: Sequence[float]) -> float:
    """How far the mean of the last third is over that of the first: what comes and goes evens out."""
    third = max(1, len(values) // 3)
    return mean(values[-third:]) - mean(values[:third])


def compute_trend(samples: Sequence[Sample]) -> float:
    """Growth of resident memory [MB an hour] by least squares."""
    hours = [sample.at_s / 3600 for sample in samples]
    return float(np.polyfit(hours, [sample.rss_mb for sample in samples], 1)[0])


def read_metric(node: LocalNode, name: str) -> float:
    """A counter of a node's /metrics."""
    text = httpx.get(f"{node.url}/metrics", timeout=10).text
    return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(name + " ")))


def tell(text: str) -> None:
    """Progress, apart from the figures."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run_fleet(folder: Path, num_nodes: int, seconds: float) -> dict[str, Any]:
    """Start the nodes, watch them for so long, end them; every figure."""
    honest: Role = "honest"
    with localnet(folder, (honest,) * num_nodes, PRESETS["toy"], tell) as net:
        for node in net.nodes:
            net.wait_until_running(node)
        everybody = num_nodes - 1
        net.wait_until("all meet", lambda: all(len(s["peers"]) == everybody for s in get_all(net)), 60)
        start = time.monotonic()
        first_round = compute_position(net.network, now_ms()).round + 1
        before = wait_until_quiet(net)
        samples = watch(net, start, seconds)
        after = wait_until_quiet(net)
        last_round = compute_position(net.network, now_ms()).round - 1
        net.wait_until("all hold the same base", lambda: len(get_bases(net)) == 1, 15)
        failures = sum(read_metric(node, "p2pfm_core_failures_total") for node in net.nodes)
        cpu_s = [sum(psutil.Process(node.process.pid).cpu_times()[:2]) for node in net.nodes if node.process]
        statuses = get_all(net)
        settled = len([entry for entry in net.ledger.get_rounds(Round(0)) if first_round <= entry.round <= last_round])
        span_s = time.monotonic() - start
    rounds = read_rounds(net.nodes)
    asked = [Round(number) for number in range(max(0, first_round), last_round + 1)]
    published, received = after.published - before.published, after.received - before.received
    return {
        "nodes": num_nodes,
        "seconds": span_s,
        "samples": {str(node): [list(sample) for sample in told] for node, told in samples.items()},
        "sample_columns": list(Sample._fields),
        "rounds": len(asked),
        "certified": sum(round in rounds.proposals for round in asked),
        "void": {str(round): sorted(rounds.voids.get(round, ())) for round in asked if round not in rounds.proposals},
        "undecided": list(rounds.get_undecided(asked)),
        "forked": list(rounds.forked),
        "settled": settled,
        "published": published,
        "heard": received,
        "lost": 1 - received / (published * everybody),
        "traffic": [status["traffic"] for status in statuses],
        "core_failures": failures,
        "complaints": dict(count_complaints(net.nodes).most_common()),
        "cpu_s_per_node_and_minute": 60 * median(cpu_s) / span_s,
    }


def watch(net: Localnet, start: float, seconds: float) -> dict[int, list[Sample]]:
    """Samples of each node until `seconds` after `start`."""
    samples: dict[int, list[Sample]] = {node.index: [] for node in net.nodes}
    told_s = 0.0
    while (at_s := time.monotonic() - start) < seconds:
        for node in net.nodes:
            samples[node.index].append(take_sample(node, at_s))
        net.get_status(net.nodes[0])  # raises when the process is gone
        if at_s >= told_s:
            told_s += 60
            newest = [told[-1] for told in samples.values()]
            what = ", ".join(f"{name} {max(getattr(s, name) for s in newest):.4g}" for name in COUNTED)
            tell(f"minute {at_s / 60:.0f}: at most {what}; certified {get_certified(net)}")
        time.sleep(SAMPLE_S)
    return samples


def get_all(net: Localnet) -> list[dict[str, Any]]:
    """Every node's /status."""
    return [net.get_status(node) for node in net.nodes]


def get_bases(net: Localnet) -> set[str]:
    """Bases that nodes hold now."""
    return {status["protocol"]["base"] for status in get_all(net)}


def get_certified(net: Localnet) -> str:
    """The newest certified round of the nodes."""
    return "/".join(str(round) for round in sorted({str(s["protocol"]["certified_round"]) for s in get_all(net)}))


def now_ms() -> Millis:
    """The wall clock, as nodes read it."""
    return Millis(time.time_ns() // 1_000_000)


def judge(figures: Mapping[str, Any]) -> list[Target]:
    """Trends after the warm-up, and the targets."""
    warm_s = min(WARM_UP_S_MAX, WARM_UP_SHARE * figures["seconds"])
    told = [[Sample(*sample) for sample in samples] for samples in figures["samples"].values()]
    steady = [[sample for sample in samples if sample.at_s >= warm_s] for samples in told]
    columns = ("node", "MB at first", "MB after warm-up", "MB at last", "MB/h", *COUNTED[1:])
    rows = [
        (
            node,
            samples[0].rss_mb,
            kept[0].rss_mb,
            kept[-1].rss_mb,
            compute_trend(kept),
            *(f"{min(column)} to {max(column)}" for column in list(zip(*kept, strict=True))[2:]),
        )
        for node, (samples, kept) in enumerate(zip(told, steady, strict=True))
    ]
    print_table("Nodes after the warm-up", columns, rows)
    hours = (steady[0][-1].at_s - steady[0][0].at_s) / 3600

    def worst(measure: Callable[[Sequence[Sample]], float]) -> float:
        return max(measure(samples) for samples in steady)

    def growth_of(name: str) -> Callable[[Sequence[Sample]], float]:
        return lambda samples: compute_growth([getattr(sample, name) for sample in samples])

    grown = worst(lambda samples: compute_trend(samples) * hours)
    num_rounds = max(1, figures["rounds"])
    errors = sum(count for text, count in figures["complaints"].items() if not text.startswith("WARNING"))
    return [
        Target("rss_growth_mb", grown, RSS_NOISE_MB + RSS_MB_PER_HOUR * hours, "less"),
        Target("descriptor_growth", worst(growth_of("descriptors")), DESCRIPTOR_NOISE, "less"),
        Target("thread_growth", worst(growth_of("threads")), THREAD_NOISE, "less"),
        Target("messages_lost_share", figures["lost"], 0, "less"),
        Target("rounds_certified_share", figures["certified"] / num_rounds, 1, "more"),
        Target("rounds_settled_share", figures["settled"] / num_rounds, 1, "more"),
        Target("rounds_forked", len(figures["forked"]), 0, "less"),
        Target("core_failures", figures["core_failures"], 0, "less"),
        Target("errors_logged", errors, 0, "less"),
    ]


def main() -> None:
    """Run and judge."""
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="how long")
    parser.add_argument("--nodes", type=int, default=6, help="how many")
    arguments = parser.parse_args()
    options = read_options(arguments)
    minutes, num_nodes = (0.4, 3) if options.quick else (arguments.minutes, arguments.nodes)
    with tempfile.TemporaryDirectory(prefix="p2pfm-soak-") as folder:
        figures = run_fleet(Path(folder) / "net", num_nodes, 60 * minutes)
    targets = judge(figures)
    shown = ("seconds", "rounds", "certified", "settled", "published", "heard", "cpu_s_per_node_and_minute")
    print_table("The fleet", ("figure", "value"), [(name, figures[name]) for name in shown])
    print_table("Void rounds", ("round", "why"), [(round, "; ".join(why)) for round, why in figures["void"].items()])
    print_table("Complaints in the logs", ("line", "times"), list(figures["complaints"].items()))
    finish(options, figures, targets)


if __name__ == "__main__":
    main()
