"""What an operator or another program gives that cannot be: one line, no traceback. And hosts and terminals of all
kinds.
"""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import msgspec
import pytest
from node_toml import NODE
from page_status import make_status
from typer.testing import CliRunner

from nodes.cli import app
from nodes.doctor import examine
from nodes.explorer.serve import find_networks
from nodes.homes import write_config
from nodes.run import _refuse_port_in_use
from p2pfm.config import ChainConfig, HttpConfig, NetworkConfig, NodeConfig, parse_node_config
from p2pfm.errors import ConfigError, OperatorError
from p2pfm.runtime.endpoints import make_url
from p2pfm.runtime.web3_ledger import READ_ONLY_KEY, Web3Ledger
from p2pfm.types import Millis

NOWHERE = "0x" + "11" * 20
NETWORK = NetworkConfig("n", Millis(0), "linear", "00" * 32, ChainConfig(1, NOWHERE, NOWHERE))


@contextmanager
def answering(body: bytes, host: str = "127.0.0.1") -> Iterator[int]:
    """A server that answers everything with `body`; its port."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Silence."""

    with Server((host, 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def call(*words: str, **options: object) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, "-m", "nodes.cli", *words], capture_output=True, timeout=60, check=False, **options
    )  # type: ignore[call-overload]


def refuse(*words: str) -> str:
    """The one line of an operator's error."""
    told = CliRunner().invoke(app, words)
    assert isinstance(told.exception, OperatorError), (told.exception, told.output)
    return str(told.exception)


def write(folder: Path, http: HttpConfig) -> Path:
    path = folder / "node.toml"
    write_config(path, NodeConfig(".", "data", "http://127.0.0.1:1", NETWORK, http=http))
    return path


def test_an_address_that_is_none_is_told() -> None:
    assert "http://[::1" in refuse("node", "status", "--url", "http://[::1")


@pytest.mark.parametrize("body", [b"[]", b'{"peer": 1}', b"\xff\xfe", b"no"])
def test_a_status_of_another_program_is_told(tmp_path: Path, body: bytes) -> None:
    with answering(body) as port:
        refuse("node", "status", "--url", f"http://127.0.0.1:{port}")
        config = NodeConfig(str(tmp_path), "data", "http://127.0.0.1:1", NETWORK, http=HttpConfig(port=port))
        told = {check.name: check for check in examine(config, "")}
    assert told["node"].verdict in ("warn", "fail")


def test_a_doctor_survives_a_status_with_other_types(tmp_path: Path) -> None:
    with answering(b'{"peers": 3, "clock": [], "chain": 1, "reach": "x"}') as port:
        config = NodeConfig(str(tmp_path), "data", "http://127.0.0.1:1", NETWORK, http=HttpConfig(port=port))
        assert {check.name: check.verdict for check in examine(config, "")}["node"] == "fail"


@pytest.mark.parametrize("amount", ["inf", "1e300", "0"])
def test_an_amount_that_no_pool_holds_is_refused(tmp_path: Path, amount: str) -> None:
    path = write(tmp_path, HttpConfig())
    assert "amount: expected PFM above 0" in refuse("pool", "fund", amount, "--config", str(path))


def test_nothing_is_sent_to_what_is_no_account() -> None:
    ledger = Web3Ledger("http://127.0.0.1:1", NETWORK.chain, READ_ONLY_KEY)
    for account in ("", "0x12", "alice"):
        with pytest.raises(OperatorError, match="expected an account"):
            ledger.send_ether(account, 1)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("token =", 'serving_pool = "xyz", token =', "network.chain.serving_pool"),
        ('home = "h"', 'home = "\\u0000"', "home: expected a path"),
        ('data = "d"', 'data = "\\u0000"', "data: expected a path"),
        ('data = "d"', 'data = "d"\nprobe = "a\\u0000"', "probe: expected a path"),
        ('data = "d"', 'data = "d"\nhttp.host = "\\u0000"', "http.host"),
        ('data = "d"', 'data = "d"\nhttp.host = ""', "http.host"),
        ('data = "d"', 'data = "d"\nhttp.api_keys_file = "\\u0000"', "http.api_keys_file"),
    ],
)
def test_what_no_node_can_use_is_refused_by_name(old: str, new: str, says: str) -> None:
    assert old in NODE
    with pytest.raises(ConfigError, match=says):
        parse_node_config(NODE.replace(old, new))


def test_a_chat_without_input_or_with_bytes_is_told() -> None:
    with answering(b'{"data": [{"id": "m"}]}') as port:
        url = f"http://127.0.0.1:{port}"
        done = subprocess.run(
            f'exec "{sys.executable}" -m nodes.cli chat --url {url} <&-',
            shell=True, capture_output=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, b"standard input is closed" in done.stderr) == (2, True), done.stderr
        done = call("chat", "--url", url, input=b"\xff\xfe\n")
        assert (done.returncode, b"other bytes" in done.stderr, b"Traceback" in done.stderr) == (2, True, False)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::1", "http://[::1]:80"),
        ("::", "http://[::1]:80"),
        ("node.example", "http://node.example:80"),
    ],
)
def test_a_url_leads_to_who_listens(host: str, url: str) -> None:
    assert make_url(host, 80) == url


def test_a_node_may_listen_on_ipv6(tmp_path: Path) -> None:
    status = make_status(stage="starting")
    status["chain"]["rpc"] = "none"
    with answering(msgspec.json.encode(status), "::1") as port:
        http = HttpConfig("::1", port)
        path = write(tmp_path, http)
        told = CliRunner().invoke(app, ["node", "status", "--config", str(path), "--json"])
        assert told.exit_code == 0, told.output
        assert find_networks([path], "", None, [])[0].nodes == [f"http://[::1]:{port}"]
        with pytest.raises(OperatorError, match="in use"):
            _refuse_port_in_use(http)


def test_a_terminal_without_our_characters_gets_the_rest() -> None:
    status = make_status("tiny-网", "starting")
    status["chain"]["rpc"] = "none"
    with answering(msgspec.json.encode(status)) as port:
        done = call(
            "node", "status", "--url", f"http://127.0.0.1:{port}", env={"PYTHONIOENCODING": "ascii", "PATH": "/bin"}
        )
    assert done.returncode == 0, done.stderr
    assert b"tiny-?" in done.stdout
