"""The door: what is not proven does not come in, what cannot be judged blames nobody, and strangers cost no BLS."""

import msgspec
import pytest

from p2pfm.config import ChainConfig, NetworkConfig
from p2pfm.errors import Reject, Unjudged
from p2pfm.messages import Attestation, Certificate, Envelope, Message, Presence, Proposal, encode
from p2pfm.protocol.events import RosterChanged
from p2pfm.runtime.door import Door
from p2pfm.settlement import bls
from p2pfm.settlement.ledger import Member, Roster
from p2pfm.settlement.rewards import proposal_message
from p2pfm.types import Digest, MemberIndex, Millis, PeerId, Round, Wei

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
    for message in (Presence(stranger, (), 0, 4, 1000, 1), certificate()):
        with pytest.raises(Unjudged):
            door.open(sealed(stranger, message))


def test_without_a_registry_nothing_is_judged_and_nobody_blamed() -> None:
    door = Door(CONFIG)
    for message in (certificate(), attestation(1, by=1)):
        with pytest.raises(Unjudged):
            door.open(sealed(NAMES[1], message))
    assert door.open(sealed(NAMES[2], Presence(NAMES[2], (), 0, 4, 1000, 1))), "serving goes on while the chain is down"


def test_a_body_that_is_no_message_is_rejected(door: Door) -> None:
    with pytest.raises(Reject):
        door.open(Envelope(NAMES[0], b"junk", b""))
