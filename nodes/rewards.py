"""Reading rewards back from the chain: who was paid what in which round, and whether it was right.

The chain holds a root and a data hash a round; the proposal under that hash (reveals, medians, weights, leaves) comes
from any peer and is believed only after it was checked against both. Knows a Ledger and a way to fetch a blob.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import msgspec
from matplotlib import pyplot
from rich.table import Table

from p2pfm.config import WEI_PER_PFM, NetworkConfig
from p2pfm.errors import Reject, WorldError
from p2pfm.messages import Announcement, IncludedUpdate, Proposal, decode_message
from p2pfm.protocol.committee import draft_proposal
from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import LeafValue, Ledger, Roster, SettledRound
from p2pfm.settlement.rewards import from_wire
from p2pfm.types import NANO, WEIGHT_ONE, Contribution, Digest, MemberIndex, PeerId, Round, Wei, Weight, compute_digest

matplotlib.use("Agg")

PROPOSAL_BYTES_MAX = 8_000_000
"""Far above a proposal of a full network (128 peers: some 200 kB)."""

FIRST = Round(0)

Fetch = Callable[[Digest], bytes | None]
"""Bytes of a content-addressed blob from wherever they are held; None: nobody serves it."""


class Row(msgspec.Struct, frozen=True):
    """One registered peer in one settled round."""

    round: Round
    member: MemberIndex
    peer: PeerId
    contribution: Contribution | None
    """Of this round's update [nano-nats/token]; None: no update of this peer was included."""
    total: Contribution
    """Accumulated over the epoch so far [nano-nats/token]."""
    weight: Weight
    """In this round's merge [parts per WEIGHT_ONE]."""
    reward_wei: Wei
    """Allotted by this round."""
    cumulative_wei: Wei
    """Allotted up to this round."""
    claimed_wei: Wei
    """Drawn up to now."""
    is_final: bool


def read_rewards(ledger: Ledger, fetch: Fetch, first: Round = FIRST, is_partial: bool = False) -> tuple[Row, ...]:
    """All settled rounds from `first` on, by round and then by registry index.

    Args:
        is_partial: leave out rounds whose data nobody serves, instead of raising.

    Raises:
        ChainError: the chain cannot be read.
        WorldError: a round's data is not to be had.
        Reject: the data has the right hash, but its leaves are not those of the root on chain.
    """
    members = ledger.get_roster().members
    claimed = [ledger.get_claimed(member.index) for member in members]
    rows: list[Row] = []
    for settled in ledger.get_rounds(first):
        data = fetch(settled.data_digest)
        if data is None and is_partial:
            continue
        proposal = _open(settled, data)
        updates = {update.member: update for update in proposal.updates}
        for member, leaf, drawn in zip(members, from_wire(proposal.leaves), claimed, strict=False):
            update = updates.get(member.index)
            rows.append(
                Row(
                    round=settled.round,
                    member=member.index,
                    peer=member.peer,
                    contribution=update.contribution if update else None,
                    total=Contribution(leaf.contribution),
                    weight=update.weight if update else Weight(0),
                    reward_wei=leaf.reward_wei,
                    cumulative_wei=leaf.cumulative_wei,
                    claimed_wei=drawn,
                    is_final=settled.is_final,
                )
            )
    return tuple(rows)


def verify_rewards(ledger: Ledger, fetch: Fetch, network: NetworkConfig) -> dict[Round, list[str]]:
    """Findings by settled round; an empty list: everything recomputes to what the chain holds. Raises: ChainError."""
    roster = ledger.get_roster()
    findings: dict[Round, list[str]] = {}
    previous: Proposal | None = None
    for settled in ledger.get_rounds(Round(0)):
        data = fetch(settled.data_digest)
        if data is None:
            findings[settled.round] = [f"nobody serves its data {settled.data_digest.hex()}: it cannot be checked"]
            previous = None
            continue
        findings[settled.round] = verify_round(settled, data, roster, previous, network)
        try:
            previous = _decode(data)
        except Reject:
            previous = None
    return findings


def verify_round(
    settled: SettledRound, proposal_bytes: bytes, roster: Roster, previous: Proposal | None, network: NetworkConfig
) -> list[str]:
    """What is wrong with a settled round; empty: medians, weights, leaves and root all recompute.

    Commitments are gossip of their round and not part of a proposal: that every reveal matched one is what the
    committee's signatures say. `previous` is the proposal of the settled round before; None only for the first.
    """
    if compute_digest(proposal_bytes) != settled.data_digest:
        return [f"data: expected SHA-256 {settled.data_digest.hex()}, got {compute_digest(proposal_bytes).hex()}"]
    try:
        proposal = _decode(proposal_bytes)
    except Reject as error:
        return [f"data: {error}"]
    return [
        *_compare_header(settled, proposal),
        *_compare_root(settled, from_wire(proposal.leaves)),
        *_compare_content(settled, proposal, roster, previous, network),
    ]


def claim_newest(ledger: Ledger, peer: PeerId, fetch: Fetch) -> Wei:
    """Draw all that the newest final round owes `peer`; 0 if nothing is owed.

    Raises:
        WorldError: no round is final yet, or nobody serves its data.
        Reverted: the contract refused.
    """
    member = next((member for member in ledger.get_roster().members if member.peer == peer), None)
    final = [settled for settled in ledger.get_rounds(FIRST) if settled.is_final]
    if member is None or not final:
        raise WorldError("nothing to claim yet: " + ("no round is final" if member else "this peer is not registered"))
    leaves = from_wire(_open(final[-1], fetch(final[-1].data_digest)).leaves)
    if member.index >= len(leaves) or leaves[member.index].cumulative_wei <= ledger.get_claimed(member.index):
        return Wei(0)
    return ledger.claim(final[-1].round, member.index, leaves)


def rows_to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as JSON-able objects; wei as decimal strings, since JSON readers round large numbers."""
    told: list[dict[str, Any]] = [msgspec.to_builtins(row) for row in rows]
    for entry in told:
        entry.update({name: str(entry[name]) for name in ("reward_wei", "cumulative_wei", "claimed_wei")})
    return told


def make_rewards_table(rows: Sequence[Row]) -> Table:
    """Contributions and rewards by peer: one line a peer, one column a round, and what was claimed."""
    table = Table(title="Contributions and rewards, read from the chain")
    rounds = sorted({row.round for row in rows})
    table.add_column("peer")
    for round in rounds:
        table.add_column(f"round {round}\n(mnat/token)", justify="right")
    table.add_column("allotted\n(PFM)", justify="right")
    table.add_column("claimed\n(PFM)", justify="right")
    last: dict[MemberIndex, Row] = {row.member: row for row in rows}
    by_place = {(row.member, row.round): row for row in rows}
    for row in sorted(last.values(), key=lambda row: (-row.cumulative_wei, row.member)):
        cells = [_format_contribution(by_place.get((row.member, round))) for round in rounds]
        table.add_row(row.peer[-12:], *cells, _format_pfm(row.cumulative_wei), _format_pfm(row.claimed_wei))
    return table


def plot_rewards(rows: Sequence[Row], path: Path, names: Mapping[PeerId, str] | None = None) -> None:
    """Two charts into `path` (PNG): rewards by peer, stacked by round; contributions by peer and round.

    Args:
        names: what to call peers; without one, the end of the peer id.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("expected at least one settled round")
    rounds = sorted({row.round for row in rows})
    called = {row.member: (names or {}).get(row.peer, f"…{row.peer[-6:]}") for row in rows}
    members = sorted(called, key=lambda member: (called[member], member))
    labels = [called[member] for member in members]
    by_place = {(row.member, row.round): row for row in rows}
    colours = pyplot.get_cmap("viridis")
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(max(7.0, 1.1 * len(members)), 8.0), constrained_layout=True)
    positions = range(len(members))
    drawn = [0.0] * len(members)
    for rank, round in enumerate(rounds):
        colour = colours(rank / max(1, len(rounds) - 1) * 0.85)
        here = [by_place.get((member, round)) for member in members]
        rewards = [row.reward_wei / WEI_PER_PFM if row else 0.0 for row in here]
        top.bar(positions, rewards, bottom=drawn, color=colour, label=f"round {round}")
        drawn = [below + reward for below, reward in zip(drawn, rewards, strict=True)]
        width = 0.8 / len(rounds)
        measured = [(row.contribution or 0) / NANO * 1000 if row else 0.0 for row in here]
        bottom.bar([x - 0.4 + width * (rank + 0.5) for x in positions], measured, width, color=colour)
    top.set_title("Rewards by peer and round, as the chain allotted them")
    top.set_ylabel("reward [PFM]")
    bottom.set_title("Measured contributions by peer and round")
    bottom.set_ylabel("contribution [millinats/token]")
    bottom.axhline(0, color="black", linewidth=0.8)
    for axes in (top, bottom):
        axes.set_xticks(
            list(positions),
            labels,
            rotation=30 if len(members) > 6 else 0,
            ha="right" if len(members) > 6 else "center",
        )
        axes.set_xlabel("peer")
        axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(6, len(rounds)), fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _decode(data: bytes) -> Proposal:
    message = decode_message(data, PROPOSAL_BYTES_MAX)
    if not isinstance(message, Proposal):
        raise Reject(f"expected a proposal, got a {type(message).__name__}")
    return message


def _open(settled: SettledRound, data: bytes | None) -> Proposal:
    if data is None or compute_digest(data) != settled.data_digest:
        raise WorldError(
            f"round {settled.round}: nobody serves its data {settled.data_digest.hex()}; "
            "try again when more peers are connected"
        )
    proposal = _decode(data)
    faults = _compare_root(settled, from_wire(proposal.leaves))
    if faults:
        raise Reject(f"round {settled.round}: {faults[0]}")
    return proposal


def _compare_header(settled: SettledRound, proposal: Proposal) -> list[str]:
    pairs = (
        ("round", settled.round, proposal.round),
        ("epoch", settled.epoch, proposal.epoch),
        ("nonce", settled.nonce, proposal.nonce),
        ("prev_root", settled.prev_root.hex(), proposal.prev_root.hex()),
        ("root", settled.root.hex(), proposal.root.hex()),
        ("base", settled.base.hex(), proposal.new_base.hex()),
    )
    return [f"{name}: the chain says {chain}, the data {data}" for name, chain, data in pairs if chain != data]


def _compare_root(settled: SettledRound, leaves: tuple[LeafValue, ...]) -> list[str]:
    try:
        tree = merkle.compute_root(leaves)
    except ValueError as error:
        return [f"leaves: {error}"]
    findings = []
    if tree.digest != settled.root:
        findings.append(f"leaves: their root is {tree.digest.hex()}, the chain holds {settled.root.hex()}")
    if tree.sums != settled.sums:
        findings.append(f"leaves: they sum to {tree.sums}, the chain holds {settled.sums}")
    return findings


def _compare_content(
    settled: SettledRound, proposal: Proposal, roster: Roster, previous: Proposal | None, network: NetworkConfig
) -> list[str]:
    """Medians, weights, leaves and root, recomputed from the revealed vectors by the peers' own rule.

    Who proposed, at which epoch, from which base: the committee's signatures say so; that is taken from the proposal.
    """
    if (previous.root if previous else merkle.EMPTY_ROOT) != settled.prev_root:
        return ["the settled round before this one is not at hand, so that its leaves cannot be recomputed"]
    members = [reveal.member for reveal in proposal.reveals]
    if len(set(members)) < len(members) or any(
        reveal.round != proposal.round or reveal.member >= len(proposal.leaves) for reveal in proposal.reveals
    ):
        return ["reveals: one member's stand there twice, or are nobody's, or of another round"]
    told = {update.payload: update for update in proposal.updates}
    announced = {
        payload: Announcement(proposal.round, update.peer, proposal.base, payload, 0, 0)
        for payload, update in told.items()
    }
    then = msgspec.structs.replace(
        roster, epoch=proposal.epoch, nonce=proposal.nonce, members=roster.members[: len(proposal.leaves)]
    )
    try:
        right = draft_proposal(network, then, previous, proposal.round, proposal.base, proposal.reveals, announced)
    except Reject as error:
        return [f"reveals: {error}"]
    findings = _compare_updates(right, told)
    if right.leaves != proposal.leaves:
        pairs = zip(from_wire(right.leaves), from_wire(proposal.leaves), strict=False)
        findings += [
            f"leaf of member {index}: recomputed {computed}, the proposal says {given}"
            for index, (computed, given) in enumerate(pairs)
            if computed != given
        ]
    return findings


def _compare_updates(right: Proposal, told: Mapping[Digest, IncludedUpdate]) -> list[str]:
    findings = []
    computed = {update.payload: update for update in right.updates}
    for payload, given in told.items():
        name, expected = f"update {payload.hex()[:10]} of member {given.member}", computed.get(payload)
        if expected is None:
            findings.append(f"{name}: included, but half of the reveals or fewer scored it")
        elif expected.contribution != given.contribution:
            findings.append(
                f"{name}: the reveals' median is {expected.contribution}, the proposal says {given.contribution}"
            )
        elif expected.weight != given.weight:
            findings.append(
                f"{name}: its merge weight should be {expected.weight / WEIGHT_ONE:.9f}, "
                f"the proposal says {given.weight / WEIGHT_ONE:.9f}"
            )
        elif expected != given:
            findings.append(f"{name}: expected peer {expected.peer}, the proposal says {given.peer}")
    return findings


def _format_contribution(row: Row | None) -> str:
    return "-" if row is None or row.contribution is None else f"{row.contribution / NANO * 1000:+.3f}"


def _format_pfm(amount: Wei) -> str:
    return f"{amount / WEI_PER_PFM:.4f}"
