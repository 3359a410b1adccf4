"""Explanations, findings and contests as text for people. Takes their structs; knows no chain."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nodes.rewards.checking import is_accusation
from nodes.rewards.contests import Contest
from nodes.rewards.explain import Explanation, ShardPart
from nodes.rewards.reading import Book, name_maker
from nodes.rewards.tables import format_amount, format_nats, format_peer, format_time, make_table
from p2pfm.settlement.faults import FaultKind
from p2pfm.types import WEIGHT_ONE, Round

if TYPE_CHECKING:  # measuring loads torch
    from nodes.rewards.measuring import Balance, Counterfactual, DeepCheck

MARKS = {"passed": "[green]yes[/]", "failed": "[red]no[/]", "off": "[dim]off[/]", "unknown": "[yellow]?[/]"}
FAULTS_TOLD_MAX = 10


def describe_nothing(book: Book) -> str:
    """What to say when no round is on chain."""
    members = len(book.roster.members)
    what = f"{members} peers are registered" if members else "no peer is registered"
    return f"no round is on chain yet ({what}, {format_amount(book.pool)} in the pool)"


def print_explanation(
    out: Console, told: Explanation, effect: "Counterfactual | None", why_not: str, *, with_proof: bool
) -> None:
    """One section a step."""
    table = Table(
        title=f"Peer {told.member} ({escape(told.peer)}) in round {told.round}",
        title_justify="left",
        show_header=False,
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("contribution", _describe_contribution(told))
    for judgement in told.judgements:
        reading = format_nats(judgement.contribution)
        if not judgement.is_revealed:
            reading = "revealed no vector"
        elif judgement.contribution is None:
            reading = "did not score it"
        table.add_row(f"  member {judgement.member}", f"{reading}  [dim]{escape(format_peer(judgement.peer))}[/]")
    if told.part is not None:
        table.add_row("its part", _describe_part(told, told.part))
    table.add_row("this epoch", f"epoch {told.epoch}: {format_nats(told.accumulated)} mnat/token so far")
    if told.rank is not None:
        table.add_row("rank", f"{told.rank} of {told.num_updates} merged updates")
    table.add_row("merge weight", _describe_weight(told))
    for gate in told.gates:
        table.add_row(f"  {gate.name}", f"{MARKS[gate.verdict]}: {escape(gate.text)}")
    table.add_row("reward", _describe_reward(told))
    table.add_row("proof", _describe_proof(told))
    if with_proof:
        for level, node in enumerate(told.siblings):
            sums = node.sums
            table.add_row(
                f"  sibling {level}",
                f"{node.digest.hex()}  [dim]cumulative {sums.cumulative_wei} wei, reward {sums.reward_wei} wei, "
                f"contribution {sums.contribution}[/]",
            )
    table.add_row("status", _describe_status(told))
    table.add_row("without it", escape(why_not) if effect is None else _describe_effect(effect))
    out.print(table, highlight=False)


def print_findings(out: Console, findings: Mapping[Round, Sequence[str]], checks: "Mapping[Round, DeepCheck]") -> None:
    """`verify`: a line a round, what is wrong, and for a deep check the measurements."""
    for round, found in findings.items():
        check = checks.get(round)
        wrong = [*found, *(check.findings if check else ())]
        verdict = "[red]wrong[/]" if is_accusation(wrong) else "[yellow]not checked[/]" if wrong else "[green]ok[/]"
        out.print(f"round {round}: {verdict}", highlight=False)
        for line in wrong:
            out.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
        if check:
            _print_check(out, check)
    if findings:
        out.print(f"{len(findings)} settled rounds checked", highlight=False)


def print_balances(out: Console, balances: "Sequence[Balance]") -> None:
    """`verify --deep`: each peer over all measured rounds; nothing for a single round."""
    told = [balance for balance in balances if balance.num_rounds > 1]
    if told:
        out.print("over all measured rounds:", highlight=False)
    for balance in told:
        off, most = abs(balance.certified - balance.measured), balance.tolerance
        verdict = "[red]too far[/]" if balance.is_finding else "within"
        out.print(
            f"  {escape(name_maker(balance.peer, balance.member))} ({balance.num_rounds} rounds): certified "
            f"{format_nats(balance.certified)}, measured again {format_nats(balance.measured)} mnat/token; off by "
            f"{format_nats(off)[1:]}, tolerated {format_nats(most)[1:]}: {verdict}",
            highlight=False,
            soft_wrap=True,
        )


def print_contest(out: Console, contest: Contest, unprovable: Sequence[str], book: Book) -> None:
    """`challenge`: what was found in one round, and what became of it."""
    if not contest.faults and not unprovable:
        out.print(f"round {contest.round}: follows the rules", highlight=False)
    for fault in contest.faults[:FAULTS_TOLD_MAX]:
        peer = escape(format_peer(book.roster.members[fault.index].peer))
        what = "reward" if fault.kind == FaultKind.REWARD else "sum up to the round"
        out.print(
            f"round {contest.round}: member {fault.index} ({peer}): its {what} is "
            f"{fault.found_wei} wei, the rule says {fault.expected_wei}",
            highlight=False,
            soft_wrap=True,
        )
    if len(contest.faults) > FAULTS_TOLD_MAX:
        out.print(f"  and {len(contest.faults) - FAULTS_TOLD_MAX} more", highlight=False)
    for line in unprovable:
        what = "wrong, but not provable on chain: " if is_accusation([line]) else ""
        out.print(f"round {contest.round}: {what}{escape(line)}", highlight=False)
    if contest.proven is not None:
        out.print(
            f"[green]proven[/]: round {contest.round} and all after it are void; {contest.num_slashed} signers lost "
            f"{format_amount(contest.slashed_wei)}, and {format_amount(contest.bounty_wei)} of it is your bounty",
            highlight=False,
            soft_wrap=True,
        )
    elif contest.faults:
        out.print("nothing was sent (--dry-run)", highlight=False)


def make_demands_table(book: Book) -> Table:
    """Every demand, answered or not."""
    table = make_table("Demands for leaves")
    for name in ("number", "round", "member", "deadline", "state", "by"):
        table.add_column(name)
    for demand in book.demands:
        is_there = demand.position < len(book.readings)
        round = str(book.readings[demand.position].settled.round) if is_there else "voided"
        state = "open" if demand.is_open else "ended"
        deadline = format_time(demand.deadline_s)
        table.add_row(str(demand.number), round, str(demand.index), deadline, state, demand.account)
    return table


def _describe_contribution(told: Explanation) -> str:
    if told.median is None:
        return "no update of this peer was merged in this round"
    num = sum(judgement.contribution is not None for judgement in told.judgements)
    return f"{format_nats(told.median)} mnat/token, the lower median of {num} committee members' readings:"


def _describe_part(told: Explanation, part: ShardPart) -> str:
    return (
        f"{format_nats(told.contribution)} mnat/token: shard {part.shard} of {part.num_shards} contributed "
        f"{format_nats(part.contribution)}, divided by what its members contributed inside (this update "
        f"{abs(told.median or 0)} of {part.sum_positive} nano-nats)"
    )


def _describe_weight(told: Explanation) -> str:
    text = f"{told.weight / WEIGHT_ONE:.2%}"
    if told.is_capped and told.wanted_weight is not None and told.weight_max is not None:
        wanted, most = told.wanted_weight / WEIGHT_ONE, told.weight_max / WEIGHT_ONE
        where = "" if told.part is None else " in its shard"
        text += f", capped{where}: its contributions ask for {wanted:.2%}, its stake allows {most:.2%}"
    return text


def _describe_reward(told: Explanation) -> str:
    if not told.pool_wei:
        reason = (
            "its pool is 0"
            if told.payout_round == told.round
            else f"the first settled round from {told.payout_round} on pays this epoch"
        )
        text = f"{format_amount(told.reward_wei)}: this round divides nothing ({reason})"
    else:
        text = (
            f"{format_amount(told.reward_wei)} = floor({format_amount(told.pool_wei)} * "
            f"{max(0, told.accumulated)} / {told.sum_positive}), {told.share:.2%} of the pool"
        )
    if told.reward_wei != told.expected_wei:
        text += f"\n[red]wrong[/]: the rule says {told.expected_wei} wei (p2pfm rewards challenge --round {told.round})"
    served = f", and {format_amount(told.served_wei)} for serving" if told.served_wei else ""
    return f"{text}\n{format_amount(told.cumulative_wei)} up to this round{served}"


def _describe_proof(told: Explanation) -> str:
    verdict = "[green]leads to[/]" if told.is_proven else "[red]does not lead to[/]"
    return f"leaf {told.member} with {len(told.siblings)} siblings {verdict} the root on chain {told.root.hex()}"


def _describe_status(told: Explanation) -> str:
    if told.status == "final":
        status = "final"
    else:
        held = " (a demand for a leaf holds it)" if told.status == "held" else ""
        status = f"contestable until {format_time(told.until_s)}{held}"
    if not told.cumulative_wei:
        return f"{status}; nothing to claim"
    if not told.owed_wei:
        return f"{status}; claimed"
    return f"{status}; {format_amount(told.owed_wei)} of it not claimed yet"


def _describe_effect(effect: "Counterfactual") -> str:
    verdict = "it helped by" if effect.gain > 0 else "it did harm by" if effect.gain < 0 else "no difference:"
    return (
        f"held-out loss {effect.loss_with:.4f} nats/token with it, {effect.loss_without:.4f} without it: {verdict} "
        f"{abs(effect.gain) * 1000:.3f} mnat/token (before the round: {effect.loss_before:.4f})"
    )


def _print_check(out: Console, check: "DeepCheck") -> None:
    for line in check.notes:
        out.print(f"  [yellow]note:[/] {escape(line)}", highlight=False, soft_wrap=True)
    for update in check.updates:
        off, most = format_nats(abs(update.certified - update.measured)), format_nats(update.tolerance)
        verdict = "[red]too far[/]" if update.is_finding else update.note or "within"
        out.print(
            f"  {escape(update.name)}: certified {format_nats(update.certified)}, measured again "
            f"{format_nats(update.measured)} mnat/token; off by {off[1:]}, tolerated {most[1:]}: "
            f"{verdict}",
            highlight=False,
            soft_wrap=True,
        )
