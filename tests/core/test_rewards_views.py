"""What `p2pfm rewards show` and `plot` say: sums that agree with the chain, states, and edges that have a name."""

import csv
import io
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from ledger_worlds import ACCOUNTS, PARAMS, PEERS
from rewards_world import MEASURED, POOL_WEI, Settled
from rich.console import Console

from nodes.rewards import claim_newest
from nodes.rewards.plots import KINDS, plot_book
from nodes.rewards.tables import (
    describe_totals,
    format_amount,
    make_epochs_table,
    make_peers_table,
    make_rounds_table,
    to_csv,
    to_json,
)
from nodes.rewards.views import (
    EpochLine,
    PeerLine,
    RoundLine,
    compute_histories,
    view_epochs,
    view_peers,
    view_rounds,
    view_totals,
)
from p2pfm.errors import OperatorError
from p2pfm.types import MemberIndex, Round


@pytest.fixture
def settled() -> Settled:
    return Settled()


def render(table) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_peers_add_up_to_the_chains_totals_at_every_moment(settled: Settled) -> None:
    for round, is_claimed in ((0, False), (1, True), (2, False), (3, False)):
        settled.settle(round)
        if is_claimed:
            settled.finish()
            claim_newest(settled.world.any, PEERS[1], settled.blobs.get)
        book = settled.book()
        lines, totals = view_peers(book), view_totals(book)
        assert sum(line.allotted_wei for line in lines) == totals.allotted_wei
        assert sum(line.claimed_wei for line in lines) == totals.claimed_wei
        assert sum(line.claimable_wei for line in lines) == totals.claimable_wei
        assert sum(line.contestable_wei for line in lines) == totals.contestable_wei
        assert totals.claimed_wei + totals.claimable_wei + totals.contestable_wei == totals.allotted_wei
        assert sum(line.share for line in lines) == pytest.approx(1 if totals.allotted_wei else 0)
        assert totals.pool_wei == settled.world.any.get_pool()


def test_a_peer_worth_nothing_for_ever_is_shown_with_nothing(settled: Settled) -> None:
    for round in range(4):
        settled.settle(round)
    lines = view_peers(settled.book())
    negative = next(line for line in lines if line.member == 1)
    idle = next(line for line in lines if line.member == 3)
    assert (negative.contribution, negative.num_rounds, negative.allotted_wei, negative.share) == (-80, 4, 0, 0.0)
    assert (idle.contribution, idle.num_rounds, idle.allotted_wei) == (0, 0, 0)
    assert view_totals(settled.book()).gini == pytest.approx((2 * (3 * 100 + 4 * 180) / (4 * 280)) - 5 / 4, abs=1e-12)
    assert "-0.000" in render(make_peers_table(lines, view_totals(settled.book()), 200))


def test_rounds_tell_until_when_they_can_be_contested(settled: Settled) -> None:
    settled.settle(0)
    settled.finish()
    settled.settle(1)
    accepted_s = settled.world.any.get_rounds(Round(1))[0].accepted_s
    lines = view_rounds(settled.book(), 2)
    assert [(line.status, line.until_s) for line in lines] == [
        ("final", 0),
        ("contestable", accepted_s + PARAMS.challenge_window_s),
    ]
    assert [line.allotted_wei for line in lines] == [0, POOL_WEI * 100 // 280 + POOL_WEI * 180 // 280]
    settled.world.ledgers[1].demand_leaf(Round(1), MemberIndex(2))
    (line,) = view_rounds(settled.book(), 2)[1:]
    assert line.status == "contestable"  # the demand ends before the window does
    settled.world.advance(PARAMS.challenge_window_s - 10)
    settled.world.ledgers[1].demand_leaf(Round(1), MemberIndex(1))
    settled.world.advance(20)
    (line,) = view_rounds(settled.book(), 2)[1:]
    assert line.status == "held"
    assert line.until_s == accepted_s + PARAMS.challenge_window_s - 10 + 2 * PARAMS.response_s
    settled.world.advance(line.until_s - accepted_s - PARAMS.challenge_window_s - 11)
    assert not settled.book().readings[1].settled.is_final
    settled.world.advance(1)
    assert settled.book().readings[1].settled.is_final


def test_epochs_gather_rounds_and_a_void_last_round_defers_the_pay(settled: Settled) -> None:
    for round in (0, 2, 3):  # round 1 was void: round 2 pays the epoch that it should have ended
        settled.settle(round)
    lines = view_epochs(settled.book(), 2)
    assert [(line.epoch, line.first, line.last, line.num_rounds) for line in lines] == [(0, 0, 0, 1), (1, 2, 3, 2)]
    assert [line.allotted_wei > 0 for line in lines] == [False, True]
    assert lines[0].gini is None
    assert sum(line.allotted_wei for line in lines) == view_totals(settled.book()).allotted_wei


def test_a_round_without_data_is_shown_with_what_the_chain_holds(settled: Settled) -> None:
    settled.settle(0)
    settled.settle(1)
    settled.lose(1)
    book = settled.book()
    line = view_rounds(book, 2)[1]
    assert (line.num_updates, line.gini) == (None, None)
    assert line.allotted_wei == book.readings[1].settled.sums.reward_wei > 0
    assert "nobody serves its data" in line.problem
    assert "no data" in render(make_rounds_table(view_rounds(book, 2), view_totals(book)))
    assert view_epochs(book, 2)[0].contribution is None
    assert view_totals(book).allotted_wei == line.allotted_wei


def test_no_round_on_chain_is_an_empty_answer() -> None:
    book = Settled().book()
    totals = view_totals(book)
    assert (totals.num_rounds, totals.allotted_wei, totals.gini) == (0, 0, None)
    assert [line.allotted_wei for line in view_peers(book)] == [0] * 4
    assert view_rounds(book, 2) == view_epochs(book, 2) == ()
    assert to_json("round", (), totals, [])["rows"] == []
    assert to_csv(RoundLine, ()).startswith("round,epoch,status")


def test_a_zero_pool_pays_nobody_and_nothing_divides_by_it() -> None:
    settled = Settled(pool=0)
    for round in (0, 1):
        settled.settle(round)
    totals = view_totals(settled.book())
    assert (totals.allotted_wei, totals.gini) == (0, 0.0)
    assert [line.gini for line in view_epochs(settled.book(), 2)] == [None]


def test_one_peer_alone_gets_all() -> None:
    settled = Settled(num_members=1)
    for round in (0, 1):
        settled.settle(round, measured={0: (50,)})
    (line,) = view_peers(settled.book())
    assert (line.allotted_wei, line.share) == (POOL_WEI, 1.0)
    assert view_totals(settled.book()).gini == 0.0


def test_json_and_csv_tell_the_same_and_wei_are_strings(settled: Settled) -> None:
    settled.settle(0)
    settled.settle(1)
    book = settled.book()
    totals = view_totals(book)
    for kind, line_type, lines in (
        ("peer", PeerLine, view_peers(book)),
        ("round", RoundLine, view_rounds(book, 2)),
        ("epoch", EpochLine, view_epochs(book, 2)),
    ):
        told = json.loads(json.dumps(to_json(kind, lines, totals, [])))
        assert told["by"] == kind
        rows = list(csv.DictReader(io.StringIO(to_csv(line_type, lines))))
        assert len(rows) == len(told["rows"]) == len(lines)
        for row, plain in zip(rows, told["rows"], strict=True):
            scalars = {key: value for key, value in plain.items() if not isinstance(value, list)}
            assert row == {key: "" if value is None else str(value) for key, value in scalars.items()}
            assert isinstance(plain["allotted_wei"], str)
    assert told["totals"]["allotted_wei"] == str(totals.allotted_wei)


def test_tables_have_a_line_each_and_the_totals() -> None:
    settled = Settled(pool=POOL_WEI // 8)
    for round in range(8):
        settled.settle(round)
    book = settled.book()
    totals = view_totals(book)
    wide, narrow = (render(make_peers_table(view_peers(book), totals, width)) for width in (200, 80))
    assert "round 0" in wide
    assert max(map(len, narrow.rstrip().splitlines())) <= 80
    middle = render(make_peers_table(view_peers(book), totals, 104))
    assert [round for round in range(8) if f"round {round}" in middle] == [6, 7]  # the newest that fit
    assert all(
        str(line.round) in render(make_rounds_table(view_rounds(book, 2), totals)) for line in view_rounds(book, 2)
    )
    assert "6 to 7 (2)" in render(make_epochs_table(view_epochs(book, 2), totals))
    assert f"Gini {totals.gini:.3f}" in describe_totals(totals)


def test_small_amounts_are_told_in_wei() -> None:
    assert format_amount(0) == "0.0000 PFM"
    assert format_amount(999) == "999 wei"
    assert format_amount(1_234 * 10**18) == "1,234.0000 PFM"


def test_histories_grow_and_end_at_what_is_allotted_and_claimed(settled: Settled) -> None:
    for round in range(4):
        settled.settle(round)
        settled.finish()
        if round == 1:
            claim_newest(settled.world.any, PEERS[3], settled.blobs.get)
    book = settled.book()
    rounds, histories = compute_histories(book)
    assert rounds == (0, 1, 2, 3)
    for line in view_peers(book):
        allotted, drawn = histories[line.member]
        assert allotted == sorted(allotted)
        assert (allotted[-1], drawn[-1]) == (line.allotted_wei, line.claimed_wei)
    assert histories[MemberIndex(2)][1] == [0, *[POOL_WEI * 180 // 280] * 3]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_picture_is_drawn_as_png_and_svg(kind: str, settled: Settled, tmp_path: Path) -> None:
    settled.settle(0)
    settled.settle(1)
    png, svg = tmp_path / "a.png", tmp_path / "a.SVG"
    plot_book(settled.book(), kind, png)
    plot_book(settled.book(), kind, svg, {PEERS[1]: "ada"})
    assert png.read_bytes().startswith(b"\x89PNG")
    text = "".join(ElementTree.parse(svg).getroot().itertext())
    assert ("Gini" in text) == (kind in ("lorenz", "distribution"))
    assert ("ada" in text) == (kind != "lorenz")
    again = tmp_path / "b.svg"
    plot_book(settled.book(), kind, again, {PEERS[1]: "ada"})
    assert again.read_bytes() == svg.read_bytes()


def test_a_picture_of_another_kind_or_of_nothing_is_refused(settled: Settled, tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="no round is on chain yet: nothing to draw"):
        plot_book(settled.book(), "lorenz", tmp_path / "a.png")
    settled.settle(0)
    for name in ("a.jpg", "a", "a.pdf"):
        with pytest.raises(OperatorError, match=r"ends in \.png or \.svg"):
            plot_book(settled.book(), "lorenz", tmp_path / name)
    with pytest.raises(OperatorError, match="expected one of overview"):
        plot_book(settled.book(), "pie", tmp_path / "a.png")
    settled.lose(0)
    with pytest.raises(OperatorError, match="nobody serves the data of any"):
        plot_book(settled.book(), "overview", tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_the_worlds_medians_are_what_these_tests_count_with(settled: Settled) -> None:
    proposal = settled.settle(0)
    assert sorted(update.contribution for update in proposal.updates) == [-20, 50, 90]
    assert len(MEASURED) == 3
    assert view_peers(settled.book())[0].account in ACCOUNTS
