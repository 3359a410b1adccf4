"""An endpoint's key is for its owner: not in /status, not in errors, and not in a file that others can read."""

import stat
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from nodes.doctor import examine
from nodes.homes import write_config
from p2pfm.config import ChainConfig, NetworkConfig, NodeConfig
from p2pfm.errors import ChainError
from p2pfm.runtime.chain_rpc import Rpc
from p2pfm.runtime.endpoints import hide_endpoint, name_endpoint
from p2pfm.runtime.web3_ledger import READ_ONLY_KEY
from p2pfm.types import Millis

SECRETS = ("KEY12345", "user7", "pass8", "token9")
NOWHERE = "0x" + "11" * 20


class Refusing(BaseHTTPRequestHandler):
    """An endpoint that takes no key, and repeats what it got in what it says."""

    def do_POST(self) -> None:
        """HTTP 401, or JSON that is none for a path with "garbage"."""
        body = b"no" if "garbage" in self.path else f"bad key {self.path}".encode()
        self.send_response(200 if "garbage" in self.path else 401, f"bad key {self.path}")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silence."""


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://user7:pass8@rpc.example:8443/v3/KEY12345?t=token9#x", "https://rpc.example:8443"),
        ("https://rpc.example/KEY12345", "https://rpc.example"),
        ("http://[::1]:8545/KEY12345", "http://[::1]:8545"),
        ("http://[::1", "an address that is none"),
        ("KEY12345", "an address that is none"),
        ("", "an address that is none"),
    ],
)
def test_an_endpoint_is_named_by_scheme_host_and_port(url: str, name: str) -> None:
    assert name_endpoint(url) == name


def test_parts_of_an_endpoint_are_hidden_wherever_they_stand() -> None:
    url = "https://user7:pass8@rpc.example/v3/KEY12345?t=token9"
    text = f"no route to {url}; project KEY12345 of user7:pass8 with t=token9"
    hidden = hide_endpoint(text, url)
    assert not [secret for secret in SECRETS if secret in hidden]
    assert "https://rpc.example;" in hidden


@pytest.mark.parametrize("path", ["v3/KEY12345?t=token9", "garbage/KEY12345?t=token9"])
def test_what_a_chain_refuses_is_told_without_the_key(port: int, path: str) -> None:
    with pytest.raises(ChainError, match=f"http://127.0.0.1:{port}") as caught:
        Rpc(f"http://user7:pass8@127.0.0.1:{port}/{path}", 1, READ_ONLY_KEY).check()
    assert not [secret for secret in SECRETS if secret in str(caught.value)]


def test_the_doctor_tells_no_key(port: int, tmp_path: Path) -> None:
    network = NetworkConfig("n", Millis(0), "linear", "00" * 32, ChainConfig(1, NOWHERE, NOWHERE))
    config = NodeConfig(str(tmp_path), "data", f"http://user7:pass8@127.0.0.1:{port}/KEY12345?t=token9", network)
    told = str(list(examine(config, NOWHERE)))
    assert f"http://127.0.0.1:{port}" in told
    assert not [secret for secret in SECRETS if secret in told]


def test_a_nodes_toml_is_for_its_owner_even_where_it_stood_open(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.touch(mode=0o644)
    network = NetworkConfig("n", Millis(0), "linear", "00" * 32, ChainConfig(1, NOWHERE, NOWHERE))
    write_config(path, NodeConfig(".", "data", "http://127.0.0.1/KEY12345", network))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
