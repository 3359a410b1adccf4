"""What people see: tables and pictures of nodes, rounds and rewards. Takes plain values, knows no network."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nodes.localnet import Localnet
from nodes.printable import make_printable
from p2pfm.errors import OperatorError
from p2pfm.runtime.clock import describe_offset
from p2pfm.types import NANO


def make_status_table(status: Any) -> Table:
    """One node's /status, the lines an operator looks for first; what the node says is neither markup nor commands.

    Raises:
        OperatorError: it is not what a node of this version answers.
    """
    try:
        return _make_status_table(status)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise OperatorError(
            f"expected the /status of a p2pfm node of this version ({error!r:.80}); is the address right?"
        ) from error


def _make_status_table(status: Mapping[str, Any]) -> Table:
    table = Table(title=_plain(f"node {status['peer']}"), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def add_row(name: str, text: str) -> None:
        table.add_row(name, _plain(text))

    chain, protocol, serving = status["chain"], status.get("protocol", {}), status.get("serving", {})
    seconds = status["phase_ends_in_ms"] / 1000
    level = {None: "", "SHARD": " of the shards", "TOP": " above the shards"}[status.get("level")]
    where = f"{status['round']} · {status['phase']}{level}, {seconds:.0f} s left"
    add_row("stage", status["stage"])
    add_row("network", f"{status['network']['name']} · {status['network']['backbone']}")
    add_row("round", where if status["round"] >= 0 else f"the first begins in {seconds:.0f} s")
    add_row("peers", f"{len(status['peers'])} connected")
    table.add_row("clock", _describe_clock(status["clock"]))
    add_row("listens on", "\n".join(status["addresses"]))
    add_row("reach", "\n".join(_describe(name, way) for name, way in status.get("reach", {}).items()))
    add_row("account", status["account"])
    add_row("member", f"{chain['member']} of {chain['members']}, committee {chain['committee']}")
    settled = "no round settled yet" if chain["settled_round"] is None else f"settled round {chain['settled_round']}"
    add_row("chain", f"{chain['rpc']} · {chain['error'] or 'reachable'}, {settled}")
    if "waits_for" in protocol:
        shard = "" if protocol["shard"] is None else f"shard {protocol['shard']} · "
        add_row("waits for", shard + protocol["waits_for"])
    if "privacy" in status:
        add_row("privacy", _describe_privacy(status["privacy"]))
    if protocol:
        losses = protocol["losses_nats"]
        certified = protocol["certified_round"]
        origin = "the initial adapter" if certified is None else f"certified in round {certified}"
        add_row("base", f"{protocol['base'][:16]} · {origin}")
        if losses:
            newest = max(losses, key=int)
            when = "before the first round" if int(newest) < 0 else f"after round {newest}"
            add_row("held-out loss", f"{losses[newest]:.3f} nats a token {when}")
        declared = [update for update in protocol["updates"] if "epsilon" in update]
        if declared:
            parts = [f"{u['peer'][-6:]} ε {u['epsilon']:.3g} (δ {u['delta']:.0e})" for u in declared]
            add_row("peers' privacy", f"{', '.join(parts)}; of {len(protocol['updates'])} merged updates")
        add_row(
            "serves",
            f"{len(serving['versions'])} versions, {serving['sessions']} sessions, {serving['replicas']} replicas",
        )
        add_row("receipts", _describe_receipts(serving["receipts"], status["peer"]))
        if rewards := status.get("rewards"):
            told = {name: "not known" if wei is None else f"{int(wei) / 1e18:.4f}" for name, wei in rewards.items()}
            add_row(
                "allotted",
                f"{told['allotted_wei']} PFM for learning (drawn: {told['claimed_wei']}), "
                f"{told['served_wei']} for serving (drawn: {told['claimed_served_wei']})",
            )
        add_row("notes", "\n".join(f"round {n['round']}: {n['text']}" for n in protocol["notes"][-5:]))
    return table


def _plain(text: str, style: str = "") -> Text:
    return Text(make_printable(text), style)


def _describe(name: str, way: Mapping[str, str]) -> str:
    """One line of the transport's reach."""
    found = way["found"] if way["state"] in ("ok", "none") else f"{way['state']} ({way['found']})"
    return f"{name.replace('_', ' ')}: {found}"


def _describe_receipts(receipts: Mapping[str, Any], peer: str) -> str:
    """What this node's replica and gateway did in this epoch, and what the last one's receipts are worth."""
    now = f"epoch {receipts['epoch']}: {receipts['earned_tokens']} tokens earned, {receipts['given_tokens']} attested"
    if not receipts["shares"]:
        return now
    last = max(receipts["shares"], key=int)
    return f"{now}; of epoch {last} due {receipts['shares'][last].get(peer, 0) / 1e9:.1%} of what it allots"


def _describe_clock(clock: Mapping[str, Any]) -> Text:
    if clock["offset_ms"] is None:
        return Text("no peer has told its own yet")
    if not clock["is_off"]:
        return _plain(f"right, by {clock['num_peers']} peers' clocks")
    off = f"{describe_offset(clock['offset_ms'])} the median of {clock['num_peers']} peers"
    return _plain(off, "bold red").append(": set it (NTP), or nobody hears this node", "not bold default")


def _describe_privacy(privacy: Mapping[str, Any]) -> str:
    """This node's own, as it is spent: unlike a peer's word, computed here."""
    if privacy["epsilon"] is None:
        return "not guaranteed: this home has trained without noise"
    budget = f" of {privacy['epsilon_max']:g}" if privacy["epsilon_max"] else ", no budget set"
    return f"epsilon {privacy['epsilon']:.3g}{budget}, at delta {privacy['delta']:g}: of each sample, in all its rounds"


def make_network_table(nodes: Sequence[tuple[str, str, Mapping[str, Any]]]) -> Table:
    """One line a node: (name, role, its /status or {})."""
    table = Table(box=None, pad_edge=False)
    for column in ("node", "role", "stage", "round", "phase", "peers", "certified", "base", "serving"):
        table.add_column(column)
    for name, role, status in nodes:
        if not status:
            table.add_row(name, role, Text("starting", "dim"), *[""] * 6)
            continue
        protocol, serving = status.get("protocol", {}), status.get("serving", {})
        certified = protocol.get("certified_round")
        table.add_row(
            name,
            role,
            _plain(status["stage"]),
            str(max(status["round"], 0)) if status["round"] >= 0 else "soon",
            _plain(status["phase"]) if status["round"] >= 0 else "",
            str(len(status["peers"])),
            "" if certified is None else str(certified),
            _plain(protocol.get("base", "")[:8]),
            f"{serving['sessions']} sessions" if serving.get("sessions") else "",
        )
    return table


def watch_localnet(net: Localnet, console: Console) -> None:
    """Redraw the nodes' table until interrupted. Raises WorldError when the chain or a node has ended."""
    try:
        with Live(console=console, refresh_per_second=2) as live:
            while True:
                net.check_chain()
                statuses = [(f"peer {node.index}", node.role, net.get_status(node)) for node in net.nodes]
                live.update(make_network_table(statuses))
                time.sleep(1)
    finally:
        console.show_cursor()  # what interrupts Live as it starts leaves it hidden


def plot_training(
    losses: Mapping[int, float],
    payload_bytes: Mapping[int, Sequence[int]],
    sent_bytes: Mapping[int, Sequence[int]],
    dense_bytes: int,
    path: Path,
) -> None:
    """Held-out loss after each round, and the bytes of a peer beside one dense fp32 update.

    Args:
        losses: [nats/token] by round; -1 is before training.
        payload_bytes: sizes of the announced updates by round.
        sent_bytes: all that each peer sent, by round.
        dense_bytes: an update uncompressed in fp32.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    rounds = sorted(losses)
    left.plot(rounds, [losses[r] for r in rounds], marker="o", color="#2b6cb0")
    left.set(title="Held-out loss of the shared model", xlabel="after round", ylabel="nats a token")
    left.set_xticks(rounds, ["before" if r < 0 else str(r) for r in rounds])
    left.grid(alpha=0.3)
    counted = sorted(payload_bytes)
    for offset, by_round, label, colour in (
        (-0.2, payload_bytes, "an update", "#2f855a"),
        (0.2, sent_bytes, "all that a peer sends", "#90cdf4"),
    ):
        means = [sum(by_round[r]) / max(1, len(by_round[r])) for r in counted]
        bars = right.bar([r + offset for r in counted], [mean / 1024 for mean in means], 0.4, label=label, color=colour)
        ratios = [f"{dense_bytes / mean:.0f}x" if mean else "" for mean in means]
        right.bar_label(bars, labels=ratios, padding=2, fontsize="small")
    right.axhline(dense_bytes / 1024, color="#c53030", linestyle="--", label="a dense fp32 update")
    right.set(title="Bytes a peer and round; how many times less than dense", xlabel="round", ylabel="KiB")
    right.set_yscale("log")
    right.set_ylim(1, 20 * dense_bytes / 1024)
    right.set_xticks(counted)
    right.legend(ncols=3, fontsize="small", loc="upper center")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def format_nats(nano: float) -> str:
    """A contribution for people [milli-nats a token]."""
    return f"{nano / NANO * 1000:+.1f}"
