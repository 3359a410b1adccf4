"""What a client notices when nodes die: 100 streamed requests over 6 real nodes, one of which is killed or stopped now
and then (SIGKILL and restarted, or SIGSTOP for some seconds).

    python bench/failover.py [--requests 100] [--nodes 6] [--seed 0]

Runs over the same requests: undisturbed (the reference, and whether two such runs give the same text); replicas die
behind a gateway that lives; gateways die too, the clients' own among them, and each client goes on with its stream by
its id through another node; and replicas die until one is left beside the gateway's own. Requests begin at even
intervals, whatever became of those before. A latency added at a failure is what the longest pause of a disturbed stream
has over the same request's longest pause without. No round is trained meanwhile: the first is far away.
"""

import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import numpy as np
from harness import Target, finish, make_parser, print_table, read_options

from nodes.localnet import PRESETS, Localnet, LocalNode, Role, localnet

NO_ROUND_S = 10**6
"""The first round begins so much later."""

INTERVAL_S = 1.0
"""Between the beginnings of two requests."""

FAULT_S = 3.0
"""Between two faults."""

STOPPED_S = 5.0
"""How long a node stays stopped: longer than any patience."""

READY_MIN = 3
"""Nodes up beside the first, which no fault hits, that a fault leaves."""

LAST = "one is left"
LAST_READY_MIN, LAST_FAULT_S = 1, 1.0
"""The same, and FAULT_S, in that run: its nodes come up slower than they are killed."""

LAST_SHARE = 2
"""It asks one of so many requests, which bounds how long it takes."""

SILENT_S, FIRST_SILENT_S = 2.5, 4.0
"""A client whose gateway says nothing for so long goes to another one. Of a stream that has begun a living gateway says
each second that it lives; before, it may take 3 s to give up a replica."""

REQUEST_S = 90.0
"""A request that is not answered by then has failed."""

TOKENS = 128
KILLED_SHARE = 1 / 3
"""Of the faults; the others are stops. To start a node again costs a core for 20 s."""
THREADS_MAX = 32
TOPICS = ("the sea", "a clock", "bread", "the moon", "an old road", "glass", "a river", "snow", "iron", "a garden")


@dataclass
class Answer:
    """One request as its client saw it."""

    text: str = ""
    finish: str = ""
    marks: list[int] = field(default_factory=list)
    """Ids of the events, in order."""
    first_s: float = 0.0
    """Time to the first event."""
    pause_s: float = 0.0
    """The longest without an event, the first included."""
    num_replaced: int = 0
    """Replicas replaced, as gateways told."""
    num_moved: int = 0
    """Times that the client went to another gateway."""
    error: str = ""


def tell(text: str) -> None:
    """Progress, apart from the figures."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def make_question(index: int) -> dict[str, Any]:
    """The body of request `index`: half of them greedy, half drawn with a seed."""
    content = f"Tell me something about {TOPICS[index % len(TOPICS)]}, number {index}."
    return {
        "model": "tiny+base",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": TOKENS,
        "temperature": index % 2,
        "seed": index,
        "stream": True,
    }


def ask(gateways: Sequence[LocalNode], question: dict[str, Any]) -> Answer:
    """Ask the first gateway; when it fails, go on at the next, by the stream's id once that is known."""
    answer, name = Answer(), ""
    begin = last = time.monotonic()
    turn = 0
    while time.monotonic() < begin + REQUEST_S:
        url = gateways[turn % len(gateways)].url
        timeout = httpx.Timeout(REQUEST_S if len(gateways) == 1 else SILENT_S if name else FIRST_SILENT_S, connect=1.0)
        method, path, body = (
            ("GET", f"/v1/streams/{name}", None) if name else ("POST", "/v1/chat/completions", question)
        )
        headers = {"Last-Event-ID": str(answer.marks[-1])} if answer.marks else {}
        try:
            with httpx.stream(method, url + path, json=body, headers=headers, timeout=timeout) as response:
                if response.status_code != 200:
                    raise httpx.StreamError(f"{response.status_code} {response.read().decode()[:200]}")
                for line in response.iter_lines():
                    if line.startswith("id: "):
                        answer.marks.append(int(line[4:]))
                    if line == "data: [DONE]":
                        return answer
                    if not line.startswith("data: "):
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise httpx.StreamError(event["error"]["message"])
                    now = time.monotonic()
                    answer.pause_s = max(answer.pause_s, now - last)
                    last, name = now, event["id"]
                    answer.first_s = answer.first_s or now - begin
                    answer.num_replaced = max(answer.num_replaced, event["p2pfm"]["replaced"])
                    for choice in event["choices"]:
                        answer.text += choice["delta"].get("content", "")
                        answer.finish = choice["finish_reason"] or ""
            raise httpx.StreamError("the stream ended early")
        except (httpx.HTTPError, httpx.StreamError) as error:
            answer.error = f"{type(error).__name__}: {error}"
            turn += 1
            answer.num_moved += 1
            time.sleep(0.05 if turn % len(gateways) else 0.5)
    return answer


def ask_all(choose: Callable[[int], Sequence[LocalNode]], num_requests: int) -> list[Answer]:
    """All requests, begun at even intervals."""
    begin = time.monotonic()

    def run(index: int) -> Answer:
        time.sleep(max(0.0, begin + index * INTERVAL_S - time.monotonic()))
        return ask(choose(index), make_question(index))

    with ThreadPoolExecutor(THREADS_MAX) as pool:
        return list(pool.map(run, range(num_requests)))


class Trouble:
    """Kills and stops a node every `fault_s` until told to end; leaves `ready_min` of them up."""

    def __init__(
        self, net: Localnet, victims: Sequence[LocalNode], rng: random.Random, ready_min: int, fault_s: float
    ) -> None:
        """`victims`: whom it may hit."""
        self._net, self._victims, self._rng = net, victims, rng
        self._ready_min, self._fault_s = ready_min, fault_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._away: dict[int, float] = {}
        """Nodes not up, and until when they are stopped (0: killed)."""
        self.counts = {"killed": 0, "stopped": 0, "too few up": 0, "fewest up": len(victims)}

    def __enter__(self) -> "Trouble":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        for node in self._victims:
            self._wake(node)

    def _run(self) -> None:
        next_s = time.monotonic() + self._fault_s
        while not self._end.wait(0.25):
            self._look()
            if time.monotonic() < next_s:
                continue
            next_s += self._fault_s
            up = [node for node in self._victims if node.index not in self._away]
            if len(up) <= self._ready_min:
                self.counts["too few up"] += 1
                continue
            victim = self._rng.choice(up)
            assert victim.process is not None
            if self._rng.random() < KILLED_SHARE:
                self.counts["killed"] += 1
                self._away[victim.index] = 0.0
                self._net.kill(victim)
                self._net.start(victim)
            else:
                self.counts["stopped"] += 1
                self._away[victim.index] = time.monotonic() + STOPPED_S
                victim.process.send_signal(signal.SIGSTOP)
            self.counts["fewest up"] = min(self.counts["fewest up"], len(up) - 1)

    def _look(self) -> None:
        """Who is up again."""
        for node in self._victims:
            until_s = self._away.get(node.index)
            if until_s is None:
                continue
            if until_s and time.monotonic() > until_s:
                self._wake(node)
                del self._away[node.index]
            elif not until_s and is_ready(node):
                del self._away[node.index]

    def _wake(self, node: LocalNode) -> None:
        if node.is_running and node.process is not None:
            node.process.send_signal(signal.SIGCONT)


def is_ready(node: LocalNode) -> bool:
    """Whether it answers, and serves."""
    try:
        return bool(httpx.get(f"{node.url}/status", timeout=1).json().get("stage") == "running")
    except (httpx.HTTPError, ValueError):
        return False


def compare(name: str, answers: Sequence[Answer], truth: Sequence[Answer]) -> dict[str, Any]:
    """One run beside the undisturbed one."""
    pairs = list(zip(answers, truth, strict=True))
    done = [(answer, right) for answer, right in pairs if answer.finish]
    disturbed = [(answer, right) for answer, right in pairs if answer.num_replaced or answer.num_moved]
    added_s = [answer.pause_s - right.pause_s for answer, right in disturbed if answer.finish]
    return {
        "run": name,
        "requests": len(answers),
        "success": len(done) / len(answers),
        "texts differ": sum(answer.text != right.text for answer, right in done),
        "tokens lost or doubled": sum(
            len(set(a.marks) ^ set(t.marks)) + len(a.marks) - len(set(a.marks)) for a, t in done
        ),
        "disturbed": len(disturbed),
        "moved": sum(answer.num_moved > 0 for answer in answers),
        "first token p50 [s]": median(answer.first_s for answer in answers),
        "first token p95 [s]": float(np.percentile([answer.first_s for answer in answers], 95)),
        "added p50 [s]": median(added_s) if added_s else 0.0,
        "added p95 [s]": float(np.percentile(added_s, 95)) if added_s else 0.0,
        "errors": sorted({answer.error[:150] for answer in answers if answer.error and not answer.finish}),
    }


def run_all(folder: Path, num_nodes: int, num_requests: int, seed: int) -> dict[str, Any]:
    """Start the nodes, and run everything."""
    rng = random.Random(seed)
    preset = replace(PRESETS["tiny"], startup_s=NO_ROUND_S)
    honest: Role = "honest"
    with localnet(folder, (honest,) * num_nodes, preset, tell, gateways=frozenset(range(num_nodes))) as net:
        home, *others = net.nodes
        for node in net.nodes:
            net.wait_until_running(node, 300)
        everybody = num_nodes - 1
        net.wait_until("all meet", lambda: all(len(net.get_status(n)["peers"]) == everybody for n in net.nodes), 120)
        time.sleep(8)  # each has told all of its presence
        tell("undisturbed")
        truth = ask_all(lambda index: (home,), num_requests)
        num_again = num_requests // 4
        again = ask_all(lambda index: (net.nodes[index % num_nodes],), num_again)
        runs = [compare("undisturbed", truth, truth), compare("undisturbed, any gateway", again, truth[:num_again])]
        for name in ("replicas die", "gateways die", LAST):
            tell(name)
            net.wait_until("all are up", lambda: all(is_ready(node) for node in net.nodes), 120)
            bounds = (LAST_READY_MIN, LAST_FAULT_S) if name == LAST else (READY_MIN, FAULT_S)
            with Trouble(net, others, rng, *bounds) as trouble:
                if name == "replicas die":
                    answers = ask_all(lambda index: (home,), num_requests)
                elif name == LAST:
                    answers = ask_all(lambda index: (home,), num_requests // LAST_SHARE)
                else:
                    turns = [[*rng.sample(others, len(others)), home] for _ in range(num_requests)]
                    answers = ask_all(turns.__getitem__, num_requests)
            runs.append(
                {
                    **compare(name, answers, truth[: len(answers)]),
                    **trouble.counts,
                    "answers": [asdict(a) for a in answers],
                }
            )
    return {"nodes": num_nodes, "tokens": TOKENS, "fault every [s]": FAULT_S, "runs": runs}


def main() -> None:
    """Run and judge."""
    parser = make_parser(__doc__)
    parser.add_argument("--requests", type=int, default=100, help="how many a run")
    parser.add_argument("--nodes", type=int, default=6, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of who is hit when")
    arguments = parser.parse_args()
    options = read_options(arguments)
    num_nodes, num_requests = (5, 8) if options.quick else (arguments.nodes, arguments.requests)
    with tempfile.TemporaryDirectory(prefix="p2pfm-failover-") as folder:
        figures = run_all(Path(folder) / "net", num_nodes, num_requests, arguments.seed)
    runs = figures["runs"]
    shown = [name for name in runs[0] if name not in ("run", "errors")] + [
        "killed",
        "stopped",
        "too few up",
        "fewest up",
    ]
    print_table(
        "Runs", ("figure", *(run["run"] for run in runs)), [(n, *(run.get(n, "") for run in runs)) for n in shown]
    )
    for run in runs:
        for error in run["errors"]:
            print(f"{run['run']}: {error}")
    targets = []
    for run in runs[2:]:
        name = run["run"].replace(" ", "_")
        targets += [
            Target(f"{name}_success", run["success"], 0.999, "more"),
            Target(f"{name}_texts_that_differ", run["texts differ"], 0, "less"),
            Target(f"{name}_tokens_lost_or_doubled", run["tokens lost or doubled"], 0, "less"),
        ]
    finish(options, figures, targets)


if __name__ == "__main__":
    main()
