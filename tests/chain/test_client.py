"""The client against real chains that restart, reorganise, fall silent, refuse and lie.

A small proxy stands between client and chain where the trouble is in what an endpoint answers.
"""

import json
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from eth_account import Account
from hexbytes import HexBytes
from ledger_worlds import (
    ACCOUNTS,
    IMPLEMENTATIONS,
    KEYS,
    PARAMS,
    SPONSOR,
    TOKENS,
    World,
    chain_world,
    free_port,
    refuses,
    rpc,
    running_chain,
)
from web3 import HTTPProvider, Web3
from web3.exceptions import Web3RPCError

from nodes.testnet import CHAIN_ID, MNEMONIC, find_anvil
from p2pfm.errors import ChainError
from p2pfm.runtime.chain_rpc import Rpc
from p2pfm.runtime.web3_ledger import VERSION, Web3Ledger
from p2pfm.types import MemberIndex, Round, Wei

needs_anvil = pytest.mark.skipif("anvil" not in IMPLEMENTATIONS, reason="needs `npm install --prefix contracts`")

VERSION_1 = bytes.fromhex("600a600c600039600a6000f3" + "600160005260206000f3")
"""Deploys a contract that answers every call with 1."""

Bend = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


class Proxy:
    """An endpoint that passes requests on to a chain, and answers what `bend` makes of the answers."""

    def __init__(self, upstream: str) -> None:
        self.bend: Bend = lambda request, answer: answer
        self.is_down = False
        self.methods: list[str] = []
        """Of the requests that reached the chain."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 64 * 1024  # headers and body leave together
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                answer = None if proxy.is_down else proxy.ask(upstream, body)
                if answer is None or proxy.is_down:  # it may have gone down while the chain worked: the answer is lost
                    self.close_connection = True
                    return
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def ask(self, upstream: str, body: bytes) -> bytes:
        request = json.loads(body)
        self.methods.append(request["method"])
        forwarded = urllib.request.Request(upstream, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(forwarded, timeout=20) as response:
            return json.dumps(self.bend(request, json.load(response))).encode()

    def fall_silent(self, method: str, seconds: float) -> None:
        """When the next request of this method has reached the chain, no answer comes back for so long."""

        def bend(request: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
            if request["method"] == method:
                self.bend = lambda request, answer: answer
                self.is_down = True
                threading.Timer(seconds, lambda: setattr(self, "is_down", False)).start()
            return answer

        self.bend = bend


@contextmanager
def proxied(upstream: str) -> Iterator[Proxy]:
    proxy = Proxy(upstream)
    threading.Thread(target=proxy.server.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.server.shutdown()
        proxy.server.server_close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_chain(IMPLEMENTATIONS[-1]) as rpc_url:
        yield rpc_url


@pytest.fixture
def proxy(url: str) -> Iterator[Proxy]:
    with proxied(url) as one:
        yield one


@pytest.fixture
def world(url: str) -> World:
    return chain_world(url).found(4)


def client(url: str, world: World, account: int = SPONSOR, **options: Any) -> Web3Ledger:
    """A ledger that knows nothing yet."""
    return Web3Ledger(url, world.chain, KEYS[account], fresh_s=0, **options)


def told_by(ledger: Web3Ledger) -> tuple[Any, ...]:
    """Everything that a ledger says."""
    return (
        *(ledger.get_roster(), ledger.get_head(), ledger.get_rounds(Round(0)), ledger.get_pool()),
        *(ledger.get_entries(), ledger.get_demands()),
    )


def receiver(number: int) -> str:
    """An address that nobody else pays."""
    return str(Account.from_key((1_000_000 + number).to_bytes(32, "big")).address)


def balances(url: str, count: int, first: int = 0) -> list[int]:
    return [int(rpc(url, "eth_getBalance", receiver(i), "latest"), 16) for i in range(first, first + count)]


def count_sent(url: str, account: int) -> int:
    return int(rpc(url, "eth_getTransactionCount", ACCOUNTS[account], "latest"), 16)


def pay(sender: Rpc, number: int) -> Any:
    """A transfer whose amount nobody else sends, to an address of its own: twice would show."""
    return sender.send({"to": receiver(number), "value": number + 1, "data": b""})


# --- one sender a key -------------------------------------------------------------------------------------------------


class Restartable:
    """An anvil that keeps its state in a file, a block a second, and can be killed."""

    def __init__(self, state: Path) -> None:
        self.state, self.port = state, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [str(find_anvil()), "--port", str(self.port), "--chain-id", str(CHAIN_ID), "--mnemonic", MNEMONIC]
        command += ["--hardfork", "prague", "--block-time", "1", "--silent"]
        command += ["--state", str(self.state), "--state-interval", "1"]
        self.process = subprocess.Popen(command)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                rpc(self.url, "eth_chainId")
                return
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError("anvil did not start")

    def kill(self) -> None:
        """What waits in its pool is lost; what it has mined is kept.

        anvil writes accounts and blocks of different moments when it mines meanwhile, so it mines no more, and the last
        whole file that knows its newest block is what it finds again.
        """
        assert self.process is not None
        rpc(self.url, "evm_setIntervalMining", 0)
        newest, deadline = int(rpc(self.url, "eth_blockNumber"), 16), time.monotonic() + 20
        written_at = time.time()
        while True:
            try:
                text = self.state.read_text()
                is_whole = json.loads(text)["best_block_number"] == newest and self.state.stat().st_mtime > written_at
            except (OSError, ValueError):
                is_whole = False
            if is_whole:
                break
            assert time.monotonic() < deadline, "anvil wrote no state"
            time.sleep(0.05)
        self.end()
        self.state.write_text(text)

    def end(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.mark.slow
@needs_anvil
def test_a_hundred_concurrent_sends_of_three_keys_land_once_over_a_killed_node(tmp_path: Path) -> None:
    chain = Restartable(tmp_path / "state.json")
    chain.start()
    try:
        senders = [Rpc(chain.url, CHAIN_ID, KEYS[i], confirmations=3, patience_s=60) for i in range(3)]
        with ThreadPoolExecutor(100) as pool:
            sends = [pool.submit(pay, senders[i % 3], i) for i in range(100)]
            time.sleep(1.5)
            num_done = sum(send.done() for send in sends)
            chain.kill()
            time.sleep(2)
            chain.start()
            receipts = [send.result() for send in sends]
        assert num_done < 100, "the node was killed when all was over: nothing was tested"
        assert balances(chain.url, 100) == [i + 1 for i in range(100)]
        assert [count_sent(chain.url, i) for i in range(3)] == [34, 33, 33]
        assert len({HexBytes(receipt["transactionHash"]) for receipt in receipts}) == 100
    finally:
        chain.end()


def test_two_programs_with_one_key_lose_and_double_nothing(url: str) -> None:
    base = 1000
    first = count_sent(url, 0)
    ours, theirs = (Rpc(url, CHAIN_ID, KEYS[0], patience_s=30) for _ in range(2))
    web3 = Web3(HTTPProvider(url))
    foreign: list[HexBytes] = []

    def pay_plainly() -> None:
        """As a script does that knows of nobody: the pending nonce, once more if it was taken."""
        while len(foreign) < 10:
            nonce = web3.eth.get_transaction_count(ACCOUNTS[0], "pending")
            number = base + 40 + len(foreign)
            fees = {"gas": 21_000, "maxFeePerGas": 50 * 10**9, "maxPriorityFeePerGas": 10**9, "chainId": CHAIN_ID}
            envelope = {"to": receiver(number), "value": number + 1, "nonce": nonce, **fees}
            try:
                digest = web3.eth.send_raw_transaction(Account.sign_transaction(envelope, KEYS[0]).raw_transaction)
            except Web3RPCError:
                continue
            web3.eth.wait_for_transaction_receipt(digest, timeout=20, poll_latency=0.05)
            foreign.append(digest)

    with ThreadPoolExecutor(9) as pool:
        plain = pool.submit(pay_plainly)
        sends = [pool.submit(pay, (ours, theirs)[i % 2], base + i) for i in range(40)]
        for each in (plain, *sends):
            each.result()
    assert balances(url, 50, base) == [base + i + 1 for i in range(50)]
    assert count_sent(url, 0) == first + 50


def test_a_nonce_that_grew_stale_is_asked_anew(url: str) -> None:
    first, second = (Rpc(url, CHAIN_ID, KEYS[1], patience_s=20) for _ in range(2))
    for number, sender in enumerate((first, second, second, first), 2000):
        pay(sender, number)
    assert balances(url, 4, 2000) == [2001, 2002, 2003, 2004]


@needs_anvil
def test_a_node_that_lost_its_receipts_is_not_paid_on_twice(tmp_path: Path) -> None:
    """As one that was restored from a snapshot: the nonce is used, and no block holds the transaction."""
    chain = Restartable(tmp_path / "state.json")
    chain.start()
    try:
        rpc(chain.url, "evm_setIntervalMining", 0)
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(pay, Rpc(chain.url, CHAIN_ID, KEYS[0], patience_s=4), 2400)
            while not (waiting := rpc(chain.url, "txpool_content")["pending"]):
                time.sleep(0.02)
            ((_, by_nonce),) = waiting.items()
            rpc(chain.url, "anvil_dropTransaction", by_nonce["0"]["hash"])
            rpc(chain.url, "anvil_setNonce", ACCOUNTS[0], "0x1")
            rpc(chain.url, "anvil_mine", "0x2")
            with pytest.raises(ChainError, match="nonce 0 is used, and no block shows by which transaction"):
                pending.result()
        assert count_sent(chain.url, 0) == 1
        assert not rpc(chain.url, "txpool_content")["pending"]
    finally:
        chain.end()


# --- reorganisations --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_anvil
def test_after_a_reorganisation_an_old_client_knows_what_a_new_one_learns(url: str) -> None:
    world = chain_world(url).found(4)
    watcher = client(url, world)
    num_vanished = 0
    for depth in range(1, 6):
        world.ledgers[2].fund(Wei(depth))
        told_by(watcher)
        rounds = len(watcher.get_rounds(Round(0)))
        world.leaves = ()
        world.settle(10 * depth)
        assert len(watcher.get_rounds(Round(0))) == rounds + 1
        rpc(url, "anvil_reorg", depth, [])
        assert told_by(watcher) == told_by(client(url, world))
        num_vanished += len(watcher.get_rounds(Round(0))) == rounds
        # Each sender's next transaction finds that the chain took back what it had done, and does it again first.
        world.any.fund(Wei(1))
        world.ledgers[2].fund(Wei(1))
        assert told_by(watcher) == told_by(client(url, world))
        assert [settled.round for settled in watcher.get_rounds(Round(0))][-1:] == [10 * depth]
    assert num_vanished >= 3
    assert watcher.get_pool() == 1500 + sum(range(1, 6)) + 2 * 5, "every gift counts once"
    world.check_books()


def test_a_done_transaction_has_as_many_blocks_as_were_asked_for(url: str) -> None:
    sender = Rpc(url, CHAIN_ID, KEYS[2], confirmations=3)
    receipt = pay(sender, 2100)
    assert int(rpc(url, "eth_blockNumber"), 16) - receipt["blockNumber"] + 1 >= 3


# --- outages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["eth_estimateGas", "eth_sendRawTransaction", "eth_getTransactionReceipt"])
def test_a_change_survives_an_outage_and_pays_once(world: World, proxy: Proxy, method: str) -> None:
    ledger, reader = (client(proxy.url, world) for _ in range(2))
    submission = world.submission(1, [5, -3, 9, 0])
    told_by(ledger)
    told_by(reader)

    def through_an_outage(change: Callable[[], Any]) -> Any:
        proxy.fall_silent(method, 1.0)
        with ThreadPoolExecutor(1) as pool:
            pending: Future[Any] = pool.submit(change)
            deadline = time.monotonic() + 10
            while not proxy.is_down and time.monotonic() < deadline:
                time.sleep(0.01)
            with pytest.raises(ChainError, match=r"no answer from the chain at http.*is it running\?"):
                reader.get_rounds(Round(0))
            return pending.result(timeout=30)

    through_an_outage(lambda: ledger.submit_round(submission))
    assert [settled.root for settled in reader.get_rounds(Round(0))] == [submission.root]
    world.advance(PARAMS.challenge_window_s)
    assert through_an_outage(lambda: ledger.claim(Round(1), MemberIndex(0), world.leaves)) == 357
    assert ledger.claim(Round(1), MemberIndex(0), world.leaves) == 0
    assert world.any.get_balance(ACCOUNTS[1]) == TOKENS - 10 + 357
    ledger.submit_round(submission)  # again, as who lost the answer would: no error, nothing twice
    assert len(reader.get_rounds(Round(0))) == 1
    world.check_books()


def test_an_answer_that_is_none_is_an_outage_while_a_transaction_is_out(world: World, proxy: Proxy) -> None:
    ledger = client(proxy.url, world)
    until = time.monotonic() + 1.5

    def bend(request: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        is_waiting = request["method"] == "eth_getTransactionReceipt" and time.monotonic() < until
        return (
            {"jsonrpc": "2.0", "id": request["id"], "error": {"code": -32005, "message": "busy"}}
            if is_waiting
            else answer
        )

    proxy.bend = bend
    ledger.send_ether(receiver(2200), 2201)
    assert balances(proxy.url, 1, 2200) == [2201]


# --- another chain, another contract, no money ------------------------------------------------------------------------


def test_another_chain_or_contract_is_named(url: str, world: World) -> None:
    def refuse(pattern: str, **changes: Any) -> None:
        chain = msgspec.structs.replace(world.chain, **changes)
        with pytest.raises(ChainError, match=pattern):
            Web3Ledger(url, chain, KEYS[1]).get_head()
        with pytest.raises(ChainError, match=pattern):
            Web3Ledger(url, chain, KEYS[1]).fund(Wei(1))

    old = str(Rpc(url, CHAIN_ID, KEYS[0]).send({"value": 0, "data": VERSION_1})["contractAddress"])
    refuse("expected chain id 1 at http.*, got 1337; check `rpc`", chain_id=1)
    refuse(f"no p2pfm federation at {ACCOUNTS[3]} on chain 1337", federation=ACCOUNTS[3])
    refuse(f"no p2pfm federation at {world.chain.token} on chain 1337", federation=world.chain.token)
    refuse(f"expected a federation of version {VERSION}, got 1; update p2pfm", federation=old)
    refuse(f"expected reward token {ACCOUNTS[4]}, but the federation pays in", token=ACCOUNTS[4])


def test_who_has_no_ether_is_told_at_once(url: str) -> None:
    poor = Rpc(url, CHAIN_ID, (77).to_bytes(32, "big"))
    begun = time.monotonic()
    with pytest.raises(ChainError, match=r"(?i)refused.*(funds|balance)"):
        pay(poor, 2300)
    assert time.monotonic() - begun < 10
    pay(Rpc(url, CHAIN_ID, KEYS[0]), 2301)
    Rpc(url, CHAIN_ID, KEYS[0]).send({"to": poor.account, "value": 10**18, "data": b""})
    pay(poor, 2300)
    assert balances(url, 2, 2300) == [2301, 2302]


def test_who_has_no_tokens_is_told_which_rule_refuses(world: World) -> None:
    with refuses("ERC20InsufficientBalance"):
        world.ledgers[5].fund(Wei(TOKENS + 1))


# --- endpoints that lie, disagree, or give little ---------------------------------------------------------------------


def bend_logs(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Bend:
    def bend(request: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        return {**answer, "result": change(answer["result"])} if request["method"] == "eth_getLogs" else answer

    return bend


def test_logs_that_are_false_are_noticed_and_forgotten_when_they_are_true_again(world: World, proxy: Proxy) -> None:
    submissions = [world.settle(0), world.settle(1, [1, 1, 0, 0]), world.settle(2)]
    truth = told_by(world.any)
    kinds = world.ledgers[0]._federation.events
    topic = kinds["RoundAccepted"]().topic

    def drop(nth: int) -> Bend:
        def change(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
            accepted = [log for log in logs if log["topics"][0] == topic]
            return [log for log in logs if not (len(accepted) > nth and log is accepted[nth])]

        return bend_logs(change)

    def alter(old: bytes, new: bytes) -> Bend:
        return bend_logs(
            lambda logs: [
                {**log, "data": log["data"].replace(old.hex(), new.hex())} if log["topics"][0] == topic else log
                for log in logs
            ]
        )

    def retitle(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**log, "topics": ["0x" + "ab" * 32]} if log["topics"][0] == topic else log for log in logs]

    ledger = client(proxy.url, world)
    lies = {
        "the newest round is missing": drop(2),
        "an older one is missing": drop(0),
        "the newest root is another": alter(submissions[2].root, bytes(31) + b"z"),
        "an older root is another": alter(submissions[0].root, bytes(31) + b"z"),
        "the newest base is another": alter(submissions[2].base, bytes(31) + b"z"),
        "no such event": bend_logs(retitle),
        "there are no logs": bend_logs(lambda logs: []),
    }
    for lie, bend in lies.items():
        proxy.bend = bend
        fresh = client(proxy.url, world)
        for _ in range(2):
            with pytest.raises(ChainError, match=r"logs tell .* state\b.*not to be trusted, name another as `rpc`"):
                fresh.get_rounds(Round(0))
        proxy.bend = lambda request, answer: answer
        assert told_by(fresh) == truth, f"{lie}: and the endpoint was mended"
        assert told_by(ledger) == truth


def test_two_endpoints_that_disagree_stop_everything(url: str, world: World, proxy: Proxy) -> None:
    world.settle(0)
    following = world.submission(1, [1, 1, 0, 0])
    selector = world.ledgers[0]._federation.functions.recordHash(0)._encode_transaction_data()[:10]

    def lie(request: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        is_asked = request["method"] == "eth_call" and request["params"][0]["data"].startswith(selector)
        return {**answer, "result": "0x" + "ab" * 32} if is_asked else answer

    with proxied(url) as honest:
        ledger = client(honest.url, world, witness_url=proxy.url)
        assert told_by(ledger) == told_by(world.any)
        proxy.bend = lie
        changes: tuple[Callable[[], Any], ...] = (
            lambda: ledger.submit_round(following),
            lambda: ledger.claim(Round(0), MemberIndex(0), ()),
            lambda: ledger.demand_leaf(Round(0), MemberIndex(0)),
            lambda: ledger.get_head(),
        )
        for change in changes:
            with pytest.raises(ChainError, match=r"two endpoints disagree about round 0: .*until they agree"):
                change()
        assert "eth_sendRawTransaction" not in honest.methods
        proxy.bend = lambda request, answer: answer
        ledger.submit_round(following)
    assert len(world.any.get_rounds(Round(0))) == 2


def test_an_endpoint_that_gives_few_blocks_a_call_is_asked_for_few(url: str, world: World, proxy: Proxy) -> None:
    mine = [{"jsonrpc": "2.0", "id": i, "method": "evm_mine", "params": []} for i in range(250)]
    assert httpx.post(url, json=mine, timeout=60).is_success
    world.settle(0)
    num_refused = 0

    def bend(request: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
        nonlocal num_refused
        if request["method"] != "eth_getLogs":
            return answer
        first, last = (int(request["params"][0][key], 16) for key in ("fromBlock", "toBlock"))
        if last - first + 1 <= 100:
            return answer
        num_refused += 1
        return {"jsonrpc": "2.0", "id": request["id"], "error": {"code": -32005, "message": "more than 100 blocks"}}

    proxy.bend = bend
    assert told_by(client(proxy.url, world)) == told_by(world.any)
    assert 0 < num_refused < 10
