"""The door of a node: what comes in is decoded, and every signature checked, before the core hears of it.

Knows no socket; blocking (BLS), so the node calls it in a thread.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from p2pfm.config import NetworkConfig
from p2pfm.errors import Reject, Unjudged
from p2pfm.messages import (
    MEMBERS_MAX,
    Attestation,
    Certificate,
    CheatReport,
    Envelope,
    Message,
    Presence,
    ServiceReport,
    ShardMessage,
    decode_envelope,
    decode_message,
    encode,
    proposal_digest,
)
from p2pfm.protocol.committee import shard_message
from p2pfm.protocol.events import AnyEvent, RosterChanged, SettledChanged
from p2pfm.protocol.membership import get_member
from p2pfm.protocol.phases import compute_position
from p2pfm.protocol.shards import deal
from p2pfm.runtime.clock import now_ms
from p2pfm.runtime.envelopes import verify_envelope
from p2pfm.runtime.network.limits import TokenBucket
from p2pfm.settlement import bls
from p2pfm.settlement.ledger import Roster, SettledRound
from p2pfm.settlement.rewards import proposal_message
from p2pfm.settlement.sampling import compute_quorum
from p2pfm.types import Digest, MemberIndex, Millis, PeerId, Round, compute_digest, short

ROSTERS_MAX = 8
"""Committees remembered: a certificate of an earlier epoch can still arrive."""

VERSIONS_MAX = 4
"""Newest rosters of one committee remembered, beside those that the present and the previous round began with: who
joined in a round's time changes the next round's shards, not this one's."""

PROVEN_MAX = 1024
"""Bodies remembered as proven: more than a round has of them."""

BLS_BURST = 16
BLS_PER_S = 1.0
"""Signatures of one author that are verified: an honest member has two a round and level. Each costs milliseconds."""

AUTHORS_MAX = MEMBERS_MAX
"""Authors whose rate is remembered: as many as a registry has."""


class _Version(NamedTuple):
    since: Round
    """In which it was told."""
    roster: Roster


class Door:
    """Remembers whose keys count. Every method raises `Reject` for what an honest peer never sends."""

    def __init__(
        self,
        config: NetworkConfig,
        clock_s: Callable[[], float] = time.monotonic,
        clock_ms: Callable[[], Millis] = now_ms,
    ) -> None:
        """`clock_s` runs evenly, for rates; `clock_ms` tells the time [ms since 1970], for rounds."""
        self._config = config
        self._clock_s = clock_s
        self._clock_ms = clock_ms
        self._network_id = config.network_id()
        self._rosters: OrderedDict[tuple[int, int], tuple[_Version, ...]] = OrderedDict()
        """By epoch and restart, as the chain told them: the newest first."""
        self._settled: SettledRound | None = None
        self._proven: OrderedDict[Digest, None] = OrderedDict()
        self._verified: OrderedDict[PeerId, TokenBucket] = OrderedDict()

    def on_event(self, event: AnyEvent) -> None:
        """Learn what the chain tells: committees, and the newest round."""
        match event:
            case RosterChanged(roster=roster):
                key = (roster.epoch, roster.nonce)
                own = msgspec.structs.replace(roster)  # what is worked out of it is kept with it, and this is a thread
                round = self._get_round()
                self._rosters[key] = _choose_versions((_Version(round, own), *self._rosters.get(key, ())), round)
                self._rosters.move_to_end(key)
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

    def prove_bytes(self, data: bytes) -> None:
        """The same of an envelope's bytes, which must be its one encoding: nobody can say one thing in many ways.

        Raises:
            Reject: otherwise.
        """
        envelope = decode_envelope(data)
        if encode(envelope) != data:
            raise Reject("an envelope in other bytes than its encoding")
        self.prove(envelope)

    def open(self, envelope: Envelope) -> Message:
        """The message inside a proven envelope; where it carries BLS signatures, they are of who it names.

        Raises:
            Reject: not decodable, not in its one encoding, a wrong signature, or an oversized body.
            Unjudged: who sent it is not known here, or sends more signatures than a member ever has.
        """
        message = decode_message(envelope.body, self._config.limits.message_bytes_max)
        if encode(message) != envelope.body:  # what is known by its digest would have several
            raise Reject("a message in other bytes than its encoding")
        digest = compute_digest(envelope.body)
        if digest in self._proven:  # gossip and sync bring the same again: BLS costs milliseconds
            return message
        match message:
            case Attestation():
                self._verify_attestation(envelope.author, message)
            case ShardMessage():
                self._open_shard_message(envelope.author, message)
            case Presence() if message.peer != envelope.author:
                raise Reject(f"presence that speaks for {message.peer}")
            case Presence() | Certificate() | CheatReport() | ServiceReport() if not self._is_registered(
                envelope.author
            ):
                raise Unjudged("serving and certificates are registered peers' affair")  # BLS costs 3 ms: no stranger's
            case Certificate():
                self._take_turn(envelope.author)
                self.verify_certificate(message)
            case _:
                pass
        self._proven[digest] = None
        if len(self._proven) > PROVEN_MAX:
            self._proven.popitem(last=False)
        return message

    def verify_certificate(self, certificate: Certificate) -> None:
        """More than two thirds of the committee that the proposal names signed it, or the chain itself has it.

        Raises:
            Reject: otherwise.
        """
        proposal = certificate.proposal
        settled = self._settled
        rosters = self._rosters.get((proposal.epoch, proposal.nonce))
        if rosters is None:
            if settled and settled.round == proposal.round and settled.data_digest == proposal_digest(proposal):
                return  # the contract has verified it: good even when its committee is no longer known here
            raise Unjudged(f"certificate of epoch {proposal.epoch}, restart {proposal.nonce}: no such committee known")
        _verify_signers(rosters[0].roster, certificate, proposal_message(self._config.chain, proposal))

    def _open_shard_message(self, author: PeerId, message: ShardMessage) -> None:
        limits = self._config.limits
        if not self._config.has_shards:
            raise Reject("speaks of shards in a network that has none")
        if message.shard >= 2 * limits.peers_max // limits.shard_peers_max:  # equal parts are half full at least
            # No proof against anybody: the chain may have told its author of more peers than the rules say.
            raise Unjudged(f"speaks for shard {message.shard}, and {limits.peers_max} peers make no so many")
        if not self._newest() or not self._is_registered(author):
            raise Unjudged("shards are registered peers' affair")
        match message.message:
            case Attestation() as attestation:
                self._verify_attestation(author, attestation)
            case Certificate() as certificate:
                self._verify_shard_certificate(author, message.shard, certificate)
            case _:
                pass

    def _verify_shard_certificate(self, author: PeerId, shard: MemberIndex, certificate: Certificate) -> None:
        """More than two thirds of a shard's committee signed it, in one of the deals that a peer may know by now.

        Who joined or left while the round lasts may be known here and not there, so that a wrong signature is no proof
        against anybody: only what is wrong in every deal is.
        """
        proposal = certificate.proposal
        if proposal.leaves:
            raise Reject("a shard's certificate that pays somebody")
        if list(certificate.absent) != sorted(set(certificate.absent)):
            raise Reject("certificate names absentees out of order, or one twice")
        if abs(self._get_round() - proposal.round) > 1:
            raise Unjudged("a shard's certificate counts in its own round")  # to deal an epoch costs milliseconds, too
        self._take_turn(author)
        why = f"epoch {proposal.epoch}, restart {proposal.nonce}: no such committee known"
        signed = shard_message(self._config.chain, shard, proposal)
        for version in self._rosters.get((proposal.epoch, proposal.nonce), ()):
            dealt = deal(self._config, version.roster, proposal.round)
            if dealt is None or shard >= len(dealt.shards):
                why = "no such shard in any deal known"
                continue
            try:
                return _verify_signers(dealt.shards[shard], certificate, signed)
            except Reject as error:
                why = str(error)
        raise Unjudged(f"shard {shard}: {why}")

    def _take_turn(self, author: PeerId) -> None:
        """Before each BLS verification. Raises: Unjudged."""
        bucket = self._verified.setdefault(author, TokenBucket(BLS_BURST, BLS_PER_S))
        self._verified.move_to_end(author)
        if len(self._verified) > AUTHORS_MAX:
            self._verified.popitem(last=False)
        if bucket.take(self._clock_s()):
            raise Unjudged(f"{short(author)} sends more signatures than a member has")

    def _newest(self) -> Roster | None:
        newest = next(reversed(self._rosters.values()), None)
        return newest[0].roster if newest else None

    def _get_round(self) -> Round:
        """By the clock."""
        return compute_position(self._config, self._clock_ms()).round

    def _is_registered(self, peer: PeerId) -> bool:
        """Everybody may be, while no registry could be read: serving goes on when the chain is down."""
        roster = self._newest()
        return roster is None or get_member(roster, peer) is not None

    def _verify_attestation(self, author: PeerId, attestation: Attestation) -> None:
        roster = self._newest()
        if roster is None or attestation.member >= len(roster.members):
            raise Unjudged(f"attestation of member {attestation.member}, who is not known here")
        member = roster.members[attestation.member]
        if member.peer != author:
            raise Reject(f"speaks for member {attestation.member}, which is not its own registry index")
        self._take_turn(author)
        if not bls.verify(member.bls_key, attestation.message, attestation.signature):
            raise Reject(f"attestation of member {attestation.member}: its signature does not verify")


def _choose_versions(versions: tuple[_Version, ...], now: Round) -> tuple[_Version, ...]:
    """Of a committee's rosters, the newest first, those worth remembering: at most VERSIONS_MAX + 2."""
    oldest = len(versions) - 1
    begun = {
        next((place for place, version in enumerate(versions) if version.since < round), oldest)
        for round in (now, now - 1)
    }
    return tuple(version for place, version in enumerate(versions) if place < VERSIONS_MAX or place in begun)


def _verify_signers(roster: Roster, certificate: Certificate, message: Digest) -> None:
    """All of the roster's committee but those named absent signed `message`, and they are enough. Raises: Reject."""
    absent = set(certificate.absent)
    signers = [index for index in roster.committee if index not in absent]
    if not absent <= set(roster.committee) or len(absent) != len(certificate.absent):
        raise Reject("certificate names absentees that are not on the committee, or one twice")
    if len(signers) < compute_quorum(len(roster.committee)):
        raise Reject(f"certificate of {len(signers)} signatures, expected {compute_quorum(len(roster.committee))}")
    keys = [roster.by_index[index].bls_key for index in signers]
    if not bls.fast_aggregate_verify(keys, message, certificate.signature):
        raise Reject(f"certificate of round {certificate.proposal.round}: its signature does not verify")
