"""`p2pfm stake` and `p2pfm pool` against a real chain: what an operator sees when joining, leaving and paying in."""

from collections.abc import Iterator

import msgspec
import pytest
from ledger_worlds import ACCOUNTS, PARAMS, SPONSOR, World, chain_world, running_chain

from nodes.stakes import describe_pool, describe_stake
from p2pfm.config import WEI_PER_PFM, LimitConfig, NetworkConfig, PhaseConfig, ScoringConfig, SettlementConfig
from p2pfm.errors import OperatorError
from p2pfm.runtime.node import validate_rules
from p2pfm.types import Digest, Millis, Wei


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_chain("embedded") as rpc_url:
        yield rpc_url


@pytest.fixture
def world(url: str) -> World:
    return chain_world(url).found(4, pool=1500)


def test_a_members_whole_life_is_told(world: World) -> None:
    ledger = world.ledgers[1]
    assert describe_stake(world.any, ACCOUNTS[SPONSOR])["state"] == "not registered"
    assert describe_stake(ledger, ACCOUNTS[1])["state"] == "active"
    ledger.unbond()
    told = describe_stake(ledger, ACCOUNTS[1])
    assert (told["state"], told["stake_pfm"]) == ("leaving", 10 / WEI_PER_PFM)
    assert told["free"] == f"free {PARAMS.unbonding_s} s after committee 4 is drawn (now 1)"
    for _ in range(3):
        world.advance(PARAMS.rotation_s)
        world.any.rotate()
    assert describe_stake(ledger, ACCOUNTS[1])["free"].startswith("free at 20")
    world.advance(PARAMS.unbonding_s)
    ledger.withdraw()
    assert describe_stake(ledger, ACCOUNTS[1])["state"] == "left"


def test_a_slashed_member_is_told_so(world: World) -> None:
    one = world.submission(0)
    other = world.submission(0, base=Digest(b"\x09" * 32))
    world.any.prove_equivocation(one, other)
    told = describe_stake(world.any, ACCOUNTS[2])
    assert (told["state"], told["stake_pfm"]) == ("slashed", 0.0)


def test_the_pool_tells_how_long_it_lasts(world: World) -> None:
    told = describe_pool(world.any)
    assert (told["pool_pfm"], told["paying_rounds_left"]) == (1500 / WEI_PER_PFM, "1")


def test_a_node_refuses_a_contract_with_other_rules(world: World) -> None:
    params = world.any.get_params()
    network = NetworkConfig("n", Millis(0), "none", "00" * 32, world.chain, phases=PhaseConfig())
    scoring = msgspec.structs.replace(network.scoring, committee_size=params.committee_size)
    settlement = msgspec.structs.replace(network.settlement, rounds_per_epoch=params.rounds_per_epoch)
    fitting = msgspec.structs.replace(network, scoring=scoring, settlement=settlement)
    pool = msgspec.structs.replace(params, pool_per_epoch=fitting.pool_per_epoch(), serving_per_epoch=Wei(0))
    validate_rules(fitting, pool)
    for changes in ({"committee_size": 5}, {"rounds_per_epoch": 3}, {"pool_per_epoch": 1}, {"serving_per_epoch": 1}):
        with pytest.raises(OperatorError, match=next(iter(changes))):
            validate_rules(fitting, msgspec.structs.replace(pool, **changes))


def test_a_node_refuses_a_contract_that_takes_more_members_than_its_shards_can_hold(world: World) -> None:
    params = world.any.get_params()
    scoring, settlement = ScoringConfig(committee_size=4), SettlementConfig(2, 1, 0)
    network = NetworkConfig("n", Millis(0), "none", "00" * 32, world.chain, scoring=scoring, settlement=settlement)
    fitting = msgspec.structs.replace(params, pool_per_epoch=network.pool_per_epoch(), serving_per_epoch=Wei(0))
    validate_rules(network, msgspec.structs.replace(fitting, members_max=1024))
    sharded = msgspec.structs.replace(network, limits=LimitConfig(peers_max=16, shard_peers_max=4))
    validate_rules(sharded, msgspec.structs.replace(fitting, members_max=16))
    with pytest.raises(OperatorError, match=r"limits.peers_max: .* says 16, .* takes 17 members"):
        validate_rules(sharded, msgspec.structs.replace(fitting, members_max=17))
