"""`p2pfm demo`: the whole story on one machine, with every part real, in a few minutes.

Five peers train on their own text, value each other's updates, certify and settle rounds on a chain, and serve all the
while; two of them are killed, one comes back. Everything shown is read from the nodes or from the chain.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from nodes.demo_folder import REWARDS_PICTURE, TRAINING_PICTURE
from nodes.localnet import PRESETS, Localnet, LocalNode, Role, localnet
from nodes.models import fetch
from nodes.rewards import Row, claim_newest, read_rewards, rows_to_json, verify_rewards
from nodes.rewards.plots import plot_rewards
from nodes.screens import format_nats, make_network_table, plot_training
from p2pfm.config import WEI_PER_PFM
from p2pfm.errors import WorldError
from p2pfm.protocol.membership import compute_ranks
from p2pfm.protocol.phases import get_durations
from p2pfm.types import Digest, PeerId, Round

ROLES: tuple[Role, ...] = ("honest", "honest", "honest", "free rider", "corrupted")
GATEWAY = 0
"""This node answers its clients from other peers' replicas, so that the one that generates can be killed."""

STREAM_PROMPT = "Once upon a time there was a computer that wanted to learn. One day it"
STREAM_TOKENS = 48
KILL_AFTER_TOKENS = 10
QUIET_ROUNDS = 2
"""Rounds before anybody is killed."""


@dataclass(slots=True)
class Streamed:
    """A streamed completion as a client saw it."""

    text: str = ""
    num_pieces: int = 0
    num_tokens: int = 0
    replicas: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Figures:
    """What the demonstration measured; written by --json."""

    wall_s: dict[str, float] = field(default_factory=dict)
    cpu_s: dict[str, float] = field(default_factory=dict)
    losses_nats: dict[int, float] = field(default_factory=dict)
    payload_bytes: dict[int, list[int]] = field(default_factory=dict)
    sent_bytes: dict[int, list[int]] = field(default_factory=dict)
    dense_bytes: int = 0
    serving: dict[str, Any] = field(default_factory=dict)
    rejoin: dict[str, Any] = field(default_factory=dict)
    rewards: list[dict[str, Any]] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)


def figures_to_json(figures: Figures) -> str:
    """JSON as the standard has it: a figure that is no number (a loss that diverged) is null."""
    return json.dumps(_finite(asdict(figures)), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_rewards(rows: Sequence[Row], roles: Mapping[str, Role]) -> dict[str, bool]:
    """What must hold of rewards that follow contributions; `roles` by peer id."""
    by_round: dict[int, dict[str, Row]] = {}
    for row in rows:
        by_round.setdefault(row.round, {})[row.peer] = row
    ordered, totals = True, dict.fromkeys(roles, 0)
    for held in by_round.values():
        honest = [row for peer, row in held.items() if roles[peer] == "honest" and row.contribution is not None]
        ranked = sorted(honest, key=lambda row: row.contribution or 0)
        ordered &= all(a.reward_wei <= b.reward_wei for a, b in pairwise(ranked))
        for peer, row in held.items():
            totals[peer] += row.reward_wei
    paid = sum(totals.values())
    least_honest = min(total for peer, total in totals.items() if roles[peer] == "honest")
    riders = sum(total for peer, total in totals.items() if roles[peer] == "free rider")
    corrupted = max(total for peer, total in totals.items() if roles[peer] == "corrupted")
    return {
        "honest peers are paid in the order of their contribution in every round": ordered,
        "the free rider gets about nothing (at most 1% of what is paid)": riders * 100 <= paid,
        "the corrupted peer gets less than every honest one": corrupted < least_honest,
    }


class Screen:
    """Progress bars over a table of the nodes; plain lines where the output is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=40), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(), console=console,
        )  # fmt: skip
        self._live = Live(self._progress, console=console, refresh_per_second=4, transient=False)
        self._task: TaskID | None = None
        self._last_note = ""

    def __enter__(self) -> "Screen":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def begin(self, what: str, total: float) -> None:
        """A new part of the story."""
        if self._task is not None:
            self._progress.update(self._task, completed=self._progress.tasks[-1].total, note="")
        self._task = self._progress.add_task(what, total=total, note="")
        if not self.console.is_terminal:
            self.console.print(f"· {what}")

    def tell(self, note: str, seconds_left: float | None = None) -> None:
        """What is going on now, and how long it will take; without a terminal each thing is said once."""
        left = "" if seconds_left is None else f", {seconds_left:.0f} s left"
        if self._task is not None:
            self._progress.update(self._task, note=note + left)
        if not self.console.is_terminal and note != self._last_note:
            self._last_note = note
            self.console.print(f"    {note}", highlight=False)

    def progress(self, what: str, part: float) -> None:
        """A download or a conversion moves on."""
        if self._task is not None:
            self._progress.update(self._task, completed=part, note=what)

    def show(self, completed: float, table: Table) -> None:
        """Move the bar and redraw the nodes."""
        if self._task is not None:
            self._progress.update(self._task, completed=completed)
        self._live.update(Group(self._progress, "", table))

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False)


class Demo:
    """The story, told on a running local network."""

    def __init__(self, net: Localnet, screen: Screen, figures: Figures) -> None:
        self.net, self.screen, self.figures = net, screen, figures
        self.killed = net.nodes[-1]
        """Who was killed in mid-stream."""
        self._killed_round = self._missed_round = -1
        self._gateway = net.nodes[GATEWAY]
        self._by_round: dict[int, dict[int, dict[str, int]]] = {}

    # --- watching ---

    def statuses(self) -> list[tuple[LocalNode, dict[str, Any]]]:
        """Every node's status, {} for one that does not run."""
        return [(node, self.net.get_status(node) if node.is_running else {}) for node in self.net.nodes]

    def watch(self, completed: float) -> list[tuple[LocalNode, dict[str, Any]]]:
        """One look at all nodes: redraw, and note what rounds have brought."""
        statuses = self.statuses()
        self.screen.show(completed, make_network_table([(f"peer {n.index}", _name(n), s) for n, s in statuses]))
        for node, status in statuses:
            protocol = status.get("protocol", {})
            for text, loss in protocol.get("losses_nats", {}).items():
                self.figures.losses_nats.setdefault(int(text), loss)
            for text, figures in protocol.get("rounds", {}).items():
                self._by_round.setdefault(int(text), {})[node.index] = figures
            self.figures.dense_bytes = protocol.get("dense_bytes", self.figures.dense_bytes)
        for round, by_node in self._by_round.items():
            if 0 <= round < int(self._round_now()):
                told = by_node.values()
                self.figures.payload_bytes[round] = [f["payload_bytes"] for f in told if f.get("num_tokens", 0) > 1]
                self.figures.sent_bytes[round] = [f["sent_bytes"] for f in told]
        return statuses

    def wait_until_running(self) -> None:
        """All nodes loaded, registered, and connected to one another."""
        num_nodes = len(self.net.nodes)

        def is_done() -> bool:
            statuses = self.watch(sum(s.get("stage") == "running" for _, s in self.statuses()))
            return all(s.get("stage") == "running" and len(s["peers"]) == num_nodes - 1 for _, s in statuses)

        self.net.wait_until("all peers run and know one another", is_done, 150, poll_s=1)

    def wait_for_round(self, round: int, nodes: list[LocalNode]) -> None:
        """Until these nodes hold a certificate of `round` or of a later one."""
        round_s = sum(get_durations(self.net.network)) / 1000
        start_s = self.net.network.genesis_ms / 1000

        def is_done() -> bool:
            within = (time.time() - start_s) / round_s
            statuses = {node.index: status for node, status in self.watch(max(0.0, within))}
            held = [statuses[node.index].get("protocol", {}).get("certified_round") for node in nodes]
            self.screen.tell(*_describe_round(statuses[nodes[0].index]))
            return all(value is not None and value >= round for value in held)

        deadline = start_s + (round + 3) * round_s
        self.net.wait_until(f"round {round} is certified", is_done, max(30.0, deadline - time.time()), poll_s=1)

    # --- the parts of the story ---

    def show_failover(self) -> None:
        """A stream outlives the process that generates it, with the very same text."""
        model = self._pin_model()
        self.screen.tell("a streamed completion, undisturbed")
        calm = self._stream(model, kill=False)
        self.screen.tell("the same again; the process that generates it is killed in mid-stream")
        broken = self._stream(model, kill=True)
        survivors = list(dict.fromkeys(broken.replicas))
        self.figures.serving = {
            "model": model,
            "prompt": STREAM_PROMPT,
            "text": broken.text,
            "tokens": broken.num_tokens,
            "replicas_in_order": survivors,
            "tokens_undisturbed": calm.num_tokens,
        }
        self.figures.checks["stream survives SIGKILL of its replica, same text"] = (
            broken.text == calm.text and broken.num_tokens == calm.num_tokens and len(survivors) >= 2
        )

    def show_second_death(self) -> LocalNode:
        """With two nodes dead, a completion is still answered."""
        victim = self._choose_second_victim()
        self.net.kill(victim)
        self.screen.tell(f"peer {victim.index} is killed too; asking again")
        body = {
            "model": self._newest_model(),
            "messages": [{"role": "user", "content": "What is a computer?"}],
            "max_tokens": 24,
            "temperature": 0,
        }
        answer = httpx.post(f"{self._gateway.url}/v1/chat/completions", json=body, timeout=90).json()
        text = answer.get("choices", [{}])[0].get("message", {}).get("content", "")
        self.figures.serving["after_second_death"] = text
        self.figures.checks["a completion is answered with two nodes dead"] = bool(text.strip())
        return victim

    def wait_for_missed_round(self) -> None:
        """Until the others have certified a round without the killed peer: it will have something to fetch."""
        running = [node for node in self.net.nodes if node.is_running]
        self.wait_for_round(self._killed_round, running)
        self._missed_round = self.net.get_status(self._gateway)["protocol"]["certified_round"]

    def show_rejoin(self) -> None:
        """A killed node comes back with its keys, fetches the base it missed, and takes part again."""
        node, figures = self.killed, self.figures
        self.screen.tell(f"peer {node.index} is started again")
        started = time.monotonic()
        self.net.start(node)
        self.net.wait_until_running(node)
        figures.rejoin = {
            "peer": node.index,
            "missed_round": self._missed_round,
            "seconds_to_running": round(time.monotonic() - started, 1),
        }
        figures.checks["the killed peer comes back with its keys"] = self.net.get_status(node)["peer"] == node.peer
        fetched = False

        def is_done() -> bool:
            nonlocal fetched
            statuses = {n.index: status.get("protocol", {}) for n, status in self.watch(self._round_now())}
            where, left = _describe_round(self._gateway.last_status)
            self.screen.tell(f"peer {node.index} is back; waiting for its update to be certified; {where}", left)
            notes = statuses[node.index].get("notes", [])
            fetched |= any(n["round"] == self._missed_round and n["text"].startswith("certified") for n in notes)
            certified = statuses[GATEWAY].get("certified_round") or -1
            is_in = any(update["peer"] == node.peer for update in statuses[GATEWAY].get("updates", []))
            return is_in and certified > self._missed_round

        self.net.wait_until(f"peer {node.index} takes part again", is_done, 200, poll_s=1)
        figures.checks["it fetched the base that was certified while it was away"] = fetched
        figures.rejoin["takes_part_in_round"] = self._gateway.last_status["protocol"]["certified_round"]

    def check_bases(self) -> None:
        """All running nodes hold the base whose digest the chain holds."""
        running = [node for node in self.net.nodes if node.is_running]

        def is_settled() -> bool:
            head = self.net.ledger.get_head()
            statuses = self.watch(self._round_now())
            bases = {s["protocol"]["base"] for node, s in statuses if node in running and "protocol" in s}
            is_same = head is not None and bases == {head.base.hex()}
            self.figures.checks["every running node holds the base that the chain names"] = is_same
            return is_same and head is not None and head.round in self.figures.losses_nats

        try:
            self.net.wait_until("the last round is on chain", is_settled, 40, poll_s=1)
        except WorldError as error:
            self.screen.say(f"[yellow]{error}[/]")

    def read_chain(self) -> tuple[Row, ...]:
        """Contributions and rewards as the chain has them, and the checks that people would make on them."""
        rows = read_rewards(self.net.ledger, self._fetch_blob)
        self._claim_for_all(rows)
        rows = read_rewards(self.net.ledger, self._fetch_blob)
        findings = verify_rewards(self.net.ledger, self._fetch_blob, self.net.network)
        figures = self.figures
        figures.rewards = rows_to_json(rows)
        figures.checks["every round recomputes to its root on chain"] = not any(findings.values())
        figures.checks["held-out loss fell from before the first round to after the last"] = (
            len(figures.losses_nats) > 1
            and figures.losses_nats[max(figures.losses_nats)] < figures.losses_nats[min(figures.losses_nats)]
        )
        figures.checks.update(check_rewards(rows, {node.peer: node.role for node in self.net.nodes}))
        return rows

    def _claim_for_all(self, rows: Sequence[Row]) -> None:
        """Claims are open to anyone and always paid to the peer: so the dead are paid too."""
        newest = max(row.round for row in rows)
        self.net.wait_until("the newest round is final", lambda: self._is_final(newest), 30)
        for row in rows:
            if row.round == newest and row.cumulative_wei > row.claimed_wei:
                self.screen.tell(f"claiming for …{row.peer[-6:]}")
                claim_newest(self.net.ledger, row.peer, self._fetch_blob)

    def _is_final(self, round: Round) -> bool:
        return all(settled.is_final for settled in self.net.ledger.get_rounds(round))

    def _fetch_blob(self, digest: Digest) -> bytes | None:
        """From whichever node serves it; the reader checks the hash."""
        for node in self.net.nodes:
            if node.is_running:
                response = httpx.get(f"{node.url}/blobs/{digest.hex()}", timeout=10)
                if response.status_code == 200:
                    return response.content
        return None

    # --- helpers ---

    def _round_now(self) -> float:
        elapsed_ms = time.time() * 1000 - self.net.network.genesis_ms
        return max(0.0, elapsed_ms / sum(get_durations(self.net.network)))

    def _newest_model(self) -> str:
        names = [model["id"] for model in httpx.get(f"{self._gateway.url}/v1/models", timeout=10).json()["data"]]
        return str(names[0])

    def _pin_model(self) -> str:
        """The newest base by its digest: both streams must use one version, whatever is certified in between."""
        base = self.net.get_status(self._gateway)["protocol"]["base"]
        return f"{self.net.network.backbone}+base@{base[:16]}"

    def _stream(self, model: str, *, kill: bool) -> Streamed:
        body = {
            "model": model,
            "prompt": STREAM_PROMPT,
            "max_tokens": STREAM_TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        seen = Streamed()
        is_killed = False
        with httpx.stream("POST", f"{self._gateway.url}/v1/completions", json=body, timeout=120) as response:
            for event in _read_events(response):
                seen.num_tokens = (event.get("usage") or {}).get("completion_tokens", seen.num_tokens)
                for choice in event.get("choices", []):
                    if choice.get("text"):
                        seen.text += choice["text"]
                        seen.num_pieces += 1
                        seen.replicas.append(event["p2pfm"]["replica"])
                        self._show_stream(seen)
                if kill and not is_killed and seen.num_pieces >= KILL_AFTER_TOKENS:
                    is_killed = True
                    self._kill_replica(seen.replicas[-1])
        return seen

    def _show_stream(self, seen: Streamed) -> None:
        """The end of the text so far, and who writes it: a person sees the pause and the change of hands."""
        if self.screen.console.is_terminal:
            writer = next(node.index for node in self.net.nodes if node.peer == seen.replicas[-1])
            self.screen.tell(f"peer {writer}: …{seen.text[-36:]!r}")

    def _kill_replica(self, peer: str) -> None:
        node = next(node for node in self.net.nodes if node.peer == peer)
        self._killed_round = int(self._round_now())
        self.net.kill(node)
        self.killed = node
        self.screen.tell(f"peer {node.index} was generating: SIGKILL")

    def _choose_second_victim(self) -> LocalNode:
        """A node whose death costs no round: not the gateway, and not first-ranked in the next two rounds."""
        roster = self.net.ledger.get_roster()
        done = self.net.get_status(self._gateway)["protocol"]["certified_round"]
        needed = {roster.members[compute_ranks(roster, Round(r))[0]].peer for r in (done + 1, done + 2)}
        running = [node for node in self.net.nodes if node.is_running and node.index != GATEWAY]
        return next((node for node in reversed(running) if node.peer not in needed), running[-1])


def run_demo(
    folder: Path, console: Console, *, chain: Literal["embedded", "anvil"] = "embedded", json_path: Path | None = None
) -> bool:
    """Tell the whole story; returns whether every check held.

    Args:
        folder: where homes, logs and pictures go; must not hold a network yet.
        json_path: also write the figures there.

    Raises:
        OperatorError: a missing package, a folder in use, a node that cannot start.
        WorldError: a part took too long.
    """
    figures = Figures()
    preset = PRESETS["demo"]
    with Screen(console) as screen:
        screen.begin("get the model", 1)
        with _measured(figures, "model"):
            fetch(preset.backbone, screen.progress)
        screen.begin("start a chain and five peers", len(ROLES))
        clock = _Clock(figures)
        with localnet(folder, ROLES, preset, screen.tell, gateways=frozenset({GATEWAY}), chain=chain) as net:
            demo = Demo(net, screen, figures)
            demo.wait_until_running()
            clock.lap("start", net)
            screen.begin("train, value, certify, settle", QUIET_ROUNDS)
            demo.wait_for_round(QUIET_ROUNDS - 1, net.nodes)
            clock.lap("rounds", net)
            screen.begin("kill the replica in mid-stream", 1)
            demo.show_failover()
            clock.lap("failover", net)
            screen.begin("the others go on without it", QUIET_ROUNDS + 1)
            demo.wait_for_missed_round()
            demo.show_second_death()
            clock.lap("rounds without it", net)
            screen.begin("a killed peer comes back", QUIET_ROUNDS + 2)
            demo.show_rejoin()
            demo.check_bases()
            clock.lap("rejoin", net)
            screen.begin("read the chain", 1)
            rows = demo.read_chain()
            clock.lap("chain", net)
    pictures = _draw(folder, figures, rows, net)
    _print_end(console, figures, rows, net, pictures)
    if json_path is not None:
        json_path.write_text(figures_to_json(figures), encoding="utf-8")
        console.print(f"figures: {json_path}", soft_wrap=True)
    return all(figures.checks.values())


class _Clock:
    """Wall and CPU seconds by part of the story."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._wall = time.monotonic()
        self._cpu: dict[int, float] = {}

    def lap(self, part: str, net: Localnet) -> None:
        """What passed since the last lap: wall time, and CPU time of every process of the network and our own."""
        now = time.monotonic()
        self._figures.wall_s[part] = round(now - self._wall, 1)
        self._wall = now
        processes = [node.process for node in net.nodes if node.is_running and node.process] + [net.testnet.process]
        spent = 0.0
        for pid in [os.getpid(), *(process.pid for process in processes)]:
            times = psutil.Process(pid).cpu_times()
            total = times.user + times.system
            spent += total - self._cpu.get(pid, 0.0)
            self._cpu[pid] = total
        self._figures.cpu_s[part] = round(spent, 1)


@contextmanager
def _measured(figures: Figures, part: str) -> Iterator[None]:
    """Wall and CPU seconds of a part that runs in this process."""
    wall, cpu = time.monotonic(), time.process_time()
    yield
    figures.wall_s[part] = round(time.monotonic() - wall, 1)
    figures.cpu_s[part] = round(time.process_time() - cpu, 1)


def _read_events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Server-sent events of a completion, as JSON."""
    if response.status_code != 200:
        raise WorldError(f"the gateway answered {response.status_code}: {response.read().decode()[:300]}")
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def _name(node: LocalNode) -> str:
    state = "" if node.is_running else " [red](killed)[/]"
    return f"{node.role}{state}"


def _describe_round(status: Mapping[str, Any]) -> tuple[str, float]:
    """The phase in words, and its seconds left."""
    if not status:
        return "waiting for an answer", 0.0
    left = status["phase_ends_in_ms"] / 1000
    return (
        "waiting for the first round" if status["round"] < 0 else f"round {status['round']}: {status['phase']}"
    ), left


def _draw(folder: Path, figures: Figures, rows: Sequence[Row], net: Localnet) -> list[Path]:
    """The two pictures."""
    rewards, training = folder / REWARDS_PICTURE, folder / TRAINING_PICTURE
    plot_rewards(rows, rewards, {PeerId(node.peer): f"peer {node.index}\n{node.role}" for node in net.nodes})
    plot_training(figures.losses_nats, figures.payload_bytes, figures.sent_bytes, figures.dense_bytes, training)
    return [rewards, training]


def _print_end(console: Console, figures: Figures, rows: Sequence[Row], net: Localnet, pictures: list[Path]) -> None:
    """The last screen: serving, rewards, rounds, checks, pictures."""
    serving, rejoin = figures.serving, figures.rejoin
    console.rule("serving through failures")
    console.print(f"[bold]{STREAM_PROMPT}[/]{escape(serving['text'])}", soft_wrap=True)
    names = {node.peer: f"peer {node.index}" for node in net.nodes}
    path = " → ".join(names[peer] for peer in serving["replicas_in_order"])
    console.print(f"[dim]{serving['tokens']} tokens by {path}; the undisturbed text is the same[/]")
    console.print(f"[dim]with two nodes dead: {escape(serving['after_second_death'].strip()[:200])!r}[/]")
    console.print(
        f"[dim]peer {rejoin['peer']} missed round {rejoin['missed_round']}, ran again {rejoin['seconds_to_running']} s "
        f"after its restart, fetched the base it had missed, and took part in round {rejoin['takes_part_in_round']}[/]"
    )
    console.rule("read from the chain")
    console.print(_make_reward_table(rows, net))
    console.print(_make_round_table(figures))
    for check, holds in figures.checks.items():
        console.print(f"{'[green]ok[/]   ' if holds else '[red]FAIL[/] '}{check}", highlight=False)
    walls = ", ".join(f"{part} {seconds:.0f}" for part, seconds in figures.wall_s.items())
    cpus = ", ".join(f"{part} {seconds:.0f}" for part, seconds in figures.cpu_s.items())
    console.print(f"[dim]wall s: {walls} (total {sum(figures.wall_s.values()):.0f}); CPU s: {cpus}[/]", soft_wrap=True)
    for picture in pictures:
        console.print(f"picture: {picture}", soft_wrap=True, highlight=False)


def _make_reward_table(rows: Sequence[Row], net: Localnet) -> Table:
    """Contribution by round and what the chain allotted and paid, one line a peer, best first."""
    rounds = sorted({row.round for row in rows})
    table = Table(
        title="contribution by round in milli-nats a token, and reward in PFM",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=0,  # six rounds fit into 80 columns: a void one makes the demo a round longer
    )
    for column in ("peer", "role"):
        table.add_column(column, no_wrap=True)
    for column in (*(str(round) for round in rounds), "sum", "allotted", "claimed"):
        table.add_column(column, justify="right", no_wrap=True)
    by_peer = {node.peer: [row for row in rows if row.peer == node.peer] for node in net.nodes}
    for node in sorted(net.nodes, key=lambda node: -sum(row.reward_wei for row in by_peer[node.peer])):
        held = {row.round: row for row in by_peer[node.peer]}
        parts = [held[r].contribution if r in held else None for r in rounds]
        table.add_row(
            f"peer {node.index}",
            node.role,
            *("-" if part is None else format_nats(part) for part in parts),
            format_nats(sum(part or 0 for part in parts)),
            f"{sum(row.reward_wei for row in held.values()) / WEI_PER_PFM:.2f}",
            f"{max((row.claimed_wei for row in held.values()), default=0) / WEI_PER_PFM:.2f}",
        )
    return table


def _make_round_table(figures: Figures) -> Table:
    """Held-out loss and bytes by round."""
    table = Table(
        title="held-out loss, and bytes beside a dense fp32 update",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in ("round", "loss", "an update", "is smaller by", "sent a peer", "is less by"):
        table.add_column(column, justify="right", no_wrap=True)
    if not {round for round in figures.losses_nats if round >= 0} <= figures.sent_bytes.keys():
        table.caption = "bytes are told of rounds that are over"
    for round in sorted({*figures.losses_nats, *figures.payload_bytes}):
        update = _mean(figures.payload_bytes.get(round, []))
        sent = _mean(figures.sent_bytes.get(round, []))
        table.add_row(
            "before" if round < 0 else str(round),
            f"{figures.losses_nats[round]:.3f}" if round in figures.losses_nats else "void",
            f"{update:,.0f}" if update else "",
            f"{figures.dense_bytes / update:.0f}x" if update else "",
            f"{sent:,.0f}" if sent else "",
            f"{figures.dense_bytes / sent:.1f}x" if sent else "",
        )
    return table


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
