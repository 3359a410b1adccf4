"""What the child of test_store_crash.py writes, by number."""

import random

from p2pfm.messages import Certificate, Proposal
from p2pfm.protocol.events import Durable
from p2pfm.types import Digest, MemberIndex, Round, compute_digest

ZERO = Digest(bytes(32))
RESIDUAL_BYTES = 200_000


def residual_of(number: int) -> bytes:
    return random.Random(number).randbytes(RESIDUAL_BYTES)


def durable_of(number: int) -> Durable:
    return Durable(
        base=ZERO,
        residual=compute_digest(residual_of(number)),
        head=certificate_of(number),
        signed_round=number,
        announced_round=-1,
        pending_residual=None,
        announced_payload=None,
    )


def certificate_of(number: int) -> Certificate:
    proposal = Proposal(
        round=Round(number),
        proposer=MemberIndex(0),
        epoch=0,
        nonce=0,
        base=ZERO,
        new_base=ZERO,
        prev_root=ZERO,
        root=ZERO,
        updates=(),
        reveals=(),
        leaves=(),
    )
    return Certificate(proposal, (), bytes(96))
