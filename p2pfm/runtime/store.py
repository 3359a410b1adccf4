"""A node's memory on disk: blobs by digest, and in SQLite the durable state, the settle queue, the peer book, bans and
what training has cost of its samples' privacy.

What a method has acknowledged by returning is there after SIGKILL or a power cut. Blocking and safe to call from
several threads; knows no network, no model, and not what a blob means.
"""

import os
import sqlite3
import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from p2pfm.errors import OperatorError
from p2pfm.learner import Spending
from p2pfm.messages import Certificate, Envelope, Receipt, decode_envelope, encode
from p2pfm.protocol.events import Durable
from p2pfm.runtime.files import make_private_folder, sync_folder, write_durably
from p2pfm.runtime.network.bans import BanRecord
from p2pfm.runtime.network.memory import NetworkMemory
from p2pfm.runtime.network.peer_book import KnownAddress
from p2pfm.serving.routing import Ban
from p2pfm.types import DIGEST_BYTES, Digest, Round, compute_digest

BLOB_FOLDER = "blobs"
DATABASE = "node.db"
SCHEMA_VERSION = 4
"""2: spendings. 3: certificates. 4: addresses with their good and bad times, bans."""
SETTLEMENTS_MAX = 10_000
CERTIFICATES_MAX = 512
"""Adopted certificates kept, the newest: the chain may void a round until its contest is over."""
ADDRESSES_MAX = 4096
BANS_MAX = 4096

_SCHEMA = """
CREATE TABLE IF NOT EXISTS durable (id INTEGER PRIMARY KEY CHECK (id = 1), state BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS settlements (round INTEGER PRIMARY KEY, certificate BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS certificates (round INTEGER PRIMARY KEY, certificate BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS known_addresses (
    address TEXT PRIMARY KEY, position INTEGER NOT NULL, told_by TEXT NOT NULL, first_success REAL NOT NULL,
    last_success REAL NOT NULL, failures INTEGER NOT NULL, is_anchor INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS bans (
    peer TEXT PRIMARY KEY, score REAL NOT NULL, level INTEGER NOT NULL, offended_at REAL NOT NULL, until REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS cheats (
    peer TEXT PRIMARY KEY, until_ms INTEGER NOT NULL, num_bans INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS receipts (
    epoch INTEGER NOT NULL, gateway TEXT NOT NULL, replica TEXT NOT NULL, sealed BLOB NOT NULL,
    PRIMARY KEY (epoch, gateway, replica)
);
CREATE TABLE IF NOT EXISTS spendings (
    noise_multiplier REAL NOT NULL, sample_rate REAL NOT NULL, steps INTEGER NOT NULL,
    PRIMARY KEY (noise_multiplier, sample_rate)
);
"""


class Store:
    """One node's folder.

    Raises (on creation):
        OperatorError: another node uses the folder, it cannot be written, or its database is of a newer p2pfm.
    """

    def __init__(self, folder: Path) -> None:
        self._blobs = folder / BLOB_FOLDER
        make_private_folder(self._blobs)
        self._lock = threading.RLock()
        try:
            self._database = sqlite3.connect(
                folder / DATABASE, check_same_thread=False, isolation_level=None, timeout=1
            )
            self._open()
        except sqlite3.Error as error:
            raise OperatorError(
                f"cannot open {folder / DATABASE}: {error}. Does another node use this folder? Else restore a backup"
            ) from error
        self._remove_leftovers()

    def _open(self) -> None:
        run = self._database.execute
        run("PRAGMA locking_mode = EXCLUSIVE")  # one process a folder: two nodes with one key would sign twice
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        (version,) = run("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise OperatorError(f"the database is of a newer p2pfm (schema {version}, expected {SCHEMA_VERSION})")
        run("BEGIN IMMEDIATE")
        for statement in filter(str.strip, _SCHEMA.split(";")):
            run(statement)
        if version == 1:  # nobody counted then: a peer that was at work may have trained without noise
            run("INSERT OR IGNORE INTO spendings SELECT 0, 1, 1 FROM durable")
        if 0 < version < 4:  # what is in the old list had worked lately: it counts as the operator's word
            run("CREATE TABLE IF NOT EXISTS addresses (position INTEGER PRIMARY KEY, address TEXT NOT NULL)")
            run("INSERT OR IGNORE INTO known_addresses SELECT address, position, '', 0, 0, 0, 0 FROM addresses")
            run("DROP TABLE addresses")
        run(f"PRAGMA user_version = {SCHEMA_VERSION}")
        run("COMMIT")

    def close(self) -> None:
        """Release the folder."""
        with self._lock:
            self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- blobs ---

    def put(self, data: bytes) -> Digest:
        """Keep `data`; returns its SHA-256. Durable on return. Raises: OSError when the disk is full."""
        digest = compute_digest(data)
        path = self._path(digest)
        if self.find(digest) is None:
            path.parent.mkdir(exist_ok=True)
            write_durably(path, data)
            sync_folder(self._blobs)
        return digest

    def find(self, digest: Digest) -> bytes | None:
        """The bytes of a digest, checked; None when not held. A damaged file is removed and counts as not held."""
        path = self._path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if compute_digest(data) != digest:
            path.unlink(missing_ok=True)
            return None
        return data

    def get(self, digest: Digest) -> bytes:
        """The bytes of a digest.

        Raises:
            KeyError: not held.
        """
        data = self.find(digest)
        if data is None:
            raise KeyError(f"blob {digest.hex()[:10]} is not in the store")
        return data

    def get_part(self, digest: Digest, start: int, length: int) -> tuple[int, bytes]:
        """The blob's size and its bytes [start, start + length), unchecked (the asker checks all); (0, b"") if absent.

        Reads only that part, so that serving a large blob does not read it whole for every chunk.
        """
        try:
            with self._path(digest).open("rb") as file:
                total = os.fstat(file.fileno()).st_size
                file.seek(min(start, total))
                return total, file.read(length)
        except FileNotFoundError:
            return 0, b""

    def has(self, digest: Digest) -> bool:
        """Whether there is a file of that name (its bytes are checked when they are read)."""
        return self._path(digest).exists()

    def prune(self, keep: Collection[Digest], bytes_max: int) -> int:
        """Remove the oldest blobs that are not in `keep` until all of them take at most `bytes_max`.

        Returns the bytes freed. What is in `keep` stays, whatever its size.
        """
        kept = set(keep)
        files = []
        for path in sorted(self._blobs.glob("??/[!.]*")):  # not what a writer has under way
            with suppress(FileNotFoundError):  # a damaged one that its reader has just removed
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in files) - bytes_max
        freed = 0
        for _, size, path in sorted(files):
            if freed >= excess:
                break
            if bytes.fromhex(path.name) not in kept:
                path.unlink(missing_ok=True)
                freed += size
        return freed

    def _path(self, digest: Digest) -> Path:
        assert len(digest) == DIGEST_BYTES
        name = digest.hex()
        return self._blobs / name[:2] / name

    def _remove_leftovers(self) -> None:
        """Temporary files of writers that were killed (the folder is ours alone by now)."""
        for path in self._blobs.glob("??/.*.tmp"):
            path.unlink(missing_ok=True)

    # --- durable state ---

    def save_durable(self, durable: Durable) -> None:
        """Replace the durable state, in one step; its certificate stays on record when a newer one comes."""
        head = durable.head
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.execute("INSERT OR REPLACE INTO durable VALUES (1, ?)", (msgspec.msgpack.encode(durable),))
            if head is not None:
                self._database.execute(
                    "INSERT OR REPLACE INTO certificates VALUES (?, ?)", (head.proposal.round, encode(head))
                )
                self._database.execute(
                    "DELETE FROM certificates WHERE round NOT IN "
                    "(SELECT round FROM certificates ORDER BY round DESC LIMIT ?)",
                    (CERTIFICATES_MAX,),
                )
            self._database.execute("COMMIT")

    def load_durable(self) -> Durable | None:
        """The newest saved state; None at the first start.

        Raises:
            OperatorError: the record is damaged.
        """
        with self._lock:
            row = self._database.execute("SELECT state FROM durable").fetchone()
        if row is None:
            return None
        try:
            return msgspec.msgpack.decode(row[0], type=Durable)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise OperatorError(f"the saved state is of another version, or damaged: {error}") from error

    # --- certificates ---

    def find_certificate(self, round: Round, root: Digest) -> Certificate | None:
        """The certificate of a round that was adopted here with this root; None when it is not on record."""
        with self._lock:
            row = self._database.execute("SELECT certificate FROM certificates WHERE round = ?", (round,)).fetchone()
        certificate = msgspec.msgpack.decode(row[0], type=Certificate) if row else None
        return certificate if certificate and certificate.proposal.root == root else None

    def get_certificates(self, after: int) -> tuple[Certificate, ...]:
        """Certificates on record of rounds after this one, by round."""
        with self._lock:
            rows = self._database.execute(
                "SELECT certificate FROM certificates WHERE round > ? ORDER BY round", (after,)
            ).fetchall()
        return tuple(msgspec.msgpack.decode(row[0], type=Certificate) for row in rows)

    def get_older_bases(self, newest: Digest, num_max: int) -> tuple[Digest, ...]:
        """Bases of the rounds that were adopted before `newest`, as far as their blobs are here; oldest first."""
        bases = [certificate.proposal.new_base for certificate in reversed(self.get_certificates(-1))]
        older = [base for base in dict.fromkeys(bases) if base != newest and self.has(base)]
        return tuple(reversed(older[:num_max]))

    def queue_settlement(self, certificate: Certificate) -> None:
        """Remember a certificate until `drop_settlement`; the oldest go beyond SETTLEMENTS_MAX."""
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.execute(
                "INSERT OR REPLACE INTO settlements VALUES (?, ?)", (certificate.proposal.round, encode(certificate))
            )
            self._database.execute(
                "DELETE FROM settlements WHERE round NOT IN "
                "(SELECT round FROM settlements ORDER BY round DESC LIMIT ?)",
                (SETTLEMENTS_MAX,),
            )
            self._database.execute("COMMIT")

    def get_settlements(self) -> tuple[Certificate, ...]:
        """Certificates not yet dropped, by round."""
        with self._lock:
            rows = self._database.execute("SELECT certificate FROM settlements ORDER BY round").fetchall()
        return tuple(msgspec.msgpack.decode(row[0], type=Certificate) for row in rows)

    def drop_settlement(self, round: Round) -> None:
        """The round is on chain, or given up."""
        with self._lock:
            self._database.execute("DELETE FROM settlements WHERE round = ?", (round,))

    # --- privacy ---

    def add_spending(self, spending: Spending) -> None:
        """Count steps that look at the private samples. Durable on return."""
        with self._lock:
            self._database.execute(
                "INSERT INTO spendings VALUES (?, ?, ?) "
                "ON CONFLICT (noise_multiplier, sample_rate) DO UPDATE SET steps = steps + excluded.steps",
                (spending.noise_multiplier, spending.sample_rate, spending.steps),
            )

    def get_spendings(self) -> tuple[Spending, ...]:
        """All that was ever counted; steps of one noise and rate are summed up."""
        with self._lock:
            rows = self._database.execute("SELECT * FROM spendings ORDER BY noise_multiplier, sample_rate").fetchall()
        return tuple(Spending(*row) for row in rows)

    # --- peer book and bans ---

    def save_network_memory(self, memory: NetworkMemory) -> None:
        """Replace what the network must know at the next start; the worst addresses and shortest bans go beyond the
        bounds. Durable on return."""
        bans = sorted(memory.bans, key=lambda ban: -ban.until)[:BANS_MAX]
        with self._lock:
            run = self._database.execute
            run("BEGIN IMMEDIATE")
            run("DELETE FROM known_addresses")
            self._database.executemany(
                "INSERT OR IGNORE INTO known_addresses VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (a.address, position, a.told_by, a.first_success, a.last_success, a.failures, a.is_anchor)
                    for position, a in enumerate(memory.addresses[:ADDRESSES_MAX])
                ],
            )
            run("DELETE FROM bans")
            self._database.executemany(
                "INSERT OR IGNORE INTO bans VALUES (?, ?, ?, ?, ?)",
                [(b.peer, b.score, b.level, b.offended_at, b.until) for b in bans],
            )
            run("COMMIT")

    def save_cheats(self, bans: Sequence[Ban]) -> None:
        """Replace what routing must know of replicas that gave wrong answers. Durable on return."""
        with self._lock:
            run = self._database.execute
            run("BEGIN IMMEDIATE")
            run("DELETE FROM cheats")
            self._database.executemany(
                "INSERT INTO cheats VALUES (?, ?, ?)", [(ban.peer, ban.until_ms, ban.num_bans) for ban in bans]
            )
            run("COMMIT")

    def load_cheats(self) -> tuple[Ban, ...]:
        """What `save_cheats` kept, in its order."""
        with self._lock:
            rows = self._database.execute("SELECT peer, until_ms, num_bans FROM cheats ORDER BY rowid").fetchall()
        return tuple(Ban(*row) for row in rows)

    def save_receipt(self, receipt: Receipt, sealed: Envelope, epoch_min: int) -> None:
        """Keep a pair's newest receipt, and none of epochs before `epoch_min`. Durable on return."""
        with self._lock:
            run = self._database.execute
            run("BEGIN IMMEDIATE")
            run("DELETE FROM receipts WHERE epoch < ?", (epoch_min,))
            run(
                "INSERT OR REPLACE INTO receipts VALUES (?, ?, ?, ?)",
                (receipt.epoch, receipt.gateway, receipt.replica, encode(sealed)),
            )
            run("COMMIT")

    def load_receipts(self) -> tuple[Envelope, ...]:
        """What `save_receipt` kept."""
        with self._lock:
            rows = self._database.execute("SELECT sealed FROM receipts ORDER BY epoch, gateway, replica").fetchall()
        return tuple(decode_envelope(sealed) for (sealed,) in rows)

    def load_network_memory(self) -> NetworkMemory:
        """What `save_network_memory` kept; empty at the first start."""
        with self._lock:
            addresses = self._database.execute(
                "SELECT address, told_by, first_success, last_success, failures, is_anchor FROM known_addresses "
                "ORDER BY position"
            ).fetchall()
            bans = self._database.execute("SELECT peer, score, level, offended_at, until FROM bans").fetchall()
        return NetworkMemory(
            tuple(
                KnownAddress(address, told_by, first_success, last_success, failures, is_anchor=bool(is_anchor))
                for address, told_by, first_success, last_success, failures, is_anchor in addresses
            ),
            tuple(BanRecord(*row) for row in bans),
        )
