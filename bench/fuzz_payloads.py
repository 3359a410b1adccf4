"""The payload decoder against a million changed payloads: Reject or an exact update, in bounded time and memory.

    python bench/fuzz_payloads.py [--json FILE] [--check] [--quick]

Honest payloads of six adapters (from 3 parameters to SmolLM2's 460,800) are changed in the ways of `KINDS`, by two
processes. Each result must be a `Reject`, or an update whose values, compressed again, are the very same bytes.
Anything else is printed with the bytes that caused it, and the script exits with 1 whatever its options. Times are CPU
seconds of one decode; memory is the growth of a process's peak over what the honest payloads needed. Seeds are fixed:
mutation i of a process is the same in every run.
"""

import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from harness import Target, finish, parse_options, print_table

from p2pfm.config import CompressionConfig
from p2pfm.errors import Reject
from p2pfm.lora import compress as codec
from p2pfm.lora.compress import MAGIC, compress, decode_payload
from p2pfm.lora.delta import Shapes, compute_layout
from p2pfm.lora.subsets import Ints, Reader, Writer, uniform
from p2pfm.lora.topk import arrange

NUM_MUTATIONS = 1_000_000
NUM_MUTATIONS_QUICK = 12_000
NUM_PROCESSES = 2
BATCH = 2_000
BIG_EVERY = 2_000
"""One mutation in so many is of the big adapter's: a decode of it takes as long as 30 small ones."""
LIE_EVERY = 33
"""One mutation in so many comes from a lying encoder, which takes longer than the decoder."""
VARIANTS = 4
"""Honest payloads an adapter: normal values, heavy tails, mostly zeros, one tensor zero."""
DECODE_S_MAX = 0.25
RSS_MB_MAX = 64
EXAMPLES_MAX = 5


class Case(NamedTuple):
    """An adapter and honest payloads of it."""

    name: str
    shapes: Shapes
    config: CompressionConfig
    payloads: tuple[bytes, ...]


@dataclass
class Tally:
    """What came of some mutations."""

    tried: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    decode_s_max: dict[str, float] = field(default_factory=dict)
    rss_mb: float = 0.0
    faults: list[str] = field(default_factory=list)
    """Of what may not happen: case, kind, error, the payload in hexadecimal."""


def main() -> None:
    """Change, decode, count."""
    options = parse_options(__doc__)
    num = NUM_MUTATIONS_QUICK if options.quick else NUM_MUTATIONS
    share = num // NUM_PROCESSES
    started = time.perf_counter()
    with ProcessPoolExecutor(NUM_PROCESSES) as pool:
        tallies = list(pool.map(run, [share * i for i in range(NUM_PROCESSES)], [share] * NUM_PROCESSES))
    wall_s = time.perf_counter() - started
    tried = add_up(tally.tried for tally in tallies)
    accepted = add_up(tally.accepted for tally in tallies)
    reasons = add_up(tally.reasons for tally in tallies)
    kinds = {kind: {"tried": tried[kind], "accepted": accepted[kind]} for kind in sorted(tried)}
    print_table(
        f"{num:,} changed payloads, {wall_s:.0f} s",
        ["kind of change", "tried", "rejected", "another exact update"],
        [[kind, row["tried"], row["tried"] - row["accepted"], row["accepted"]] for kind, row in kinds.items()],
    )
    print_table("Why", ["reason", "payloads"], reasons.most_common())
    slowest = {name: max(tally.decode_s_max.get(name, 0.0) for tally in tallies) for name in tallies[0].decode_s_max}
    print_table("Slowest decode [CPU s]", ["adapter", "s"], sorted(slowest.items()))
    faults = [fault for tally in tallies for fault in tally.faults]
    for fault in faults[:EXAMPLES_MAX]:
        print("FAULT", fault)
    rss_mb = max(tally.rss_mb for tally in tallies)
    figures: dict[str, Any] = {
        "mutations": sum(tried.values()),
        "accepted": sum(accepted.values()),
        "other exceptions": len(faults),
        "kinds": kinds,
        "reasons": reasons,
        "slowest decode s": slowest,
        "peak rss growth mb": rss_mb,
        "wall s": wall_s,
    }
    targets = [
        Target("changed payloads survived", sum(tried.values()) - len(faults), NUM_MUTATIONS, "more"),
        Target("other outcomes than Reject or an exact update", len(faults), 0, "less"),
        Target("slowest decode [CPU s]", max(slowest.values()), DECODE_S_MAX, "less"),
        Target("growth of peak memory [MB]", rss_mb, RSS_MB_MAX, "less"),
    ]
    finish(options, figures, targets)
    sys.exit(1 if faults else 0)


def add_up(counters: Iterable[Counter[str]]) -> Counter[str]:
    """All processes' counts."""
    return sum(counters, Counter[str]())


def run(first: int, num: int) -> Tally:
    """Mutations first, first + 1, ... in this process."""
    cases = make_cases()
    tally = Tally()
    for case in cases:
        tally.decode_s_max[case.name] = 0.0
        for payload in case.payloads:
            decode_payload(payload, case.shapes, case.config, len(payload))
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    draw = np.random.default_rng(0)
    for index in range(first, first + num):
        if index % BATCH == 0 or index == first:
            draw = np.random.default_rng([index // BATCH, first])
        case = cases[-1] if index % BIG_EVERY == 0 else cases[int(draw.integers(len(cases) - 1))]
        kind = by_a_lying_encoder if index % LIE_EVERY == 0 else KINDS[int(draw.integers(len(KINDS)))]
        data = kind(draw, cases, case)
        while data in case.payloads:
            data = kind(draw, cases, case)
        judge(tally, case, kind.__name__.replace("_", " "), data)
    tally.rss_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024
    return tally


def judge(tally: Tally, case: Case, kind: str, data: bytes) -> None:
    """Decode and count."""
    tally.tried[kind] += 1
    start = time.process_time()
    try:
        update = decode_payload(data, case.shapes, case.config, 1 << 20)
    except Reject as error:
        tally.reasons[re.sub(r"-?\d+", "#", str(error)).removeprefix("payload: ").split(", got")[0]] += 1
        update = None
    except BaseException as error:  # noqa: BLE001
        # A panic inside the range coder is no Exception, and must be seen as well.
        tally.faults.append(f"{case.name}, {kind}: {type(error).__name__}: {error}: {data.hex()}")
        return
    finally:
        spent = time.process_time() - start
        tally.decode_s_max[case.name] = max(tally.decode_s_max[case.name], spent)
    if update is not None:
        tally.accepted[kind] += 1
        if not np.isfinite(update.norm()) or compress(update.tensors(), case.config)[0] != data:
            tally.faults.append(f"{case.name}, {kind}: its values have another encoding: {data.hex()}")


# --- adapters --------------------------------------------------------------------------------------------------------


def make_cases() -> list[Case]:
    """The big one last."""
    big: dict[str, tuple[int, ...]] = {}
    for layer in range(30):
        big |= {f"{layer}.q.lora_A": (8, 576), f"{layer}.q.lora_B": (576, 8)}
        big |= {f"{layer}.v.lora_A": (8, 576), f"{layer}.v.lora_B": (192, 8)}
    return [
        _make_case("3 parameters", {"a": (3,)}, CompressionConfig(chunk=16, keep=16)),
        _make_case("40", {"a": (40,)}, CompressionConfig(chunk=16, keep=2)),
        _make_case("64", {"a": (4, 8), "b": (16, 2)}, CompressionConfig(chunk=16, keep=4)),
        _make_case("512", {"a": (8, 64)}, CompressionConfig(chunk=512, keep=32)),
        _make_case(
            "1,017",
            {"a.lora_A": (4, 33), "a.lora_B": (70, 4), "b.lora_A": (1, 5), "b.lora_B": (300, 2)},
            CompressionConfig(chunk=64, keep=7),
        ),
        _make_case("460,800", big, CompressionConfig()),
    ]


def _make_case(name: str, shapes: Shapes, config: CompressionConfig) -> Case:
    draw = np.random.default_rng(len(name))
    payloads = []
    for variant in range(VARIANTS):
        tensors = {key: draw.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
        for key, values in tensors.items():
            if variant == 1:
                values **= 5
            if variant == 2:
                values *= draw.random(values.shape) < 0.02
                values.flat[0] = 1
            if variant == 3 and key == min(shapes) and len(shapes) > 1:
                values[:] = 0
        payloads.append(compress(tensors, config)[0])
    return Case(name, shapes, config, tuple(payloads))


# --- changes: each returns a payload made from an honest one ---------------------------------------------------------


def bits_flipped(draw: np.random.Generator, cases: list[Case], case: Case) -> bytes:
    """One to eight bits of the other value, anywhere."""
    data = bytearray(_pick(draw, case))
    for _ in range(int(draw.integers(1, 9))):
        data[int(draw.integers(len(data)))] ^= 1 << int(draw.integers(8))
    return bytes(data)


def bytes_set(draw: np.random.Generator, cases: list[Case], case: Case) -> bytes:
    """One to four bytes behind the magic ones set to a random, the least or the greatest value."""
    data = bytearray(_pick(draw, case))
    for _ in range(int(draw.integers(1, 5))):
        at = int(draw.integers(min(len(MAGIC), len(data) - 1), len(data)))
        data[at] = (int(draw.integers(256)), 0, 255)[int(draw.integers(3))]
    return bytes(data)


def last_word_changed(draw: np.random.Generator, cases: list[Case], case: Case) -> bytes:
    """Where a change is most often another legal update."""
    return _pick(draw, case)[:-4] + draw.bytes(4)


def truncated(draw: np.random.Generator, cases: list[Case], case: Case) -> bytes:
    """Any length; half of them whole words."""
    data = _pick(draw, case)
    length = int(draw.integers(len(data)))
    return data[: length - length % 4 if draw.integers(2) else length]


def extended(draw: np.random.Generator, cases: list[Case], case: Case) -> bytes:
    """Zeros or random bytes behind the end."""
    length = int(draw.integers(1, 17))
    return _pick(draw, case) + (bytes(length) if draw.integers(2) else draw.bytes(4 * length))


def spliced(draw: np.random.Generator, cases: list[Case], case: Case) -> bytes:
    """The beginning of one payload and the end of another, of any adapter; half at whole words."""
    left, right = _pick(draw, case), _pick(draw, cases[int(draw.integers(len(cases) - 1))])
    begin, end = int(draw.integers(len(left) + 1)), int(draw.integers(len(right) + 1))
    if draw.integers(2):
        begin, end = begin - begin % 4, end - end % 4
    return left[:begin] + right[end:]


def head_changed(draw: np.random.Generator, cases: list[Case], case: Case) -> bytes:
    """Other magic bytes, or another first word behind them (counts, first tilts)."""
    data = _pick(draw, case)
    if draw.integers(4) == 0:
        return draw.bytes(4) + data[4:]
    return data[:4] + draw.bytes(4) + data[8:]


def random_behind_a_good_head(draw: np.random.Generator, cases: list[Case], case: Case) -> bytes:
    """Random words from some word on, about as many as there were."""
    data = _pick(draw, case)
    kept = 4 * int(draw.integers(1, len(data) // 4 + 1))
    return data[:kept] + draw.bytes(max(0, len(data) - kept + 4 * int(draw.integers(-1, 2))))


def words_reordered(draw: np.random.Generator, cases: list[Case], case: Case) -> bytes:
    """Words swapped, rotated, doubled or left out."""
    data = _pick(draw, case)
    words = [data[i : i + 4] for i in range(4, len(data), 4)]
    if not words:
        return data + data
    one, other = int(draw.integers(len(words))), int(draw.integers(len(words)))
    match int(draw.integers(4)):
        case 0:
            words[one], words[other] = words[other], words[one]
        case 1:
            words = words[one:] + words[:one]
        case 2:
            words.insert(other, words[one])
        case _:
            words.pop(one)
    return data[:4] + b"".join(words)


def of_another_adapter(draw: np.random.Generator, cases: list[Case], case: Case) -> bytes:
    """An honest payload of other shapes or another density."""
    others = [other for other in cases[:-1] if other is not case]
    return _pick(draw, others[int(draw.integers(len(others)))])


def by_a_lying_encoder(draw: np.random.Generator, cases: list[Case], case: Case) -> bytes:
    """A well-formed stream in which one number (a count, tilt, share, centre, decay, place) is not what it should be.

    Everything after the lie is coded consistently with it, so that only the check against the one encoding can tell.
    """
    arrangement = arrange(compute_layout(case.shapes), case.config.chunk, case.config.keep)
    honest = case.payloads[int(draw.integers(2))]  # the other variants may be empty
    parts = codec.code_update(Reader(honest[len(MAGIC) :]), arrangement, None, 8 * len(honest))
    truth = Liar(0, 0)
    codec.code_update(truth, arrangement, parts, len(parts.symbols))
    while True:
        liar = Liar(int(draw.integers(1, truth.num_numbers + 1)), int(draw.integers(1, 4)))
        try:
            codec.code_update(liar, arrangement, parts, len(parts.symbols))
        except (Reject, AssertionError, ValueError, IndexError, KeyError):
            continue  # a lie that cannot be written down
        return MAGIC + liar.writer.get_bytes()


class Liar:
    """A coder that writes the `at`-th lone number lower than it is by `less`, and stands by it."""

    def __init__(self, at: int, less: int) -> None:
        self.writer, self.num_numbers = Writer(), 0
        self._at, self._less = at, less

    def code(self, model: Any, count: int, known: Ints | None) -> Ints:
        """See subsets.Coder."""
        assert known is not None
        if count == 1 and isinstance(model, type(uniform(2))) and known[0] > 0:
            self.num_numbers += 1
            if self.num_numbers == self._at:
                known = np.maximum(known - self._less, 0).astype(np.int32)
        return self.writer.code(model, count, known)


KINDS: list[Callable[[np.random.Generator, list[Case], Case], bytes]] = [
    bits_flipped,
    bytes_set,
    last_word_changed,
    truncated,
    extended,
    spliced,
    head_changed,
    random_behind_a_good_head,
    words_reordered,
    of_another_adapter,
]
"""And `by_a_lying_encoder`, more rarely."""


def _pick(draw: np.random.Generator, case: Case) -> bytes:
    return case.payloads[int(draw.integers(len(case.payloads)))]


if __name__ == "__main__":
    main()
