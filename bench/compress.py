"""Size and speed of the update codec, beside its references, in one run: `python bench/compress.py`.

Deltas have the shape of SmolLM2's LoRA (rank 8 on q and v, 460,800 parameters) and normal or Laplace values (AdamW's
deltas lie between the two). References: dense fp32, SparseLoCo's packing (12-bit index, 2-bit value), and the entropy
of the same positions and values.
"""

import math
import time

import numpy as np

from p2pfm.config import CompressionConfig
from p2pfm.lora.compress import compress, decode_payload

LAYERS = 30
REPEATS = 5


def main() -> None:
    print("values   keep  bytes   bit/param  fp32/ours  packed/ours  ours/entropy  encode   decode [MB fp32/s]")
    for kind in ("normal", "laplace"):
        tensors = make_delta(kind)
        for keep in (64, 256):
            print(measure(kind, tensors, CompressionConfig(keep=keep)))


def make_delta(kind: str) -> dict[str, np.ndarray]:
    """A delta of SmolLM2's adapter."""
    draw = np.random.default_rng(0)
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(LAYERS):
        shapes |= {f"{layer}.q.lora_A": (8, 576), f"{layer}.q.lora_B": (576, 8)}
        shapes |= {f"{layer}.v.lora_A": (8, 576), f"{layer}.v.lora_B": (192, 8)}
    return {name: (getattr(draw, kind)(size=shape) * 1e-3).astype(np.float32) for name, shape in shapes.items()}


def measure(kind: str, tensors: dict[str, np.ndarray], config: CompressionConfig) -> str:
    """One line of the table."""
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
    packed = num_values * (12 + 2) / 8
    megabytes = 4 * num_parameters / 1e6
    return (
        f"{kind:8} {config.keep:4} {len(payload):6}   {8 * len(payload) / num_parameters:9.4f}"
        f"  {4 * num_parameters / len(payload):9.1f}  {packed / len(payload):11.2f}  {len(payload) / entropy:12.4f}"
        f"  {megabytes / encode_s:6.0f}  {megabytes / decode_s:6.0f}"
    )


def best_of(work) -> float:
    """Shortest of a few runs [s]."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
