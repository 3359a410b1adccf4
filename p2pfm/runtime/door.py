"""The door of a node: what comes in is decoded, and every signature checked, before the core hears of it.

Knows no socket; blocking (BLS), so the node calls it in a thread.
"""

from collections import OrderedDict

from p2pfm.config import NetworkConfig
from p2pfm.errors import Reject
from p2pfm.messages import (
    Attestation,
    Certificate,
    Envelope,
    Message,
    decode_message,
    proposal_digest,
)
from p2pfm.protocol.events import AnyEvent, RosterChanged, SettledChanged
from p2pfm.runtime.envelopes import verify_envelope
from p2pfm.settlement import bls
from p2pfm.settlement.ledger import Roster, SettledRound
from p2pfm.settlement.rewards import proposal_message
from p2pfm.settlement.sampling import compute_quorum

ROSTERS_MAX = 8
"""Committees remembered: a certificate of an earlier epoch can still arrive."""


class Door:
    """Remembers whose keys count. Every method raises `Reject` for what an honest peer never sends."""

    def __init__(self, config: NetworkConfig) -> None:
        self._config = config
        self._network_id = config.network_id()
        self._rosters: OrderedDict[tuple[int, int], Roster] = OrderedDict()
        self._settled: SettledRound | None = None

    def on_event(self, event: AnyEvent) -> None:
        """Learn what the chain tells: committees, and the newest round."""
        match event:
            case RosterChanged(roster=roster):
                self._rosters[(roster.epoch, roster.nonce)] = roster
                self._rosters.move_to_end((roster.epoch, roster.nonce))
                while len(self._rosters) > ROSTERS_MAX:
                    self._rosters.popitem(last=False)
            case SettledChanged(settled=settled):
                self._settled = settled
            case _:
                pass

    def prove(self, envelope: Envelope) -> None:
        """Its author signed it, for this network. Depends on nothing else that this node knows.

        Raises:
            Reject: otherwise.
        """
        verify_envelope(self._network_id, envelope)

    def open(self, envelope: Envelope) -> Message:
        """The message inside a proven envelope; where it carries BLS signatures, they are of who it names.

        Raises:
            Reject: not decodable, a wrong signature, or an oversized body.
        """
        message = decode_message(envelope.body, self._config.limits.message_bytes_max)
        match message:
            case Attestation():
                self._verify_attestation(message)
            case Certificate():
                self.verify_certificate(message)
            case _:
                pass
        return message

    def verify_certificate(self, certificate: Certificate) -> None:
        """More than two thirds of the committee that the proposal names signed it, or the chain itself has it.

        Raises:
            Reject: otherwise.
        """
        proposal = certificate.proposal
        settled = self._settled
        if settled and settled.round == proposal.round and settled.data_digest == proposal_digest(proposal):
            return  # the contract has verified it: good even when its committee is no longer known here
        roster = self._rosters.get((proposal.epoch, proposal.nonce))
        if roster is None:
            raise Reject(f"certificate of epoch {proposal.epoch}, restart {proposal.nonce}: no such committee known")
        absent = set(certificate.absent)
        signers = [index for index in roster.committee if index not in absent]
        if not absent <= set(roster.committee) or len(absent) != len(certificate.absent):
            raise Reject("certificate names absentees that are not on the committee, or one twice")
        if len(signers) < compute_quorum(len(roster.committee)):
            raise Reject(f"certificate of {len(signers)} signatures, expected {compute_quorum(len(roster.committee))}")
        keys = [roster.members[index].bls_key for index in signers]
        message = proposal_message(self._config.chain, proposal)
        if not bls.fast_aggregate_verify(keys, message, certificate.signature):
            raise Reject(f"certificate of round {proposal.round}: its signature does not verify")

    def _verify_attestation(self, attestation: Attestation) -> None:
        roster = next(reversed(self._rosters.values()), None)
        if roster is None or attestation.member >= len(roster.members):
            raise Reject(f"attestation of member {attestation.member}, who is not registered")
        key = roster.members[attestation.member].bls_key
        if not bls.verify(key, attestation.message, attestation.signature):
            raise Reject(f"attestation of member {attestation.member}: its signature does not verify")
