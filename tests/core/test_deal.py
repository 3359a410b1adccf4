"""How a network is dealt into shards, what a shard counts for, and the two levels of a round."""

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfm.config import LimitConfig, SettlementConfig, validate_network
from p2pfm.errors import ConfigError
from p2pfm.messages import Certificate, Envelope, IncludedUpdate, Proposal, encode
from p2pfm.protocol.committee import compute_split
from p2pfm.protocol.events import Adopt, Fetch, Fetched, Merge, Merged, Received, RosterChanged, Tick
from p2pfm.protocol.peer import Peer, initial_durable
from p2pfm.protocol.phases import Level, Phase, compute_position, compute_round_start, get_durations
from p2pfm.protocol.shards import compute_shard_shares, compute_shares_of, deal, is_shard_name
from p2pfm.settlement.ledger import Member, Roster
from p2pfm.types import WEIGHT_ONE, Contribution, Digest, MemberIndex, Millis, PeerId, Round, Wei, Weight
from sim.scenarios import Scenario, make_network

CONFIG = make_network(Scenario(num_peers=100, shard_size=10, committee_size=5))


def make_roster(num_peers: int, epoch: int = 1) -> Roster:
    members = tuple(
        Member(MemberIndex(i), f"0x{i:040x}", PeerId(f"peer-{i}"), bytes(48), Wei(10**18 * (1 + i % 3)), i % 7 != 6)
        for i in range(num_peers)
    )
    return Roster(epoch, 0, members, (MemberIndex(0), MemberIndex(1)))


@given(st.integers(11, 100), st.integers(0, 9))
def test_every_active_member_is_in_one_shard_and_no_shard_is_too_large(num_peers: int, round: int) -> None:
    roster = make_roster(num_peers)
    dealt = deal(CONFIG, roster, Round(round))
    active = {member.peer for member in roster.members if member.active}
    if len(active) <= 10:
        assert dealt is None
        return
    assert dealt is not None
    sizes = [len(shard.members) for shard in dealt.shards]
    assert max(sizes) <= 10
    assert max(sizes) - min(sizes) <= 1
    assert sorted(itertools.chain(*dealt.names)) == sorted(active)
    for number, shard in enumerate(dealt.shards):
        assert {shard.by_index[index].peer for index in shard.committee} <= set(dealt.names[number])
        assert len(shard.committee) == min(5, len(shard.members))


def test_shards_are_dealt_anew_every_epoch_and_stay_within_it() -> None:
    config = msgspec.structs.replace(CONFIG, settlement=SettlementConfig(rounds_per_epoch=4))
    roster = make_roster(90)
    deals = [deal(config, roster, Round(round)) for round in range(8)]
    assert deals[0] == deals[3]
    assert deals[4] == deals[7]
    assert deals[0] != deals[4]
    assert deal(config, make_roster(90, epoch=2), Round(0)) != deals[0]


def test_a_network_that_fits_one_shard_has_one_level_and_the_old_rounds() -> None:
    small = make_network(Scenario(num_peers=8))
    assert not small.has_shards
    assert sum(get_durations(small)) == sum(msgspec.structs.asdict(small.phases).values())
    assert deal(small, make_roster(8), Round(0)) is None


def test_a_shards_shares_are_its_members() -> None:
    roster = make_roster(60)
    dealt = deal(CONFIG, roster, Round(0))
    assert dealt is not None
    assert sum(compute_shard_shares(dealt, compute_shares_of(roster, CONFIG.stake_cap()))) == WEIGHT_ONE


def test_the_upper_levels_train_lasts_as_long_as_the_shards_whole_round() -> None:
    start, phases = compute_round_start(CONFIG, Round(3)), CONFIG.phases
    shard_ms = sum(msgspec.structs.asdict(phases).values())
    assert sum(get_durations(CONFIG)) == sum(get_durations(CONFIG, Level.TOP)) == 2 * shard_ms - phases.train_ms
    for elapsed, below, above in (
        (0, Phase.TRAIN, Phase.TRAIN),
        (shard_ms - 1, Phase.MERGE, Phase.TRAIN),
        (shard_ms, Phase.MERGE, Phase.EXCHANGE),
        (2 * shard_ms - phases.train_ms - 1, Phase.MERGE, Phase.MERGE),
    ):
        now_ms = Millis(start + elapsed)
        assert compute_position(CONFIG, now_ms).phase == below
        assert compute_position(CONFIG, now_ms, Level.TOP).phase == above


def make_shard_proposal(contributions: list[int]) -> Proposal:
    none = Digest(bytes(32))
    updates = tuple(
        IncludedUpdate(PeerId(f"peer-{i}"), MemberIndex(i), none, Contribution(value), Weight(0))
        for i, value in enumerate(contributions)
    )
    return Proposal(Round(0), MemberIndex(0), 1, 0, none, none, none, none, updates, (), ())


@given(st.integers(-(10**15), 10**15), st.lists(st.integers(-(10**15), 10**15), max_size=20))
def test_a_shards_contribution_is_split_and_nothing_is_made_from_nothing(whole: int, inside: list[int]) -> None:
    split = compute_split(Contribution(whole), make_shard_proposal(inside))
    assert sum(max(0, part) for part in split.values()) <= max(0, whole)
    assert all(abs(part) <= abs(whole) for part in split.values())
    for member, part in split.items():
        assert part <= 0 or (inside[member] > 0 and whole > 0)


def test_who_contributed_twice_as_much_gets_twice_as_much() -> None:
    assert compute_split(Contribution(900), make_shard_proposal([200, 100, -50])) == {0: 600, 1: 300, 2: -150}
    assert compute_split(Contribution(-900), make_shard_proposal([200, 100, -50])) == {0: -600, 1: -300, 2: -150}
    assert compute_split(Contribution(900), make_shard_proposal([-1, 0])) == {}
    assert compute_split(Contribution(900), make_shard_proposal([1, -400])) == {0: 900, 1: -900}


def test_more_peers_than_two_levels_reach_are_refused() -> None:
    limits = LimitConfig(peers_max=17, shard_peers_max=4, message_bytes_max=1_000_000)
    with pytest.raises(ConfigError, match="peers_max"):
        validate_network(msgspec.structs.replace(CONFIG, limits=limits))


def test_a_peer_is_no_shard() -> None:
    assert is_shard_name(PeerId("shard-3"))
    assert not is_shard_name(PeerId("12D3KooWshard-3"))


def make_certificate(peer: str, member: int, base: Digest, new_base: Digest) -> Certificate:
    none = Digest(bytes(32))
    update = IncludedUpdate(PeerId(peer), MemberIndex(member), none, Contribution(1), Weight(1))
    return Certificate(
        Proposal(Round(0), MemberIndex(0), 1, 0, base, new_base, none, Digest(b"r" * 32), (update,), (), ()),
        (),
        bytes(96),
    )


@pytest.mark.parametrize(("peer", "member"), [("shard-x", 0), ("shard-99", 99), ("shard-1", 0), ("peer-3", 3)])
def test_a_certificate_of_shards_that_are_not_there_leads_to_its_base_and_no_crash(peer: str, member: int) -> None:
    base, new_base = Digest(b"b" * 32), Digest(b"n" * 32)
    node = Peer(PeerId("peer-3"), CONFIG, initial_durable(base))
    now_ms = compute_round_start(CONFIG, Round(0))
    node.handle(Tick(), now_ms)
    node.handle(RosterChanged(make_roster(60)), now_ms)
    certificate = make_certificate(peer, member, base, new_base)
    received = Received(Envelope(PeerId("peer-0"), encode(certificate), b""), certificate)
    fetches = [action for action in node.handle(received, now_ms) if isinstance(action, Fetch)]
    assert [(fetch.digest, fetch.kind) for fetch in fetches] == [(new_base, "base")]


def test_a_certificate_of_known_shards_is_recomputed_from_their_payloads() -> None:
    base, new_base = Digest(b"b" * 32), Digest(b"n" * 32)
    node = Peer(PeerId("peer-3"), CONFIG, initial_durable(base))
    now_ms = compute_round_start(CONFIG, Round(0))
    node.handle(Tick(), now_ms)
    node.handle(RosterChanged(make_roster(60)), now_ms)
    node.handle(Tick(), Millis(now_ms + sum(get_durations(CONFIG, Level.TOP)[:5])))
    certificate = make_certificate("shard-2", 2, base, new_base)
    received = Received(Envelope(PeerId("peer-0"), encode(certificate), b""), certificate)
    actions = node.handle(received, Millis(now_ms + sum(get_durations(CONFIG, Level.TOP)[:5])))
    payload = certificate.proposal.updates[0].payload
    assert [action.digest for action in actions if isinstance(action, Fetch)] == [payload]
    actions = node.handle(Fetched(payload, PeerId("shard-2")), now_ms)
    request = next(action.request for action in actions if isinstance(action, Merge))
    actions = node.handle(Merged(request, new_base), now_ms)
    assert [action.base for action in actions if isinstance(action, Adopt)] == [new_base]


def test_what_could_not_be_recomputed_in_its_round_is_fetched_in_the_next() -> None:
    base, new_base = Digest(b"b" * 32), Digest(b"n" * 32)
    node = Peer(PeerId("peer-3"), CONFIG, initial_durable(base))
    now_ms = compute_round_start(CONFIG, Round(0))
    node.handle(Tick(), now_ms)
    node.handle(RosterChanged(make_roster(60)), now_ms)
    certificate = make_certificate("shard-2", 2, base, new_base)
    node.handle(Received(Envelope(PeerId("peer-0"), encode(certificate), b""), certificate), now_ms)
    actions = node.handle(Tick(), compute_round_start(CONFIG, Round(1)))
    assert [(action.digest, action.kind) for action in actions if isinstance(action, Fetch)] == [(new_base, "base")]
    actions = node.handle(Fetched(new_base), compute_round_start(CONFIG, Round(1)))
    assert [action.base for action in actions if isinstance(action, Adopt)] == [new_base]
