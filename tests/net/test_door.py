"""The door: what is not proven does not come in, what cannot be judged blames nobody, and strangers cost no BLS."""

import msgspec
import pytest

from p2pfm.config import ChainConfig, NetworkConfig
from p2pfm.errors import Reject, Unjudged
from p2pfm.messages import (
    Attestation,
    Certificate,
    CheatReport,
    Envelope,
    GenerateRequest,
    Leaf,
    Message,
    Presence,
    Proposal,
    ShardMessage,
    Vouch,
    encode,
)
from p2pfm.protocol.committee import shard_message
from p2pfm.protocol.events import RosterChanged
from p2pfm.protocol.phases import compute_round_start
from p2pfm.protocol.shards import deal
from p2pfm.runtime.door import BLS_BURST, VERSIONS_MAX, Door
from p2pfm.settlement import bls
from p2pfm.settlement.ledger import Member, Roster
from p2pfm.settlement.rewards import proposal_message
from p2pfm.types import Contribution, Digest, MemberIndex, Millis, PeerId, Round, Wei, compute_digest

ZERO = Digest(bytes(32))
CONFIG = NetworkConfig("test", Millis(0), "toy", "0" * 64, ChainConfig(1, "0x" + "11" * 20, "0x" + "22" * 20))
SECRETS = [bls.key_from_seed(bytes([index]) * 32) for index in range(4)]
NAMES = [PeerId(f"peer-{index}") for index in range(4)]
ROSTER = Roster(
    1, 0,
    tuple(
        Member(MemberIndex(i), f"0x{i:040x}", NAMES[i], bls.public_key(SECRETS[i]), Wei(1), active=True)
        for i in range(4)
    ),
    tuple(MemberIndex(index) for index in range(4)),
)  # fmt: skip
PROPOSAL = Proposal(Round(3), MemberIndex(0), 1, 0, ZERO, ZERO, ZERO, ZERO, (), (), ())
MESSAGE = proposal_message(CONFIG.chain, PROPOSAL)


@pytest.fixture
def door() -> Door:
    door = Door(CONFIG)
    door.on_event(RosterChanged(ROSTER))
    return door


def sealed(author: PeerId, message: Message) -> Envelope:
    return Envelope(author, encode(message), b"")


def certificate(*absent: int) -> Certificate:
    signatures = [bls.sign(SECRETS[index], MESSAGE) for index in range(4) if index not in absent]
    return Certificate(PROPOSAL, tuple(MemberIndex(index) for index in absent), bls.aggregate(signatures))


def attestation(member: int, by: int) -> Attestation:
    return Attestation(Round(3), MemberIndex(member), MESSAGE, bls.sign(SECRETS[by], MESSAGE))


@pytest.mark.parametrize("absent", [(), (3,)])
def test_a_certificate_of_more_than_two_thirds_comes_in(door: Door, absent: tuple[int, ...]) -> None:
    assert door.open(sealed(NAMES[0], certificate(*absent))) == certificate(*absent)


def test_a_certificate_of_fewer_is_rejected(door: Door) -> None:
    with pytest.raises(Reject, match="expected 3"):
        door.open(sealed(NAMES[0], certificate(2, 3)))


def test_a_certificate_that_names_other_absentees_is_rejected(door: Door) -> None:
    forged = msgspec.structs.replace(certificate(), absent=(MemberIndex(3),))
    with pytest.raises(Reject, match="does not verify"):
        door.open(sealed(NAMES[0], forged))


def test_an_attestation_is_the_members_own_word(door: Door) -> None:
    assert door.open(sealed(NAMES[1], attestation(1, by=1)))
    with pytest.raises(Reject, match="registry index"):
        door.open(sealed(NAMES[1], attestation(2, by=2)))
    with pytest.raises(Reject, match="does not verify"):
        door.open(sealed(NAMES[1], attestation(1, by=2)))


def test_a_presence_that_speaks_for_another_is_rejected(door: Door) -> None:
    record = Presence(NAMES[2], (), 0, 4, 1000, 1)
    with pytest.raises(Reject, match="speaks for"):
        door.open(sealed(NAMES[1], record))
    assert door.open(sealed(NAMES[2], record)) == record


def test_strangers_neither_serve_nor_certify(door: Door) -> None:
    stranger = PeerId("stranger")
    claimed = GenerateRequest(ZERO, (1,), (2,), 1, 0, 1000, 0, 0)
    report = CheatReport(NAMES[1], Vouch(claimed, 0), bytes(64))
    for message in (Presence(stranger, (), 0, 4, 1000, 1), certificate(), report):
        with pytest.raises(Unjudged):
            door.open(sealed(stranger, message))
    assert door.open(sealed(NAMES[2], report)) == report


def test_without_a_registry_nothing_is_judged_and_nobody_blamed() -> None:
    door = Door(CONFIG)
    for message in (certificate(), attestation(1, by=1)):
        with pytest.raises(Unjudged):
            door.open(sealed(NAMES[1], message))
    assert door.open(sealed(NAMES[2], Presence(NAMES[2], (), 0, 4, 1000, 1))), "serving goes on while the chain is down"


def test_a_body_that_is_no_message_is_rejected(door: Door) -> None:
    with pytest.raises(Reject):
        door.open(Envelope(NAMES[0], b"junk", b""))


def test_one_value_has_one_encoding(door: Door) -> None:
    """What is known by the digest of its bytes would otherwise be many messages."""
    body = encode(certificate())
    longer = b"\xdc\x00" + bytes([body[0] & 0x0F]) + body[1:]
    assert door.open(Envelope(NAMES[0], body, b"")) == certificate()
    with pytest.raises(Reject, match="other bytes"):
        door.open(Envelope(NAMES[0], longer, b""))
    with pytest.raises(Reject, match="other bytes"):
        door.prove_bytes(b"\xdc\x00\x03" + encode(Envelope(NAMES[0], body, bytes(64)))[1:])


def test_an_author_gets_so_many_signatures_verified_and_no_more() -> None:
    now = [100.0]
    door = Door(CONFIG, lambda: now[0])
    door.on_event(RosterChanged(ROSTER))

    def send(number: int) -> None:
        message = compute_digest(b"%d" % number)
        door.open(sealed(NAMES[1], Attestation(Round(3), MemberIndex(1), message, bls.sign(SECRETS[1], message))))

    for number in range(BLS_BURST):
        send(number)
    with pytest.raises(Unjudged, match="more signatures"):
        send(99)
    assert door.open(sealed(NAMES[0], attestation(0, by=0))), "others are not touched by it"
    now[0] += 5
    send(99)


# --- shards

SHARDED = msgspec.structs.replace(CONFIG, limits=msgspec.structs.replace(CONFIG.limits, peers_max=4, shard_peers_max=2))
DEALT = deal(SHARDED, ROSTER, Round(3))
AT_MS = Millis(compute_round_start(SHARDED, Round(3)) + 1)


@pytest.fixture
def sharded() -> Door:
    door = Door(SHARDED, clock_ms=lambda: AT_MS)
    door.on_event(RosterChanged(ROSTER))
    return door


def shard_certificate(
    shard: int, *absent: int, signed_as: int | None = None, proposal: Proposal = PROPOSAL
) -> ShardMessage:
    assert DEALT is not None
    message = shard_message(SHARDED.chain, shard if signed_as is None else signed_as, proposal)
    signers = [index for index in DEALT.shards[shard].committee if index not in absent]
    signature = bls.aggregate([bls.sign(SECRETS[index], message) for index in signers])
    inner = Certificate(proposal, tuple(MemberIndex(index) for index in absent), signature)
    return ShardMessage(MemberIndex(shard), inner)


def test_a_shards_certificate_is_signed_by_the_shards_own_committee(sharded: Door) -> None:
    for shard in (0, 1):
        assert sharded.open(sealed(NAMES[0], shard_certificate(shard)))
    with pytest.raises(Unjudged, match="does not verify"):
        sharded.open(sealed(NAMES[0], shard_certificate(0, signed_as=1)))
    assert DEALT is not None
    elsewhere = DEALT.shards[0].committee[0]
    told = msgspec.structs.replace(shard_certificate(1).message, absent=(elsewhere,))
    with pytest.raises(Unjudged, match="not on the committee"):
        sharded.open(sealed(NAMES[0], ShardMessage(MemberIndex(1), told)))
    with pytest.raises(Unjudged, match="signatures, expected 2"):
        sharded.open(sealed(NAMES[0], shard_certificate(0, elsewhere)))


def test_what_no_deal_allows_is_rejected(sharded: Door, door: Door) -> None:
    with pytest.raises(Reject, match="has none"):
        door.open(sealed(NAMES[0], shard_certificate(0)))
    paying = msgspec.structs.replace(PROPOSAL, leaves=(Leaf(bytes(16), bytes(16), Contribution(0)),))
    with pytest.raises(Reject, match="pays"):
        sharded.open(sealed(NAMES[0], shard_certificate(0, proposal=paying)))


def test_a_shard_that_is_not_dealt_or_not_of_now_is_not_judged(sharded: Door) -> None:
    with pytest.raises(Unjudged, match="no such shard"):
        sharded.open(sealed(NAMES[0], msgspec.structs.replace(shard_certificate(0), shard=MemberIndex(2))))
    with pytest.raises(Unjudged, match="shard 4"):  # of a registry that has outgrown the rules
        sharded.open(sealed(NAMES[0], ShardMessage(MemberIndex(4), attestation(0, by=0))))
    later = msgspec.structs.replace(PROPOSAL, epoch=2)
    with pytest.raises(Unjudged, match="no such committee"):
        sharded.open(sealed(NAMES[0], shard_certificate(0, proposal=later)))
    with pytest.raises(Unjudged, match="own round"):
        sharded.open(sealed(NAMES[0], shard_certificate(0, proposal=msgspec.structs.replace(PROPOSAL, round=Round(9)))))
    with pytest.raises(Unjudged, match="registered"):
        sharded.open(sealed(PeerId("stranger"), shard_certificate(0)))


def test_a_shard_dealt_before_somebody_joined_is_still_known(sharded: Door) -> None:
    joined = Member(MemberIndex(4), f"0x{4:040x}", PeerId("peer-4"), bls.public_key(SECRETS[0]), Wei(1), active=True)
    sharded.on_event(RosterChanged(msgspec.structs.replace(ROSTER, members=(*ROSTER.members, joined))))
    assert sharded.open(sealed(NAMES[0], shard_certificate(0)))


def test_a_round_is_judged_by_the_registry_that_it_began_with_however_many_join_meanwhile() -> None:
    at_ms = [AT_MS]
    door = Door(SHARDED, clock_ms=lambda: at_ms[0])
    round_ms = compute_round_start(SHARDED, Round(1)) - compute_round_start(SHARDED, Round(0))
    at_ms[0] = Millis(AT_MS - round_ms)
    door.on_event(RosterChanged(ROSTER))
    later = list(ROSTER.members)
    for _ in range(2):  # this round and the next one, in which its certificates still count
        at_ms[0] = Millis(at_ms[0] + round_ms)
        for _ in range(3 * VERSIONS_MAX):
            index = len(later)
            later.append(
                Member(MemberIndex(index), f"0x{index:040x}", PeerId(f"peer-{index}"), bytes(48), Wei(1), active=True)
            )
            door.on_event(RosterChanged(msgspec.structs.replace(ROSTER, members=tuple(later))))
        assert door.open(sealed(NAMES[0], shard_certificate(0)))
        door._proven.clear()
    assert len(door._rosters[ROSTER.epoch, ROSTER.nonce]) <= VERSIONS_MAX + 2
    at_ms[0] = Millis(at_ms[0] + round_ms)
    with pytest.raises(Unjudged, match="own round"):
        door.open(sealed(NAMES[0], shard_certificate(0)))


def test_an_attestation_in_a_shard_is_the_members_own_word(sharded: Door) -> None:
    assert sharded.open(sealed(NAMES[1], ShardMessage(MemberIndex(0), attestation(1, by=1))))
    with pytest.raises(Reject, match="does not verify"):
        sharded.open(sealed(NAMES[1], ShardMessage(MemberIndex(0), attestation(1, by=2))))
    with pytest.raises(Reject, match="registry index"):
        sharded.open(sealed(NAMES[1], ShardMessage(MemberIndex(0), attestation(2, by=2))))


def test_shard_certificates_of_one_author_cost_so_many_verifications_and_no_more() -> None:
    door = Door(SHARDED, lambda: 100.0, lambda: AT_MS)
    door.on_event(RosterChanged(ROSTER))
    told = [msgspec.structs.replace(PROPOSAL, new_base=compute_digest(b"%d" % n)) for n in range(BLS_BURST + 1)]
    for proposal in told[:-1]:
        assert door.open(sealed(NAMES[0], shard_certificate(0, proposal=proposal)))
    with pytest.raises(Unjudged, match="more signatures"):
        door.open(sealed(NAMES[0], shard_certificate(0, proposal=told[-1])))
    assert door.open(sealed(NAMES[1], shard_certificate(0, proposal=told[-1])))
