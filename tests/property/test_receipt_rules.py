"""What receipts are worth, and what a book of them takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfm.errors import Reject
from p2pfm.messages import Receipt
from p2pfm.serving.receipts import EPOCHS_MAX, ONE, ReceiptBook, compute_shares, validate_report
from p2pfm.types import Digest, PeerId

PEERS = [PeerId(f"peer-{number}") for number in range(8)]
peers = st.sampled_from(PEERS)
served = st.dictionaries(st.tuples(peers, peers), st.integers(1, 10**9), max_size=40)
stakes = st.dictionaries(peers, st.integers(1, 10**24), min_size=1)


def receipt(number: int, total: int, tokens: int = 1, gateway: int = 0, replica: int = 1, epoch: int = 5) -> Receipt:
    zeros = Digest(bytes(32))
    return Receipt(PEERS[gateway], PEERS[replica], epoch, number, zeros, zeros, tokens, total, zeros)


@given(served, stakes)
def test_shares_never_exceed_the_pool_and_only_members_draw(tokens, stake) -> None:
    shares = compute_shares(tokens, stake)
    assert all(share >= 0 for share in shares.values())
    assert sum(shares.values()) <= ONE
    assert shares.keys() <= stake.keys()


@given(served, stakes, st.randoms(), st.integers(2, 1000))
def test_shares_depend_on_no_order_and_on_no_gateways_loudness(tokens, stake, random, factor: int) -> None:
    shuffled = list(tokens.items())
    random.shuffle(shuffled)
    assert compute_shares(dict(shuffled), stake) == compute_shares(tokens, stake)
    loud = {pair: many * (factor if pair[0] == PEERS[0] else 1) for pair, many in tokens.items()}
    assert compute_shares(loud, stake) == compute_shares(tokens, stake)


@given(served, stakes)
def test_who_attests_himself_or_is_no_member_changes_nothing(tokens, stake) -> None:
    foreign = {
        (PeerId("stranger"), PEERS[1]): 10**9,
        (PEERS[2], PEERS[2]): 10**9,
        (PEERS[3], PeerId("stranger")): 10**9,
    }
    kept = {pair: many for pair, many in tokens.items() if pair[0] != pair[1]}
    assert compute_shares({**kept, **foreign}, stake) == compute_shares(kept, stake)


@given(st.integers(0, 8), st.lists(st.integers(1, 100), min_size=8, max_size=8))
def test_a_coalition_with_less_than_two_thirds_of_the_stake_cannot_pay_itself_for_nothing(size: int, amounts) -> None:
    stake = dict(zip(PEERS, amounts, strict=True))
    ring = {(PEERS[i], PEERS[j]): 10**6 for i in range(size) for j in range(size) if i != j}
    honest = {(PEERS[i], PEERS[j]): 10**3 for i in range(size, 8) for j in range(size, 8) if i != j}
    drawn = sum(compute_shares({**ring, **honest}, stake).get(peer, 0) for peer in PEERS[:size])
    assert drawn == 0 or 3 * sum(amounts[:size]) >= 2 * sum(amounts)


def test_a_replica_that_all_use_alike_draws_what_all_attest() -> None:
    tokens = {(PEERS[i], PEERS[j]): 100 * (i + 1) for i in range(4) for j in range(4) if i != j}
    shares = compute_shares(tokens, dict.fromkeys(PEERS[:4], 7))
    assert shares == dict.fromkeys(PEERS[:4], ONE // 3 * 3 // 4)  # three of four attest a third each


def test_a_book_takes_newer_sums_only() -> None:
    book = ReceiptBook()
    assert book.add(receipt(1, 10, 10))
    assert not book.add(receipt(1, 99, 10))
    assert book.add(receipt(3, 40, 5))  # one in between was lost: its sum is in this one
    assert not book.add(receipt(2, 20, 10))
    with pytest.raises(Reject, match="sum"):
        book.add(receipt(4, 41, 5))
    assert book.served(5) == {(PEERS[0], PEERS[1]): 40}
    assert [one.number for one in book.earned(5, PEERS[1])] == [3]
    assert book.earned(5, PEERS[0]) == ()


def test_a_book_forgets_old_epochs_and_takes_none_of_them_again() -> None:
    book = ReceiptBook()
    for epoch in range(10):
        assert book.add(receipt(1, 5, epoch=epoch))
    assert book.epochs == tuple(range(10 - EPOCHS_MAX, 10))
    assert not book.add(receipt(2, 9, epoch=1))


@pytest.mark.parametrize("bad", [receipt(1, 5, gateway=1), receipt(1, 4, tokens=5)])
def test_a_book_rejects_what_no_honest_gateway_says(bad: Receipt) -> None:
    with pytest.raises(Reject):
        ReceiptBook().add(bad)


@pytest.mark.parametrize(
    "receipts",
    [
        (receipt(1, 5), receipt(2, 9)),  # one gateway twice
        (receipt(1, 5, replica=2),),
        (receipt(1, 5, epoch=4),),
    ],
)
def test_a_report_of_others_receipts_is_refused(receipts) -> None:
    with pytest.raises(Reject):
        validate_report(PEERS[1], 5, receipts)
    validate_report(PEERS[1], 5, (receipt(1, 5), receipt(1, 7, gateway=2)))
