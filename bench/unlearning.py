"""A peer leaves: what its data still does to the model after subtraction and repair, beside a model that never saw it.

    python bench/unlearning.py [--json FILE] [--check] [--quick]

One of four peers (a topic each; error feedback, codec, clip, equal weights) holds a few samples of a topic of its own
and canaries: prompts with random digits for an answer. After the federation's rounds it leaves; its direct
contribution is subtracted (`p2pfm.lora.unlearn`), then the others go on without it (repair). References of the same
run: a model retrained from the initial adapter without the peer, for as many rounds (what unlearning wants to be), and
the same repair rounds without the subtraction (what leaving alone gives).

AUC: a low loss tells the peer's samples from held-out ones of the same topic (.5 is chance); "calibrated" takes each
sample's loss at the initial adapter off first, and so does the exposure: bits of a canary that the model gives away
(1.4 by chance, 6 of 63 references at most).
Losses are nats a token. Spread: standard deviation over seeds.
"""

import dataclasses
import string
from collections.abc import Sequence
from typing import NamedTuple

import harness
import numpy as np
import torch
from tasks import BACKBONE, COMPRESSION, Task, make_task, through_codec

from p2pfm.config import AdapterConfig, TrainingConfig
from p2pfm.lora.batches import Encoded, encode_all
from p2pfm.lora.compress import feed_back
from p2pfm.lora.delta import encode_tensors
from p2pfm.lora.layers import load_backbone
from p2pfm.lora.leakage import compute_calibrated_auc, compute_exposure, compute_membership_auc
from p2pfm.lora.merge import merge
from p2pfm.lora.samples import Sample
from p2pfm.lora.unlearn import MergedRound, MergedUpdate, remove_peers
from p2pfm.types import WEIGHT_ONE, Array, PeerId, Round, Tensors, Weight, compute_digest

ADAPTER = AdapterConfig(
    rank=8, alpha=16, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
)
TRAINING = TrainingConfig(steps=20, batch=4, tokens_max=48, learning_rate=1e-2)
LEAVER = 0
"""The peer with the largest topic, so that most of the topic is left to compare with."""
CODE_DIGITS, COPIES = 4, 4
"""A canary's answer, and how often the leaver holds it: what is rare in its data leaves no trace in a mean of peers."""
PASS_SAMPLES = 32
"""Samples in one pass."""
AUC_GAP, LOSS_RATIO = 0.05, 1.02
"""The bounds: AUC from the retrained model's, and the others' held-out loss over the retrained model's."""


class Size(NamedTuple):
    """How much is run."""

    seeds: tuple[int, ...]
    num_peers: int = 4
    num_rounds: int = 8
    repairs: tuple[int, ...] = (1, 2, 4)
    num_members: int = 16
    num_others: int = 96
    num_canaries: int = 4
    num_references: int = 63


DEFAULT = Size(seeds=(1, 2, 3))
QUICK = Size(seeds=(1,), num_peers=3, num_rounds=2, repairs=(1,), num_members=8, num_canaries=1, num_references=3)


class World(NamedTuple):
    """A federation and the leaver's secrets. `codes`: for each canary its own sample, then the references."""

    task: Task
    members: tuple[Encoded, ...]
    others: tuple[Encoded, ...]
    """Held-out samples of the leaver's topic."""
    codes: tuple[tuple[Encoded, ...], ...]

    @property
    def attacked(self) -> tuple[Encoded, ...]:
        """All samples that an attacker asks about: members, others, every canary with its references."""
        return (*self.members, *self.others, *(code for variants in self.codes for code in variants))


class Federation(NamedTuple):
    """Where a federation stands."""

    base: dict[str, Array]
    residuals: dict[int, Tensors]
    history: tuple[MergedRound, ...]
    num_rounds: int


def main() -> None:
    """Every seed's models, their table, the targets."""
    options = harness.parse_options(__doc__)
    size = QUICK if options.quick else DEFAULT
    seconds: dict[str, float] = {}
    runs = []
    for seed in size.seeds:
        with harness.cpu_seconds(seconds, "all"):
            runs.append(run_seed(size, seed))
    columns = ("model", "AUC", "spread", "calibrated", "exposure", "loss, its topic", "loss, others", "spread")
    rows = [row(name, [run[name] for run in runs]) for name in runs[0]]
    harness.print_table(f"A peer leaves after {size.num_rounds} rounds; {len(runs)} seeds", columns, rows)
    print(f"\nCPU seconds: {seconds['all']:.0f}")
    last = size.repairs[-1]
    repaired, retrained = (
        [run[name] for run in runs] for name in (f"subtracted, {last} repair rounds", retrained_name(size, last))
    )
    pairs = list(zip(repaired, retrained, strict=True))
    gaps = {attack: max(abs(a[attack] - b[attack]) for a, b in pairs) for attack in ("AUC", "calibrated")}
    ratio = max(a["loss, others"] / b["loss, others"] for a, b in pairs)
    targets = [
        harness.Target("AUC, repaired minus retrained, worst seed", gaps["AUC"], AUC_GAP, "less"),
        harness.Target("calibrated AUC, repaired minus retrained, worst seed", gaps["calibrated"], AUC_GAP, "less"),
        harness.Target("others' loss, repaired over retrained, worst seed", ratio, LOSS_RATIO, "less"),
    ]
    figures = {"size": size._asdict(), "seconds": seconds, "runs": dict(zip(map(str, size.seeds), runs, strict=True))}
    harness.finish(options, figures, targets)


def row(name: str, runs: Sequence[dict[str, float]]) -> list[object]:
    """A line of the table: means over seeds, and two spreads."""
    mean = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
    spread = {key: float(np.std([run[key] for run in runs])) for key in runs[0]}
    cells: list[object] = [name, mean["AUC"], spread["AUC"], mean["calibrated"], mean["exposure"]]
    return [*cells, mean["loss, its topic"], mean["loss, others"], spread["loss, others"]]


def retrained_name(size: Size, num_repairs: int) -> str:
    """The reference of so many repair rounds."""
    return f"retrained, {size.num_rounds + num_repairs} rounds"


def run_seed(size: Size, seed: int) -> dict[str, dict[str, float]]:
    """Figures of every model of one seed, by name."""
    world = make_world(size, seed)
    task, stayers = world.task, [peer for peer in range(size.num_peers) if peer != LEAVER]
    start = Federation(task.initial, {}, (), 0)
    joint = run_rounds(task, start, range(size.num_peers), size.num_rounds)
    since = compute_digest(encode_tensors(task.initial))
    removed = remove_peers(joint.base, joint.history, {name_of(LEAVER)}, since)
    models: dict[str, Tensors] = {"before": joint.base, "subtracted": removed}
    repaired, left = joint._replace(base=removed), joint
    retrained = run_rounds(task, start, stayers, size.num_rounds)
    references: dict[str, Tensors] = {f"retrained, {size.num_rounds} rounds": retrained.base}
    for before, after in zip((0, *size.repairs), size.repairs, strict=False):
        repaired, left, retrained = (
            run_rounds(task, state, stayers, after - before) for state in (repaired, left, retrained)
        )
        models[f"subtracted, {after} repair rounds"] = repaired.base
        references[f"not subtracted, {after} rounds without"] = left.base
        references[retrained_name(size, after)] = retrained.base
    initial = compute_losses(task, task.initial, world.attacked)
    return {name: measure(world, base, initial) for name, base in {**models, **references}.items()}


def run_rounds(task: Task, state: Federation, peers: Sequence[int], num_rounds: int) -> Federation:
    """Rounds of these peers with equal weights, as nodes do them: feedback, codec, clip, merge."""
    base, residuals, history = state.base, dict(state.residuals), list(state.history)
    for number in range(state.num_rounds, state.num_rounds + num_rounds):
        updates = []
        for peer, delta in zip(peers, task.train(base, number, peers), strict=True):
            update, residuals[peer] = through_codec(feed_back(residuals.get(peer), delta, COMPRESSION))
            updates.append(MergedUpdate(name_of(peer), update, Weight(WEIGHT_ONE // len(peers))))
        merged = merge(base, [(item.update, item.weight) for item in updates])
        digests = [compute_digest(encode_tensors(tensors)) for tensors in (base, merged)]
        history.append(MergedRound(Round(number), digests[0], digests[1], tuple(updates)))
        base = merged
    return Federation(base, residuals, tuple(history), state.num_rounds + num_rounds)


def name_of(peer: int) -> PeerId:
    """A peer by its position."""
    return PeerId(f"peer {peer}")


def make_world(size: Size, seed: int) -> World:
    """A topic a peer; the leaver's topic is cut in two by prompt, and its part gets the canaries."""
    task = make_task(size.num_peers, seed, num_topics=size.num_peers, training=TRAINING, adapter=ADAPTER)
    tokenizer = load_backbone(BACKBONE)[1]
    rng = np.random.default_rng([seed, 2])
    prompts = list(dict.fromkeys(get_prompt(sample) for sample in task.peers[LEAVER]))
    own = {prompts[i] for i in rng.permutation(len(prompts))[: size.num_members]}
    members = tuple(sample for sample in task.peers[LEAVER] if get_prompt(sample) in own)
    rest = [sample for sample in task.peers[LEAVER] if get_prompt(sample) not in own]
    others = tuple(rest[: size.num_others])
    codes = tuple(
        encode_all(tokenizer, make_codes(name, 1 + size.num_references, rng), TRAINING.tokens_max)
        for name in string.ascii_uppercase[: size.num_canaries]
    )
    peers = list(task.peers)
    peers[LEAVER] = (*members, *(variants[0] for variants in codes for _ in range(COPIES)))
    return World(dataclasses.replace(task, peers=tuple(peers)), members, others, codes)


def make_codes(name: str, count: int, rng: np.random.Generator) -> list[Sample]:
    """The same question with different random answers."""
    prompt = f"What is the code of room {name}?"
    digits = rng.integers(0, 10, (count, CODE_DIGITS))
    return [Sample("canary", prompt, " ".join(map(str, code))) for code in digits]


def get_prompt(sample: Encoded) -> tuple[int, ...]:
    """A sample's question: all answers to it are on one side."""
    return sample.tokens[: sample.num_prompt]


def measure(world: World, base: Tensors, initial: Array) -> dict[str, float]:
    """What an attacker and a user see of one model; `initial`: losses of `world.attacked` at the initial adapter."""
    losses = compute_losses(world.task, base, world.attacked)
    ends = np.cumsum([len(world.members), len(world.others)])
    (inside, outside, codes), (inside_0, outside_0, codes_0) = (np.split(part, ends) for part in (losses, initial))
    # Some codes are easy for every model: what a canary's loss fell by is compared, not the loss.
    falls = (codes - codes_0).reshape(len(world.codes), -1)  # (num_canaries, 1 + num_references)
    by_topic = world.task.model.evaluate([base], world.task.test)[0]  # (num_topics,) the leaver's first, as peers
    return {
        "AUC": compute_membership_auc(inside, outside),
        "calibrated": compute_calibrated_auc(inside, outside, inside_0, outside_0),
        "exposure": float(np.mean([compute_exposure(float(part[0]), part[1:]) for part in falls])),
        "loss, its topic": float(by_topic[LEAVER]),
        "loss, others": float(np.delete(by_topic, LEAVER).mean()),
    }


def compute_losses(task: Task, base: Tensors, samples: Sequence[Encoded]) -> Array:
    """(num_samples,) mean loss of each sample [nats/token]: one adapter side by side with itself, a sample each."""
    order = sorted(range(len(samples)), key=lambda index: len(samples[index].tokens))  # little padding
    losses = np.zeros(len(samples), np.float32)
    with torch.inference_mode():
        for start in range(0, len(order), PASS_SAMPLES):
            part = order[start : start + PASS_SAMPLES]
            stack = task.model.stack([base] * len(part))
            chosen = [samples[index] for index in part]
            sums = task.model.losses(stack, [[s] for s in chosen], [[1 / s.num_completion] for s in chosen])
            losses[part] = sums.cpu().numpy()
    return losses


if __name__ == "__main__":
    main()
