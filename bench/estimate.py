"""The coefficients of sim/estimate.py: runs of several sizes, each in its own process, and a non-negative fit.

    python bench/estimate.py [--kind convex] [--peers 8,32,128,256,1000/32] [--rounds 3]

Sizes are peers, or peers/shard size.

Prints one `Cost` a learner, and every measurement beside what the fit says of it. Relative errors count, so that small
runs are told as well as large ones.
"""

import argparse
import subprocess
import sys

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from sim.estimate import compute_pairs
from sim.scenarios import LearnerModel, Scenario, make_network

LONGER = 8
"""One more run of a middle size has so many times the rounds: what each leaves behind in memory."""

RUN = """
import resource, sys
from sim.report import run_scenario
from sim.scenarios import LearnerModel, Scenario
kind, peers, shard, rounds = sys.argv[1], *map(int, sys.argv[2:])
model = LearnerModel(kind=kind)
report = run_scenario(Scenario(num_peers=peers, shard_size=shard, num_rounds=rounds, learner=model))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, report.cpu_s / rounds)
"""


def measure(kind: str, peers: int, shard: int, rounds: int) -> tuple[float, float]:
    """Peak memory [bytes] and CPU time a round [s]."""
    arguments = [sys.executable, "-c", RUN, kind, str(peers), str(shard), str(rounds)]
    memory_bytes, round_s = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return float(memory_bytes), float(round_s)


def read_size(text: str) -> tuple[int, int]:
    """Peers, and the size of a shard."""
    peers, _, shard = text.partition("/")
    return int(peers), int(shard or Scenario().shard_size)


def fit(columns: NDArray[np.float64], measured: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = nnls(columns / measured[:, None], np.ones_like(measured))[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", choices=LearnerModel.__annotations__["kind"].__args__)
    parser.add_argument("--peers", default="8,32,128,256,1000/32")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    runs = [(*read_size(size), options.rounds) for size in options.peers.split(",")]
    runs.append((*runs[len(runs) // 2][:2], LONGER * options.rounds))
    sizes, _, rounds = np.array(runs, float).T
    seats = make_network(Scenario(num_peers=max(peers for peers, *_ in runs))).scoring.committee_size
    pairs = np.array([compute_pairs(peers, shard, seats) for peers, shard, _ in runs], float)
    for kind in options.kind or ["digests", "convex", "mlp", "lora"]:
        memory, seconds = np.array([measure(kind, *run) for run in runs]).T
        space, time = np.stack([np.ones_like(sizes), sizes, pairs, sizes * rounds], 1), np.stack([sizes, pairs], 1)
        in_space, in_time = fit(space, memory), fit(time, seconds)
        print(f'"{kind}": Cost({", ".join(f"{value:.3g}" for value in (*in_space, *in_time))}),')
        for (size, _, num), *figures in zip(runs, memory, space @ in_space, seconds, time @ in_time, strict=True):
            text = "  {} peers, {} rounds: {:.3g} B, fit {:.3g}; {:.3g} s a round, fit {:.3g}"
            print(text.format(size, num, *figures))


if __name__ == "__main__":
    main()
