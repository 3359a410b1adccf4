"""Size and speed of the update codec, beside its references, in one run.

    python bench/compression.py [--json FILE] [--check]

Deltas have the shape of SmolLM2's LoRA (rank 8 on q and v, 460,800 parameters) and normal or Laplace values (AdamW's
deltas lie between the two). References: dense fp32, SparseLoCo's packing (12-bit index, 2-bit value), and the entropy
of the same positions and values. The last lines are targets of ALGORITHMS, part 2; --check fails when one falls short.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from p2pfm.config import CompressionConfig
from p2pfm.lora.compress import compress, decode_payload

LAYERS = 30
REPEATS = 5
COLUMNS = ("bytes", "bits_a_parameter", "fp32_ratio", "packed_ratio", "over_entropy", "encode_mb_s", "decode_mb_s")
TARGETS = (
    ("ratio to fp32 at 6.25%", 256, "fp32_ratio", 71.0, 1),
    ("ratio to fp32 at 1.56%", 64, "fp32_ratio", 220.0, 1),
    ("bytes over entropy at 6.25%", 256, "over_entropy", 1.02, -1),
    ("encode MB/s of fp32", 256, "encode_mb_s", 100.0, 1),
    ("decode MB/s of fp32", 256, "decode_mb_s", 100.0, 1),
)
"""What, at which keep of 4096, which figure, bound, and whether more (1) or less (-1) is better."""


def main() -> None:
    """Measure, print, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    print(f"{'values':8} {'keep':>4}  " + "  ".join(f"{name:>16}" for name in COLUMNS))
    results: dict[str, dict[str, float]] = {}
    for kind in ("normal", "laplace"):
        tensors = make_delta(kind)
        for keep in (64, 256):
            figures = measure(tensors, CompressionConfig(keep=keep))
            results[f"{kind} {keep}"] = figures
            print(f"{kind:8} {keep:4}  " + "  ".join(f"{figures[name]:16.4g}" for name in COLUMNS))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))
    is_short = False
    for name, keep, figure, target, sign in TARGETS:
        value = min((results[f"{kind} {keep}"][figure] for kind in ("normal", "laplace")), key=lambda v: sign * v)
        is_met = sign * value >= sign * target
        is_short |= not is_met
        print(f"{name} {value:.4g} {target:g} {'ok' if is_met else 'short'}")
    if arguments.check and is_short:
        sys.exit(1)


def make_delta(kind: str) -> dict[str, np.ndarray]:
    """A delta of SmolLM2's adapter."""
    draw = np.random.default_rng(0)
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(LAYERS):
        shapes |= {f"{layer}.q.lora_A": (8, 576), f"{layer}.q.lora_B": (576, 8)}
        shapes |= {f"{layer}.v.lora_A": (8, 576), f"{layer}.v.lora_B": (192, 8)}
    return {name: (getattr(draw, kind)(size=shape) * 1e-3).astype(np.float32) for name, shape in shapes.items()}


def measure(tensors: dict[str, np.ndarray], config: CompressionConfig) -> dict[str, float]:
    """One line of the table, by column."""
    shapes = {name: values.shape for name, values in tensors.items()}
    num_parameters = sum(values.size for values in tensors.values())
    payload, _ = compress(tensors, config)
    update = decode_payload(payload, shapes, config, len(payload))
    encode_s = best_of(lambda: compress(tensors, config))
    decode_s = best_of(lambda: decode_payload(payload, shapes, config, len(payload)))
    num_values = len(update.positions)
    density = num_values / num_parameters
    index_bits = -math.log2(density) * density - math.log2(1 - density) * (1 - density)
    shares = update.counts.sum(axis=0) / num_values
    value_bits = 1 - float(np.sum(shares * np.log2(shares)))
    entropy = (num_parameters * index_bits + num_values * value_bits) / 8
    megabytes = 4 * num_parameters / 1e6
    return {
        "bytes": len(payload),
        "bits_a_parameter": 8 * len(payload) / num_parameters,
        "fp32_ratio": 4 * num_parameters / len(payload),
        "packed_ratio": num_values * (12 + 2) / 8 / len(payload),
        "over_entropy": len(payload) / entropy,
        "encode_mb_s": megabytes / encode_s,
        "decode_mb_s": megabytes / decode_s,
    }


def best_of(work: Callable[[], object]) -> float:
    """Shortest of a few runs, in CPU seconds of this process."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


if __name__ == "__main__":
    main()
