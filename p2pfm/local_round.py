"""One federated round in one process, on a peft model that the caller owns: no node, no chain, no network.

The round is the real one: each peer trains from the same base, its delta travels as compressed bytes, contributions
are measured by Aumann-Shapley, and the merge weighs by them. Every rule of it is `p2pfm.work`'s and
`p2pfm.protocol`'s; here are only the loop over peers and the care for the caller's model.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from p2pfm import work
from p2pfm.config import (
    ChainConfig,
    CompressionConfig,
    LimitConfig,
    NetworkConfig,
    ScoringConfig,
    TrainingConfig,
    validate_network,
)
from p2pfm.errors import OperatorError, WorldError
from p2pfm.lora.batches import Encoded
from p2pfm.lora.checkpoint import validate_tensors
from p2pfm.lora.delta import decode_tensors, encode_tensors
from p2pfm.lora.examples import Example, encode_examples
from p2pfm.lora.layers import adapter_shapes, get_adapter_tensors, get_parameters, set_adapter_tensors
from p2pfm.lora.torch_learner import Data, TorchLearner
from p2pfm.protocol.committee import compute_merge_weights
from p2pfm.protocol.events import Evaluate, Merge, ScoreUpdates, Train, Weighted
from p2pfm.types import NANO, WEIGHT_ONE, Array, Digest, Millis, PeerId, Round, Weight, compute_digest

NOWHERE = "0x" + "0" * 40
"""The address of a contract that is never asked."""
DEFAULT_TRAINING = TrainingConfig()
DEFAULT_COMPRESSION = CompressionConfig()


@dataclass(frozen=True, slots=True)
class RoundResult:
    """What one round did. Mappings are by peer, in the order in which peers were given."""

    round: int
    contributions: dict[str, float]
    """Aumann-Shapley value of each peer's update [nats/token]: by how much it lowered the held-out loss. Of peers with
    the same data only the first is worth anything: the others repeat it."""
    weights: dict[str, float]
    """What each update weighed in the merge; 0 where its contribution is not positive."""
    training_losses: dict[str, float]
    """Mean loss of each peer's local steps [nats/token]."""
    payload_bytes: dict[str, int]
    """What each peer would have sent."""
    dense_bytes: int
    """The same as plain float32."""
    cross_term: float
    """How far merging A and B is from merging B A, of what the merge moved (`lora.cross_term`); 0 for other kinds."""
    loss_before: float
    """Held-out loss before the merge [nats/token]."""
    loss_after: float
    """And after it. The weights were chosen on the same data: for a figure without that favour, measure the model on
    data that no round has seen."""
    base: dict[str, Array]
    """The adapter that the model has now."""
    residuals: dict[str, bytes]
    """What compression left out, for the next round (`after`)."""
    previous: bytes
    """The base that this round started from: in the next one, repeating this round's aggregate earns nothing."""


def run_local_round(
    model: PeftModel,
    peers: Mapping[str, Iterable[Example]],
    held_out: Iterable[Example] | Mapping[str, Iterable[Example]],
    tokenizer: Any = None,
    *,
    training: TrainingConfig = DEFAULT_TRAINING,
    compression: CompressionConfig = DEFAULT_COMPRESSION,
    after: RoundResult | None = None,
) -> RoundResult:
    """Train every peer from the model's adapter, measure their updates on `held_out`, merge them into the model.

    The same arguments give the same result on one machine. If it raises, the model is as it was.

    Args:
        model: a peft causal language model with a trainable adapter; its present values are the base. Dropout is off.
        peers: private data by the peer's name.
        held_out: what contributions are measured on; as a mapping: strata of equal weight.
        tokenizer: needed for text; examples may be tokens already (`lora.examples` says how).
        training: each peer's local steps.
        compression: what the wire takes of an update.
        after: the result of the round before, with the same model.

    Raises:
        OperatorError: no peers, an empty dataset, an example that cannot be read, a model without a trainable adapter,
            `after` of another model, or training that diverged.
    """
    config = _make_config(training, compression)
    adapter = _validate_model(model)
    if after is not None:
        validate_tensors(after.base, adapter_shapes(model, adapter), "after")
    _validate_names(peers, config.limits.peers_max)
    strata = held_out if isinstance(held_out, Mapping) else {"held_out": held_out}
    if not strata:
        raise OperatorError("held_out: expected examples, or examples by stratum; got an empty mapping")
    num_tokens = model.get_input_embeddings().num_embeddings
    limits = (tokenizer, training.tokens_max, num_tokens)
    shared = {str(name): encode_examples(part, f"held-out data {name!r}", *limits) for name, part in strata.items()}
    private = {name: encode_examples(part, f"peer {name!r}", *limits) for name, part in peers.items()}
    pad = getattr(tokenizer, "pad_token_id", None) or 0  # of no effect: nothing sees what stands on its right
    with _lent(model, adapter):
        learners = {
            name: TorchLearner.on_peft(model, adapter, pad, config, Data(shard, shared, shared, _digest(shard)))
            for name, shard in private.items()
        }
        try:
            result = _run(config, learners, after)
        except WorldError as error:  # a node would try again later; here there is only the caller
            raise OperatorError(f"the round failed: {error}") from error
        set_adapter_tensors(model, result.base, adapter)
    return result


class MemoryBlobs:
    """`work.BlobStore` of one process; ends with it."""

    def __init__(self) -> None:
        self._blobs: dict[Digest, bytes] = {}

    def put(self, data: bytes) -> Digest:
        """See BlobStore."""
        digest = compute_digest(data)
        self._blobs[digest] = data
        return digest

    def get(self, digest: Digest) -> bytes:
        """See BlobStore."""
        return self._blobs[digest]


def _run(config: NetworkConfig, learners: Mapping[str, TorchLearner], after: RoundResult | None) -> RoundResult:
    blobs = MemoryBlobs()
    judge = next(iter(learners.values()))  # all hold the same model and the same held-out data
    base = blobs.put(encode_tensors(judge.initial()))
    round = Round(after.round + 1 if after else 0)
    kept = {name: blobs.put(data) for name, data in after.residuals.items()} if after else {}
    trained = {
        name: work.train_update(learner, blobs, config, Train(round, PeerId(name), base, kept.get(name)))
        for name, learner in learners.items()
    }
    share = Weight(WEIGHT_ONE // len(learners))
    payloads = [answer.payload for answer in trained.values()]
    previous = blobs.put(after.previous) if after else None
    measured = tuple(Weighted(payload, share) for payload in payloads)
    asked = ScoreUpdates(round=round, base=base, previous=previous, updates=measured)
    scored = work.score_updates(judge, blobs, config, asked, seed=0, salt=bytes(32))
    weights = compute_merge_weights(scored.contributions, [share] * len(payloads))
    new_base, cross_term = base, 0.0
    if any(weights):  # else the base stays, as in a network
        updates = tuple(Weighted(payload, weight) for payload, weight in zip(payloads, weights, strict=True))
        merging = Merge(request=base, base=base, updates=updates)
        new_base = work.merge_updates(blobs, judge.shapes(), config, merging).new_base
        cross_term = work.measure_cross_term(blobs, judge.shapes(), config, merging)
    # What was announced has arrived only if it was merged: else the old residual still holds all of it.
    residuals = {
        name: answer.residual if weight else kept.get(name)
        for (name, answer), weight in zip(trained.items(), weights, strict=True)
    }
    return RoundResult(
        round=round,
        contributions={name: phi / NANO for name, phi in zip(trained, scored.contributions, strict=True)},
        weights={name: weight / WEIGHT_ONE for name, weight in zip(trained, weights, strict=True)},
        training_losses={name: (answer.loss_nano or 0) / NANO for name, answer in trained.items()},
        payload_bytes={name: answer.payload_bytes for name, answer in trained.items()},
        dense_bytes=4 * sum(part.size for part in judge.initial().values()),
        cross_term=cross_term,
        loss_before=work.evaluate(judge, blobs, Evaluate(round, base)).loss_nano / NANO,
        loss_after=work.evaluate(judge, blobs, Evaluate(round, new_base)).loss_nano / NANO,
        base=decode_tensors(blobs.get(new_base), judge.shapes()),
        residuals={name: blobs.get(digest) for name, digest in residuals.items() if digest is not None},
        previous=blobs.get(base),
    )


def _make_config(training: TrainingConfig, compression: CompressionConfig) -> NetworkConfig:
    config = NetworkConfig(
        name="local round",
        genesis_ms=Millis(0),
        backbone="the caller's",
        probe="0" * 64,
        chain=ChainConfig(0, NOWHERE, NOWHERE),
        training=training,
        compression=compression,
        scoring=ScoringConfig(samples_per_stratum=10_000),  # all of most held-out sets
        limits=LimitConfig(payload_bytes_max=2**32),
    )
    validate_network(config)
    return config


def _validate_names(peers: Mapping[str, Iterable[Example]], peers_max: int) -> None:
    if not isinstance(peers, Mapping) or not 1 <= len(peers) <= peers_max:
        got = f"{len(peers)}" if isinstance(peers, Mapping) else type(peers).__name__
        raise OperatorError(f"peers: expected a mapping of 1 to {peers_max} names to examples, got {got}")
    for name in peers:
        if not isinstance(name, str) or not 1 <= len(name.encode()) <= work.NAME_BYTES_MAX:
            raise OperatorError(f"peers: expected names of 1 to {work.NAME_BYTES_MAX} bytes, got {name!r}")


def _validate_model(model: PeftModel) -> str:
    """The name of the adapter that the round is about."""
    if not isinstance(model, PeftModel):
        raise OperatorError(f"model: expected one of peft's `get_peft_model`, got {type(model).__name__}")
    if len(model.active_adapters) != 1:
        raise OperatorError(
            f"model: expected one active adapter, got {model.active_adapters}; see peft's `set_adapter`"
        )
    adapter = str(model.active_adapter)
    own = get_parameters(model, adapter)
    if not any(parameter.requires_grad for parameter in own.values()):
        raise OperatorError(f"model: nothing of the adapter {adapter!r} is trainable; load it with `is_trainable=True`")
    for name, part in own.items():
        if not torch.isfinite(part).all():
            raise OperatorError(f"model: {name} has values that are not finite")
    if any(isinstance(layer, BaseTunerLayer) and layer.merged for layer in model.modules()):
        raise OperatorError("model: the adapter is merged into the backbone; call `unmerge_adapter()` first")
    mine = {id(parameter) for parameter in own.values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in mine:
            raise OperatorError(f"model: {name} is trainable and no part of the adapter {adapter!r}; freeze it first")
    if model.get_output_embeddings() is None:
        raise OperatorError("model: expected a causal language model; this one does not predict tokens")
    return adapter


@contextmanager
def _lent(model: PeftModel, adapter: str) -> Iterator[None]:
    """The model without dropout; it gets its mode back, and after an error its adapter too."""
    was_training, before = model.training, get_adapter_tensors(model, adapter)
    model.eval()
    try:
        yield
    except BaseException:
        set_adapter_tensors(model, before, adapter)
        raise
    finally:
        model.train(was_training)


def _digest(samples: tuple[Encoded, ...]) -> Digest:
    return compute_digest(msgspec.msgpack.encode(samples))
