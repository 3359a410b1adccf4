"""What a peer knows beyond one round: its state on disk, the registry, its neighbours and its history.

Shared by the peer and its ballots. Knows no clock and no message of a round.
"""

import msgspec

from p2pfm.config import NetworkConfig
from p2pfm.errors import Reject
from p2pfm.protocol.events import Durable, Remembered
from p2pfm.protocol.history import History
from p2pfm.protocol.proofs import Proofs
from p2pfm.settlement.ledger import Roster, SettledRound
from p2pfm.types import PeerId, compute_digest


class Standing:
    """One participant's lasting knowledge."""

    def __init__(self, me: PeerId, config: NetworkConfig, durable: Durable) -> None:
        self.me = me
        self.number = int.from_bytes(compute_digest(me.encode())[:4], "big")
        """Its own, so that not all begin with the same neighbour."""
        self.config = config
        self.durable = durable
        self.roster: Roster | None = None
        self.peers: tuple[PeerId, ...] = ()
        self.history = History(durable.head.proposal if durable.head else None)
        self.proofs = Proofs()
        self.earlier: tuple[Remembered, ...] = ()
        """Updates of earlier rounds, the newest first."""
        self.rewinds_to: tuple[int, SettledRound | None] | None = None
        """The restart nonce and the round that this peer goes back to, while it does; no work is done meanwhile."""

    def save(self, **changes: object) -> Durable:
        """Change the durable state; the caller persists what it returns."""
        self.durable = msgspec.structs.replace(self.durable, **changes)
        return self.durable

    def validate_readiness(self, roster: Roster) -> None:
        """Whether a round under this roster can follow what is held here.

        Raises:
            Reject: says what is missing.
        """
        if self.history.is_orphaned() or self.history.is_behind():
            raise Reject("the chain holds a round whose certificate is not here yet")
        if self.roster is None or self.roster.nonce != roster.nonce or self.rewinds_to is not None:
            raise Reject("the chain has restarted since this round began: what is signed in it is worth nothing")
        if roster.epoch < self.roster.epoch_min:
            raise Reject("the committee was slashed, and none was drawn since: what it signs is worth nothing")
