"""A local Ethereum testnet: the embedded chain behind HTTP, or anvil from contracts/node_modules.

    python -m nodes.testnet --port 8545          serves the embedded chain until interrupted

`start_embedded` and `start_anvil` run one as a child process and wait until it answers. Knows nothing of p2pfm.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from eth_account import Account

from nodes.ports import try_to_listen
from nodes.tied import end_with_stdin, start_tied, stop
from p2pfm.errors import OperatorError

if TYPE_CHECKING:  # py-evm is an extra
    from nodes.evm import EmbeddedChain

CHAIN_ID = 1337
ETHER = 10**18
NUM_ACCOUNTS = 32
REQUEST_BYTES_MAX = 4 * 1024 * 1024
START_SECONDS_MAX = 60.0
CONTRACTS = Path(__file__).resolve().parent.parent / "contracts"
MNEMONIC = "test test test test test test test test test test test junk"
"""anvil's own default: the same prefunded accounts on both chains."""


@dataclass(frozen=True)
class Testnet:
    """A running chain: its JSON-RPC address and the private keys of accounts that hold ether."""

    __test__ = False  # not pytest's, whatever its name says

    rpc_url: str
    keys: tuple[bytes, ...]
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        """End the process, by force if it does not listen."""
        stop(self.process)


def account_keys(count: int = NUM_ACCOUNTS) -> tuple[bytes, ...]:
    """Private keys of the prefunded accounts (publicly known: worthless anywhere else)."""
    Account.enable_unaudited_hdwallet_features()
    return tuple(bytes(Account.from_mnemonic(MNEMONIC, account_path=f"m/44'/60'/0'/0/{i}").key) for i in range(count))


def serve_embedded(host: str, port: int, chain_id: int = CHAIN_ID) -> ThreadingHTTPServer:
    """A bound, not yet running server of a new embedded chain; `.serve_forever()` runs it.

    Raises:
        OperatorError: py-evm is not installed, or the port is taken.
    """
    try:
        from nodes.evm import EmbeddedChain
    except ImportError as error:
        raise OperatorError(f"the embedded chain needs py-evm: pip install 'p2pfm[testnet]' ({error})") from error
    balances = {Account.from_key(key).address: 1_000_000 * ETHER for key in account_keys()}
    chain = EmbeddedChain(chain_id, balances, clock=time.time, entropy=os.urandom)
    return serve_chain(chain, host, port)


def serve_chain(chain: "EmbeddedChain", host: str, port: int) -> ThreadingHTTPServer:
    """The same for a chain that is there. Raises: OperatorError."""
    handler = type("Handler", (_RpcHandler,), {"chain": chain, "lock": threading.Lock()})
    try:
        return ThreadingHTTPServer((host, port), handler)
    except OSError as error:
        raise OperatorError(f"cannot listen on {host}:{port}: {error}. Choose another --port") from error


def start_embedded(port: int, log: Path | None = None) -> Testnet:
    """The embedded chain in a child process. Raises: OperatorError if it does not answer in time."""
    command = [sys.executable, "-m", "nodes.testnet", "--port", str(port), "--tied"]
    return _start(command, port, log)


def start_anvil(port: int, log: Path | None = None) -> Testnet:
    """anvil with the same accounts, rules and block time. Raises: OperatorError if it is not installed or fails."""
    binary = find_anvil()
    if binary is None:
        raise OperatorError("anvil is not installed: run `npm install --prefix contracts` (needs Node.js)")
    command = [
        *(
            sys.executable,
            "-m",
            "nodes.tied",
            str(binary),
            "--port",
            str(port),
            "--chain-id",
            str(CHAIN_ID),
            "--accounts",
            str(NUM_ACCOUNTS),
        ),
        *("--mnemonic", MNEMONIC, "--balance", "1000000", "--hardfork", "prague", "--enable-tx-gas-limit"),
        *("--block-time", "1", "--mixed-mining", "--silent"),
    ]
    return _start(command, port, log)


def find_anvil() -> Path | None:
    """The anvil binary that npm installed beside the contracts, else one on the PATH."""
    installed = sorted((CONTRACTS / "node_modules" / "@foundry-rs").glob("anvil-*/bin/anvil"))
    on_path = shutil.which("anvil")
    return installed[0] if installed else Path(on_path) if on_path else None


@contextmanager
def run_testnet(port: int, is_anvil: bool = False, log: Path | None = None) -> Iterator[Testnet]:
    """A testnet for the length of a `with` block."""
    testnet = start_anvil(port, log) if is_anvil else start_embedded(port, log)
    try:
        yield testnet
    finally:
        testnet.stop()


def _start(command: list[str], port: int, log: Path | None) -> Testnet:
    if problem := try_to_listen("127.0.0.1", port):
        raise OperatorError(f"port {port} is in use ({problem}); choose another --port")
    output: Any = log.open("ab") if log else subprocess.DEVNULL
    try:
        process = start_tied(command, output, cwd=CONTRACTS.parent)
    finally:
        if log:
            output.close()
    testnet = Testnet(f"http://127.0.0.1:{port}", account_keys(), process)
    deadline = time.monotonic() + START_SECONDS_MAX
    while not (_answers(testnet.rpc_url) and _listens(process.pid, port)):
        if process.poll() is not None:
            raise OperatorError(f"the testnet ended with {process.returncode}: is port {port} in use?")
        if time.monotonic() > deadline:
            testnet.stop()
            raise OperatorError(f"the testnet on port {port} did not answer within {START_SECONDS_MAX:.0f} s")
        time.sleep(0.05)
    return testnet


def _listens(pid: int, port: int) -> bool:
    """That process, or one that it started, listens there: another's chain that took the port meanwhile is not ours."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        found = [connection for one in family for connection in one.net_connections("tcp")]
    except psutil.Error:  # it is ending
        return False
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in found)


def _answers(url: str) -> bool:
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "eth_chainId", "params": []}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=2) as response:
            return bool(json.load(response).get("result") == hex(CHAIN_ID))
    except (urllib.error.URLError, OSError, ValueError):
        return False


class _RpcHandler(BaseHTTPRequestHandler):
    """One JSON-RPC request (or batch) a POST; the chain sees one call at a time."""

    protocol_version = "HTTP/1.1"
    wbufsize = 64 * 1024  # headers and body leave together: else Nagle and delayed ACK cost 40 ms a request
    disable_nagle_algorithm = True
    chain: Any
    lock: threading.Lock

    def do_POST(self) -> None:
        """Answer a request."""
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= REQUEST_BYTES_MAX:
            self.send_error(413)
            return
        try:
            request = json.loads(self.rfile.read(length))
        except ValueError:
            self.send_error(400)
            return
        answer = [self._answer(one) for one in request] if isinstance(request, list) else self._answer(request)
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer(self, request: Any) -> dict[str, Any]:
        from nodes.evm import RpcError

        if not isinstance(request, dict) or not isinstance(request.get("method"), str):
            return {"jsonrpc": "2.0", "id": None, "error": {"code": -32600, "message": "not a JSON-RPC request"}}
        answer: dict[str, Any] = {"jsonrpc": "2.0", "id": request.get("id")}
        try:
            with self.lock:
                answer["result"] = self.chain.handle(request["method"], request.get("params") or [])
        except RpcError as error:
            answer["error"] = {"code": error.code, "message": error.message}
            if error.data is not None:
                answer["error"]["data"] = error.data
        return answer

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: a line a request would drown the log."""


def main() -> None:
    """Serve the embedded chain until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m nodes.testnet", description=main.__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8545)
    parser.add_argument("--tied", action="store_true", help="end when standard input closes")
    arguments = parser.parse_args()
    if arguments.tied:
        end_with_stdin()
    try:
        server = serve_embedded(arguments.host, arguments.port)
    except OperatorError as error:
        sys.exit(str(error))
    print(f"embedded chain {CHAIN_ID} at http://{arguments.host}:{arguments.port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


if __name__ == "__main__":
    main()
