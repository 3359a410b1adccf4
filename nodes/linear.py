"""Nodes without a backbone: the simulator's linear regression as their learner, everything else as in any node.

For experiments with the network itself: such a node loads neither torch nor transformers, so it starts in seconds and
many fit on one machine, while chain, transport, store, protocol, compression and merge are the real ones. It generates
no text. Knows no peer and no socket.

The network's `adapter.seed` makes the problem that all peers share. A node's private shard and the declared probe are
text, of which such a learner understands nothing: the shard's bytes decide which samples of the problem the node has.
"""

from collections.abc import Mapping, Sequence

from nodes.adversaries import Wrap
from p2pfm.config import NodeConfig
from p2pfm.errors import OperatorError
from p2pfm.learner import Learner, SpendingLog
from p2pfm.lora.samples import Sample, encode_lines
from p2pfm.runtime.node import Learners, Models
from p2pfm.runtime.text import TextCodec
from p2pfm.serving.session import Vocabulary
from p2pfm.types import compute_digest
from sim.learners.convex import LinearLearner, Problem

PLACE_BYTES = 6
"""Of the shard's digest: enough that no two shards give one place."""

CONTEXT_MAX = 4096
"""Bytes of a prompt: as good as any, since no replica ever answers."""


class ByteTokenizer:
    """Every byte of UTF-8 a token: what the HTTP side needs to refuse a request in order."""

    all_special_ids: Sequence[int] = ()

    def convert_ids_to_tokens(self, tokens: Sequence[int]) -> list[str]:
        """A character each."""
        return [chr(token) for token in tokens]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The text's bytes; there are no special tokens."""
        return list(text.encode())

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **_options: bool) -> str:
        """One line a message."""
        return "".join(f"{message['content']}\n" for message in messages)

    def decode(self, tokens: Sequence[int], **_options: bool) -> str:
        """The text of `tokens`."""
        return bytes(tokens).decode(errors="replace")


def make_models(config: NodeConfig, samples: Sequence[Sample], wrap: Wrap) -> Models:
    """A linear learner at the place that `samples` give it, and no engine.

    Raises:
        OperatorError: the configuration asks for what only a backbone can do.
    """
    for key, is_on in (
        ("serving.enabled", config.serving.enabled),
        ("personal.enabled", config.personal.enabled),
        ("privacy.enabled", config.privacy.enabled),
        ("rank", config.rank > 0),
    ):
        if is_on:
            raise OperatorError(f"{key}: the backbone linear is a regression, not a language model; turn it off")

    def make_learners(probe: bytes, spendings: SpendingLog) -> Learners:
        return Learners(wrap(make_learner(config, samples)))

    return Models(
        codec=lambda: TextCodec(ByteTokenizer(), Vocabulary(256, frozenset(), CONTEXT_MAX)),
        engine=lambda: None,
        learners=make_learners,
    )


def make_learner(config: NodeConfig, samples: Sequence[Sample]) -> Learner:
    """The learner of the node with this shard; equal shards give equal learners."""
    network = config.network
    place = int.from_bytes(compute_digest(encode_lines(samples))[:PLACE_BYTES])
    return LinearLearner(
        Problem(network.adapter.seed),
        place,
        steps=network.training.steps,
        learning_rate=network.training.learning_rate,
        probe_samples=network.scoring.samples_per_stratum,
        work_steps=network.scoring.work_steps,
    )
