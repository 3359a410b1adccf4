"""`p2pfm rewards ...`: what the chain paid, to whom, why, whether it was right, and what to do if it was not.

Files and the environment end here. Exit codes are those of `nodes.cli`; 3: a check found something wrong.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from nodes.rewards import checking, contests, reports
from nodes.rewards.blobs import Blobs
from nodes.rewards.explain import explain, find_makers, list_excluded
from nodes.rewards.reading import Book, advise, find_member, read_book, validate_reading
from nodes.rewards.tables import (
    describe_totals,
    format_amount,
    format_time,
    make_epochs_table,
    make_peers_table,
    make_rounds_table,
    to_csv,
    to_json,
    to_plain,
)
from nodes.rewards.views import EpochLine, PeerLine, RoundLine, view_epochs, view_peers, view_rounds, view_totals
from p2pfm.config import NodeConfig
from p2pfm.errors import ChainError, OperatorError, Reject, Reverted, WorldError
from p2pfm.settlement.ledger import Ledger
from p2pfm.types import Digest, PeerId, Round

if TYPE_CHECKING:  # measuring loads torch
    from nodes.rewards.measuring import Balance, DeepCheck

FINDING = 3
"""Exit code: a check found something wrong (`nodes.cli.Exit`)."""

NOTHING_VOIDED = "nothing was voided by it (the round is final, or was void already)"

app = typer.Typer(no_args_is_help=True, help="What the chain paid, to whom, why, and whether it was right.")
out = Console()
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The node's TOML file.")]
Nodes = Annotated[
    list[str] | None, typer.Option("--node", help="HTTP address of another node to ask for data; may be repeated.")
]
PasswordFile = Annotated[Path | None, typer.Option(help="File with the keys' password.")]
RoundNumber = Annotated[int, typer.Option("--round", "-r", min=0, help="A settled round.")]


class By(StrEnum):
    """What a line of `show` is."""

    PEER = "peer"
    ROUND = "round"
    EPOCH = "epoch"


class Kind(StrEnum):
    """Pictures."""

    OVERVIEW = "overview"
    DISTRIBUTION = "distribution"
    LORENZ = "lorenz"
    HISTORY = "history"


class World(NamedTuple):
    """What every command works on."""

    config: NodeConfig
    ledger: Ledger
    blobs: Blobs


@app.command()
def show(
    config_file: ConfigFile,
    by: Annotated[By, typer.Option(help="One line a peer, a settled round, or a settlement epoch.")] = By.PEER,
    csv: Annotated[Path | None, typer.Option("--csv", help="Also write the lines to this file.")] = None,
    nodes: Nodes = None,
    as_json: Json = False,
) -> None:
    """Contributions and rewards, with totals, what is not claimed yet, and the Gini coefficient.

    Example: `p2pfm rewards show --config alice/node.toml --by round`
    """
    world = _open(config_file, nodes)
    book = read_book(world.ledger, world.blobs)
    totals, per_epoch = view_totals(book), world.config.network.settlement.rounds_per_epoch
    problems = _list_problems(book, world.blobs)
    match by:
        case By.PEER:
            peers = view_peers(book)
            lines, table = to_json(by, peers, totals, problems), make_peers_table(peers, totals, out.width)
            text = to_csv(PeerLine, peers)
        case By.ROUND:
            rounds = view_rounds(book, per_epoch)
            lines, table = to_json(by, rounds, totals, problems), make_rounds_table(rounds, totals)
            text = to_csv(RoundLine, rounds)
        case By.EPOCH:
            epochs = view_epochs(book, per_epoch)
            lines, table = to_json(by, epochs, totals, problems), make_epochs_table(epochs, totals)
            text = to_csv(EpochLine, epochs)
    if csv is not None:
        csv.write_text(text, encoding="utf-8")
    if as_json:
        _print_json(lines)
        return
    if book.readings:
        out.print(table)
        out.print(describe_totals(totals), highlight=False)
    else:
        out.print(reports.describe_nothing(book), highlight=False)
    if csv is not None:
        out.print(f"lines: {escape(str(csv))}", highlight=False, soft_wrap=True)
    _tell_problems(problems)


@app.command()
def plot(
    config_file: ConfigFile,
    path: Annotated[Path, typer.Option("--out", help="PNG or SVG file.")] = Path("rewards.png"),
    kind: Annotated[Kind, typer.Option(help="Which picture.")] = Kind.OVERVIEW,
    nodes: Nodes = None,
) -> None:
    """Draw rewards: overview (by peer and round), distribution, lorenz (with Gini), history (by peer).

    Example: `p2pfm rewards plot --config alice/node.toml --kind lorenz --out lorenz.svg`
    """
    from nodes.rewards.plots import plot_book, validate_path

    validate_path(path)
    world = _open(config_file, nodes)
    book = read_book(world.ledger, world.blobs)
    plot_book(book, kind, path)
    out.print(f"picture: {escape(str(path))}", highlight=False, soft_wrap=True)
    _tell_problems(_list_problems(book, world.blobs))


@app.command("explain")
def explain_reward(
    peer: Annotated[str, typer.Argument(help="Registry index, peer id, or the unique end of one.")],
    round: RoundNumber,
    config_file: ConfigFile,
    proof: Annotated[bool, typer.Option("--proof", help="Print the Merkle proof's siblings.")] = False,
    measure: Annotated[bool, typer.Option(help="Measure the held-out loss with and without the update.")] = True,
    nodes: Nodes = None,
    as_json: Json = False,
) -> None:
    """Why a peer got what it got in a round, step by step down to the root on chain.

    Example: `p2pfm rewards explain 2 --round 5 --config alice/node.toml`
    """
    world = _open(config_file, nodes)
    book = read_book(world.ledger, world.blobs)
    member = find_member(book.roster, peer)
    reading = book.get_reading(Round(round))
    validate_reading(reading)
    excluded = list_excluded(reading)
    mine = _find_excluded(world.blobs, excluded, member.peer)
    committee = world.ledger.get_committee(reading.settled.epoch)
    told = explain(book, member, Round(round), world.config.network, committee, mine)
    effect, why_not = None, "not measured (--no-measure)" if told.is_included else "no update of it was merged"
    if measure and told.is_included and told.payload is not None:
        from nodes.rewards.measuring import open_meter

        try:
            with _progress(as_json) as progress:
                progress.add_task("measuring the held-out loss with and without the update", total=None)
                effect = open_meter(world.config, world.blobs).compare_without(book, reading, told.payload)
        except (WorldError, OperatorError, Reject) as error:
            why_not = str(error)
    if as_json:
        plain = to_plain(told)
        plain["counterfactual"] = {"problem": why_not} if effect is None else {**to_plain(effect), "gain": effect.gain}
        _print_json(plain)
    else:
        reports.print_explanation(out, told, effect, why_not, with_proof=proof)
    if not told.is_proven or told.reward_wei != told.expected_wei:
        raise typer.Exit(FINDING)


@app.command()
def verify(
    config_file: ConfigFile,
    deep: Annotated[bool, typer.Option("--deep", help="Also measure contributions again on the public probe.")] = False,
    round: Annotated[int | None, typer.Option("--round", "-r", min=0, help="Only this settled round.")] = None,
    draws: Annotated[int, typer.Option(min=3, max=1000, help="Samples a deep check measures a round on.")] = 8,
    minutes: Annotated[float, typer.Option(min=0.1, help="A deep check begins no round after this time.")] = 10.0,
    nodes: Nodes = None,
    as_json: Json = False,
) -> None:
    """Recompute settled rounds from the revealed vectors and compare them with the chain; exit code 3 on a finding.

    --deep loads the backbone, measures the contributions again, newest round first, and merges the updates again.
    Example: `p2pfm rewards verify --deep --config alice/node.toml`
    """
    world = _open(config_file, nodes)
    book = read_book(world.ledger, world.blobs)
    wanted = book.readings if round is None else (book.get_reading(Round(round)),)
    findings = {
        reading.settled.round: checking.verify_reading(
            book,
            reading.settled.position,
            world.config.network,
            world.ledger.get_committee(reading.settled.epoch),
        )
        for reading in wanted
    }
    checks: dict[Round, DeepCheck] = {}
    balances: tuple[Balance, ...] = ()
    if deep and wanted:
        from nodes.rewards.measuring import check_rounds, compute_balances, open_meter

        with _progress(as_json) as progress:
            task = progress.add_task("loading the backbone", total=None)
            meter = open_meter(world.config, world.blobs)
            checked = check_rounds(
                meter,
                book,
                wanted,
                lambda position: checking.find_roster(book, position, world.config.network),
                draws,
                60 * minutes,
                lambda done, total, what: progress.update(task, description=what, completed=done, total=total),
            )
        checks, balances = {check.round: check for check in checked}, compute_balances(checked)
    if as_json and not deep:
        _print_json({str(number): found for number, found in findings.items()})
    elif as_json:
        rounds = {
            str(number): {"findings": found, "deep": to_plain(checks[number])} for number, found in findings.items()
        }
        _print_json({"rounds": rounds, "peers": [to_plain(balance) for balance in balances]})
    else:
        reports.print_findings(out, findings, checks)
        reports.print_balances(out, balances)
        _tell_problems(world.blobs.warnings)
        if not findings:
            out.print(reports.describe_nothing(book), highlight=False)
    is_far_off = any(check.findings for check in checks.values()) or any(balance.is_finding for balance in balances)
    if any(findings.values()) or is_far_off:
        raise typer.Exit(FINDING)


@app.command()
def claim(
    config_file: ConfigFile,
    peer: Annotated[str, typer.Option(help="For whom; without it: this node. The money goes to the peer.")] = "",
    password_file: PasswordFile = None,
    nodes: Nodes = None,
    as_json: Json = False,
) -> None:
    """Draw all that the newest final round owes a peer. Anyone may, and pays the gas; the peer's account is paid.

    Example: `p2pfm rewards claim --config alice/node.toml`
    """
    world, own = _open_with_keys(config_file, password_file, nodes)
    roster = world.ledger.get_roster()
    name = find_member(roster, peer).peer if peer else own
    member = next((member for member in roster.members if member.peer == name), None)
    with _refusals():
        paid = contests.claim_newest(world.ledger, name, world.blobs)
    account = member.account if member else ""
    if as_json:
        _print_json({"paid_wei": str(paid), "account": account, "peer": name})
    elif paid:
        out.print(f"{format_amount(paid)} paid to {account}", highlight=False, soft_wrap=True)
    else:
        out.print(
            "nothing is owed now: all that final rounds allotted is drawn, or nothing was allotted "
            "(p2pfm rewards show tells which)",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def challenge(
    config_file: ConfigFile,
    round: Annotated[
        int | None, typer.Option("--round", "-r", min=0, help="Which; without it: every one not final yet.")
    ] = None,
    demand: Annotated[
        str, typer.Option(help="Make the signers show this peer's leaf, with a bond: for data that nobody serves.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only search; send nothing.")] = False,
    password_file: PasswordFile = None,
    nodes: Nodes = None,
    as_json: Json = False,
) -> None:
    """Search settled rounds for what is provably wrong, and send the proof: the round and all after it are void.

    Example: `p2pfm rewards challenge --round 7 --config alice/node.toml`
    """
    if dry_run:
        world = _open(config_file, nodes)
    else:
        world, _ = _open_with_keys(config_file, password_file, nodes)
    book = read_book(world.ledger, world.blobs)
    if demand:
        if round is None or dry_run:
            raise OperatorError("--demand PEER needs --round ROUND, and no --dry-run")
        _demand(world, book, Round(round), demand, as_json)
        return
    wanted = contests.list_contestable(book) if round is None else (book.get_reading(Round(round)),)
    if not wanted:
        out.print_json("[]") if as_json else out.print("nothing can be contested: every settled round is final")
        return
    found: list[contests.Contest] = []
    unprovable: dict[Round, list[str]] = {}
    for reading in wanted:
        with _refusals():
            contest = contests.contest_round(world.ledger, book, reading, is_dry=dry_run)
        found.append(contest)
        if not contest.faults:
            committee = world.ledger.get_committee(reading.settled.epoch)
            position = reading.settled.position
            unprovable[contest.round] = checking.verify_reading(book, position, world.config.network, committee)
        if contest.proven is not None:
            break  # what follows is void as well
    if as_json:
        rounds = {contest.round: unprovable.get(contest.round, []) for contest in found}
        _print_json([{**to_plain(contest), "not_provable": rounds[contest.round]} for contest in found])
    else:
        for contest in found:
            reports.print_contest(out, contest, unprovable.get(contest.round, []), book)
    if any(contest.faults for contest in found) or any(unprovable.values()):
        raise typer.Exit(FINDING)


@app.command()
def demands(config_file: ConfigFile, as_json: Json = False) -> None:
    """List demands for leaves: who must show what until when.

    Example: `p2pfm rewards demands --config alice/node.toml`
    """
    world = _open(config_file, None)
    book = read_book(world.ledger, lambda digest: None)
    if as_json:
        _print_json([to_plain(demand) for demand in book.demands])
    elif book.demands:
        out.print(reports.make_demands_table(book))
    else:
        out.print("nobody has demanded a leaf")


@app.command("show-leaf")
def show_leaf(
    number: Annotated[int, typer.Argument(help="The demand's number.")],
    config_file: ConfigFile,
    password_file: PasswordFile = None,
    nodes: Nodes = None,
    as_json: Json = False,
) -> None:
    """Answer a demand with the leaf that it asks for; the bond is yours.

    Example: `p2pfm rewards show-leaf 0 --config alice/node.toml`
    """
    world, _ = _open_with_keys(config_file, password_file, nodes)
    bond = world.ledger.get_params().leaf_bond
    with _refusals():
        index = contests.show_leaf(world.ledger, world.blobs, number)
    if as_json:
        _print_json({"number": number, "member": index, "bond_wei": str(bond)})
    else:
        out.print(
            f"the leaf of member {index} is on chain; the bond of {format_amount(bond)} is yours", highlight=False
        )


@app.command("close-demand")
def close_demand(
    number: Annotated[int, typer.Argument(help="The demand's number.")],
    config_file: ConfigFile,
    password_file: PasswordFile = None,
    as_json: Json = False,
) -> None:
    """End a demand that nobody answered in time: its round is void, and the bond goes back to whoever demanded.

    Example: `p2pfm rewards close-demand 0 --config alice/node.toml`
    """
    world, _ = _open_with_keys(config_file, password_file, None)
    with _refusals():
        is_void = contests.close_demand(world.ledger, number)
    if as_json:
        _print_json({"number": number, "is_round_void": is_void})
        return
    what = "nobody showed the leaf: the round and all after it are void" if is_void else NOTHING_VOIDED
    out.print(f"{what}; the bond went back", highlight=False)


def _demand(world: World, book: Book, round: Round, name: str, as_json: bool) -> None:
    with _refusals():
        demand = contests.demand_leaf(world.ledger, book, round, name)
    bond = book.params.leaf_bond
    if as_json:
        _print_json({**to_plain(demand), "bond_wei": str(bond)})
        return
    out.print(
        f"demand {demand.number}: the signers of round {round} must show the leaf of member {demand.index} by "
        f"{format_time(demand.deadline_s)}; whoever shows it gets your bond of {format_amount(bond)}.\n"
        f"If it is shown, search it: p2pfm rewards challenge --round {round}\n"
        f"If not, after that time: p2pfm rewards close-demand {demand.number} (voids the round, returns the bond)",
        highlight=False,
        soft_wrap=True,
    )


def _open(config_file: Path, nodes: list[str] | None) -> World:
    from p2pfm.runtime.web3_ledger import READ_ONLY_KEY

    return _connect(config_file, nodes, READ_ONLY_KEY)


def _open_with_keys(config_file: Path, password_file: Path | None, nodes: list[str] | None) -> tuple[World, Any]:
    """(world with the node's own account, its peer id)"""
    from nodes.homes import open_keys, read_config

    keys = open_keys(read_config(config_file), password_file)
    return _connect(config_file, nodes, keys.account_private_key), keys.peer


def _connect(config_file: Path, nodes: list[str] | None, key: bytes) -> World:
    from nodes.homes import read_config
    from p2pfm.runtime.endpoints import make_url
    from p2pfm.runtime.store import BLOB_FOLDER
    from p2pfm.runtime.web3_ledger import Web3Ledger

    config = read_config(config_file)
    ledger = Web3Ledger(
        config.rpc, config.network.chain, key, confirmations=config.confirmations, witness_url=config.rpc_witness
    )
    urls = [make_url(config.http.host, config.http.port), *(nodes or ())]
    return World(config, ledger, Blobs(Path(config.home) / BLOB_FOLDER, urls))


@contextmanager
def _refusals() -> Iterator[None]:
    """The contract's custom errors with what they mean and the next step."""
    try:
        yield
    except Reverted as error:
        raise ChainError(contests.explain_refusal(error)) from error


@contextmanager
def _progress(is_quiet: bool) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, disable=is_quiet, transient=True) as progress:
        yield progress


def _find_excluded(blobs: Blobs, payloads: Sequence[Digest], peer: PeerId) -> Digest | None:
    """Which of these the peer made; None where nobody serves them any more, or answers."""
    try:
        makers = find_makers(blobs, payloads)
    except OperatorError:
        return None
    return next((payload for payload in payloads if makers.get(payload) == peer), None)


def _list_problems(book: Book, blobs: Blobs) -> list[str]:
    problems = [(reading, reading.problem or reading.gap) for reading in book.readings]
    return [*(f"{problem}; {advise(reading)}" for reading, problem in problems if problem), *blobs.warnings]


def _tell_problems(problems: list[str]) -> None:
    for problem in problems:
        err.print(f"[yellow]note:[/] {escape(problem)}", highlight=False, soft_wrap=True)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
