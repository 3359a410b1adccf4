"""The peer book and the bans: what strangers can put in, what stays, what outlives a restart. No socket."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID

from p2pfm.runtime.network.bans import BAN_MAX_S, BAN_S, HALF_LIFE_S, Bans
from p2pfm.runtime.network.peer_book import (
    ANCHORS_MAX,
    FORGET_UNPROVEN,
    NET_MAX,
    OPERATOR,
    SOCKET_MAX,
    TOLD_MAX,
    PeerBook,
    get_net,
    is_credible,
)
from p2pfm.types import PeerId

PEERS_MAX = 512
WALL = 1_700_000_000.0


def make_peers(count: int) -> list[PeerId]:
    return [
        PeerId(str(ID.from_pubkey(create_new_key_pair(number.to_bytes(32, "big")).public_key)))
        for number in range(1, count + 1)
    ]


OWN, HONEST, *PEERS = make_peers(1200)


def make_book() -> PeerBook:
    return PeerBook(OWN, PEERS_MAX, 8)


def at(host: str, peer: PeerId, port: int = 4001) -> str:
    return f"/ip4/{host}/tcp/{port}/p2p/{peer}"


def public_hosts() -> Iterator[str]:
    """Each in a net of its own."""
    return (f"{first}.{second}.7.1" for first in range(20, 90) for second in range(200))


def prove(book: PeerBook, peer: PeerId, address: str, now: float) -> None:
    book.add(address, now, OPERATOR)
    book.on_connected(peer, now, address)
    book.on_lost(peer, now + 1)


def test_one_teller_of_inventions_fills_a_bounded_part_of_the_book() -> None:
    book, hosts = make_book(), public_hosts()
    kept = [book.add(at(next(hosts), peer), 0, PEERS[-1]) for peer in PEERS[:300]]
    assert sum(kept) == TOLD_MAX == len(book)
    assert book.add(at(next(hosts), PEERS[301]), 0, PEERS[-2]), "somebody else is still heard"


def test_one_net_fills_a_bounded_part_of_the_book_whoever_tells() -> None:
    book = make_book()
    kept = [book.add(at(f"20.1.1.{n + 1}", PEERS[n]), 0, PEERS[-1 - n]) for n in range(200)]
    assert sum(kept) == NET_MAX
    assert book.add(at("20.1.2.1", PEERS[400]), 0, PEERS[401])


def test_a_lan_is_one_net_and_still_leaves_room_for_the_rest() -> None:
    book = make_book()
    kept = [book.add(at(f"10.0.{n // 200}.{n % 200 + 1}", PEERS[n]), 0, PEERS[n]) for n in range(400)]
    assert NET_MAX < sum(kept) == PEERS_MAX // 2
    assert book.add(at("20.1.2.1", PEERS[500]), 0, PEERS[500])


def test_nobody_is_made_to_knock_at_one_socket_for_many_names() -> None:
    book = make_book()
    kept = [book.add(at("127.0.0.1", PEERS[n]), 0, PEERS[-1 - n]) for n in range(50)]
    assert sum(kept) == SOCKET_MAX


@pytest.mark.parametrize(
    "text",
    [
        at("0.0.0.0", HONEST),
        at("224.0.0.251", HONEST),
        at("255.255.255.255", HONEST),
        at("20.1.1.1", HONEST, port=0),
        at("20.1.1.1", OWN),
        "/ip4/20.1.1.1/tcp/1",
        f"/ip6/::/tcp/1/p2p/{HONEST}",
        f"/ip4/20.1.1.1/udp/1/p2p/{HONEST}",
        "x" * 300,
    ],
)
def test_an_address_that_nobody_can_dial_is_refused(text: str) -> None:
    book = make_book()
    assert not book.add(text, 0, HONEST)
    assert len(book) == 0


@pytest.mark.parametrize(
    ("host", "teller", "expected"),
    [
        ("127.0.0.1", "20.1.1.1", False),
        ("127.0.0.1", "10.0.0.1", False),
        ("127.0.0.1", "127.0.0.1", True),
        ("192.168.1.1", "20.1.1.1", False),
        ("100.64.0.1", "20.1.1.1", False),
        ("192.168.1.1", "10.0.0.1", True),
        ("20.1.1.1", "127.0.0.1", True),
        ("node.example.org", "20.1.1.1", True),
        ("::1", "20.1.1.1", False),
        ("0.0.0.0", "127.0.0.1", False),
    ],
)
def test_who_speaks_from_afar_tells_nobody_to_dial_near_it(host: str, teller: str, expected: bool) -> None:
    assert is_credible(host, teller) == expected


def test_nets_are_what_one_owner_has() -> None:
    assert get_net("20.1.1.1") == get_net("20.1.1.254") != get_net("20.1.2.1")
    assert get_net("2600:1:2:3::1") == get_net("2600:1:2:ffff::1") != get_net("2600:1:3::1")
    assert get_net("a.evil.example") == get_net("b.EVIL.example")
    assert get_net("192.168.1.1") == get_net("127.0.0.1") == ""


def fill(book: PeerBook) -> None:
    """As many inventions as strangers get in, from many of them."""
    hosts = public_hosts()
    for number, peer in enumerate(PEERS[: 2 * PEERS_MAX]):
        book.add(at(next(hosts), peer), 0, PEERS[-1 - number // 16])
    assert len(book) == PEERS_MAX


def test_a_book_full_of_inventions_still_takes_a_connected_peers_own_word_and_bootstrap() -> None:
    book = make_book()
    fill(book)
    assert book.add(at("90.1.1.1", HONEST), 1, HONEST, is_connected=True)
    assert book.get_addresses(HONEST) == [at("90.1.1.1", HONEST)]
    book.add_bootstrap([at("90.1.1.2", PEERS[-1])], 1)
    assert book.get_addresses(PEERS[-1]) == [at("90.1.1.2", PEERS[-1])]
    assert len(book) == PEERS_MAX


def test_hearsay_never_displaces_the_proven_nor_goes_before_it() -> None:
    book = make_book()
    proven = at("90.1.1.1", HONEST)
    prove(book, HONEST, proven, 0)
    for number in range(50):
        book.add(at(f"91.{number}.1.1", HONEST), 2, PEERS[number])
    fill(book)
    addresses = book.get_addresses(HONEST)
    assert addresses[0] == proven
    assert len(addresses) <= 8
    assert book.get_due(100, frozenset())[0] == HONEST
    book.add(at("92.1.1.1", HONEST), 3, HONEST, is_connected=True)
    assert proven in book.get_addresses(HONEST), "its own newer word pushes out hearsay, not what has worked"


def test_bootstrap_is_kept_however_often_it_fails() -> None:
    book = make_book()
    text = at("90.1.1.1", HONEST)
    book.add_bootstrap([text], 0)
    for number in range(1000):
        book.on_failed(HONEST, text, is_other_peer=True)
        book.on_unreachable(HONEST, float(number))
    assert book.get_addresses(HONEST) == [text]
    assert book.get_due(1e6, frozenset()) == [HONEST]


def test_what_never_worked_is_forgotten_and_gives_its_place_back() -> None:
    book = make_book()
    told = [(peer, at(f"20.1.1.{n + 1}", peer)) for n, peer in enumerate(PEERS[:NET_MAX])]
    for _, text in told:
        assert book.add(text, 0, HONEST)
    assert not book.add(at("20.1.1.99", PEERS[100]), 0, HONEST)
    for peer, text in told:
        for _ in range(FORGET_UNPROVEN + 1):
            book.on_failed(peer, text, is_other_peer=False)
            book.on_unreachable(peer, 1.0)
    assert len(book) == 0
    assert book.add(at("20.1.1.99", PEERS[100]), 2, HONEST)


def test_connected_peers_of_one_net_are_all_kept_until_they_go() -> None:
    book = make_book()
    for n, peer in enumerate(PEERS[:100]):
        assert book.add(at(f"20.1.1.{n + 1}", peer), 0, peer, is_connected=True)
    assert len(book) == 100
    for peer in PEERS[:100]:
        book.on_lost(peer, 1)
    assert len(book) == NET_MAX


def test_the_book_outlives_a_restart_with_its_anchors_first() -> None:
    book = make_book()
    hosts = public_hosts()
    for number, peer in enumerate(PEERS[:30]):
        prove(book, peer, at(next(hosts), peer), 100.0 + number)
    for peer in PEERS[30:60]:
        book.add(at(next(hosts), peer), 200, HONEST)
    bad = PEERS[40]
    for _ in range(4):
        book.on_failed(bad, book.get_addresses(bad)[0], is_other_peer=False)
        book.on_unreachable(bad, 200)
    records = book.get_records(300, WALL)
    again = make_book()
    again.restore(records, 5000, WALL + 3600)  # another clock that began at another time, an hour later
    assert len(again) == 60
    anchors = set(PEERS[:ANCHORS_MAX])
    assert {peer for peer in PEERS if again.is_anchor(peer)} == anchors
    assert set(again.get_due(5000, frozenset())) == anchors, "the others follow a little later"
    assert set(again.get_due(5002, frozenset())) >= set(PEERS[:30])
    assert set(again.get_due(5100, frozenset())) == set(PEERS[:60])
    third = again.get_records(5000, WALL + 3600)
    assert {(r.address, round(r.last_success, 3), r.failures) for r in third} == {
        (r.address, round(r.last_success, 3), r.failures) for r in records
    }
    assert next(r for r in third if bad in r.address).failures == 4
    for peer in PEERS[100 : 100 + TOLD_MAX]:
        again.add(at(next(hosts), peer), 5000, HONEST)
    assert len(again) == 30 + TOLD_MAX, "what was told before the restart counts against its teller after it"


def test_one_public_net_gives_one_anchor() -> None:
    book = make_book()
    for number, peer in enumerate(PEERS[:5]):
        prove(book, peer, at(f"20.1.1.{number + 1}", peer), number)
    prove(book, HONEST, at("21.1.1.1", HONEST), 10)
    again = make_book()
    again.restore(book.get_records(20, WALL), 0, WALL)
    assert {peer for peer in (HONEST, *PEERS[:5]) if again.is_anchor(peer)} == {HONEST, PEERS[0]}


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30), st.integers(0, 12), st.integers(0, 30)), max_size=120))
def test_the_books_counts_are_those_of_its_content(steps: list[tuple[int, int, int, int]]) -> None:
    """Whatever happens in whatever order, the bounds count exactly what is in the book."""
    book = PeerBook(OWN, 12, 3)
    for now, (kind, number, net, teller) in enumerate(steps):
        peer, text = PEERS[number], at(f"20.1.{net}.{number + 1}", PEERS[number])
        if kind in (0, 1):
            book.add(text, now, PEERS[teller], is_connected=kind == 1 and teller == number)
        elif kind == 2:
            book.on_connected(peer, now, text)
        elif kind == 3:
            book.on_lost(peer, now)
        elif kind == 4:
            book.on_failed(peer, text, is_other_peer=net == 0)
            book.on_unreachable(peer, now)
        else:
            book.add_bootstrap([text], now)
        fresh = PeerBook(OWN, 12, 3)
        fresh._entries = book._entries
        for entry in book._entries.values():
            fresh._tally(entry, +1)
        assert (fresh._by_teller, fresh._by_net, fresh._by_socket) == (
            book._by_teller,
            book._by_net,
            book._by_socket,
        )
        assert len(book) <= 12


# --- bans ---


def test_three_offences_in_a_minute_ban_and_three_in_a_month_do_not() -> None:
    bans = Bans(100)
    assert [bans.add_offence("fast", now) for now in (0, 20, 40)] == [False, False, True]
    assert bans.is_banned("fast", 40 + BAN_S - 1)
    assert not bans.is_banned("fast", 40 + BAN_S + 1)
    assert not any(bans.add_offence("slow", day * 86_400.0) for day in (0, 10, 20))


def test_two_offences_throttle_for_a_while() -> None:
    bans = Bans(100)
    bans.add_offence("x", 0)
    assert not bans.is_throttled("x", 0)
    bans.add_offence("x", 1)
    assert bans.is_throttled("x", 1)
    assert not bans.is_throttled("x", HALF_LIFE_S)


def ban(bans: Bans, peer: str, now: float) -> float:
    """Offend until banned; returns how long."""
    assert any(bans.add_offence(peer, now) for _ in range(3))
    return bans.until[peer] - now


def test_each_ban_lasts_twice_as_long_up_to_a_bound_and_quiet_days_are_counted() -> None:
    bans, now = Bans(100), 0.0
    lengths = []
    for _ in range(13):
        lengths.append(ban(bans, "x", now))
        now += lengths[-1] + 1
    assert lengths[:4] == [BAN_S, 2 * BAN_S, 4 * BAN_S, 8 * BAN_S]
    assert max(lengths) == BAN_MAX_S == lengths[-1]
    assert ban(bans, "x", now + 30 * 86_400) == BAN_S


@pytest.mark.parametrize("clock_jump", [0.0, -86_400.0])
def test_a_ban_is_not_shortened_by_a_restart_and_grows_after_it(clock_jump: float) -> None:
    bans = Bans(100)
    ban(bans, "x", 0)
    lasts = ban(bans, "x", 100)
    assert lasts == 2 * BAN_S
    bans.add_offence("near", 100)
    bans.add_offence("near", 100)
    again = Bans(100)
    again.restore(bans.get_records(110, WALL), 7, WALL + clock_jump)
    left = lasts - 10 if clock_jump == 0 else lasts
    assert again.is_banned("x", 7 + left - 1)
    assert not again.is_banned("x", 7 + left + 1)
    assert again.add_offence("near", 7)
    assert ban(again, "x", 7 + left + 1) == 4 * BAN_S


def test_a_flood_of_new_offenders_frees_no_old_one_and_stays_bounded() -> None:
    bans = Bans(100)
    for _ in range(4):
        ban(bans, "old", 0)
    for number in range(1000):
        ban(bans, f"new {number}", 1)
    assert bans.is_banned("old", 2)
    assert len(bans.until) <= 100
    assert len(bans.get_records(2, WALL)) <= 100
    assert len(bans.seen) <= 100
