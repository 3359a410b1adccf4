"""One simulated machine: a Peer, its disk, and what survives when it is killed. Knows no network and no other host."""

from dataclasses import dataclass, field
from random import Random

from p2pfm.messages import Certificate
from p2pfm.protocol.events import Durable
from p2pfm.protocol.peer import Peer
from p2pfm.types import Digest, Millis, PeerId, Round
from sim.adversaries.filters import Honest
from sim.churn import Departure
from sim.disk import Disk
from sim.scenarios import AdversaryKind


@dataclass(slots=True)
class Host:
    """What one machine holds. `peer` is None while it is down; all above `peer` is on disk."""

    index: int
    me: PeerId
    kind: AdversaryKind | None
    filter: Honest | None
    """What stands between the peer and its driver; None: nothing."""
    disk: Disk
    rng: Random
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
    departure: Departure | None = None
    """Why it is about to go, and for how long."""
    topics: tuple[str, ...] = ()
    """Gossip that it hears beside what everybody does."""
    num_bytes_sent: int = 0
    num_bytes_received: int = 0
