"""What a peer draws that games the rewards, relative to what the same peer draws for honest work.

    python bench/gaming.py [--json FILE] [--check] [--quick]

One player with a strategy among honest peers, who are all evaluators too, for one epoch on the shared real task, by a
node's own functions: error feedback and codec, scores on every evaluator's own sample, the certificate's draft with its
medians, merge, rewards. A figure is the player's reward [wei] over the reward of the same peer when honest in the same
world (same data, same draws): mean, least and greatest over seeds. "undefended" is the same ratio of the plain
Aumann-Shapley values of the same updates: nothing is a duplicate, nothing is remembered.

Further tables: how alike updates are, which is what the limits of duplicates stand on; who passes the proof of
computation (`scoring.work_steps`); and the CPU time in which an evaluator compares 128 updates with each other and with
256 earlier ones.
"""

import functools
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import harness
import msgspec
import numpy as np
import tasks
import torch

from p2pfm import work
from p2pfm.config import (
    AdapterConfig,
    ChainConfig,
    CompressionConfig,
    NetworkConfig,
    ScoringConfig,
    SettlementConfig,
    TrainingConfig,
)
from p2pfm.contribution.duplicates import Limits, find_leaders
from p2pfm.contribution.repeats import compute_repeated_gains
from p2pfm.contribution.similarity import Sparse, compute_cosines, compute_norms, compute_overlaps
from p2pfm.learner import Training
from p2pfm.lora.batches import Encoded
from p2pfm.lora.compress import Update, decode_payload
from p2pfm.lora.delta import (
    compute_layout,
    decode_tensors,
    encode_tensors,
    flatten,
    get_shapes,
    subtract,
    unflatten,
    zeros,
)
from p2pfm.lora.layers import ADAPTER as ADAPTER_NAME
from p2pfm.lora.layers import build_peft, load_backbone
from p2pfm.lora.torch_learner import Data, TorchLearner
from p2pfm.messages import Announcement, Proposal, Score, ScoreReveal
from p2pfm.protocol.committee import draft_proposal, merge_request
from p2pfm.protocol.events import Merge, Remembered, ScoreUpdates, Train, Weighted
from p2pfm.protocol.membership import compute_shares
from p2pfm.protocol.peer import EARLIER_MAX
from p2pfm.settlement.ledger import Member, Roster
from p2pfm.settlement.rewards import from_wire
from p2pfm.types import (
    WEIGHT_ONE,
    Array,
    Contribution,
    Digest,
    MemberIndex,
    Millis,
    PeerId,
    Round,
    Tensors,
    Wei,
    Weight,
    compute_digest,
)

ADAPTER = AdapterConfig(
    rank=8, alpha=16, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
)
STAKE = 10**20
WHOLE = 10**6
"""Samples a stratum: all there are."""
PLACES_MAX = 4
"""Adapters whose slopes are kept: a round's two, and those of the undefended game."""
SAMPLES_AT_ONCE = 16
"""Of similar lengths, in one pass."""


class Size(NamedTuple):
    """How much is run."""

    seeds: tuple[int, ...]
    num_peers: int
    num_rounds: int
    training: TrainingConfig
    samples_per_stratum: int
    num_topics: int
    num_probe: int
    """Prompts a topic, with all their answers."""
    proof_steps: tuple[int, ...]
    proof_peers: int
    proof_rounds: int
    compared: tuple[int, int, int]
    """(updates, earlier updates, parameters) of the timing."""


DEFAULT = Size(
    seeds=(1, 2, 3),
    num_peers=9,
    num_rounds=4,
    training=TrainingConfig(steps=6, batch=4, tokens_max=32, learning_rate=1e-2),
    samples_per_stratum=10,
    num_topics=5,
    num_probe=12,
    proof_steps=(1, 3),
    proof_peers=6,
    proof_rounds=3,
    compared=(128, 256, 460_800),
)
QUICK = Size(
    seeds=(1,),
    num_peers=3,
    num_rounds=2,
    training=TrainingConfig(steps=2, batch=2, tokens_max=32, learning_rate=1e-2),
    samples_per_stratum=2,
    num_topics=2,
    num_probe=3,
    proof_steps=(1,),
    proof_peers=2,
    proof_rounds=1,
    compared=(4, 4, 40_000),
)


# --- strategies ------------------------------------------------------------------------------------------------------


class Move(NamedTuple):
    """One identity's update of a round; `is_work`: with error feedback, as an honest peer's."""

    delta: Tensors
    is_work: bool = False


Moves = Callable[["World"], list[Move]]


class Strategy(NamedTuple):
    """What the player does with its identities, and who lies for it."""

    name: str
    group: str
    moves: Moves
    stakes: tuple[int, ...] = (STAKE,)
    num_liars: int = 0
    """Evaluators who report ten times the player's value, and the opposite of everybody else's."""
    is_smallest: bool = False
    """The player is the peer of the smallest updates; else the one with the median honest reward."""
    is_whole: bool = False
    """Every evaluator measures on all of the probe."""


def do_work(world: "World") -> list[Move]:
    """Honest."""
    return [Move(world.deltas[world.player], is_work=True)]


def do_nothing(world: "World") -> list[Move]:
    """An update of zeros."""
    return [Move(zeros(get_shapes(world.base)))]


def make_noise(world: "World") -> list[Move]:
    """Random values."""
    return [Move(world.add_noise(zeros(get_shapes(world.base)), 1.0))]


def replay(noise: float) -> Moves:
    """How the base moved last time; `noise`: so much of its norm is added."""

    def moves(world: "World") -> list[Move]:
        if len(world.bases) < 2:
            return do_nothing(world)
        return [Move(world.add_noise(subtract(world.bases[-1], world.bases[-2]), noise))]

    return moves


def replay_all(world: "World") -> list[Move]:
    """How the base moved since the beginning."""
    return [Move(subtract(world.bases[-1], world.bases[0]))]


def copy_stale(rounds: int, noise: float, num_mixed: int = 1) -> Moves:
    """The best paid updates of some rounds ago, mixed."""

    def moves(world: "World") -> list[Move]:
        if len(world.best) < rounds:
            return do_nothing(world)
        chosen = world.best[-rounds][:num_mixed]
        mixed = {name: np.stack([update[name] for update in chosen]).sum(axis=0) for name in chosen[0]}
        return [Move(world.add_noise(mixed, noise))]

    return moves


def copy_fresh(noise: float) -> Moves:
    """The update of this very round of who earned most (leaked: the protocol hides it until all have announced)."""

    def moves(world: "World") -> list[Move]:
        others = [peer for peer in range(world.size.num_peers) if peer != world.player]
        best = max(others, key=lambda peer: world.totals.get(peer, 0))
        return [Move(world.add_noise(world.read(world.payloads[best]).tensors(), noise))]

    return moves


def split_update(num: int) -> Moves:
    """One honest update from all identities."""
    return lambda world: do_work(world) * num


def split_data(num: int) -> Moves:
    """Each identity trains on its part of the data."""

    def moves(world: "World") -> list[Move]:
        own = world.task.peers[world.player]
        return [Move(delta, is_work=True) for delta in world.train([own[index::num] or own for index in range(num)])]

    return moves


def split_draws(num: int) -> Moves:
    """Each identity trains on all the data, in another order."""
    return lambda world: [Move(delta, is_work=True) for delta in world.train([world.task.peers[world.player]] * num)]


def inflate(scale: float) -> Moves:
    """Honest work, scaled up."""
    return lambda world: [
        Move({name: np.float32(scale) * part for name, part in world.deltas[world.player].items()}, is_work=True)
    ]


def make_strategies(size: Size) -> list[Strategy]:
    """All of them; the first and the last are honest: on drawn samples, and on the whole probe."""
    third = size.num_peers // 3
    liars = f"{third} of {size.num_peers} evaluators collude"
    free_riders: list[tuple[str, Moves]] = [
        ("zero update", do_nothing),
        ("noise", make_noise),
        ("replay of the last aggregate", replay(0.0)),
        ("replay with noise", replay(1.0)),
        ("replay of all aggregates", replay_all),
        ("copy of the last round's best", copy_stale(1, 0.0)),
        ("copy of the last round's best, noisy", copy_stale(1, 1.0)),
        ("mix of the last round's best three", copy_stale(1, 0.0, 3)),
        ("copy of three rounds ago", copy_stale(3, 0.0)),
        ("late copy of this round's best", copy_fresh(0.0)),
        ("late copy of this round's best, noisy", copy_fresh(1.0)),
    ]
    sybils = [
        (2, "same update", split_update),
        (10, "same update", split_update),
        (2, "data divided", split_data),
        (5, "data divided", split_data),
        (10, "data divided", split_data),
        (2, "other draws", split_draws),
        (5, "other draws", split_draws),
        (10, "other draws", split_draws),
    ]
    return [
        Strategy("honest", "honest", do_work),
        *(Strategy(name, "free rider", moves) for name, moves in free_riders),
        *(
            Strategy(f"{num} sybils, one stake, {what}", "sybil", moves(num), (STAKE // num,) * num)
            for num, what, moves in sybils
        ),
        Strategy("norm x3", "inflation", inflate(3.0), is_smallest=True),
        Strategy("norm x10", "inflation", inflate(10.0), is_smallest=True),
        Strategy("lying evaluator", "evaluator", do_work, num_liars=1),
        Strategy(liars, "evaluator", do_work, num_liars=third),
        Strategy(f"{liars}, whole probe", "evaluator", do_work, num_liars=third, is_whole=True),
        Strategy("two stakes, one update", "two stakes", split_update(2), (STAKE,) * 2),
        Strategy("honest, whole probe", "honest", do_work, is_whole=True),
    ]


# --- the task --------------------------------------------------------------------------------------------------------


class Store(dict[Digest, bytes]):
    """`work.BlobStore` in memory."""

    def put(self, data: bytes) -> Digest:
        """See BlobStore."""
        digest = compute_digest(data)
        self[digest] = data
        return digest

    def get(self, digest: Digest) -> bytes:  # type: ignore[override]
        """See BlobStore."""
        return self[digest]


class Shared:
    """Every probe sample's own gradient at the places asked for lately, and the first round's work, the same for all.

    All evaluators ask at the same two adapters of a round, each for the mean over its own sample.
    """

    def __init__(self, task: tasks.Task) -> None:
        self._task = task
        self._first: tuple[Digest, list[dict[str, Array]]] | None = None
        self._samples = [(topic, sample) for topic, part in task.probe.items() for sample in part]
        self._known: dict[Digest, Array] = {}

    def get_mean(self, at: Tensors, draw: Random, samples_per_stratum: int) -> dict[str, Array]:
        """The gradient of the mean over strata of the mean over completion tokens, on a fresh sample."""
        weights = np.zeros(len(self._samples), np.float32)
        for topic in self._task.probe:
            rows = [row for row, (other, _) in enumerate(self._samples) if other == topic]
            drawn = draw.sample(rows, min(samples_per_stratum, len(rows)))
            num_tokens = sum(self._samples[row][1].num_completion for row in drawn)
            weights[drawn] = 1 / (len(self._task.probe) * num_tokens)
        return unflatten(weights @ self._get_all(at), compute_layout(get_shapes(at)))

    def train(self, digest: Digest, base: Tensors, round: int) -> list[dict[str, Array]]:
        """All peers' deltas after local steps from `base`, whose digest it is."""
        if round > 0:
            return self._task.train(base, round)
        if self._first is None or self._first[0] != digest:
            self._first = (digest, self._task.train(base, round))
        return self._first[1]

    def _get_all(self, at: Tensors) -> Array:
        """(num_samples, num_parameters) of the summed loss over completion tokens."""
        key = compute_digest(encode_tensors(at))
        if key not in self._known:
            while len(self._known) >= PLACES_MAX:
                del self._known[next(iter(self._known))]
            self._known[key] = self._compute(at)
        return self._known[key]

    def _compute(self, at: Tensors) -> Array:
        model = self._task.model
        gradients = np.zeros((len(self._samples), compute_layout(get_shapes(at)).size), np.float32)
        order = sorted(range(len(self._samples)), key=lambda row: len(self._samples[row][1].tokens))
        for start in range(0, len(order), SAMPLES_AT_ONCE):
            rows = order[start : start + SAMPLES_AT_ONCE]
            stack = {name: part.requires_grad_() for name, part in model.stack([at] * len(rows)).items()}
            losses = model.losses(stack, [[self._samples[row][1]] for row in rows], [[1.0]] * len(rows))
            losses.sum().backward()  # type: ignore[no-untyped-call]
            each = model.unstack({name: part.grad for name, part in stack.items() if part.grad is not None})
            for row, gradient in zip(rows, each, strict=True):
                gradients[row] = flatten(gradient)
        return gradients


@dataclass
class TaskLearner:
    """`learner.Learner` on the shared task; `delta` is what training gave (all peers train at once)."""

    task: tasks.Task
    shared: Shared
    samples_per_stratum: int
    delta: Tensors = field(default_factory=dict)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See Learner."""
        return get_shapes(self.task.initial)

    def initial(self) -> Tensors:
        """See Learner."""
        return self.task.initial

    def train(self, base: Tensors, round: Round, work: int | None = None) -> Training:
        """See Learner."""
        return Training(self.delta, 1, 0.0)

    def gradient(self, at: Tensors, seed: int) -> tuple[float, Tensors]:
        """See Learner."""
        return 0.0, self.shared.get_mean(at, Random(seed), self.samples_per_stratum)

    def work_loss(self, at: Tensors, seed: int) -> float:
        """See Learner."""
        raise AssertionError("no proof of computation is asked for in a world")

    def evaluate(self, at: Tensors) -> float:
        """See Learner."""
        return float(self.task.losses([at], self.task.test)[0])


@functools.lru_cache(maxsize=1)
def make_task(size: Size, seed: int) -> tuple[tasks.Task, Shared]:
    """One federation a seed: Dirichlet(1), so that peers' data differ and none lives on one topic alone."""
    task = tasks.make_task(
        size.num_peers,
        seed,
        num_topics=size.num_topics,
        alpha=1.0,
        num_probe=size.num_probe,
        training=size.training,
        adapter=ADAPTER,
    )
    return task, Shared(task)


def make_config(size: Size, scoring: ScoringConfig) -> NetworkConfig:
    """A network's rules; one epoch is all rounds."""
    return NetworkConfig(
        name="gaming",
        genesis_ms=Millis(0),
        backbone="tiny-llama",
        probe="00" * 32,
        chain=ChainConfig(chain_id=1, federation="0x" + "11" * 20, token="0x" + "22" * 20),
        adapter=ADAPTER,
        training=size.training,
        compression=CompressionConfig(),
        scoring=scoring,
        settlement=SettlementConfig(rounds_per_epoch=size.num_rounds),
    )


# --- a world ---------------------------------------------------------------------------------------------------------


class World:
    """One epoch of a federation in which the player follows one strategy."""

    def __init__(self, size: Size, seed: int, strategy: Strategy, player: int) -> None:
        self.size, self.seed, self.strategy, self.player = size, seed, strategy, player
        self.task, self._shared = make_task(size, seed)
        extra = range(size.num_peers, size.num_peers + len(strategy.stakes) - 1)
        self.mine = [player, *extra]
        """Registry indices of the player's identities."""
        stakes = [STAKE] * size.num_peers + list(strategy.stakes[1:])
        stakes[player] = strategy.stakes[0]
        self.names = [PeerId(f"peer-{index}") for index in range(len(stakes))]
        members = tuple(
            Member(MemberIndex(index), f"0x{index:040x}", name, bytes(48), Wei(stake), active=True)
            for index, (name, stake) in enumerate(zip(self.names, stakes, strict=True))
        )
        self.roster = Roster(1, 0, members, tuple(MemberIndex(index) for index in range(size.num_peers)))
        samples = WHOLE if strategy.is_whole else size.samples_per_stratum
        self._samples = samples
        self.config = make_config(size, ScoringConfig(committee_size=size.num_peers))
        plain = ScoringConfig(committee_size=size.num_peers, duplicate_cosine=1.0, duplicate_overlap=1.0)
        self._plain_config = make_config(size, plain)
        self.bases: list[Tensors] = [self.task.initial]
        self.best: list[list[Tensors]] = []
        """By round the other peers' best paid updates, as received."""
        self.totals: dict[int, int] = {}
        """Contributions so far, by registry index."""
        self.payloads: dict[int, Digest] = {}
        self.deltas: list[dict[str, Array]] = []
        """What honest work gives every peer in this round."""
        self.round = Round(0)
        self._store = Store()
        self._plain = dict.fromkeys(range(len(stakes)), 0.0)
        self._norms = np.zeros(len(stakes))
        self._alike = {"cosine": 0.0, "overlap": 0.0}
        self._residuals: dict[int, Digest] = {}
        self._pending: dict[int, Digest] = {}
        self._noise = np.random.default_rng([seed, 99])

    @property
    def base(self) -> Tensors:
        """Where the round starts from."""
        return self.bases[-1]

    def train(self, data: Sequence[Sequence[Encoded]]) -> list[dict[str, Array]]:
        """Deltas after local steps on these samples, each drawn in its own order."""
        draws = [f"{self.seed} {self.round} sybil {index}" for index in range(len(data))]
        trained = self.task.model.train([self.base] * len(data), data, self.task.training, draws)
        return [subtract(adapter, self.base) for adapter in trained]

    def add_noise(self, delta: Tensors, share: float) -> Tensors:
        """Normal noise of `share` times the norm, on the delta's nonzero values (everywhere if it has none)."""
        energy = sum(float(np.sum(np.square(part, dtype=np.float64))) for part in delta.values())
        num = sum(int(np.count_nonzero(part)) for part in delta.values())
        scale = share * np.sqrt(energy / num) if num else 1e-3
        noisy = {}
        for name in sorted(delta):
            noise = self._noise.normal(0, scale, delta[name].shape).astype(np.float32)
            noisy[name] = delta[name] + (noise * (delta[name] != 0) if num else noise)
        return noisy

    def read(self, payload: Digest) -> Update:
        """An update as its receivers see it."""
        coded = work.split_payload(self._store.get(payload))[1]
        limit = self.config.limits.payload_bytes_max
        return _decode_once(coded, tuple(sorted(get_shapes(self.base).items())), self.config.compression, limit)

    def run(self) -> dict[str, Any]:
        """All rounds: everybody's reward over an equal share, undefended value and mean norm; the held-out loss."""
        base = self._store.put(encode_tensors(self.base))
        shapes = get_shapes(self.base)
        proposal: Proposal | None = None
        earlier: tuple[Remembered, ...] = ()
        for number in range(self.size.num_rounds):
            self.round = Round(number)
            self.deltas = self._shared.train(base, self.base, number)
            announced = self._announce(base)
            asked = self._ask(base, proposal.base if proposal else None, announced, earlier)
            reveals = [self._evaluate(asked, announced, index) for index in range(self.size.num_peers)]
            by_payload = {announcement.payload: announcement for announcement in announced}
            draft = draft_proposal(self.config, self.roster, proposal, self.round, base, reveals, by_payload)
            request = merge_request(draft)
            if request:
                base = work.merge_updates(self._store, shapes, self.config, request).new_base
            proposal = msgspec.structs.replace(draft, new_base=base)
            self._close(proposal)
            best_first = sorted(proposal.updates, key=lambda update: -update.contribution)
            earlier = (*(Remembered(update.payload, is_paid=True) for update in best_first), *earlier)
            earlier = earlier[:EARLIER_MAX]
            self.bases.append(decode_tensors(self._store.get(base), shapes))
        assert proposal is not None, "at least one round"
        pool = self.config.pool_per_epoch() / self.size.num_peers
        return {
            "rewards": [leaf.reward_wei / pool for leaf in from_wire(proposal.leaves)],
            "plain": [max(0.0, value) for value in self._plain.values()],
            "norms": (self._norms / self.size.num_rounds).tolist(),
            "mine": self.mine,
            "loss": float(self.task.losses([self.base], self.task.test)[0]),
            **self._alike,
        }

    def _announce(self, base: Digest) -> list[Announcement]:
        """Everybody's update, the player's last."""
        self._pending = {}
        honest = [index for index in range(self.size.num_peers) if index != self.player]
        announced = [self._commit(base, index, Move(self.deltas[index], is_work=True)) for index in honest]
        moves = self.strategy.moves(self)
        announced += [self._commit(base, index, move) for index, move in zip(self.mine, moves, strict=True)]
        updates = {index: self.read(payload) for index, payload in self.payloads.items()}
        vectors = {index: Sparse(update.positions, update.values) for index, update in updates.items()}
        self._norms += compute_norms([vectors[index] for index in sorted(vectors)]) * len(vectors) / len(self._norms)
        compared = self.mine if len(self.mine) > 1 else honest
        rows, size = [vectors[index] for index in compared], updates[self.player].layout.size
        above = np.triu_indices(len(rows), 1)
        for name, figures in (("cosine", compute_cosines(rows, size)), ("overlap", compute_overlaps(rows, size))):
            self._alike[name] = max(self._alike[name], float(figures[above].max(initial=0.0)))
        return announced

    def _commit(self, base: Digest, index: int, move: Move) -> Announcement:
        learner = TaskLearner(self.task, self._shared, self._samples, move.delta)
        residual = self._residuals.get(index) if move.is_work else None
        done = work.train_update(
            learner, self._store, self.config, Train(self.round, self.names[index], base, residual)
        )
        self._pending[index], self.payloads[index] = done.residual, done.payload
        return Announcement(self.round, self.names[index], base, done.payload, done.payload_bytes, 1)

    def _ask(
        self, base: Digest, previous: Digest | None, announced: Sequence[Announcement], earlier: tuple[Remembered, ...]
    ) -> ScoreUpdates:
        shares = compute_shares(self.roster, self.config.stake_cap())
        updates = tuple(Weighted(announcement.payload, shares[announcement.peer]) for announcement in announced)
        return ScoreUpdates(self.round, base, previous, updates, earlier)

    def _evaluate(self, asked: ScoreUpdates, announced: Sequence[Announcement], evaluator: int) -> ScoreReveal:
        learner = TaskLearner(self.task, self._shared, self._samples)
        seed = int.from_bytes(compute_digest(f"{self.seed} {self.round} {evaluator}".encode())[:7], "big")
        scored = work.score_updates(learner, self._store, self.config, asked, seed, bytes(32), self._read)
        values = scored.contributions
        if evaluator == 0:
            plain = msgspec.structs.replace(asked, previous=None, earlier=())
            undefended = work.score_updates(
                learner, self._store, self._plain_config, plain, seed, bytes(32), self._read
            )
            for announcement, value in zip(announced, undefended.contributions, strict=True):
                self._plain[self.names.index(announcement.peer)] += value
        if (evaluator - self.player) % self.size.num_peers < self.strategy.num_liars:
            mine = self.names[self.player]
            values = tuple(
                Contribution(10 * abs(value) if announcement.peer == mine else -abs(value))
                for announcement, value in zip(announced, values, strict=True)
            )
        pairs = zip(announced, values, strict=True)
        scores = sorted((Score(one.payload, value) for one, value in pairs), key=lambda score: score.payload)
        return ScoreReveal(self.round, MemberIndex(evaluator), bytes(32), tuple(scores))

    def _read(self, payloads: Sequence[Digest]) -> tuple[list[PeerId], list[Update]]:
        """See `work.ReadUpdates`: nine evaluators decode the same bytes in one process, and once is enough."""
        makers = [work.split_payload(self._store.get(payload))[0] for payload in payloads]
        return makers, [self.read(payload) for payload in payloads]

    def _close(self, proposal: Proposal) -> None:
        """What was merged leaves its maker's residual; who earned what is public."""
        for update in proposal.updates:
            self.totals[update.member] = self.totals.get(update.member, 0) + update.contribution
            if update.weight > 0:
                self._residuals[update.member] = self._pending[update.member]
        others = [update for update in proposal.updates if update.member not in self.mine]
        others.sort(key=lambda update: -update.contribution)
        self.best.append([self.read(update.payload).tensors() for update in others[:3]])


def run_world(job: tuple[Size, int, int, int]) -> tuple[int, int, dict[str, Any]]:
    """(seed, strategy's number, figures) of a job: (size, seed, number, player)."""
    size, seed, number, player = job
    torch.set_num_threads(1)
    start = time.process_time()
    figures = World(size, seed, make_strategies(size)[number], player).run()
    return seed, number, {**figures, "cpu_s": time.process_time() - start}


@functools.lru_cache(maxsize=256)
def _decode_once(
    data: bytes, shapes: tuple[tuple[str, tuple[int, ...]], ...], config: CompressionConfig, bytes_max: int
) -> Update:
    return decode_payload(data, dict(shapes), config, bytes_max)


# --- proof of computation --------------------------------------------------------------------------------------------

PROVERS = ("honest", "skips the batch", "copy of the last round")


def run_proofs(job: tuple[Size, int, int]) -> tuple[int, dict[str, list[bool]], dict[str, Any]]:
    """(steps on the own batch, who passed, figures) of a job: (size, seed, steps), on torch learners as a node's."""
    size, seed, steps = job
    torch.set_num_threads(1)
    start = time.process_time()
    training = msgspec.structs.replace(tasks.TRAINING, learning_rate=1e-2)
    config = make_config(size._replace(training=training), ScoringConfig(work_steps=steps))
    task = tasks.make_task(
        size.proof_peers, seed, num_topics=size.num_topics, num_probe=8, training=training, adapter=ADAPTER
    )
    model, tokenizer = load_backbone(tasks.BACKBONE)
    model.set_attn_implementation("eager")
    peft = build_peft(model, ADAPTER)
    public = tuple(sample for part in task.probe.values() for sample in part[::2])
    probe = {topic: part[1::2] for topic, part in task.probe.items()}
    learners = [
        TorchLearner.on_peft(
            peft,
            ADAPTER_NAME,
            tokenizer.eos_token_id,
            config,
            Data(samples, probe, task.test, compute_digest(f"{seed} {peer}".encode()), public),
        )
        for peer, samples in enumerate(task.peers)
    ]
    store, shapes = Store(), learners[0].shapes()
    base = store.put(encode_tensors(learners[0].initial()))
    passed: dict[str, list[bool]] = {name: [] for name in PROVERS}
    residuals: list[Digest | None] = [None] * len(learners)
    last: list[bytes] = []
    share = Weight(WEIGHT_ONE // len(learners))
    for number in range(size.proof_rounds):
        round = Round(number)
        payloads: dict[str, list[Digest]] = {name: [] for name in PROVERS}
        for peer, learner in enumerate(learners):
            done = work.train_update(
                learner, store, config, Train(round, PeerId(f"honest {peer}"), base, residuals[peer])
            )
            rest = residuals[peer]
            delta = learner.train(decode_tensors(store.get(base), shapes), round).delta
            residual = decode_tensors(store.get(rest), shapes) if rest else None
            maker = PeerId(f"skipper {peer}")
            payloads["honest"].append(done.payload)
            skipped, _, _ = work.compress_delta(store, config.compression, delta, residual, maker)
            payloads["skips the batch"].append(skipped)
            residuals[peer] = done.residual
        payloads["copy of the last round"] = [
            store.put(work.join_payload(PeerId(f"copycat {peer}"), coded)) for peer, coded in enumerate(last)
        ]
        asked = tuple(Weighted(payload, share) for name in PROVERS for payload in payloads[name])
        scored = work.score_updates(learners[0], store, config, ScoreUpdates(round, base, None, asked), seed, bytes(32))
        answers = iter(scored.proofs)
        for name in PROVERS:
            passed[name] += [next(answers) for _ in payloads[name]]
        last = [work.split_payload(store.get(payload))[1] for payload in payloads["honest"]]
        merged = tuple(Weighted(payload, share) for payload in payloads["honest"])
        base = work.merge_updates(store, shapes, config, Merge(Digest(bytes(32)), base, merged)).new_base
    loss = learners[0].evaluate(decode_tensors(store.get(base), shapes))
    return steps, passed, {"loss": loss, "cpu_s": time.process_time() - start}


# --- time ------------------------------------------------------------------------------------------------------------


def time_comparison(num_updates: int, num_earlier: int, size: int) -> tuple[float, float]:
    """CPU seconds of (duplicates, repeats) for random updates of a sixteenth of all parameters."""
    rng = np.random.default_rng(0)
    vectors = [
        Sparse(np.flatnonzero(rng.random(size) < 1 / 16), np.zeros(0, np.float32))
        for _ in range(num_updates + num_earlier)
    ]
    vectors = [
        Sparse(vector.positions, rng.standard_normal(len(vector.positions)).astype(np.float32)) for vector in vectors
    ]
    updates, earlier = vectors[:num_updates], vectors[num_updates:]
    seconds: dict[str, float] = {}
    with harness.cpu_seconds(seconds, "duplicates"):
        leaders = find_leaders(updates, size, Limits(0.9, 0.4))
    assert leaders == list(range(num_updates)), "random updates are no duplicates"
    with harness.cpu_seconds(seconds, "repeats"):
        compute_repeated_gains(updates, earlier, rng.standard_normal(size), np.ones((num_updates, num_earlier), bool))
    return seconds["duplicates"], seconds["repeats"]


# --- all of it -------------------------------------------------------------------------------------------------------


class Payoff(NamedTuple):
    """A strategy's ratios to honest work, by seed."""

    rewards: list[float]
    plain: list[float]


def main() -> None:
    """Every strategy in every seed's world, the tables, the targets."""
    options = harness.parse_options(__doc__)
    size = QUICK if options.quick else DEFAULT
    strategies = make_strategies(size)
    started_s = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        honest = [number for number, strategy in enumerate(strategies) if strategy.group == "honest"]
        worlds = _run(pool, [(size, seed, number, 0) for seed in size.seeds for number in honest])
        players = {seed: _choose_players(worlds[seed, 0]) for seed in size.seeds}
        others = [number for number in range(len(strategies)) if number not in honest]
        worlds |= _run(
            pool,
            [
                (size, seed, number, players[seed][strategies[number].is_smallest])
                for seed in size.seeds
                for number in others
            ],
        )
        proofs = pool.map(run_proofs, [(size, seed, steps) for seed in size.seeds for steps in size.proof_steps], 1)
    payoffs = {
        number: _compare(
            [worlds[seed, number] for seed in size.seeds], [worlds[seed, reference] for seed in size.seeds]
        )
        for number, reference in ((n, honest[strategies[n].is_whole]) for n in others)
    }
    rows = [
        [
            strategies[number].group,
            strategies[number].name,
            float(np.mean(payoff.plain)),
            float(np.mean(payoff.rewards)),
            min(payoff.rewards),
            max(payoff.rewards),
        ]
        for number, payoff in payoffs.items()
    ]
    columns = ("group", "strategy", "undefended", "reward", "least", "greatest")
    title = f"Reward over the same peer's when honest; {size.num_peers} peers, {size.num_rounds} rounds"
    harness.print_table(f"{title}, {len(size.seeds)} seeds", columns, rows)
    _print_alike(size, strategies, worlds)
    rates = _print_proofs(size, proofs)
    duplicates_s, repeats_s = time_comparison(*size.compared)
    num_updates, num_earlier, num_parameters = size.compared
    print(
        f"\n{num_updates} updates of {num_parameters} parameters at 6.25%: duplicates {duplicates_s:.2f} CPU s, "
        f"repeats of {num_earlier} earlier ones {repeats_s:.2f} CPU s"
    )
    cpu_s = sum(world["cpu_s"] for world in worlds.values()) + sum(figures["cpu_s"] for *_, figures in proofs)
    print(f"{time.perf_counter() - started_s:.0f} s on two processes, {cpu_s:.0f} CPU s")
    worst = {
        group: max(np.mean(p.rewards) for n, p in payoffs.items() if strategies[n].group == group)
        for group in ("free rider", "sybil", "inflation", "evaluator")
    }
    targets = [
        harness.Target("free riders over honest, worst", float(worst["free rider"]), 0.05, "less"),
        harness.Target("sybils with one stake over one peer, worst", float(worst["sybil"]), 1.05, "less"),
        harness.Target("inflation by norm over honest, worst", float(worst["inflation"]), 1.0, "less"),
        harness.Target("lying evaluators over honest, worst", float(worst["evaluator"]), 1.0, "less"),
        *(harness.Target(f"honest proofs passed, {steps} steps", rate, 0.9, "more") for steps, rate in rates.items()),
    ]
    figures = {
        "size": size._asdict(),
        "payoffs": {strategies[number].name: payoff._asdict() for number, payoff in payoffs.items()},
        "worlds": {f"{strategies[number].name}, seed {seed}": world for (seed, number), world in worlds.items()},
        "comparison_cpu_s": [duplicates_s, repeats_s],
        "cpu_s": cpu_s,
    }
    harness.finish(options, figures, targets)


def _run(pool: Any, jobs: Sequence[tuple[Size, int, int, int]]) -> dict[tuple[int, int], dict[str, Any]]:
    return {(seed, number): figures for seed, number, figures in pool.imap_unordered(run_world, jobs)}


def _choose_players(honest: Mapping[str, Any]) -> tuple[int, int]:
    """(the peer of the median honest reward, the peer of the smallest updates)."""
    rewards = honest["rewards"]
    return sorted(range(len(rewards)), key=lambda i: rewards[i])[len(rewards) // 2], int(np.argmin(honest["norms"]))


def _compare(worlds: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]) -> Payoff:
    rewards, plain = [], []
    for world, reference in zip(worlds, references, strict=True):
        mine, player = world["mine"], world["mine"][0]
        rewards.append(sum(world["rewards"][i] for i in mine) / reference["rewards"][player])
        shares = [
            sum(part["plain"][i] for i in who) / sum(part["plain"])
            for part, who in ((world, mine), (reference, [player]))
        ]
        plain.append(shares[0] / shares[1])
    return Payoff(rewards, plain)


def _print_alike(
    size: Size, strategies: Sequence[Strategy], worlds: Mapping[tuple[int, int], Mapping[str, Any]]
) -> None:
    limits = ScoringConfig()
    names = (
        "honest",
        "2 sybils, one stake, data divided",
        "2 sybils, one stake, other draws",
        "two stakes, one update",
    )
    rows = []
    for number, strategy in enumerate(strategies):
        if strategy.name in names:
            found = [worlds[seed, number] for seed in size.seeds]
            what = "honest peers" if strategy.name == "honest" else f"identities: {strategy.name}"
            rows.append([what, max(world["cosine"] for world in found), max(world["overlap"] for world in found)])
    rows.append(["limit", limits.duplicate_cosine, limits.duplicate_overlap])
    harness.print_table("How alike two updates of a round are at most, over chance", ("of", "cosine", "overlap"), rows)


def _print_proofs(size: Size, proofs: Sequence[tuple[int, dict[str, list[bool]], dict[str, Any]]]) -> dict[int, float]:
    """The table; returns how often honest peers pass, by steps on the own batch."""
    rates: dict[int, float] = {}
    rows = []
    for steps in size.proof_steps:
        runs = [(passed, figures) for other, passed, figures in proofs if other == steps]
        shares = [float(np.mean([bit for passed, _ in runs for bit in passed[name]] or [False])) for name in PROVERS]
        rates[steps] = shares[0]
        rows.append([steps, *shares, float(np.mean([figures["loss"] for _, figures in runs]))])
    title = f"Passed proofs of computation, of {tasks.TRAINING.steps} local steps so many on the own batch"
    harness.print_table(title, ("steps", *PROVERS, "loss"), rows)
    return rates


if __name__ == "__main__":
    main()
