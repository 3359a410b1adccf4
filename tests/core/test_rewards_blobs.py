"""Data beside the chain come from anywhere and are believed only by their digest."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ledger_worlds import free_port

from nodes.rewards import blobs
from nodes.rewards.blobs import Blobs
from p2pfm.errors import OperatorError
from p2pfm.types import Digest, compute_digest

DATA = b"a proposal"
DIGEST = compute_digest(DATA)


@contextmanager
def serving(answers: Mapping[Digest, bytes]) -> Iterator[tuple[str, list[str]]]:
    """An HTTP server that gives these bytes under /blobs/DIGEST; and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            data = answers.get(Digest(bytes.fromhex(self.path.rsplit("/", 1)[1])))
            self.send_response(404 if data is None else 200)
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_disk_is_asked_first_and_then_every_node(tmp_path: Path) -> None:
    other = compute_digest(b"other")
    path = tmp_path / DIGEST.hex()[:2] / DIGEST.hex()
    path.parent.mkdir()
    path.write_bytes(DATA)
    with serving({}) as (empty, asked_first), serving({other: b"other"}) as (full, asked_second):
        source = Blobs(tmp_path, [empty, full])
        assert source(DIGEST) == DATA
        assert asked_first == []
        assert source(other) == b"other"
        assert asked_first == asked_second == [f"/blobs/{other.hex()}"]
        assert source(other) == b"other"
        assert len(asked_second) == 1  # what was fetched stays at hand
        assert source(compute_digest(b"nowhere")) is None
        assert source.warnings == []


def test_a_lying_node_is_named_and_the_next_one_is_asked() -> None:
    with serving({DIGEST: b"a lie"}) as (liar, _), serving({DIGEST: DATA}) as (honest, _):
        source = Blobs(None, [liar, honest])
        assert source(DIGEST) == DATA
        (warning,) = source.warnings
        assert warning.startswith(f"{liar.rstrip('/')} gave bytes of SHA-256 {compute_digest(b'a lie').hex()[:16]}")
        assert Blobs(None, [liar])(DIGEST) is None


def test_a_damaged_file_is_named_and_a_node_is_asked(tmp_path: Path) -> None:
    path = tmp_path / DIGEST.hex()[:2] / DIGEST.hex()
    path.parent.mkdir()
    path.write_bytes(DATA[:-1])
    with serving({DIGEST: DATA}) as (url, _):
        source = Blobs(tmp_path, [url])
        assert source(DIGEST) == DATA
        assert source.warnings[0].startswith(str(path))


def test_a_dead_node_is_asked_once_and_when_none_lives_it_is_an_operators_error() -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    with serving({DIGEST: DATA}) as (url, _):
        assert Blobs(None, [dead, url])(DIGEST) == DATA
        assert Blobs(None, [dead, url])(compute_digest(b"nowhere")) is None
    with pytest.raises(OperatorError, match=r"no node answers .* p2pfm node run --config FILE, or name another"):
        Blobs(None, [dead])(DIGEST)


def test_what_is_made_here_needs_no_node() -> None:
    source = Blobs(None, [f"http://127.0.0.1:{free_port()}"])
    assert source.get(source.put(DATA)) == DATA
    assert source(DIGEST) == DATA
    with pytest.raises(KeyError):
        Blobs(None, ()).get(DIGEST)


def test_a_flood_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "BLOB_BYTES_MAX", 1000)
    with serving({DIGEST: bytes(2000)}) as (flood, _), serving({DIGEST: DATA}) as (honest, _):
        source = Blobs(None, [flood, honest])
        assert source(DIGEST) == DATA
        assert source.warnings == []
