"""The coefficients of sim/estimate.py: runs of several sizes, each in its own process, and a non-negative fit.

    python bench/estimate.py [--kind convex] [--peers 8,32,96,128,256] [--rounds 3]

Prints one `Cost` a learner, and every measurement beside what the fit says of it. Relative errors count, so that small
runs are told as well as large ones.
"""

import argparse
import subprocess
import sys

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from sim.scenarios import LearnerModel, Scenario

RUN = """
import resource, sys
from sim.report import run_scenario
from sim.scenarios import LearnerModel, Scenario
kind, peers, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
report = run_scenario(Scenario(num_peers=peers, num_rounds=rounds, learner=LearnerModel(kind=kind)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, report.cpu_s / rounds)
"""


def measure(kind: str, peers: int, rounds: int) -> tuple[float, float]:
    """Peak memory [bytes] and CPU time a round [s]."""
    arguments = [sys.executable, "-c", RUN, kind, str(peers), str(rounds)]
    memory_bytes, round_s = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return float(memory_bytes), float(round_s)


def fit(columns: NDArray[np.float64], measured: NDArray[np.float64]) -> NDArray[np.float64]:
    found, _ = nnls(columns / measured[:, None], np.ones_like(measured))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", choices=LearnerModel.__annotations__["kind"].__args__)
    parser.add_argument("--peers", default="8,32,96,128,256")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sizes = np.array([float(size) for size in options.peers.split(",")])
    pairs = sizes * np.minimum(sizes, Scenario().shard_size)
    for kind in options.kind or ["digests", "convex", "mlp", "lora"]:
        memory, seconds = np.array([measure(kind, int(size), options.rounds) for size in sizes]).T
        space, time = np.stack([np.ones_like(sizes), sizes, pairs], 1), np.stack([sizes, pairs], 1)
        base, peer, pair = fit(space, memory)
        peer_s, pair_s = fit(time, seconds)
        print(f'"{kind}": Cost({base:.3g}, {peer:.3g}, {pair:.3g}, {peer_s:.3g}, {pair_s:.3g}),')
        for size, *figures in zip(
            sizes, memory, space @ [base, peer, pair], seconds, time @ [peer_s, pair_s], strict=True
        ):
            print("  {:5.0f} peers: {:.3g} B, fit {:.3g}; {:.3g} s a round, fit {:.3g}".format(size, *figures))


if __name__ == "__main__":
    main()
