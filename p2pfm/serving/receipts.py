"""What replicas served, attested by the gateways that asked them, and what each is due for it.

Knows no chain, clock or socket. A receipt is a gateway's word about one replica, and each one supersedes those before:
it holds the epoch's sum so far, so the newest is all that has to be kept, shown and added up. Shares are integers that
everybody who holds the same receipts computes alike.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from p2pfm.errors import Reject
from p2pfm.messages import SERVED_MAX, Receipt, Service
from p2pfm.types import MemberIndex, PeerId

ONE = 10**9
"""A whole pool in the integers of shares."""

AGREEING = (2, 3)
"""Part of all stake that must attest a share for it to count: as much as signs a certificate."""

EPOCHS_MAX = 4
"""Epochs of which receipts are kept: the one that runs, and those whose reports may still come."""

PAIRS_MAX = 128 * 128
"""Pairs of gateway and replica an epoch: one network's peers."""

Served = Mapping[tuple[PeerId, PeerId], int]
"""Tokens by (gateway, replica)."""


def compute_shares(served: Served, stakes: Mapping[PeerId, int]) -> dict[PeerId, int]:
    """What each replica is due of a serving pool [parts of ONE]; the sum is at most ONE, the rest stays in the pool.

    Every gateway says which share of its tokens each replica gave. A replica is paid the mean of these shares, weighted
    by the gateways' stakes, but none counts for more than what gateways with two thirds of all stake attest. So whoever
    holds less cannot pay itself for nothing (docs/decisions/why-receipts-need-agreement.md). Shares, not tokens: who
    invents tokens only says the same more loudly. Nothing is made up to a whole, so nobody gains by saying that others
    gave nothing.

    Args:
        stakes: of the members; receipts of and for others do not count.
    """
    total_stake = sum(stakes.values())
    asked: dict[PeerId, int] = {}
    for (gateway, replica), tokens in served.items():
        if gateway != replica and gateway in stakes and replica in stakes:
            asked[gateway] = asked.get(gateway, 0) + tokens
    votes: dict[PeerId, list[tuple[int, int]]] = {}
    for (gateway, replica), tokens in served.items():
        if gateway != replica and replica in stakes and asked.get(gateway, 0) > 0:
            votes.setdefault(replica, []).append((tokens * ONE // asked[gateway], stakes[gateway]))
    return {replica: _agree(given, total_stake) for replica, given in sorted(votes.items())}


def list_services(shares: Mapping[PeerId, int], members: Mapping[PeerId, MemberIndex]) -> tuple[Service, ...]:
    """`compute_shares` as a committee member reveals it: the SERVED_MAX largest, by registry index."""
    due = [(share, members[replica]) for replica, share in shares.items() if share and replica in members]
    largest = sorted(due, key=lambda entry: (-entry[0], entry[1]))[:SERVED_MAX]
    return tuple(Service(member, share) for share, member in sorted(largest, key=lambda entry: entry[1]))


def _agree(votes: list[tuple[int, int]], total_stake: int) -> int:
    """The mean of (share, stake) `votes` over all stake, each cut at the largest share that enough stake attests."""
    attested, level = 0, 0
    for share, stake in sorted(votes, reverse=True):
        attested += stake
        if attested * AGREEING[1] >= total_stake * AGREEING[0]:
            level = share
            break
    return sum(min(share, level) * stake for share, stake in votes) // max(total_stake, 1)


@dataclass(slots=True)
class ReceiptBook:
    """Newest receipts by epoch and pair, own ones and those that others reported. Bounded; takes no step back."""

    _held: dict[int, dict[tuple[PeerId, PeerId], Receipt]] = field(default_factory=dict)

    def get(self, epoch: int, gateway: PeerId, replica: PeerId) -> Receipt | None:
        """The newest that is held."""
        return self._held.get(epoch, {}).get((gateway, replica))

    def add(self, receipt: Receipt) -> bool:
        """Take in a receipt whose signature was proven. False: an older one of the pair, or of an epoch long past.

        Raises:
            Reject: a gateway's word about itself, or one that contradicts what it said before.
        """
        validate_receipt(receipt)
        epochs = sorted({*self._held, receipt.epoch})[-EPOCHS_MAX:]
        if receipt.epoch not in epochs:
            return False
        pairs = self._held.setdefault(receipt.epoch, {})
        pair = receipt.gateway, receipt.replica
        known = pairs.get(pair)
        if known is not None:
            if receipt.number <= known.number:
                return False
            if receipt.total_tokens < known.total_tokens + receipt.num_tokens:
                raise Reject(
                    f"expected a sum of at least {known.total_tokens + receipt.num_tokens} tokens after receipt "
                    f"{known.number}, got {receipt.total_tokens}"
                )
        elif len(pairs) >= PAIRS_MAX:
            return False
        pairs[pair] = receipt
        for past in set(self._held) - set(epochs):
            del self._held[past]
        return True

    def earned(self, epoch: int, replica: PeerId) -> tuple[Receipt, ...]:
        """What `replica` can show of an epoch, by gateway."""
        pairs = self._held.get(epoch, {})
        return tuple(receipt for (_, other), receipt in sorted(pairs.items()) if other == replica)

    def served(self, epoch: int) -> dict[tuple[PeerId, PeerId], int]:
        """Tokens by (gateway, replica): what `compute_shares` takes."""
        return {pair: receipt.total_tokens for pair, receipt in sorted(self._held.get(epoch, {}).items())}

    @property
    def epochs(self) -> tuple[int, ...]:
        """Of which anything is held, the newest last."""
        return tuple(sorted(self._held))


def validate_receipt(receipt: Receipt) -> None:
    """Raises: Reject, if it says what no honest gateway does."""
    if receipt.gateway == receipt.replica:
        raise Reject("expected a receipt of one peer for another, got one for itself")
    if not 0 < receipt.num_tokens <= receipt.total_tokens:
        raise Reject(f"expected 1 to {receipt.total_tokens} tokens, got {receipt.num_tokens}")


def validate_report(replica: PeerId, epoch: int, receipts: Iterable[Receipt]) -> None:
    """What a replica shows of its epoch. Raises: Reject."""
    seen: set[PeerId] = set()
    for receipt in receipts:
        validate_receipt(receipt)
        if receipt.replica != replica or receipt.epoch != epoch:
            raise Reject(f"expected receipts for {replica} in epoch {epoch}, got one for {receipt.replica}")
        if receipt.gateway in seen:
            raise Reject(f"expected one receipt of each gateway, got two of {receipt.gateway}")
        seen.add(receipt.gateway)
