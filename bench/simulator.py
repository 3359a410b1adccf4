"""What a simulated peer-round costs: the whole protocol with a perceptron on digits, and the protocol alone.

    python bench/simulator.py [--json FILE] [--check] [--quick] [--frameworks flwr,fluke,pfl] [--plot FILE]

Every world runs in a process of its own, one thread, and is measured in CPU seconds of its rounds (set-up, cooling down
and claims left out). Beside the perceptron stand, in the same run, a plain sequential PyTorch loop over the same peers'
data, the same training batched by hand without any protocol, and, where asked for, other frameworks in environments of
their own. All start from the 49,960 parameters of `sim.learners.mlp`, pass once over 32 digits, and average.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib
from harness import Target, finish, make_parser, print_table, read_options
from matplotlib import pyplot
from matplotlib.ticker import LogLocator

matplotlib.use("Agg")

RUN = """
import json, resource, sys, time
from sim.network import NetworkModel
from sim.scenarios import LearnerModel, PhaseConfig, Scenario
from sim.world import World
kind, peers, shard, committee, rounds = sys.argv[1], *map(int, sys.argv[2:6])
model = LearnerModel(kind=kind, codec="modelled" if kind == "mlp" else "real")
phases = PhaseConfig(10_000, 6_000, 5_000, 3_000, 4_000, 3_000)
world = World(Scenario(
    num_peers=peers, num_rounds=rounds, shard_size=shard, committee_size=committee, learner=model, phases=phases,
    network=NetworkModel(quantum_ms=50),
))
marks = [time.process_time()]
world.run(lambda round: marks.append(time.process_time()))
first, *later = [after - before for before, after in zip(marks, marks[1:])]
print(json.dumps({
    "round_cpu_s": sum(later) / len(later) if later else first,
    "certified": len(world.checks.certificates),
    "holders": min(map(len, world.checks.holders.values()), default=0),
    "steps": world.num_steps,
    "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}))
"""

LOOPS = """
import json, sys, time
import torch
torch.set_num_threads(1)
from sim.learners.mlp import Digits, MlpLab
peers = int(sys.argv[1])
lab = MlpLab(Digits(1), peers)
base = lab.learners[0].initial()
def measure(train):
    train(0)
    start = time.process_time()
    train(1)
    return (time.process_time() - start) / peers * 1000
def alone(round):
    for learner in lab.learners:
        learner.train_alone(base, round, None)
def together(round):
    for learner in lab.learners:
        learner.train(base, round)
print(json.dumps({"sequential": measure(alone), "batched": measure(together)}))
"""

PROTOCOL = ((1_000, 128, 9), (3_000, 128, 9), (10_000, 128, 9))
"""Peers, shard size (the product's own), committee."""
LEARNING = ((256, 128, 3), (1_000, 128, 3))
PROTOCOL_1000_S, PROTOCOL_10000_S, MEMORY_GB, PEER_ROUND_MS = 2.0, 40.0, 4.0, 0.7


def call(code: str, *arguments: object) -> dict[str, float]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent.parent)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure_protocol(sizes: tuple[tuple[int, int, int], ...]) -> list[dict[str, float]]:
    """The protocol alone, by the number of peers."""
    found = []
    for peers, shard, committee in sizes:
        figures = call(RUN, "digests", peers, shard, committee, 2)
        found.append({"peers": peers, "shard": shard, **figures})
    return found


def measure_learning(sizes: tuple[tuple[int, int, int], ...]) -> list[dict[str, float]]:
    """The whole with a perceptron, beside the loops."""
    found = []
    for peers, shard, committee in sizes:
        figures = call(RUN, "mlp", peers, shard, committee, 3)
        ours_ms = figures["round_cpu_s"] / peers * 1000
        found.append({"peers": peers, "shard": shard, "ours": ours_ms, **call(LOOPS, peers), **figures})
    return found


def plot_growth(protocol: list[dict[str, float]], path: Path) -> None:
    """CPU seconds of a round by the number of peers, beside what N log N would take from the smallest size on."""
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    sizes = [row["peers"] for row in protocol]
    unit = protocol[0]["round_cpu_s"] / (sizes[0] * math.log(sizes[0]))
    axes.loglog(sizes, [unit * size * math.log(size) for size in sizes], "--", color="#a0aec0", label="N log N")
    costs = [row["round_cpu_s"] for row in protocol]
    axes.loglog(sizes, costs, "o-", color="#2b6cb0", label="the whole protocol")
    for row in protocol:
        label = f"{row['round_cpu_s']:.2g} s, {row['memory_bytes'] / 1e9:.2g} GB"
        axes.annotate(label, (row["peers"], row["round_cpu_s"]), (8, -12), textcoords="offset points", fontsize="small")
    axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes], minor=False)
    axes.minorticks_off()
    axes.set_xlim(sizes[0] * 0.8, sizes[-1] * 2)
    axes.set_ylim(min(costs) / 2, max(costs) * 2)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(title="A simulated round without tensors", xlabel="peers", ylabel="CPU seconds, one core")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--frameworks", default="", help="flwr,fluke,pfl: measured in environments of their own")
    parser.add_argument("--plot", type=Path, help="draw the growth of the protocol's cost here (PNG)")
    arguments = parser.parse_args()
    options = read_options(arguments)
    protocol = measure_protocol(((12, 4, 3), (24, 6, 3)) if options.quick else PROTOCOL)
    learning = measure_learning(((12, 4, 3),) if options.quick else LEARNING)
    rows = [
        (row["peers"], row["shard"], row["round_cpu_s"], row["memory_bytes"] / 1e9, f"{row['holders']:.0f}")
        for row in protocol
    ]
    print_table("The protocol alone", ("peers", "shard", "CPU s a round", "memory [GB]", "holders"), rows)
    lines = [
        (row["peers"], row["ours"], row["sequential"], row["batched"], row["ours"] / row["sequential"])
        for row in learning
    ]
    names = ("peers", "p2pfm", "sequential loop", "batched by hand", "p2pfm / sequential")
    print_table("CPU ms a peer-round, perceptron on digits", names, lines)
    if arguments.plot:
        plot_growth(protocol, arguments.plot)
    others = []
    if arguments.frameworks:
        from frameworks import measure

        others = measure(arguments.frameworks.split(","), [16, 64])
        columns = ("framework", "peers", "CPU ms a peer-round", "times the sequential loop", "")
        sequential = learning[0]["sequential"]
        told = [
            (row["framework"], row["num_peers"], cost, "" if cost is None else cost / sequential, row["note"])
            for row in others
            for cost in [row["cpu_ms_per_peer_round"]]
        ]
        print_table("Other frameworks, the same work", columns, told)
    small, large = protocol[0], protocol[-1]
    log_growth = math.log(large["peers"]) / math.log(small["peers"]) * large["peers"] / small["peers"]
    targets = [
        Target("protocol_1000_cpu_s", small["round_cpu_s"], PROTOCOL_1000_S, "less"),
        Target("protocol_10000_cpu_s", large["round_cpu_s"], PROTOCOL_10000_S, "less"),
        Target("protocol_10000_memory_gb", large["memory_bytes"] / 1e9, MEMORY_GB, "less"),
        Target("growth_over_n_log_n", large["round_cpu_s"] / small["round_cpu_s"] / log_growth, 1.0, "less"),
        *(Target(f"peer_round_{row['peers']:.0f}_ms", row["ours"], PEER_ROUND_MS, "less") for row in learning),
    ]
    finish(options, {"protocol": protocol, "learning": learning, "frameworks": others}, targets)


if __name__ == "__main__":
    main()
