"""A Book by peer, by round and by epoch: the figures that tables, files and pictures show. Pure; knows no screen."""

from collections.abc import Sequence
from typing import Literal

import msgspec

from nodes.rewards.inequality import compute_gini
from nodes.rewards.reading import Book, Reading, make_rows
from p2pfm.settlement.ledger import Claimed, SettledRound
from p2pfm.types import Contribution, Epoch, MemberIndex, PeerId, Round, Wei

Status = Literal["final", "contestable", "held"]
"""held: its window is over, but a demand for a leaf keeps it open."""


class PeerLine(msgspec.Struct, frozen=True):
    """All that one registered peer contributed and got."""

    member: MemberIndex
    peer: PeerId
    account: str
    num_rounds: int
    """Settled rounds that merged an update of it, of those whose data are at hand."""
    contribution: int
    """Sum over those rounds [nano-nats/token]."""
    by_round: tuple[tuple[Round, Contribution], ...]
    allotted_wei: Wei
    """By all settled rounds."""
    share: float
    """Of all that was allotted."""
    claimed_wei: Wei
    claimable_wei: Wei
    """Final and not drawn yet: `p2pfm rewards claim`."""
    contestable_wei: Wei
    """Allotted by rounds that are not final yet."""


class RoundLine(msgspec.Struct, frozen=True):
    """One settled round."""

    round: Round
    epoch: Epoch
    status: Status
    until_s: int
    """Contestable until then [s since 1970]; 0 when final."""
    num_updates: int | None
    """None: its data are not at hand."""
    num_positive: int | None
    """Updates that were worth something."""
    contribution: int | None
    """Sum of the positive medians [nano-nats/token]."""
    allotted_wei: Wei
    cumulative_wei: Wei
    gini: float | None
    """Of the round's rewards over all members; None: it paid nobody, or its data are not at hand."""
    num_absent: int
    """Committee members that did not sign."""
    problem: str


class EpochLine(msgspec.Struct, frozen=True):
    """The settled rounds of one settlement epoch: those of round // rounds_per_epoch == epoch."""

    epoch: Epoch
    first: Round
    last: Round
    num_rounds: int
    """Settled; the others of the epoch were void, or are yet to come."""
    status: Status
    """Of its newest round."""
    num_updates: int | None
    contribution: int | None
    allotted_wei: Wei
    """Within the epoch. A void last round defers an epoch's payment to the next settled round."""
    gini: float | None


class Totals(msgspec.Struct, frozen=True):
    """Over everything."""

    num_members: int
    num_rounds: int
    num_final: int
    allotted_wei: Wei
    claimed_wei: Wei
    claimable_wei: Wei
    """Final and not drawn."""
    contestable_wei: Wei
    """Allotted by rounds that are not final."""
    pool_wei: Wei
    """Funded and not allotted yet."""
    gini: float | None
    """Of what was allotted, over all members; None before the first round whose data are at hand."""


def view_peers(book: Book) -> tuple[PeerLine, ...]:
    """By what they were allotted, most first; then by registry index."""
    newest, final = book.get_newest(), book.get_final()
    allotted = _cumulative(newest, len(book.roster.members))
    secured = _cumulative(final, len(book.roster.members))
    total = sum(allotted)
    by_member: dict[MemberIndex, list[tuple[Round, Contribution]]] = {}
    for reading in book.readings:
        for update in reading.updates:
            by_member.setdefault(update.member, []).append((reading.settled.round, update.contribution))
    lines = []
    for member, claimed in zip(book.roster.members, book.claimed, strict=True):
        rounds = tuple(by_member.get(member.index, ()))
        own, safe = allotted[member.index], secured[member.index]
        lines.append(
            PeerLine(
                member=member.index,
                peer=member.peer,
                account=member.account,
                num_rounds=len(rounds),
                contribution=sum(contribution for _, contribution in rounds),
                by_round=rounds,
                allotted_wei=Wei(own),
                share=own / total if total else 0.0,
                claimed_wei=claimed,
                claimable_wei=Wei(max(0, safe - claimed)),
                contestable_wei=Wei(max(0, own - max(safe, claimed))),
            )
        )
    return tuple(sorted(lines, key=lambda line: (-line.allotted_wei, line.member)))


def view_rounds(book: Book, rounds_per_epoch: int) -> tuple[RoundLine, ...]:
    """In order."""
    lines = []
    for reading in book.readings:
        settled, proposal = reading.settled, reading.proposal
        status, until_s = get_status(book, settled)
        worth = [update.contribution for update in reading.updates] if proposal and not reading.gap else None
        rewards = [leaf.reward_wei for leaf in reading.leaves]
        lines.append(
            RoundLine(
                round=settled.round,
                epoch=Epoch(settled.round // rounds_per_epoch),
                status=status,
                until_s=until_s,
                num_updates=None if worth is None else len(worth),
                num_positive=None if worth is None else sum(value > 0 for value in worth),
                contribution=None if worth is None else sum(max(0, value) for value in worth),
                allotted_wei=settled.sums.reward_wei,
                cumulative_wei=settled.sums.cumulative_wei,
                gini=compute_gini(rewards) if any(rewards) else None,
                num_absent=len(settled.absent),
                problem=reading.problem or reading.gap,
            )
        )
    return tuple(lines)


def view_epochs(book: Book, rounds_per_epoch: int) -> tuple[EpochLine, ...]:
    """In order; an epoch without a settled round has no line."""
    by_epoch: dict[Epoch, list[RoundLine]] = {}
    for line in view_rounds(book, rounds_per_epoch):
        by_epoch.setdefault(line.epoch, []).append(line)
    paid: dict[Epoch, dict[MemberIndex, int]] = {}
    for reading in book.readings:
        sums = paid.setdefault(Epoch(reading.settled.round // rounds_per_epoch), {})
        for row in make_rows(book, reading):
            sums[row.member] = sums.get(row.member, 0) + row.reward_wei
    lines = []
    for epoch, rounds in by_epoch.items():
        is_whole = all(not line.problem for line in rounds)
        amounts = list(paid[epoch].values())
        lines.append(
            EpochLine(
                epoch=epoch,
                first=rounds[0].round,
                last=rounds[-1].round,
                num_rounds=len(rounds),
                status=rounds[-1].status,
                num_updates=sum((line.num_updates or 0) for line in rounds) if is_whole else None,
                contribution=sum(line.contribution or 0 for line in rounds) if is_whole else None,
                allotted_wei=Wei(sum(line.allotted_wei for line in rounds)),
                gini=compute_gini(amounts) if is_whole and any(amounts) else None,
            )
        )
    return tuple(lines)


def view_totals(book: Book) -> Totals:
    """The last line of every table. Amounts allotted are the chain's own, and need no data."""
    final = [reading.settled for reading in book.readings if reading.settled.is_final]
    allotted = book.readings[-1].settled.sums.cumulative_wei if book.readings else Wei(0)
    secured = final[-1].sums.cumulative_wei if final else Wei(0)
    claimed = Wei(sum(book.claimed))
    newest = book.get_newest()
    amounts = _cumulative(newest, len(book.roster.members))
    return Totals(
        num_members=len(book.roster.members),
        num_rounds=len(book.readings),
        num_final=len(final),
        allotted_wei=allotted,
        claimed_wei=claimed,
        claimable_wei=Wei(secured - claimed),
        contestable_wei=Wei(allotted - secured),
        pool_wei=book.pool,
        gini=compute_gini(amounts) if newest and amounts else None,
    )


def get_status(book: Book, settled: SettledRound) -> tuple[Status, int]:
    """(whether a round stands for good, until when it can be contested [s since 1970]; 0 when final)."""
    if settled.is_final:
        return "final", 0
    window_s = settled.accepted_s + book.params.challenge_window_s
    held_s = [
        demand.deadline_s + book.params.response_s
        for demand in book.demands
        if demand.position <= settled.position and _is_standing(book, demand.deadline_s, demand.position)
    ]
    until_s = min(max(held_s, default=0), settled.accepted_s + book.params.contest_s)
    return ("held", until_s) if until_s > window_s else ("contestable", window_s)


def compute_histories(book: Book) -> tuple[tuple[Round, ...], dict[MemberIndex, tuple[list[int], list[int]]]]:
    """(rounds with data, by member: allotted up to each, drawn against roots up to each) [wei]."""
    readings = [reading for reading in book.readings if reading.proposal]
    rounds = tuple(reading.settled.round for reading in readings)
    by_round = [_cumulative(reading, len(book.roster.members)) for reading in readings]
    draws: dict[MemberIndex, list[Claimed]] = {}
    for entry in book.entries:
        if isinstance(entry.what, Claimed):
            draws.setdefault(entry.what.index, []).append(entry.what)
    histories: dict[MemberIndex, tuple[list[int], list[int]]] = {}
    for member in book.roster.members:
        mine = draws.get(member.index, [])
        drawn: list[int] = [sum(draw.amount for draw in mine if draw.round <= round) for round in rounds]
        histories[member.index] = ([sums[member.index] for sums in by_round], drawn)
    return rounds, histories


def _is_standing(book: Book, deadline_s: int, position: int) -> bool:
    """Whether a demand is of the round that stands at its position now, and not of one that was voided there."""
    made_s = deadline_s - book.params.response_s
    return position < len(book.readings) and made_s >= book.readings[position].settled.accepted_s


def _cumulative(reading: Reading | None, num_members: int) -> Sequence[int]:
    """(num_members,) wei allotted up to a round; whoever joined later has 0."""
    leaves = reading.leaves if reading else ()
    return [leaf.cumulative_wei for leaf in leaves] + [0] * (num_members - len(leaves))
