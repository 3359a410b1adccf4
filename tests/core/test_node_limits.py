"""`[limits]` in a node's TOML: what strangers may take of it. And in a network's: what its largest messages take."""

import re

import msgspec
import pytest
from node_toml import NODE

from nodes.homes import read_config, write_config
from p2pfm.config import (
    GOSSIP_BYTES_MAX,
    ChainConfig,
    LimitConfig,
    NetworkConfig,
    ScoringConfig,
    SettlementConfig,
    TransportLimits,
    make_transport_limits,
    parse_node_config,
    validate_network,
)
from p2pfm.errors import ConfigError
from p2pfm.messages import (
    SERVED_MAX,
    Certificate,
    Envelope,
    IncludedUpdate,
    Leaf,
    Message,
    Proposal,
    Score,
    ScoreReveal,
    Service,
    ShardMessage,
    encode,
)
from p2pfm.types import Contribution, Digest, MemberIndex, Millis, PeerId, Round, Weight


def test_what_is_not_named_keeps_its_default():
    limits = parse_node_config(NODE + "[limits]\nconnections_max = 20\nbuffered_max = 1_000_000").limits
    assert limits == TransportLimits(connections_max=20, buffered_max=1_000_000)
    assert parse_node_config(NODE).limits == TransportLimits()


def test_a_written_configuration_names_only_what_differs(tmp_path):
    path = tmp_path / "node.toml"
    write_config(path, parse_node_config(NODE + "[limits]\nping_s = 2.0"))
    assert path.read_text().split("[limits]\n")[1].split("\n\n")[0] == "ping_s = 2.0"
    assert read_config(path).limits == TransportLimits(ping_s=2.0)


def test_the_share_of_answers_that_is_rechecked_is_a_share():
    assert parse_node_config(NODE).serving.recheck_share == 0.05
    for share in ("1.5", "-0.1", "nan"):
        with pytest.raises(ConfigError, match=r"serving.recheck_share: expected 0 to 1"):
            parse_node_config(NODE + f"[serving]\nrecheck_share = {share}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("connections_max = 0", "limits.connections_max: expected a positive number, got 0"),
        ("window_slack_bytes = -1", "limits.window_slack_bytes: expected a positive number, got -1"),
        ("gossip_bytes_max = 2_000_000", "limits.gossip_bytes_max: at most 1000000 .*, got 2000000"),
        ("silent_s = 5.0", "limits.silent_s: expected at least twice ping_s .* got 5"),
        ("negotiate_s = 0.5", "limits.negotiate_s: expected at least 1"),
        ("conections_max = 5", "unknown field `conections_max`"),
    ],
)
def test_what_cannot_work_is_refused_by_its_name(line, message):
    with pytest.raises(ConfigError, match=message):
        parse_node_config(NODE + "[limits]\n" + line)


# --- a network's


CHAIN = ChainConfig(1, "0x" + "11" * 20, "0x" + "22" * 20)
NO = Digest(bytes(32))
NUM_BIG, AMOUNT, INDEX = Contribution(2**60), bytes(16), MemberIndex(2**31)


def make_network(limits: LimitConfig, seats: int = 9) -> NetworkConfig:
    scoring, settlement = ScoringConfig(committee_size=seats), SettlementConfig(serving_per_epoch_pfm=1)
    return NetworkConfig("n", Millis(0), "toy", "0" * 64, CHAIN, scoring=scoring, settlement=settlement, limits=limits)


def make_largest(network: NetworkConfig) -> list[bytes]:
    """Envelopes with the longest certificates that such a network can have: a shard's, and the whole one's."""
    limits, seats = network.limits, network.scoring.committee_size

    def make(names: list[PeerId], num_leaves: int, num_shards: int) -> Certificate:
        scores = tuple(Score(NO, NUM_BIG) for _ in names)
        served = tuple(Service(INDEX, 10**9) for _ in range(SERVED_MAX))
        number = 2**53
        proposal = Proposal(
            Round(number), INDEX, number, number, NO, NO, NO, NO,
            tuple(IncludedUpdate(name, INDEX, NO, NUM_BIG, Weight(10**9)) for name in names),
            tuple(ScoreReveal(Round(number), INDEX, NO, scores, served) for _ in range(seats)),
            (Leaf(AMOUNT, AMOUNT, NUM_BIG, AMOUNT),) * num_leaves,
            (NO,) * num_shards,
        )  # fmt: skip
        return Certificate(proposal, (INDEX,) * (seats // 3), bytes(96))

    def seal(message: Message) -> bytes:
        return encode(Envelope(peer, encode(message), bytes(64)))

    peer = PeerId("12D3KooW" + "x" * 44)
    if not network.has_shards:
        return [seal(make([peer] * limits.peers_max, limits.peers_max, 0))]
    num_shards = -(-limits.peers_max // limits.shard_peers_max)
    names = [PeerId(f"shard-{number}") for number in range(num_shards)]
    shard = ShardMessage(INDEX, make([peer] * limits.shard_peers_max, 0, 0))
    return [seal(shard), seal(make(names, limits.peers_max, num_shards))]


@pytest.mark.parametrize(
    ("limits", "seats"),
    [
        (LimitConfig(peers_max=128), 9),
        (LimitConfig(peers_max=128, message_bytes_max=GOSSIP_BYTES_MAX), 128),
        (LimitConfig(peers_max=2000, message_bytes_max=GOSSIP_BYTES_MAX), 100),
        (LimitConfig(peers_max=10_000, message_bytes_max=GOSSIP_BYTES_MAX), 9),
    ],
)
def test_a_network_is_taken_just_as_its_largest_proposals_fit_into_a_message(limits: LimitConfig, seats: int) -> None:
    network = make_network(limits, seats)
    validate_network(network)
    with pytest.raises(ConfigError, match="takes up to") as caught:
        validate_network(make_network(msgspec.structs.replace(limits, message_bytes_max=4096), seats))
    (reckoned,) = re.findall(r"takes up to (\d+) bytes", str(caught.value))
    largest = max(map(len, make_largest(network)))
    assert largest <= int(reckoned) <= 1.05 * largest
    validate_network(make_network(msgspec.structs.replace(limits, message_bytes_max=int(reckoned)), seats))


def test_too_many_peers_for_a_message_are_refused_with_the_most_that_fit() -> None:
    with pytest.raises(
        ConfigError, match=r"peers_max: .* at most (\d+) peers fit; .* raise message_bytes_max to"
    ) as caught:
        validate_network(make_network(LimitConfig(peers_max=10_000)))
    (most,) = map(int, re.findall(r"at most (\d+) peers", str(caught.value)))
    assert 7500 < most < 8200
    validate_network(make_network(LimitConfig(peers_max=most)))
    with pytest.raises(ConfigError, match="peers_max"):
        validate_network(make_network(LimitConfig(peers_max=most + 1)))
    with pytest.raises(ConfigError, match=r"at most 14\d\d\d peers fit; lower peers_max or scoring.committee_size"):
        validate_network(make_network(LimitConfig(peers_max=16_000, message_bytes_max=GOSSIP_BYTES_MAX)))


def test_a_node_that_would_blame_others_for_its_networks_large_messages_is_refused():
    large = NODE + "[network.limits]\npeers_max = 10_000\nmessage_bytes_max = 900_000\n"
    with pytest.raises(ConfigError, match=r"limits.gossip_bytes_max: expected at least .* \(900000\)"):
        parse_node_config(large)
    config = parse_node_config(large + "[limits]\ngossip_bytes_max = 900_000\n")
    assert make_transport_limits(config.network) == config.limits
    assert make_transport_limits(parse_node_config(NODE).network) == TransportLimits()
