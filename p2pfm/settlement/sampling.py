"""The committee draw, exactly as the contract draws it. Knows stakes and a seed, nothing else."""

from collections.abc import Sequence

from eth_hash.auto import keccak

from p2pfm.types import MemberIndex, Wei


def compute_quorum(committee_size: int) -> int:
    """How many members make a certificate: more than 2/3."""
    return 2 * committee_size // 3 + 1


def draw_committee(seed: bytes, stakes: Sequence[Wei], size: int) -> tuple[MemberIndex, ...]:
    """At most `size` distinct members, drawn without replacement in proportion to stake; the first is first-ranked.

    Draw k takes keccak256(seed, k) modulo the stake still in the urn and walks the registry in order. A stake of 0 is
    never drawn. The modulo's bias is below total stake / 2**256.
    """
    urn: list[int] = list(stakes)
    total = sum(urn)
    committee = []
    for rank in range(min(size, sum(1 for stake in urn if stake > 0))):
        ticket = int.from_bytes(keccak(seed + rank.to_bytes(32, "big")), "big") % total
        index = 0
        while ticket >= urn[index]:
            ticket -= urn[index]
            index += 1
        committee.append(MemberIndex(index))
        total -= urn[index]
        urn[index] = 0
    return tuple(committee)
