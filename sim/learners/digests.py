"""No learning at all: payloads are names with a size, contributions are drawn. For the protocol alone, at 10,000 peers.

Knows no tensor. What a peer's update is worth is drawn once from the scenario's seed; each evaluator reads it with some
error, as real ones do.
"""

from collections.abc import Sequence, Set
from random import Random

from p2pfm.config import NetworkConfig
from p2pfm.protocol.events import Condense, Evaluate, Evaluated, Merge, Merged, Scored, ScoreUpdates, Train, Trained
from p2pfm.protocol.shards import is_shard_name
from p2pfm.types import NANO, WEIGHT_ONE, Contribution, Digest, PeerId, compute_digest
from sim.disk import Disk, make_ghost
from sim.scenarios import AdversaryKind

NUM_PARAMETERS = 8_000_000
"""Of the adapter that is not there: its payloads have 0.45 bit a parameter, its base 32."""

PAYLOAD_BYTES = NUM_PARAMETERS * 45 // 800

BASE_BYTES = NUM_PARAMETERS * 4

WORTH_NANO = 1_000_000.0
"""Mean of what honest updates are worth at their full weight [nano-nats]."""

WORTHLESS: frozenset[AdversaryKind] = frozenset(
    {"zero", "replay", "noisy_replay", "noise", "skipper", "colluder", "overpayer"}
)

HARMFUL: frozenset[AdversaryKind] = frozenset(
    {"sign_flip", "boosted", "gaussian", "alie", "ipm", "minmax", "label_flip", "backdoor"}
)


class DigestWorkshop:
    """Answers at once with names; implements sim.workshop.Workshop."""

    def __init__(self, config: NetworkConfig, seed: int, kinds: Sequence[AdversaryKind | None]) -> None:
        self._config = config
        self._seed = seed
        self._worths = [_draw_worth(seed, index, kind) for index, kind in enumerate(kinds)]
        self._worth_of: dict[Digest, float] = {}
        """By payload: what it is worth at its full weight [nano-nats]."""
        self._makers: dict[Digest, PeerId] = {}
        self._num_merges: dict[Digest, int] = {}

    def get_genesis(self) -> bytes:
        """See Workshop."""
        return make_ghost(b"genesis", BASE_BYTES)

    def expect(self, index: int, disk: Disk, action: Train) -> None:
        """See Workshop."""

    def train(self, index: int, disk: Disk, action: Train) -> Trained:
        """See Workshop."""
        payload = self._make(disk, action.maker, b"payload %d" % action.round + action.base)
        self._worth_of[payload] = self._worths[index]
        return Trained(action.round, action.base, payload, PAYLOAD_BYTES, 1_000, payload, 0)

    def score(self, index: int, disk: Disk, action: ScoreUpdates, rng: Random) -> Scored:
        """See Workshop."""
        salt = rng.randbytes(32)
        values = tuple(
            Contribution(round(self._worth_of.get(item.payload, 0.0) * rng.gauss(1, 0.1) * item.weight / WEIGHT_ONE))
            for item in action.updates
        )
        return Scored(action.round, values, salt, (), action.shard)

    def merge(self, index: int, disk: Disk, action: Merge | Condense) -> Merged:
        """See Workshop."""
        name = compute_digest(b"merge" + action.base + b"".join(item.payload for item in action.updates))
        if isinstance(action, Merge):
            base = disk.put_as(name, make_ghost(name, BASE_BYTES))
            self._num_merges[base] = self._num_merges.get(action.base, 0) + 1
            return Merged(action.request, base)
        payload = self._make(disk, action.maker, name)
        worths = [self._worth_of.get(item.payload, 0.0) * item.weight / WEIGHT_ONE for item in action.updates]
        self._worth_of[payload] = sum(worths)
        return Merged(action.request, payload)

    def evaluate(self, disk: Disk, action: Evaluate) -> Evaluated:
        """See Workshop: a curve that falls with every merge, and means nothing."""
        return Evaluated(action.round, int(NANO / (1 + self._num_merges.get(action.base, 0))))

    def validate(self, kind: str, digest: Digest, disk: Disk) -> tuple[bool, PeerId | None]:
        """See Workshop."""
        if kind != "payload":
            return True, None
        maker = self._makers.get(digest)
        return maker is not None, maker

    def make_empty_payload(self, maker: PeerId) -> bytes:
        """See Workshop."""
        empty = make_ghost(b"empty " + maker.encode(), PAYLOAD_BYTES)
        self._makers[compute_digest(empty)] = maker
        return empty

    def get_optimum_loss(self) -> float | None:
        """See Workshop."""
        return None

    def get_backdoor(self, base: Digest) -> float | None:
        """See Workshop: without a model no trigger."""
        return None

    def forget(self, digests: Set[Digest]) -> None:
        """See Workshop."""
        for digest in digests:
            self._worth_of.pop(digest, None)
            self._makers.pop(digest, None)

    def _make(self, disk: Disk, maker: PeerId, what: bytes) -> Digest:
        name = compute_digest(maker.encode() + what)
        self._makers[name] = maker
        return disk.put_as(name, make_ghost(name, PAYLOAD_BYTES if not is_shard_name(maker) else 4 * PAYLOAD_BYTES))


def _draw_worth(seed: int, index: int, kind: AdversaryKind | None) -> float:
    if kind in WORTHLESS:
        return 0.0
    worth = Random(f"{seed} worth {index}").gauss(WORTH_NANO, WORTH_NANO / 5)
    return -worth if kind in HARMFUL else worth
