"""The demo's data: ChatterBot's English question-answer pairs, dealt to peers by topic, and the declared probe.

Knows the corpus package's files; nothing of models or peers. Topics differ between peers (non-IID); probe and test
samples are held out of every shard; each topic is a stratum of equal weight.
"""

import random
import string
from collections.abc import Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import msgspec
import yaml

from p2pfm.errors import OperatorError
from p2pfm.lora.samples import ProbeLine, Sample, encode_lines

PROMPT_CHARS_MAX = 100
COMPLETION_CHARS_MAX = 90
"""Short samples: with SmolLM2's chat template nearly all fit in 64 tokens."""
TOPIC_SAMPLES_MIN = 16
"""A smaller topic cannot fill a shard, a probe and a test set."""
TOPIC_SAMPLES_MAX = 160
TOPICS_PER_PEER = 2
PROBE_PART, PROBE_MAX = 0.2, 12
TEST_PART, TEST_MAX = 0.15, 4
"""Of each topic's samples: what is held out, and at most how many, so that a probe pass stays cheap."""
WORK_PART = 0.1
"""Of each topic's samples, at most so many for proofs of computation, where they are asked for."""
GARBAGE_WORDS = 40
GARBAGE_CHARS = string.digits + string.punctuation
"""A corrupted completion: no words, and so long that its end mark is cut off."""


class Shards(msgspec.Struct, frozen=True):
    """Files written: one shard a peer, and the probe."""

    peers: tuple[Path, ...]
    probe: Path
    topics: tuple[tuple[str, ...], ...]
    """What each peer's shard is about."""


def build_shards(
    num_peers: int, out_dir: Path, seed: int, corrupted: frozenset[int] | set[int], work_max: int = 0
) -> Shards:
    """Write peer-0.jsonl ... and probe.jsonl into `out_dir`; equal arguments give equal bytes.

    A corrupted peer's completions are random digits and signs: training on them harms the model. `work_max`: public
    samples a topic for proofs of computation (`scoring.work_steps`), at most a tenth of each topic.

    Raises:
        OperatorError: the package chatterbot-corpus is missing.
    """
    draw = random.Random(seed)
    topics = read_topics()
    chosen = sorted(topics, key=lambda topic: (-len(topics[topic]), topic))[: TOPICS_PER_PEER * num_peers]
    probe: list[ProbeLine] = []
    train: dict[str, list[Sample]] = {}
    for topic in chosen:
        train[topic], held_out = _split(topics[topic], draw, work_max)
        probe += held_out
    shards = _deal(train, chosen, num_peers)
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = tuple(out_dir / f"peer-{index}.jsonl" for index in range(num_peers))
    for index, (path, shard) in enumerate(zip(paths, shards, strict=True)):
        path.write_bytes(encode_lines([_corrupt(sample, draw) for sample in shard] if index in corrupted else shard))
    (out_dir / "probe.jsonl").write_bytes(encode_lines(probe))
    subjects = tuple(tuple(sorted({sample.topic for sample in shard})) for shard in shards)
    return Shards(paths, out_dir / "probe.jsonl", subjects)


def read_topics(*, is_every_answer: bool = False) -> dict[str, list[Sample]]:
    """Short samples by topic: the first answer to each prompt (the corpus repeats itself), or every one.

    Raises:
        OperatorError: the package chatterbot-corpus is missing.
    """
    try:
        folder = files("chatterbot_corpus") / "data" / "english"
    except ModuleNotFoundError as error:
        raise OperatorError("the package chatterbot-corpus is missing: pip install 'p2pfm[data]'") from error
    topics: dict[str, list[Sample]] = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.endswith(".yml"):
            topic = path.name.removesuffix(".yml")
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            samples = _read_pairs(topic, content["conversations"], is_every_answer)
            if len(samples) >= TOPIC_SAMPLES_MIN:
                topics[topic] = samples
    return topics


def _read_pairs(topic: str, conversations: Sequence[Sequence[object]], is_every_answer: bool) -> list[Sample]:
    found: dict[tuple[str, str], Sample] = {}
    for turns in conversations:
        for prompt, completion in pairwise(turns):
            sample = Sample(topic, str(prompt).strip(), str(completion).strip())
            fits = len(sample.prompt) <= PROMPT_CHARS_MAX and len(sample.completion) <= COMPLETION_CHARS_MAX
            if fits and sample.prompt and sample.completion:
                answer = sample.completion.casefold() if is_every_answer else ""
                found.setdefault((sample.prompt.casefold(), answer), sample)
    return list(found.values())


def _split(samples: Sequence[Sample], draw: random.Random, work_max: int) -> tuple[list[Sample], list[ProbeLine]]:
    """(train, probe, test and work lines) of one topic."""
    shuffled = draw.sample(samples, min(len(samples), TOPIC_SAMPLES_MAX))
    num_probe = min(PROBE_MAX, round(PROBE_PART * len(shuffled)))
    num_test = min(TEST_MAX, round(TEST_PART * len(shuffled)))
    lines = [ProbeLine("probe", s.topic, s.prompt, s.completion) for s in shuffled[:num_probe]]
    lines += [ProbeLine("test", s.topic, s.prompt, s.completion) for s in shuffled[num_probe : num_probe + num_test]]
    rest = shuffled[num_probe + num_test :]
    num_work = min(work_max, round(WORK_PART * len(shuffled)))
    lines += [ProbeLine("work", s.topic, s.prompt, s.completion) for s in rest[:num_work]]
    return rest[num_work:], lines


def _deal(train: dict[str, list[Sample]], chosen: Sequence[str], num_peers: int) -> list[list[Sample]]:
    """Each peer's samples: large topics one way, small ones back, so that sizes even out; spare peers share topics."""
    num_slots = max(len(chosen), num_peers)
    shards: list[list[Sample]] = [[] for _ in range(num_peers)]
    for slot in range(num_slots):
        row, column = divmod(slot, num_peers)
        topic_index = slot % len(chosen)
        sharers = len(range(topic_index, num_slots, len(chosen)))
        part = train[chosen[topic_index]][slot // len(chosen) :: sharers]
        shards[num_peers - 1 - column if row % 2 else column] += part
    return shards


def _corrupt(sample: Sample, draw: random.Random) -> Sample:
    words = ["".join(draw.choices(GARBAGE_CHARS, k=draw.randint(2, 5))) for _ in range(GARBAGE_WORDS)]
    return Sample(sample.topic, sample.prompt, " ".join(words))
