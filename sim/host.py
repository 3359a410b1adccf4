"""One simulated machine: a Peer, its disk, and what survives when it is killed. Knows no network and no other host."""

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from random import Random

from p2pfm.learner import Learner
from p2pfm.messages import Certificate
from p2pfm.protocol.events import Durable
from p2pfm.protocol.peer import Peer
from p2pfm.types import Digest, Millis, PeerId, Round, compute_digest
from sim.faults import Honest
from sim.scenarios import AdversaryKind


class Disk:
    """A host's blob store. All hosts of a world share one pool of bytes, since equal digests mean equal bytes.

    Implements `work.BlobStore`.
    """

    def __init__(self, pool: MutableMapping[Digest, bytes]) -> None:
        self._pool = pool
        self.held: set[Digest] = set()

    def put(self, data: bytes) -> Digest:
        """See BlobStore."""
        digest = compute_digest(data)
        self._pool.setdefault(digest, data)
        self.held.add(digest)
        return digest

    def get(self, digest: Digest) -> bytes:
        """See BlobStore."""
        if digest not in self.held:
            raise KeyError(f"{digest.hex()[:10]} is not on this disk")
        return self._pool[digest]


@dataclass(slots=True)
class Host:
    """What one machine holds. `peer` is None while it is down; all above `peer` is on disk."""

    index: int
    me: PeerId
    kind: AdversaryKind | None
    learner: Learner
    filter: Honest
    disk: Disk
    rng: Random
    offset_ms: int
    """Its clock is ahead of the world's by this much [ms]."""
    durable: Durable
    genesis: Digest
    """The base before round 0."""
    certificates: dict[Round, Certificate] = field(default_factory=dict)
    """Adopted so far."""
    unsettled: dict[Round, Certificate] = field(default_factory=dict)
    """Certificates that wait for the chain."""
    logs: list[bytearray] = field(default_factory=list)
    """Event logs, one a life; empty unless the scenario keeps them."""

    peer: Peer | None = None
    life: int = 0
    """Counts starts: what an earlier life had asked for does not reach a later one."""
    served: set[Digest] = field(default_factory=set)
    wake_ms: Millis | None = None
    """When the peer wants to be woken."""
    alarm_ms: Millis | None = None
    """The earliest wake-up call that is scheduled."""
    actions_left: int | None = None
    """Killed after so many more actions; None: not about to be."""
    num_bytes_sent: int = 0
    num_bytes_received: int = 0
