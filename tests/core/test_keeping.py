import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfm.errors import Reject
from p2pfm.messages import ExtendStream, GenerateRequest, KeepStream
from p2pfm.serving.keeping import BYTES_MAX, NOT_KEPT, StreamStore, compute_stream_id, rank_keepers
from p2pfm.types import Digest, Millis, PeerId

LIFE = Millis(1_000)
NOW = Millis(50_000)
HOME, OTHER = PeerId("home"), PeerId("other")


def kept(number: int = 0, emitted: tuple[int, ...] = (), num_prompt: int = 3, tokens_max: int = 100) -> KeepStream:
    request = GenerateRequest(Digest(b"v" * 32), (1,) * num_prompt, emitted, tokens_max, 0, 1000, number, 0)
    return KeepStream(Digest(number.to_bytes(32, "big")), request, b"state")


def extend(stream: Digest, position: int, *tokens: int) -> ExtendStream:
    return ExtendStream(stream, position, tokens)


def emitted_of(store: StreamStore, stream: Digest) -> tuple[int, ...] | None:
    found = store.find(stream, NOW)
    return None if found is None else found.request.emitted


def test_a_stream_keeps_its_name_as_it_grows_and_has_another_with_any_other_beginning() -> None:
    name = compute_stream_id(kept(1))
    assert compute_stream_id(kept(1, (5, 6))) == name
    begin = kept(1)
    others = [
        kept(2),
        msgspec.structs.replace(begin, state=b"other"),
        msgspec.structs.replace(begin, nonce=Digest(b"n" * 32)),
        kept(1, tokens_max=99),
    ]
    assert name not in {compute_stream_id(other) for other in others}


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=30))
def test_whatever_parts_come_in_what_order_no_token_is_lost_doubled_or_changed(parts: list[tuple[int, int]]) -> None:
    truth = tuple(range(100, 140))
    store = StreamStore(LIFE)
    stream = store.put(HOME, kept(), NOW)
    for start, size in parts:
        part = truth[start : start + size]
        before = emitted_of(store, stream) or ()
        num = store.extend(HOME, ExtendStream(stream, start, part), NOW)
        after = emitted_of(store, stream)
        assert after == truth[:num]
        assert num == (max(len(before), start + len(part)) if start <= len(before) else len(before))


def test_tokens_that_contradict_those_held_change_nothing() -> None:
    store = StreamStore(LIFE)
    stream = store.put(HOME, kept(emitted=(1, 2, 3)), NOW)
    assert store.extend(OTHER, extend(stream, 1, 9, 9, 9), NOW) == 3
    assert store.put(OTHER, kept(emitted=(9, 9, 9, 9)), NOW) == stream
    assert emitted_of(store, stream) == (1, 2, 3)
    assert store.extend(OTHER, extend(stream, 2, 3, 4), NOW) == 4
    assert emitted_of(store, stream) == (1, 2, 3, 4)


def test_more_tokens_than_the_stream_asks_for_are_rejected() -> None:
    store = StreamStore(LIFE)
    stream = store.put(HOME, kept(tokens_max=2), NOW)
    with pytest.raises(Reject):
        store.extend(OTHER, extend(stream, 0, 1, 2, 3), NOW)
    with pytest.raises(Reject):
        store.put(OTHER, kept(1, (1, 2, 3), tokens_max=2), NOW)
    assert emitted_of(store, stream) == ()


def test_a_stream_is_forgotten_its_life_after_its_last_token() -> None:
    store = StreamStore(LIFE)
    stream = store.put(HOME, kept(), NOW)
    assert store.extend(HOME, extend(stream, 0, 1), Millis(NOW + 900)) == 1
    assert store.find(stream, Millis(NOW + 1_899)) is not None
    assert store.find(stream, Millis(NOW + 1_900)) is None
    store.put(HOME, kept(1), Millis(NOW + 1_900))
    assert len(store) == 1, "the next one takes its place"
    assert store.extend(HOME, extend(stream, 1, 2), Millis(NOW + 1_900)) == NOT_KEPT


def test_of_a_full_store_who_takes_most_loses_his_oldest() -> None:
    store = StreamStore(LIFE, streams_max=4)
    mine = store.put(HOME, kept(0), NOW)
    his = [store.put(OTHER, kept(number), NOW) for number in range(1, 5)]
    assert (emitted_of(store, mine), emitted_of(store, his[0]), len(store)) == ((), None, 4)
    large = store.put(HOME, kept(9, num_prompt=30_000), NOW)
    assert emitted_of(store, mine) is None, "bytes count, not streams"
    assert emitted_of(store, large) == ()


def test_the_bytes_of_all_streams_are_bounded() -> None:
    store = StreamStore(LIFE, bytes_max=BYTES_MAX // 64)
    for number in range(100):
        store.put(PeerId(f"peer-{number % 7}"), kept(number, num_prompt=30_000), NOW)
    assert 0 < len(store) < 10


PEERS = [PeerId(f"peer-{index}") for index in range(12)]


def test_keepers_differ_by_stream_and_one_that_leaves_moves_no_other() -> None:
    streams = [Digest(index.to_bytes(32, "big")) for index in range(64)]
    assert len({rank_keepers(stream, PEERS)[0] for stream in streams}) > 8
    for stream in streams:
        ranked = rank_keepers(stream, PEERS)
        assert ranked == rank_keepers(stream, reversed(PEERS))
        for gone in ranked:
            assert rank_keepers(stream, set(PEERS) - {gone}) == tuple(peer for peer in ranked if peer != gone)
