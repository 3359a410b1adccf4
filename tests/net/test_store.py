"""The store and the event log: what they keep, what they refuse."""

import sqlite3
from pathlib import Path

import msgspec
import pytest
from store_child import certificate_of

from p2pfm.config import ChainConfig, NetworkConfig
from p2pfm.errors import OperatorError
from p2pfm.learner import Spending
from p2pfm.protocol.events import Durable, SetTimer, Tick
from p2pfm.protocol.log import digest_actions
from p2pfm.protocol.log import read_log as read_log_bytes
from p2pfm.runtime.event_log import EventLogWriter, read_log
from p2pfm.runtime.network.bans import BanRecord
from p2pfm.runtime.network.memory import NetworkMemory
from p2pfm.runtime.network.peer_book import KnownAddress
from p2pfm.runtime.store import Store
from p2pfm.serving.routing import Ban
from p2pfm.types import Digest, Millis, PeerId, Round, compute_digest

ZERO = Digest(bytes(32))
CHEATS = (Ban(PeerId("z"), Millis(2**41), 2), Ban(PeerId("a"), Millis(7), 1))
MEMORY = NetworkMemory(
    (KnownAddress("b", "", 1.5, 2.5, 0, is_anchor=True), KnownAddress("a", "who", 0, 0, 3)),
    (BanRecord("liar", 0.5, 2, 100.25, 220.25),),
)


def make_durable(number: int) -> Durable:
    return Durable(
        base=compute_digest(b"base %d" % number),
        residual=None,
        head=None,
        signed_round=number,
        announced_round=-1,
        pending_residual=None,
        announced_payload=None,
    )


def make_network() -> NetworkConfig:
    return NetworkConfig("test", Millis(0), "toy", "0" * 64, ChainConfig(1, "0x0", "0x0"))


def test_a_blob_is_found_by_its_digest(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        digest = store.put(b"some bytes")
        assert digest == compute_digest(b"some bytes")
        assert store.get(digest) == b"some bytes"
        assert store.put(b"some bytes") == digest
        assert store.find(compute_digest(b"other")) is None
        with pytest.raises(KeyError):
            store.get(compute_digest(b"other"))


def test_a_damaged_blob_is_removed_and_missing(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        digest = store.put(b"some bytes")
        path = tmp_path / "blobs" / digest.hex()[:2] / digest.hex()
        path.write_bytes(b"some bytez")
        assert store.find(digest) is None
        assert not path.exists()
        store.put(b"some bytes")
        assert store.get(digest) == b"some bytes"


def test_parts_of_a_blob_add_up(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40
    with Store(tmp_path) as store:
        digest = store.put(data)
        parts = [store.get_part(digest, start, 1000) for start in range(0, len(data), 1000)]
        assert b"".join(chunk for _, chunk in parts) == data
        assert {total for total, _ in parts} == {len(data)}
        assert store.get_part(digest, 10**12, 10) == (len(data), b"")
        assert store.get_part(ZERO, 0, 10) == (0, b"")


def test_pruning_keeps_what_it_is_told_and_the_newest(tmp_path: Path) -> None:
    import os

    with Store(tmp_path) as store:
        digests = [store.put(bytes([number]) * 1000) for number in range(10)]
        for age, digest in enumerate(digests):
            os.utime(tmp_path / "blobs" / digest.hex()[:2] / digest.hex(), ns=(age, age))
        assert store.prune({digests[0]}, 3000) == 7000
        assert [digest for digest in digests if store.has(digest)] == [digests[0], digests[8], digests[9]]
        assert store.prune({digests[0]}, 0) == 2000
        assert store.has(digests[0])


def test_state_queue_and_addresses_survive_reopening(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        assert store.load_durable() is None
        store.save_durable(make_durable(1))
        store.save_durable(make_durable(2))
        for round in (5, 3, 4):
            store.queue_settlement(certificate_of(round))
        store.drop_settlement(Round(4))
        store.save_network_memory(NetworkMemory((KnownAddress("old", "", 0, 0, 0),), ()))
        store.save_network_memory(MEMORY)
        store.save_cheats(CHEATS[1:])
        store.save_cheats(CHEATS)
    with Store(tmp_path) as store:
        assert store.load_durable() == make_durable(2)
        assert [c.proposal.round for c in store.get_settlements()] == [3, 5]
        assert store.get_settlements()[0] == certificate_of(3)
        assert store.load_network_memory() == MEMORY
        assert store.load_cheats() == CHEATS


def test_the_peer_book_of_an_older_schema_is_taken_over(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / "node.db") as database:
        database.execute("DROP TABLE known_addresses")
        database.execute("CREATE TABLE addresses (position INTEGER PRIMARY KEY, address TEXT NOT NULL)")
        database.execute("INSERT INTO addresses VALUES (0, 'best'), (1, 'second')")
        database.execute("PRAGMA user_version = 3")
    database.close()
    with Store(tmp_path) as store:
        assert [known.address for known in store.load_network_memory().addresses] == ["best", "second"]


def test_a_folder_belongs_to_one_node(tmp_path: Path) -> None:
    with Store(tmp_path), pytest.raises(OperatorError, match="another node"):
        Store(tmp_path)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OperatorError, match="cannot create"):
        Store(tmp_path / "file" / "node")


def test_a_damaged_database_is_told(tmp_path: Path) -> None:
    with Store(tmp_path):
        pass
    (tmp_path / "node.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(OperatorError, match="cannot open"):
        Store(tmp_path)


def write_log(folder: Path, num_events: int) -> Path:
    writer = EventLogWriter(folder, make_network(), PeerId("me"), make_durable(0))
    for number in range(num_events):
        writer.append(Millis(number), Tick(), [SetTimer(Millis(number + 1))])
    writer.close()
    return sorted(folder.iterdir())[-1]


def test_a_log_reads_back_as_it_was_written(tmp_path: Path) -> None:
    header, records = read_log(write_log(tmp_path, 3))
    assert (header.peer, header.network, header.durable) == ("me", make_network(), make_durable(0))
    assert [(r.now_ms, r.event) for r in records] == [(Millis(n), Tick()) for n in range(3)]


def test_a_log_tells_a_changed_action() -> None:
    assert digest_actions([SetTimer(Millis(1))]) != digest_actions([SetTimer(Millis(2))])


def test_a_log_cut_anywhere_reads_up_to_the_cut(tmp_path: Path) -> None:
    data = write_log(tmp_path, 3).read_bytes()
    whole = len(list(read_log_bytes(data)[1]))
    counts = []
    for cut in range(len(data)):
        try:
            counts.append(len(list(read_log_bytes(data[:cut])[1])))
        except OperatorError:
            counts.append(-1)  # the cut is inside the header
    assert counts == sorted(counts)
    assert counts[-1] == whole - 1
    assert counts[0] == -1


def test_something_else_is_no_log() -> None:
    with pytest.raises(OperatorError):
        read_log_bytes(b"\x00\x00\x00\x03abc")
    with pytest.raises(OperatorError, match="a record of"):
        read_log_bytes(b"\xff" * 100)


def test_a_log_rotates_and_the_oldest_files_go(tmp_path: Path) -> None:
    writer = EventLogWriter(tmp_path, make_network(), PeerId("me"), make_durable(0), file_bytes_max=1200, files_max=3)
    for number in range(100):
        writer.append(Millis(number), Tick(), [])
    writer.close()
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 3
    assert all(path.stat().st_size <= 1200 for path in paths)
    parts = [read_log(path)[0].part for path in paths]
    assert parts == list(range(parts[0], parts[0] + 3))
    times = [record.now_ms for path in paths for record in read_log(path)[1]]
    assert times == list(range(100 - len(times), 100))


def test_spendings_of_one_kind_are_summed_up_and_outlive_the_process(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        assert store.get_spendings() == ()
        for steps in (10, 5):
            store.add_spending(Spending(1.5, 0.1, steps))
        store.add_spending(Spending(0.0, 1.0, 7))
    with Store(tmp_path) as store:
        assert store.get_spendings() == (Spending(0.0, 1.0, 7), Spending(1.5, 0.1, 15))


@pytest.mark.parametrize("was_at_work", [True, False])
def test_a_home_from_before_spendings_counts_as_trained_without_noise_if_it_was_at_work(
    tmp_path: Path, was_at_work: bool
) -> None:
    with Store(tmp_path) as store:
        if was_at_work:
            store.save_durable(make_durable(3))
    with sqlite3.connect(tmp_path / "node.db") as database:
        database.execute("DROP TABLE spendings")
        database.execute("PRAGMA user_version = 1")
    database.close()
    for _ in range(2):  # the second start changes nothing
        with Store(tmp_path) as store:
            assert [spending.noise_multiplier for spending in store.get_spendings()] == [0.0] * was_at_work


def test_the_bases_before_the_newest_are_known_after_a_restart_as_far_as_they_are_here(tmp_path: Path) -> None:
    bases = [b"base %d" % number for number in range(5)]
    with Store(tmp_path) as store:
        for number, data in enumerate(bases):
            digest = store.put(data) if number != 2 else compute_digest(data)  # that one has been pruned
            proposal = msgspec.structs.replace(certificate_of(number).proposal, new_base=digest)
            head = msgspec.structs.replace(certificate_of(number), proposal=proposal)
            store.save_durable(msgspec.structs.replace(make_durable(number), base=digest, head=head))
    with Store(tmp_path) as store:
        newest = compute_digest(bases[4])
        assert store.get_older_bases(newest, 9) == tuple(compute_digest(bases[number]) for number in (0, 1, 3))
        assert store.get_older_bases(newest, 2) == tuple(compute_digest(bases[number]) for number in (1, 3))
        assert store.get_older_bases(newest, 0) == ()
