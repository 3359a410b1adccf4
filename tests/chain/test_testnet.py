"""The embedded chain: same curve arithmetic as py-evm's own, time that follows the clock, clear ends."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from eth.exceptions import VMError
from eth.vm.forks.prague.computation import PRAGUE_PRECOMPILES
from ledger_worlds import KEYS, free_port, rpc
from typer.testing import CliRunner
from web3 import HTTPProvider, Web3

from nodes.cli import app
from nodes.evm import EmbeddedChain, RpcError, fast_precompiles
from nodes.testnet import CHAIN_ID, _listens, serve_chain, start_embedded
from p2pfm.errors import OperatorError
from p2pfm.settlement import bls

OPERATOR = 2
ADDRESS = {"pairing": 0x0F, "add": 0x0D, "map": 0x11}


class Computation:
    """What a precompile sees of an EVM computation."""

    def __init__(self, data: bytes) -> None:
        self.msg = self
        self.data = self.data_as_bytes = data
        self.output = b""
        self.gas = 0

    def consume_gas(self, amount: int, reason: str) -> None:
        self.gas += amount


def outcome(precompile: Callable[[Computation], None], data: bytes) -> tuple[bytes, int] | None:
    """Output and gas; None: refused."""
    computation = Computation(data)
    try:
        precompile(computation)
    except VMError:
        return None
    return computation.output, computation.gas


SECRET = bls.key_from_seed(b"s" * 32)
KEY = bls.decompress_key(bls.public_key(SECRET))
POINT = bls.decompress_signature(bls.sign(SECRET, b"m"))
OTHER = bls.decompress_signature(bls.sign(SECRET, b"n"))
INFINITY_1, INFINITY_2 = bytes(128), bytes(256)
NEGATIVE_KEY = KEY[:64] + (bls.FIELD_MODULUS - int.from_bytes(KEY[64:], "big")).to_bytes(64, "big")
OFF_CURVE = POINT[:-1] + bytes([POINT[-1] ^ 1])
OVER = (bls.FIELD_MODULUS + 1).to_bytes(64, "big")

CASES = [
    ("pairing", KEY + POINT + NEGATIVE_KEY + POINT),
    ("pairing", KEY + POINT + NEGATIVE_KEY + OTHER),
    ("pairing", KEY + POINT + INFINITY_1 + OTHER),
    ("pairing", INFINITY_1 + INFINITY_2),
    ("pairing", KEY + OFF_CURVE),
    ("pairing", b""),
    ("pairing", KEY + POINT[:-1]),
    ("pairing", b"\x01" + KEY[1:] + POINT),
    ("add", POINT + OTHER),
    ("add", POINT + POINT),
    ("add", POINT + INFINITY_2),
    ("add", INFINITY_2 + INFINITY_2),
    ("add", POINT + OFF_CURVE),
    ("add", POINT),
    ("map", bytes(63) + b"\x07" + bytes(63) + b"\x09"),
    ("map", bytes(128)),
    ("map", OVER + bytes(64)),
    ("map", bytes(127)),
]


@pytest.mark.parametrize(
    ("name", "data"), CASES, ids=lambda value: value if isinstance(value, str) else f"{len(value)}"
)
def test_the_fast_precompiles_equal_py_evms(name: str, data: bytes) -> None:
    address = ADDRESS[name].to_bytes(20, "big")
    fast = fast_precompiles().get(address)
    if fast is None:
        pytest.skip("py-arkworks-bls12381 is not installed")
    assert outcome(fast, data) == outcome(PRAGUE_PRECOMPILES[address], data)


def test_block_time_follows_the_clock_and_never_stands_still() -> None:
    now = [1_700_000_000.0]
    chain = EmbeddedChain(1337, {}, clock=lambda: now[0], entropy=lambda count: bytes(count))

    def head_time() -> int:
        return int(chain.handle("eth_getBlockByNumber", ["latest", False])["timestamp"], 16)

    assert head_time() == 1_700_000_000
    now[0] += 0.5
    assert chain.handle("eth_blockNumber", []) == "0x0"
    now[0] += 100
    assert head_time() == 1_700_000_100
    chain.handle("evm_mine", [])
    assert head_time() == 1_700_000_101
    chain.handle("evm_increaseTime", [1000])
    assert head_time() == 1_700_001_101


def test_a_request_that_makes_no_sense_is_refused_with_a_code() -> None:
    chain = EmbeddedChain(1337, {}, clock=lambda: 1_700_000_000.0, entropy=lambda count: bytes(count))
    for method, params, code in (
        ("eth_nonsense", [], -32601),
        ("eth_getBalance", [], -32602),
        ("eth_getBalance", ["0xzz"], -32602),
        ("eth_sendRawTransaction", ["0x02"], None),
        ("eth_call", [{"to": "0x" + "00" * 20, "data": 7}], None),
    ):
        with pytest.raises(RpcError) as caught:
            chain.handle(method, params)
        assert code is None or caught.value.code == code


def test_an_unmodified_client_moves_ether_over_http() -> None:
    testnet = start_embedded(free_port())
    try:
        web3 = Web3(HTTPProvider(testnet.rpc_url))
        account = web3.eth.account.from_key(KEYS[1])
        target = web3.eth.account.create().address
        assert web3.eth.get_balance(account.address) == 10**24
        envelope = {
            "to": target,
            "value": 5,
            "gas": 21_000,
            "gasPrice": web3.eth.gas_price,
            "nonce": web3.eth.get_transaction_count(account.address),
            "chainId": web3.eth.chain_id,
        }
        digest = web3.eth.send_raw_transaction(account.sign_transaction(envelope).raw_transaction)
        receipt = web3.eth.wait_for_transaction_receipt(digest)
        assert (receipt["status"], receipt["gasUsed"]) == (1, 21_000)
        assert web3.eth.get_balance(target) == 5
        assert web3.eth.get_transaction(digest)["to"] == target
        assert web3.eth.get_block(receipt["blockHash"])["transactions"] == [digest]
        full = web3.eth.get_block(receipt["blockHash"], full_transactions=True)["transactions"]
        assert [transaction["hash"] for transaction in full] == [digest]
        assert web3.eth.get_block(receipt["blockNumber"], full_transactions=True)["transactions"] == full
        assert web3.eth.fee_history(1, "latest")["gasUsedRatio"]
        batch = [{"jsonrpc": "2.0", "id": i, "method": "eth_chainId", "params": []} for i in (1, 2)]
        answers = httpx.post(testnet.rpc_url, json=batch).json()
        assert [answer["id"] for answer in answers] == [1, 2]
        assert httpx.post(testnet.rpc_url, content=b"not json").status_code == 400
        assert rpc(testnet.rpc_url, "net_version") == "1337"
    finally:
        testnet.stop()
    assert testnet.process.poll() is not None


def test_a_port_in_use_is_one_clear_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OperatorError, match="in use"):
            start_embedded(taken.getsockname()[1])


def test_another_chain_on_the_port_does_not_pass_for_ours(tmp_path: Path) -> None:
    chain = EmbeddedChain(CHAIN_ID, {}, clock=lambda: 1_700_000_000.0, entropy=lambda count: bytes(count))
    server = serve_chain(chain, "127.0.0.1", free_port())
    port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(OperatorError, match="in use"):
            start_embedded(port)
        done = subprocess.run(
            [sys.executable, "-m", "nodes.cli", "testnet", "up", "--model", "toy", "--port", str(port),
             "--out", str(tmp_path / "net")],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, "in use" in done.stderr) == (OPERATOR, True), done.stderr
        # Had the other come between that look and our child's start, it would be told by who listens.
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            assert not _listens(child.pid, port)
        assert _listens(os.getpid(), port)
    finally:
        server.shutdown()
        server.server_close()
    assert chain.handle("eth_blockNumber", []) == "0x0"


@pytest.mark.parametrize("port", ["0", "65536"])
def test_a_port_that_none_can_have_is_refused_at_once(port: str) -> None:
    done = CliRunner().invoke(app, ["testnet", "up", "--port", port], env={"TERM": "dumb", "COLUMNS": "200"})
    assert (done.exit_code, "Invalid value for '--port'" in done.stderr) == (OPERATOR, True), done.stderr
