"""The heavy work that a peer asks for (train, score, merge), on tensors, for both drivers.

Knows a Learner and a blob store; no socket, clock or message. Each function answers one Action of `protocol.events`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from p2pfm.config import CompressionConfig, NetworkConfig
from p2pfm.contribution.aumann_shapley import Diagonal, Player
from p2pfm.contribution.duplicates import Limits, find_leaders
from p2pfm.contribution.repeats import compute_repeated_gains, compute_room
from p2pfm.contribution.rounding import to_contribution
from p2pfm.contribution.similarity import Matrix, Sparse, Vector, compute_cosines
from p2pfm.contribution.work_proof import check_work, draw_work
from p2pfm.errors import Reject, WorldError
from p2pfm.learner import Guarantee, Learner, Training
from p2pfm.lora.compress import Update, compress, decode_payload, feed_back
from p2pfm.lora.cross_term import compute_cross_term_ratio, has_cross_term
from p2pfm.lora.delta import add, compute_layout, decode_tensors, encode_tensors, flatten, subtract
from p2pfm.lora.merge import clip_factors, merge
from p2pfm.lora.unlearn import MergedRound, MergedUpdate
from p2pfm.messages import EPSILON_MICRO_MAX, MICRO, PICO, DeclaredPrivacy
from p2pfm.protocol.events import Condense, Evaluate, Evaluated, Merge, Merged, Scored, ScoreUpdates, Train, Trained
from p2pfm.protocol.shards import is_shard_name
from p2pfm.types import NANO, WEIGHT_ONE, Digest, PeerId, Round, Tensors

Shapes = Mapping[str, tuple[int, ...]]

ReadUpdates = Callable[[Sequence[Digest]], tuple[list[PeerId], list[Update]]]
"""(makers, updates) of payloads that are held."""

CompareUpdates = Callable[[Sequence[Digest], Sequence[Vector], int], Matrix]
"""Cosines of named updates of a length, see `compute_cosines`: of equal names they are the same."""

NAME_BYTES_MAX = 128
"""The wire's bound of a peer id."""


class BlobStore(Protocol):
    """Content-addressed bytes."""

    def put(self, data: bytes) -> Digest:
        """Keep `data`; returns its SHA-256."""
        ...

    def get(self, digest: Digest) -> bytes:
        """The bytes of a digest.

        Raises:
            KeyError: not held (the core asks only for what it has heard of as fetched: a bug).
        """
        ...


def train_update(learner: Learner, blobs: BlobStore, config: NetworkConfig, action: Train) -> Trained:
    """Local steps from the base, error feedback, compression; payload and next residual go to the store."""
    shapes = learner.shapes()
    base = decode_tensors(blobs.get(action.base), shapes)
    residual = None if action.residual is None else decode_tensors(blobs.get(action.residual), shapes)
    training = learner.train(base, action.round, draw_public(config, action))
    validate_training(training)
    packed = compress_delta(blobs, config.compression, training.delta, residual, action.maker)
    return make_trained(action, training, packed)


def draw_public(config: NetworkConfig, action: Train) -> int | None:
    """The seed of the public batch that a maker's last steps are to be taken on; None: nothing is to be proven."""
    if not config.scoring.work_steps:
        return None
    return draw_work(config.network_id(), action.round, action.maker)


def validate_training(training: Training) -> None:
    """Raises: WorldError: the numbers have left the finite ones."""
    if not math.isfinite(training.loss_nats or 0) or not all(np.isfinite(t).all() for t in training.delta.values()):
        raise WorldError("local training diverged (not a finite number): lower training.learning_rate")


def make_trained(action: Train, training: Training, packed: tuple[Digest, int, Digest]) -> Trained:
    """The answer to `Train`; `packed`: the payload, its bytes, the next residual."""
    payload, payload_bytes, rest = packed
    loss_nats = training.loss_nats
    return Trained(
        round=action.round,
        base=action.base,
        payload=payload,
        payload_bytes=payload_bytes,
        num_tokens=training.num_tokens,
        residual=rest,
        loss_nano=None if loss_nats is None else round(loss_nats * NANO),
        privacy=None if training.guarantee is None else _declare(training.guarantee),
    )


def score_updates(
    learner: Learner,
    blobs: BlobStore,
    config: NetworkConfig,
    action: ScoreUpdates,
    seed: int,
    salt: bytes,
    read: ReadUpdates | None = None,
    compare: CompareUpdates = lambda names, rows, size: compute_cosines(rows, size),
) -> Scored:
    """Aumann-Shapley contributions of the round's updates, in the order asked.

    Weights are p_i in parts of WEIGHT_ONE; updates are clipped to the median norm first. Both gradients are taken on
    the same fresh sample, drawn from `seed`. Where updates are compared, of those that are alike only the first has a
    weight; what an update repeats of the last aggregate or of earlier updates earns nothing (and is not excused where
    it harms). `salt`: 32 fresh secret bytes for the commitment.

    Args:
        read: where decoded updates come from, if not from the payloads' bytes.
        compare: where cosines come from, if they are not computed anew.
    """
    shapes = learner.shapes()
    read = read or partial(_read_updates, blobs, shapes, config)
    base = decode_tensors(blobs.get(action.base), shapes)
    makers, updates = read([item.payload for item in action.updates])
    factors = clip_factors(updates)
    size = compute_layout(shapes).size
    earlier, is_counted = _read_earlier(blobs, read, shapes, config, base, action, makers)
    leaders: Sequence[int] = range(len(updates))
    if action.is_compared:
        limits = Limits(config.scoring.duplicate_cosine, config.scoring.duplicate_overlap)
        among = compare([item.payload for item in action.updates], updates, size)
        leaders = find_leaders(updates, size, limits, among)
    shares = [
        weighted.weight / WEIGHT_ONE * factor if leader == index else 0.0
        for index, (weighted, factor, leader) in enumerate(zip(action.updates, factors, leaders, strict=True))
    ]
    players = [Player(update.positions, update.values, share) for update, share in zip(updates, shares, strict=True)]
    game = Diagonal(lambda at: learner.gradient(at, seed)[1], base, players)
    slope = game.compute_slope()
    values = game.earn(slope)
    if not all(math.isfinite(value) for value in values):
        raise WorldError("the probe's loss is no finite number at this base: its contributions cannot be measured")
    gains = compute_repeated_gains(updates, earlier, slope, is_counted)
    paid = [value - max(0.0, share * gain) for value, share, gain in zip(values, shares, gains, strict=True)]
    proofs: tuple[bool, ...] = ()
    if config.scoring.work_steps:
        trained = (add(base, update.tensors(), factor) for update, factor in zip(updates, factors, strict=True))
        draws = [draw_work(config.network_id(), action.round, maker) for maker in makers]
        proofs = tuple(check_work(learner.work_loss, base, trained, draws, seed))
    return Scored(action.round, tuple(to_contribution(value) for value in paid), salt, proofs, action.shard)


def merge_updates(blobs: BlobStore, shapes: Shapes, config: NetworkConfig, action: Merge) -> Merged:
    """The merged base, the same bytes on every machine and in every order of `action.updates`."""
    base = decode_tensors(blobs.get(action.base), shapes)
    _, updates = _read_updates(blobs, shapes, config, [item.payload for item in action.updates])
    weights = [weighted.weight for weighted in action.updates]
    merged = merge(base, list(zip(updates, weights, strict=True)))
    return Merged(request=action.request, new_base=blobs.put(encode_tensors(merged)))


def condense_updates(blobs: BlobStore, shapes: Shapes, config: NetworkConfig, action: Condense) -> Merged:
    """A shard's merged update as one payload, the same bytes on every machine."""
    base = decode_tensors(blobs.get(action.base), shapes)
    _, updates = _read_updates(blobs, shapes, config, [item.payload for item in action.updates])
    weights = [weighted.weight for weighted in action.updates]
    delta = subtract(merge(base, list(zip(updates, weights, strict=True))), base)
    payload, _, _ = compress_delta(blobs, get_codec(config, action.maker), delta, None, action.maker)
    return Merged(request=action.request, new_base=payload)


def measure_cross_term(blobs: BlobStore, shapes: Shapes, config: NetworkConfig, action: Merge) -> float:
    """How far this merge of factors is from a merge of products (`lora.cross_term`): for people only."""
    if not has_cross_term(shapes):
        return 0.0
    base = decode_tensors(blobs.get(action.base), shapes)
    _, updates = _read_updates(blobs, shapes, config, [item.payload for item in action.updates])
    weights = [weighted.weight for weighted in action.updates]
    return compute_cross_term_ratio(list(zip(updates, weights, strict=True)), base)


def read_merged_round(
    blobs: BlobStore, shapes: Shapes, config: NetworkConfig, round: Round, action: Merge, new_base: Digest
) -> MergedRound:
    """A certified round as `lora.unlearn` needs it: `action` is its `committee.merge_request`, payloads from the store.

    Raises:
        WorldError: a payload is not held any more; names it, so that it can be fetched from whoever kept it.
    """
    missing = [item.payload.hex() for item in action.updates if not _is_held(blobs, item.payload)]
    if missing:
        raise WorldError(
            f"round {round}: {len(missing)} of {len(action.updates)} payloads are not held here; fetch "
            f"{', '.join(missing)} from a peer that kept them"
        )
    makers, updates = _read_updates(blobs, shapes, config, [item.payload for item in action.updates])
    merged = (
        MergedUpdate(maker, update, item.weight)
        for maker, update, item in zip(makers, updates, action.updates, strict=True)
    )
    return MergedRound(round, action.base, new_base, tuple(merged))


def evaluate(learner: Learner, blobs: BlobStore, action: Evaluate) -> Evaluated:
    """Held-out loss at a base on the fixed test split."""
    loss_nats = learner.evaluate(decode_tensors(blobs.get(action.base), learner.shapes()))
    if not math.isfinite(loss_nats):
        raise WorldError("the held-out loss is no finite number at this base")
    return Evaluated(round=action.round, loss_nano=round(loss_nats * NANO))


def validate_blob(kind: str, data: bytes, shapes: Shapes, config: NetworkConfig) -> PeerId | None:
    """Check that bytes are what `Fetch.kind` says: a "payload" (returns its maker) or a "base" (None).

    Raises:
        Reject: malformed.
    """
    if kind == "payload":
        maker, coded = split_payload(data)
        decode_payload(coded, shapes, get_codec(config, maker), config.limits.payload_bytes_max)
        return maker
    if kind == "base":
        decode_tensors(data, shapes)
        return None
    raise AssertionError(f"no such kind of blob: {kind}")


def compress_delta(
    blobs: BlobStore, config: CompressionConfig, delta: Tensors, residual: Tensors | None, maker: PeerId
) -> tuple[Digest, int, Digest]:
    """Compress a delta with error feedback: (payload, its bytes, next residual), all in the store."""
    wanted = feed_back(residual, delta, config)
    coded, decoded = compress(wanted, config)
    payload = join_payload(maker, coded)
    return blobs.put(payload), len(payload), blobs.put(encode_tensors(subtract(wanted, decoded)))


def get_codec(config: NetworkConfig, maker: PeerId) -> CompressionConfig:
    """How a maker's updates are compressed: a shard's keep every value, in two bits.

    A peer's next update makes up for what this one left out; a shard is dealt anew, and has no next one.
    """
    compression = config.compression
    return msgspec.structs.replace(compression, keep=compression.chunk) if is_shard_name(maker) else compression


def join_payload(maker: PeerId, coded: bytes) -> bytes:
    """A payload's bytes: one byte with the length of its maker's peer id, the id, the coded update."""
    name = maker.encode()
    assert 0 < len(name) <= NAME_BYTES_MAX
    return bytes([len(name)]) + name + coded


def split_payload(data: bytes) -> tuple[PeerId, bytes]:
    """Inverse of `join_payload`. Raises: Reject."""
    size = data[0] if data else 0
    name = data[1 : 1 + size]
    try:
        maker = PeerId(name.decode())
    except UnicodeDecodeError as error:
        raise Reject(f"expected the maker's peer id, got bytes that are no text: {error}") from error
    if not 0 < size <= NAME_BYTES_MAX or len(name) != size:
        raise Reject(f"expected a payload that begins with its maker's peer id, got {len(data)} bytes")
    return maker, data[1 + size :]


def _is_held(blobs: BlobStore, digest: Digest) -> bool:
    try:
        blobs.get(digest)
    except KeyError:
        return False
    return True


def _declare(guarantee: Guarantee) -> DeclaredPrivacy:
    """As integers, rounded up: a peer promises no more than it keeps."""
    return DeclaredPrivacy(
        epsilon_micro=min(max(1, math.ceil(guarantee.epsilon * MICRO)), EPSILON_MICRO_MAX),
        delta_pico=max(1, math.ceil(guarantee.delta * PICO)),
    )


def _read_updates(
    blobs: BlobStore, shapes: Shapes, config: NetworkConfig, payloads: Sequence[Digest]
) -> tuple[list[PeerId], list[Update]]:
    """(makers, updates) of payloads that are in the store."""
    pairs = [split_payload(blobs.get(payload)) for payload in payloads]
    bytes_max = config.limits.payload_bytes_max
    updates = [decode_payload(coded, shapes, get_codec(config, maker), bytes_max) for maker, coded in pairs]
    return [maker for maker, _ in pairs], updates


def _read_earlier(
    blobs: BlobStore,
    read: ReadUpdates,
    shapes: Shapes,
    config: NetworkConfig,
    base: Tensors,
    action: ScoreUpdates,
    makers: Sequence[PeerId],
) -> tuple[list[Vector], NDArray[np.bool_]]:
    """(vectors, (num_updates, num_vectors) which count against whose update): the last aggregate, then what is still
    held of earlier updates, as many as the adapter's size allows."""
    size = compute_layout(shapes).size
    room = compute_room(size, size * config.compression.keep // config.compression.chunk)
    held = [item for item in action.earlier if _is_held(blobs, item.payload)][:room]
    earlier_makers, updates = read([item.payload for item in held])
    is_counted = np.array(
        [
            [item.is_paid or maker != other for item, other in zip(held, earlier_makers, strict=True)]
            for maker in makers
        ],
        np.bool_,
    ).reshape(len(makers), len(held))
    if action.previous is None or not _is_held(blobs, action.previous):
        return [*updates], is_counted  # the first round, or this peer was away and never had the base before
    moved = flatten(subtract(base, decode_tensors(blobs.get(action.previous), shapes)))
    positions = np.flatnonzero(moved)
    return [Sparse(positions, moved[positions]), *updates], np.insert(is_counted, 0, True, axis=1)
