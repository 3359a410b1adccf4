"""Size, speed and error of the update codec beside its references, on real LoRA deltas and on a Gaussian one.

    python bench/compression.py [--json FILE] [--check] [--quick]

Deltas: LoRA (rank 8 on q and v) of the tiny Llama fixture and, where `p2pfm models fetch smollm2-135m` was run, of
SmolLM2-135M, trained here on ChatterBot text: a first round, and a second with the first one's residual fed back, as a
peer sends it; and normal values in the shape of 20 layers of a 2048-wide model (1.06M parameters). 256 and 64 of every
4096 values are sent. All methods but the dense ones send the same places with the same two magnitudes a tensor.

`over entropy`: bytes over those of log2 of the number of ways to choose so many places in each chunk, plus the
empirical entropy of the value symbols. Real deltas can come out below it: their places are clustered, and p2pfm's coder
uses that.
Speeds: MB of fp32 input in CPU seconds of one thread, best of several runs with warm tables; decoding ends in dense
fp32 tensors. Error: relative L2 distance of what receivers decode from the delta. Seeds are fixed.
"""

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from harness import Target, finish, parse_options, print_table  # isort: skip  (sets how OpenMP waits, before torch)

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from nodes.models import resolve
from p2pfm.config import AdapterConfig, ChainConfig, CompressionConfig, NetworkConfig, TrainingConfig
from p2pfm.errors import OperatorError
from p2pfm.lora.compress import compress, decode_payload, feed_back
from p2pfm.lora.corpus import build_shards
from p2pfm.lora.delta import Layout, add, compute_layout, flatten, get_shapes, subtract, unflatten
from p2pfm.lora.layers import load_backbone
from p2pfm.lora.samples import read_probe, read_samples
from p2pfm.lora.topk import Arrangement, arrange, compute_levels, from_slots, quantise, select, to_slots
from p2pfm.lora.torch_learner import TorchLearner
from p2pfm.types import Array, Millis, Round, Tensors

TINY = Path(__file__).parent.parent / "tests" / "fixtures" / "tiny-llama"
SMOLLM2 = "smollm2-135m"
ADAPTER = AdapterConfig(rank=8, alpha=16, targets=("q_proj", "v_proj"))
CHUNK = 4096
KEEPS = (256, 64)
"""6.25% and 1.56% of a chunk."""
REPEATS = 7
INDEX_BITS = 12
ESCAPE = 255
"""In gap bytes: 255 places further and none taken."""
COLUMNS = ("bytes", "bits/param", "x fp32", "x bf16", "over entropy %", "encode MB/s", "decode MB/s", "error")


class Method(NamedTuple):
    """A way to send a delta: tensors to bytes, and bytes to dense tensors."""

    name: str
    encode: Callable[[Tensors], bytes]
    decode: Callable[[bytes], Mapping[str, Array]]


def main() -> None:
    """Train, measure, compare."""
    options = parse_options(__doc__)
    torch.set_num_threads(1)
    gaussian = make_gaussian(2 if options.quick else 20)
    first = measure_first_call(gaussian)
    print(f"The first encode and decode in this process, which build tables: {first[0]:.0f} and {first[1]:.0f} ms")
    deltas: dict[str, Callable[[int], Tensors]] = {"Gaussian": lambda keep: gaussian}
    training = TrainingConfig(steps=6 if options.quick else 60, batch=4, tokens_max=48, learning_rate=5e-3)
    deltas |= make_real("tiny Llama", str(TINY), training)
    judged = ["Gaussian"]
    try:
        path = resolve(SMOLLM2)
    except OperatorError as error:
        print(f"SmolLM2 is left out: {error}")
    else:
        if options.quick:
            print("SmolLM2 is left out: --quick")
        else:
            real = make_real("SmolLM2", path, TrainingConfig(steps=30, batch=4, tokens_max=64, learning_rate=2e-3))
            deltas |= real
            judged += real
    figures: dict[str, Any] = {"first encode and decode ms": first}
    for name, get_delta in deltas.items():
        figures[name] = measure_delta(name, get_delta)
    finish(options, figures, make_targets({name: figures[name] for name in judged}))


def make_targets(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[Target]:
    """Of ALGORITHMS, part 2, on each delta that is large enough for them."""
    targets = []
    for name, rows in figures.items():
        dense, sparse = rows["p2pfm 6.25%"], rows["p2pfm 1.56%"]
        targets += [
            Target(f"{name}: ratio to fp32 at 6.25%", dense["x fp32"], 71, "more"),
            Target(f"{name}: ratio to fp32 at 1.56%", sparse["x fp32"], 220, "more"),
            Target(f"{name}: % over entropy at 6.25%", dense["over entropy %"], 2, "less"),
            Target(f"{name}: % over entropy at 1.56%", sparse["over entropy %"], 2, "less"),
            Target(f"{name}: encode MB/s at 6.25%", dense["encode MB/s"], 100, "more"),
            Target(f"{name}: decode MB/s at 6.25%", dense["decode MB/s"], 100, "more"),
        ]
    return targets


# --- deltas ----------------------------------------------------------------------------------------------------------


def make_gaussian(num_layers: int) -> dict[str, Array]:
    draw = np.random.default_rng(0)
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(num_layers):
        shapes |= {f"{layer}.q.lora_A": (8, 2048), f"{layer}.q.lora_B": (2048, 8)}
        shapes |= {f"{layer}.v.lora_A": (8, 2048), f"{layer}.v.lora_B": (512, 8)}
    return {name: (1e-3 * draw.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def make_real(name: str, path: str, training: TrainingConfig) -> dict[str, Callable[[int], Tensors]]:
    """What one peer sends in its first round, and in its second when `keep` of a chunk were sent in the first."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        shards = build_shards(6, Path(folder), seed=0, corrupted=frozenset())
        probe, samples = read_probe(shards.probe), read_samples(shards.peers[0])
    config = NetworkConfig(
        name="bench",
        genesis_ms=Millis(0),
        backbone=name,
        probe=probe.digest.hex(),
        chain=ChainConfig(1, "", ""),
        adapter=ADAPTER,
        training=training,
    )
    backbone, tokenizer = load_backbone(path)
    learner = TorchLearner(backbone, tokenizer, config, samples, probe)
    base = learner.initial()
    first = learner.train(base, Round(0)).delta
    _, sent = compress(first, make_config(KEEPS[0]))
    second = learner.train(add(base, sent), Round(1)).delta

    def with_residual(keep: int) -> Tensors:
        _, sent = compress(first, make_config(keep))
        return feed_back(subtract(first, sent), second, make_config(keep))

    size = sum(values.size for values in first.values())
    spent_s = time.process_time() - start
    print(f"{name}: {size} parameters, two rounds of {training.steps} steps, {spent_s:.0f} CPU s")
    return {f"{name}, round 1": lambda keep: first, f"{name}, round 2": with_residual}


def make_config(keep: int) -> CompressionConfig:
    return CompressionConfig(chunk=CHUNK, keep=keep)


# --- measurements ----------------------------------------------------------------------------------------------------


def measure_delta(name: str, get_delta: Callable[[int], Tensors]) -> dict[str, dict[str, float]]:
    """All methods on one delta: by method and density, by column."""
    figures: dict[str, dict[str, float]] = {}
    for keep in KEEPS:
        delta, density = get_delta(keep), f"{keep / CHUNK:.2%}"
        entropy = compute_entropy_bytes(delta, keep)
        for method in make_sparse_methods(delta, keep):
            figures[f"{method.name} {density}"] = measure(method, delta, entropy)
    for method in make_dense_methods(delta):
        figures[method.name] = measure(method, delta, math.nan)
    size = sum(values.size for values in delta.values())
    rows = [
        [method, *("" if math.isnan(row[column]) else row[column] for column in COLUMNS)]
        for method, row in figures.items()
    ]
    print_table(f"{name}: {size:,} parameters in {len(delta)} tensors", ["method", *COLUMNS], rows)
    return figures


def measure(method: Method, delta: Tensors, entropy_bytes: float) -> dict[str, float]:
    size = sum(values.size for values in delta.values())
    data = method.encode(delta)
    decoded = method.decode(data)
    off = sum(float(np.sum((decoded[name].astype(np.float64) - delta[name]) ** 2)) for name in delta)
    norm = sum(float(np.sum(delta[name].astype(np.float64) ** 2)) for name in delta)
    return {
        "bytes": len(data),
        "bits/param": 8 * len(data) / size,
        "x fp32": 4 * size / len(data),
        "x bf16": 2 * size / len(data),
        "over entropy %": 100 * (len(data) / entropy_bytes - 1),
        "encode MB/s": 4e-6 * size / best_of(lambda: method.encode(delta)),
        "decode MB/s": 4e-6 * size / best_of(lambda: method.decode(data)),
        "error": math.sqrt(off / norm),
    }


def best_of(work: Callable[[], object]) -> float:
    """Shortest of a few runs [CPU s]."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def measure_first_call(delta: Tensors) -> tuple[float, float]:
    """[CPU ms]."""
    start = time.process_time()
    payload, _ = compress(delta, make_config(KEEPS[0]))
    between = time.process_time()
    decode_payload(payload, get_shapes(delta), make_config(KEEPS[0]), len(payload))
    return 1e3 * (between - start), 1e3 * (time.process_time() - between)


def compute_entropy_bytes(delta: Tensors, keep: int) -> float:
    """log2 C(size, sent) of every chunk, and the empirical entropy of sign and magnitude."""
    sparse = Sparse.of(delta, keep)
    counts = np.bincount(sparse.symbols, minlength=4)
    shares = counts[counts > 0] / counts.sum()
    bits = -float(np.sum(counts[counts > 0] * np.log2(shares)))
    for rows in sparse.arrangement.rows:
        bits += rows.num * math.log2(math.comb(rows.size, rows.keep))
    return bits / 8


# --- methods ---------------------------------------------------------------------------------------------------------


class Sparse(NamedTuple):
    """What all sparse methods send: places and value symbols in the slots' order, two levels a tensor."""

    arrangement: Arrangement
    slots: NDArray[np.int64]
    symbols: NDArray[np.int32]
    levels: Array
    values: Array
    """Unquantised."""

    @staticmethod
    def of(delta: Tensors, keep: int) -> "Sparse":
        """Chunked top-k and Lloyd's two levels, as in p2pfm."""
        arrangement = arrange(compute_layout(get_shapes(delta)), CHUNK, keep)
        flat = flatten(delta)
        mask = np.zeros(len(flat), np.uint8)
        mask[select(flat[None], arrangement)[0]] = 1
        slots = np.flatnonzero(to_slots(mask, arrangement))
        assert len(slots) == arrangement.most.sum(), "the references' packing has no room for chunks with zeros"
        values = to_slots(flat, arrangement)[slots]
        codes, is_high = quantise(np.abs(values), get_tensors(arrangement), len(delta))
        return Sparse(arrangement, slots, 2 * (values < 0) + is_high, compute_levels(codes), values)


def get_tensors(arrangement: Arrangement) -> NDArray[np.int64]:
    """The tensor of each value sent, in the slots' order."""
    of_chunk = [np.full(piece.rows.num, piece.tensor) for piece in arrangement.pieces]
    return np.repeat(np.concatenate(of_chunk), arrangement.most)


def make_sparse_methods(delta: Tensors, keep: int) -> list[Method]:
    """Ours first."""
    shapes, config = get_shapes(delta), make_config(keep)
    arrangement = arrange(compute_layout(shapes), CHUNK, keep)
    layout, chunk_starts = arrangement.layout, np.repeat(arrangement.starts, arrangement.most)
    tensors = get_tensors(arrangement)
    num = len(tensors)
    head = 8 * len(layout.names)  # two float32 levels a tensor
    packed_bytes = -(-num // 4)
    index_bytes = -(-num * INDEX_BITS // 8)

    def spread(slots: NDArray[Any], values: Array) -> dict[str, Array]:
        dense = np.zeros(arrangement.num_slots, np.float32)
        dense[slots] = values
        return unflatten(from_slots(dense, arrangement), layout)

    def join(index: bytes, sparse: Sparse) -> bytes:
        return sparse.levels.tobytes() + pack_two_bits(sparse.symbols) + index

    def split(data: bytes) -> tuple[Array, bytes]:
        levels = np.frombuffer(data, np.float32, head // 4).reshape(-1, 2)
        symbols = unpack_two_bits(data[head : head + packed_bytes], num)
        magnitudes = levels[tensors, symbols & 1]
        return np.where(symbols >> 1, -magnitudes, magnitudes), data[head + packed_bytes :]

    def encode_raw(delta: Tensors) -> bytes:
        sparse = Sparse.of(delta, keep)
        return join(sparse.slots.astype(np.int32).tobytes(), sparse)

    def decode_raw(data: bytes) -> Mapping[str, Array]:
        values, index = split(data)
        return spread(np.frombuffer(index, np.int32), values)

    def encode_packed(delta: Tensors) -> bytes:
        sparse = Sparse.of(delta, keep)
        return join(pack_twelve_bits(sparse.slots - chunk_starts), sparse)

    def decode_packed(data: bytes) -> Mapping[str, Array]:
        values, index = split(data)
        return spread(unpack_twelve_bits(index, num) + chunk_starts, values)

    def encode_exact(delta: Tensors) -> bytes:
        sparse = Sparse.of(delta, keep)
        return pack_twelve_bits(sparse.slots - chunk_starts) + sparse.values.tobytes()

    def decode_exact(data: bytes) -> Mapping[str, Array]:
        slots = unpack_twelve_bits(data[:index_bytes], num) + chunk_starts
        return spread(slots, np.frombuffer(data[index_bytes:], np.float32))

    def encode_zstd(delta: Tensors) -> bytes:
        sparse = Sparse.of(delta, keep)
        return zstandard.compress(join(to_gap_bytes(sparse.slots), sparse))

    def decode_zstd(data: bytes) -> Mapping[str, Array]:
        values, index = split(zstandard.decompress(data))
        return spread(from_gap_bytes(index), values)

    return [
        Method(
            "p2pfm",
            lambda delta: compress(delta, config)[0],
            lambda data: decode_payload(data, shapes, config, len(data)).tensors(),
        ),
        Method("gap bytes + 2 bits, zstd", encode_zstd, decode_zstd),
        Method("12-bit index + 2 bits", encode_packed, decode_packed),
        Method("int32 index + 2 bits", encode_raw, decode_raw),
        Method("12-bit index + fp32 value", encode_exact, decode_exact),
    ]


def make_dense_methods(delta: Tensors) -> list[Method]:
    layout = compute_layout(get_shapes(delta))
    return [
        Method("dense int8, a scale a tensor", encode_int8, lambda data: decode_int8(data, layout)),
        Method("dense bf16", encode_bf16, lambda data: decode_bf16(data, layout)),
    ]


def encode_int8(delta: Tensors) -> bytes:
    parts = []
    for name in sorted(delta):
        scale = np.float32(max(np.abs(delta[name]).max(), 1e-30) / 127)
        parts += [scale.tobytes(), np.rint(delta[name] / scale).astype(np.int8).tobytes()]
    return b"".join(parts)


def decode_int8(data: bytes, layout: Layout) -> dict[str, Array]:
    tensors, at = {}, 0
    for name, shape, size in zip(layout.names, layout.shapes, layout.sizes, strict=True):
        scale = np.frombuffer(data, np.float32, 1, at)[0]
        tensors[name] = np.frombuffer(data, np.int8, size, at + 4).reshape(shape) * scale
        at += 4 + size
    return tensors


def encode_bf16(delta: Tensors) -> bytes:
    """Rounded to nearest, ties to even."""
    words = flatten(delta).view(np.uint32)
    return ((words + 0x7FFF + (words >> 16 & 1)) >> 16).astype(np.uint16).tobytes()


def decode_bf16(data: bytes, layout: Layout) -> dict[str, Array]:
    words = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
    return unflatten(words.view(np.float32), layout)


def pack_two_bits(symbols: NDArray[np.int32]) -> bytes:
    bits = np.stack([symbols >> 1, symbols & 1], axis=1).astype(np.uint8)
    return np.packbits(bits).tobytes()


def unpack_two_bits(data: bytes, num: int) -> NDArray[np.uint8]:
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=2 * num).reshape(num, 2)
    return 2 * bits[:, 0] + bits[:, 1]


def pack_twelve_bits(offsets: NDArray[np.int64]) -> bytes:
    """Two in three bytes."""
    left, right = np.append(offsets, 0)[: len(offsets) + len(offsets) % 2].reshape(-1, 2).T
    packed = np.stack([left >> 4, (left & 15) << 4 | right >> 8, right & 255], axis=1)
    return packed.astype(np.uint8).tobytes()[: -(-len(offsets) * INDEX_BITS // 8)]


def unpack_twelve_bits(data: bytes, num: int) -> NDArray[np.int32]:
    one, two, three = np.frombuffer(data + bytes(-len(data) % 3), np.uint8).reshape(-1, 3).astype(np.int32).T
    return np.stack([one << 4 | two >> 4, (two & 15) << 8 | three], axis=1).ravel()[:num]


def to_gap_bytes(slots: NDArray[np.int64]) -> bytes:
    distances = np.diff(slots, prepend=-1) - 1
    ends = np.cumsum(distances // ESCAPE + 1) - 1
    gaps = np.full(int(ends[-1]) + 1, ESCAPE, np.uint8)
    gaps[ends] = distances % ESCAPE
    return gaps.tobytes()


def from_gap_bytes(data: bytes) -> NDArray[np.int64]:
    gaps = np.frombuffer(data, np.uint8)
    steps = np.cumsum(gaps.astype(np.int64) + (gaps < ESCAPE))
    return steps[gaps < ESCAPE] - 1


if __name__ == "__main__":
    main()
