"""Data beside the chain, from wherever it is: a node's folder on this disk, then any node's HTTP side.

Everything is content-addressed: bytes of another digest are a lie, are told of, and are never used. Knows no message.
"""

from collections.abc import Sequence
from pathlib import Path

import httpx

from p2pfm.errors import OperatorError
from p2pfm.types import Digest, compute_digest

BLOB_BYTES_MAX = 1 << 28
"""A giver that sends more is cut off: far above the base of any adapter that peers of limits.payload_bytes_max have."""

TIMEOUT_S = 10.0
"""A node asks its own peers before it answers."""

WARNINGS_MAX = 100


class Blobs:
    """`reading.Fetch`, and `work.BlobStore` for whoever measures: what was fetched or made stays at hand."""

    def __init__(self, folder: Path | None, urls: Sequence[str]) -> None:
        """`folder`: of a node's blobs, running or not; `urls`: HTTP addresses of nodes, asked in this order."""
        self.warnings: list[str] = []
        """Who lied, for people."""
        self._folder = folder
        self._urls = [url.rstrip("/") for url in urls]
        self._silent: dict[str, str] = {}
        """Nodes that do not answer, and why; they are asked no more."""
        self.kept: dict[Digest, bytes] = {}
        """Fetched or made so far; one command's worth."""

    def __call__(self, digest: Digest) -> bytes | None:
        """The bytes of a digest, or None when nobody serves them.

        Raises:
            OperatorError: they are not on this disk, and not one of the nodes answers.
        """
        data = self.kept.get(digest) or self._read_folder(digest) or self._ask(digest)
        if data is not None:
            self.kept[digest] = data
        elif self._urls and len(self._silent) == len(self._urls):
            reasons = "; ".join(f"{url}: {reason}" for url, reason in self._silent.items())
            raise OperatorError(
                f"no node answers ({reasons}). Start it: p2pfm node run --config FILE, or name another with --node URL"
            )
        return data

    def get(self, digest: Digest) -> bytes:
        """See work.BlobStore."""
        data = self(digest)
        if data is None:
            raise KeyError(digest.hex())
        return data

    def put(self, data: bytes) -> Digest:
        """See work.BlobStore."""
        digest = compute_digest(data)
        self.kept[digest] = data
        return digest

    def _read_folder(self, digest: Digest) -> bytes | None:
        if self._folder is None:
            return None
        path = self._folder / digest.hex()[:2] / digest.hex()
        try:
            return self._check(digest, path.read_bytes(), str(path))
        except FileNotFoundError:
            return None

    def _ask(self, digest: Digest) -> bytes | None:
        for url in self._urls:
            if url in self._silent:
                continue
            try:
                data = _download(f"{url}/blobs/{digest.hex()}")
            except httpx.HTTPError as error:
                self._silent[url] = str(error) or type(error).__name__
                continue
            checked = None if data is None else self._check(digest, data, url)
            if checked is not None:
                return checked
        return None

    def _check(self, digest: Digest, data: bytes, giver: str) -> bytes | None:
        found = compute_digest(data)
        if found == digest:
            return data
        if len(self.warnings) < WARNINGS_MAX:
            self.warnings.append(f"{giver} gave bytes of SHA-256 {found.hex()[:16]} for {digest.hex()[:16]}: not used")
        return None


def _download(url: str) -> bytes | None:
    """The body; None unless the answer is 200. Raises: httpx.HTTPError."""
    with httpx.stream("GET", url, timeout=TIMEOUT_S) as response:
        if response.status_code != 200:
            return None
        parts: list[bytes] = []
        size = 0
        for part in response.iter_bytes():
            size += len(part)
            if size > BLOB_BYTES_MAX:
                return None
            parts.append(part)
        return b"".join(parts)
