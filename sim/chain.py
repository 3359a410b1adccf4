"""The chain of a simulated world: the in-memory ledger, its clock and outages, and checks of what it must have signed.

Knows the ledger, certificates and time; no peer's state.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from p2pfm.config import NetworkConfig
from p2pfm.errors import ChainError, Reverted
from p2pfm.messages import Attestation, Certificate
from p2pfm.protocol.committee import shard_message
from p2pfm.protocol.events import Accuse
from p2pfm.protocol.shards import deal
from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import Entry, FederationParams, LeafValue, Roster, SettledRound, Submission
from p2pfm.settlement.memory_ledger import InMemoryLedger
from p2pfm.settlement.proofs import Proof
from p2pfm.settlement.rewards import from_wire, make_submission, proposal_message
from p2pfm.settlement.sampling import compute_quorum
from p2pfm.types import Digest, MemberIndex, Millis, PeerId, Round, Wei
from sim.scenarios import STAKE, Scenario, compute_stakes
from sim.signatures import Signatures

CHALLENGE_WINDOW_S = 30
SPONSOR = "sponsor"
UNBOUNDED_GAS = 10**12
"""A rotation reads every stake: the contract holds about a thousand members. Simulated are also more."""


def make_params(network: NetworkConfig, num_peers: int) -> FederationParams:
    """The contract's parameters for a network of so many peers."""
    return FederationParams(
        committee_size=network.scoring.committee_size,
        min_stake=STAKE,
        challenge_window_s=CHALLENGE_WINDOW_S,
        pool_per_epoch=network.pool_per_epoch(),
        serving_per_epoch=network.serving_per_epoch(),
        rounds_per_epoch=network.settlement.rounds_per_epoch,
        members_max=max(num_peers, network.scoring.committee_size),
    )


class OtherLedger(Protocol):
    """A ledger somewhere else, with the rules of `make_params`: newly made, its time the world's from `follow` on."""

    params: FederationParams
    accounts: Sequence[str]
    """The peers', each with its stake (`compute_stakes`)."""

    def follow(self, clock: Callable[[], Millis]) -> None:
        """Take the time from `clock` [ms]."""
        ...

    def get_gas(self) -> Mapping[str, int]:
        """Spent so far, by kind of transaction."""
        ...

    def fund(self, account: str, amount: Wei) -> None:
        """See InMemoryLedger."""
        ...

    def register(self, account: str, peer: PeerId, bls_key: bytes, possession: bytes, stake: Wei) -> MemberIndex:
        """See InMemoryLedger."""
        ...

    def rotate(self) -> None:
        """See InMemoryLedger."""
        ...

    def get_committee(self, epoch: int) -> tuple[MemberIndex, ...]:
        """See InMemoryLedger."""
        ...

    def prove_equivocation(self, account: str, first: Submission, second: Submission) -> None:
        """See InMemoryLedger."""
        ...

    def get_roster(self) -> Roster:
        """See InMemoryLedger."""
        ...

    def get_head(self) -> SettledRound | None:
        """See InMemoryLedger."""
        ...

    def get_rounds(self, first: Round) -> tuple[SettledRound, ...]:
        """See InMemoryLedger."""
        ...

    def get_entries(self) -> tuple[Entry, ...]:
        """See InMemoryLedger."""
        ...

    def get_claimed(self, index: MemberIndex) -> Wei:
        """See InMemoryLedger."""
        ...

    def submit_round(self, submission: Submission) -> None:
        """See InMemoryLedger."""
        ...

    def claim_leaf(self, round: Round, index: MemberIndex, leaves: tuple[LeafValue, ...]) -> None:
        """Draw what a settled round with these leaves owes a member."""
        ...


class Chain:
    """One federation with all peers of a scenario registered, funded for the whole run, its first committee drawn."""

    def __init__(
        self,
        scenario: Scenario,
        network: NetworkConfig,
        signatures: Signatures,
        clock: Callable[[], Millis],
        peers: Sequence[PeerId],
        ledger: OtherLedger | None = None,
    ) -> None:
        """`clock` tells the virtual time [ms]; `ledger`: None: one in memory."""
        self._scenario = scenario
        self._network = network
        self._signatures = signatures
        self._clock = clock
        num_epochs = scenario.num_rounds // scenario.rounds_per_epoch + 2
        self.deposits = Wei(network.pool_per_epoch() * num_epochs)
        self.accounts = ledger.accounts if ledger else [f"0x{index + 1:040x}" for index in range(len(peers))]
        stakes = compute_stakes(scenario)
        self.ledger: InMemoryLedger | OtherLedger = ledger or InMemoryLedger(
            network.chain,
            make_params(network, len(peers)),
            signatures,
            lambda: clock() // 1000,
            {SPONSOR: self.deposits, **dict(zip(self.accounts, stakes, strict=True))},
            seed=scenario.seed.to_bytes(32, "big"),
            rotation_gas_max=UNBOUNDED_GAS,
        )
        if ledger:
            ledger.follow(clock)
        self.ledger.fund(SPONSOR, self.deposits)
        for account, peer, stake in zip(self.accounts, peers, stakes, strict=True):
            possession = signatures.prove_possession(network.chain, account, peer)
            self.ledger.register(account, peer, signatures.bls_key(peer), possession, stake)
        self._rosters: dict[int, Roster] = {}
        self._verified: dict[tuple[Digest, bytes, tuple[MemberIndex, ...]], bool] = {}
        self.ledger.rotate()
        self.read_roster()

    @property
    def roster(self) -> Roster:
        """Registry and committee now."""
        return self._rosters[max(self._rosters)]

    def read_roster(self) -> Roster:
        """The registry and committee as they are on chain now."""
        roster = self.ledger.get_roster()
        if self._rosters.get(roster.epoch) != roster:
            self._rosters[roster.epoch] = roster
        return self._rosters[roster.epoch]

    def get_head(self) -> SettledRound | None:
        """The newest round that the chain has taken."""
        return self.ledger.get_head()

    def is_down(self) -> bool:
        """Whether it cannot be reached now."""
        elapsed = self._clock() - self._network.genesis_ms
        return any(outage.start_ms <= elapsed < outage.end_ms for outage in self._scenario.outages)

    def submit(self, certificate: Certificate) -> bool:
        """Bring a certified round on chain; False: it is there already, or a later one is.

        Raises:
            ChainError: the chain is down, or (Reverted) refuses.
        """
        self._reach()
        head = self.get_head()
        if head is not None and head.round >= certificate.proposal.round:
            return False
        self.ledger.submit_round(make_submission(certificate))
        return True

    def _reach(self) -> None:
        if self.is_down():
            raise ChainError("the chain cannot be reached: its outage is part of the scenario")

    def claim(self, certificate: Certificate) -> None:
        """Every member draws what the round of this certificate, which the chain has taken, owes it."""
        leaves = from_wire(certificate.proposal.leaves)
        if not isinstance(self.ledger, InMemoryLedger):
            for index in map(MemberIndex, range(len(leaves))):
                self.ledger.claim_leaf(certificate.proposal.round, index, tuple(leaves))
            return
        levels = merkle.build(leaves)
        for index in map(MemberIndex, range(len(leaves))):
            self.ledger.claim(certificate.proposal.round, index, Proof(leaves[index], merkle.prove(levels, index)))

    def get_gas(self) -> int | None:
        """Spent so far; None: the ledger is in memory, which has none."""
        return None if isinstance(self.ledger, InMemoryLedger) else sum(self.ledger.get_gas().values())

    def accuse(self, accuser: int, evidence: Accuse) -> bool:
        """Let the chain slash a member that signed two proposals of one round; False: it sees no fault (any more).

        Raises:
            ChainError: the chain is down.
        """
        self._reach()
        committee = self.ledger.get_committee(evidence.first.epoch)
        absent = tuple(sorted(index for index in committee if index != evidence.member))
        try:
            first, second = (
                make_submission(Certificate(proposal, absent, signature))
                for proposal, signature in (
                    (evidence.first, evidence.first_signature),
                    (evidence.second, evidence.second_signature),
                )
            )
            self.ledger.prove_equivocation(self.accounts[accuser], first, second)
        except (ValueError, Reverted):  # of leaves that do not make their root the contract cannot be told
            return False
        return True

    def get_claimed(self) -> list[Wei]:
        """What each peer has drawn so far [wei]."""
        return [self.ledger.get_claimed(MemberIndex(index)) for index in range(len(self.accounts))]

    def verify_attestation(self, attestation: Attestation) -> bool:
        """Whether it carries its member's signature."""
        if attestation.member >= len(self.roster.members):
            return False
        key = self.roster.members[attestation.member].bls_key
        return attestation.signature == self._signatures.sign(key, attestation.message)

    def verify_certificate(self, certificate: Certificate) -> bool:
        """Whether more than two thirds of the committee of its epoch signed it."""
        roster = self._rosters.get(certificate.proposal.epoch)
        key = (certificate.proposal.digest, certificate.signature, certificate.absent)
        if key not in self._verified:
            message = proposal_message(self._network.chain, certificate.proposal)
            self._verified[key] = self._verify(roster, message, certificate)
        return self._verified[key]

    def verify_shard_certificate(self, shard: int, certificate: Certificate) -> bool:
        """The same of a shard's committee."""
        proposal = certificate.proposal
        roster = self._rosters.get(proposal.epoch)
        dealt = deal(self._network, roster, proposal.round) if roster else None
        if dealt is None or shard >= len(dealt.shards):
            return False
        return self._verify(dealt.shards[shard], shard_message(self._network.chain, shard, proposal), certificate)

    def _verify(self, roster: Roster | None, message: Digest, certificate: Certificate) -> bool:
        absent = set(certificate.absent)
        if roster is None or not absent <= set(roster.committee) or len(absent) != len(certificate.absent):
            return False
        signers = [index for index in roster.committee if index not in absent]
        if len(signers) < compute_quorum(len(roster.committee)):
            return False
        keys = [roster.by_index[index].bls_key for index in signers]
        return self._signatures.verify_round(keys, message, certificate.signature)
