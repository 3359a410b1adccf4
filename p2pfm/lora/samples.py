"""Text samples: a peer's private shard and the network's declared probe, as JSON lines.

Knows no model and no tokenizer. A sample is {"topic", "prompt", "completion"}; a probe line also has
"split": "probe" (what contributions are measured on), "test" (held-out loss for reports) or "work" (what proofs of
computation are trained on, apart from both).
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from p2pfm.errors import OperatorError
from p2pfm.types import Digest, compute_digest

LINE_BYTES_MAX = 1 << 20
"""A longer line is no chat sample; refusing it bounds what one bad file costs."""


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A question and the answer that a model should give."""

    topic: str
    prompt: str
    completion: str


class ProbeLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of a probe file."""

    split: Literal["probe", "test", "work"]
    topic: str
    prompt: str
    completion: str


class Probe(msgspec.Struct, frozen=True):
    """The declared probe set: strata by topic, each of equal weight. `digest` is NetworkConfig.probe."""

    probe: Mapping[str, tuple[Sample, ...]]
    test: Mapping[str, tuple[Sample, ...]]
    digest: Digest
    work: tuple[Sample, ...] = ()


def parse_samples(data: bytes, where: str) -> tuple[Sample, ...]:
    """A private shard's samples, in order; `where` names the source in errors.

    Raises:
        OperatorError: empty, or a line that is not a sample (says which).
    """
    return tuple(_parse_lines(data, where, msgspec.json.Decoder(Sample).decode))


def parse_probe(data: bytes, where: str) -> Probe:
    """A probe file's strata, topics sorted.

    Raises:
        OperatorError: empty, a bad line, or a topic without samples in one of the splits.
    """
    strata: dict[str, dict[str, list[Sample]]] = {"probe": {}, "test": {}}
    work: list[Sample] = []
    for line in _parse_lines(data, where, msgspec.json.Decoder(ProbeLine).decode):
        sample = Sample(line.topic, line.prompt, line.completion)
        if line.split == "work":
            work.append(sample)
        else:
            strata[line.split].setdefault(line.topic, []).append(sample)
    if set(strata["probe"]) != set(strata["test"]):
        odd = sorted(set(strata["probe"]) ^ set(strata["test"]))
        raise OperatorError(f'{where}: topics {odd} need lines with "split": "probe" and with "split": "test"')
    probe, test = ({topic: tuple(split[topic]) for topic in sorted(split)} for split in strata.values())
    return Probe(probe, test, compute_digest(data), tuple(work))


def read_samples(path: Path) -> tuple[Sample, ...]:
    """The shard in a file. Raises: OperatorError."""
    return parse_samples(_read(path), str(path))


def read_probe(path: Path) -> Probe:
    """The probe in a file. Raises: OperatorError."""
    return parse_probe(_read(path), str(path))


def encode_lines(items: Iterable[Sample | ProbeLine]) -> bytes:
    """JSON lines; equal items have equal bytes, so their SHA-256 names a probe."""
    return b"".join(msgspec.json.encode(item) + b"\n" for item in items)


Line = TypeVar("Line", Sample, ProbeLine)


def _parse_lines(data: bytes, where: str, decode: Callable[[bytes], Line]) -> list[Line]:
    lines: list[Line] = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        if len(line) > LINE_BYTES_MAX:
            raise OperatorError(f"{where}, line {number}: expected at most {LINE_BYTES_MAX} bytes, got {len(line)}")
        try:
            item = decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise OperatorError(
                f'{where}, line {number}: expected {{"topic", "prompt", "completion"}} as JSON: {error}'
            ) from error
        if not item.prompt.strip() or not item.completion.strip():
            raise OperatorError(f"{where}, line {number}: prompt and completion must not be empty")
        lines.append(item)
    if not lines:
        raise OperatorError(f"{where}: no samples; expected one JSON object a line")
    return lines


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OperatorError(f"cannot read {path}: {error.strerror}. Check the path in the node's config") from error
