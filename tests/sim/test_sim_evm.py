"""A scenario on the contract itself, in a real EVM with real BLS signatures, comes to what it does in memory."""

from nodes.evm_world import open_evm_world
from sim.scenarios import Scenario
from sim.world import World

SCENARIO = Scenario(num_peers=8, num_rounds=3, committee_size=8, seed=21)


def test_the_contract_and_its_specification_in_memory_settle_and_pay_the_same() -> None:
    memory = World(SCENARIO)
    memory.run()
    with open_evm_world(SCENARIO) as (world, ledger):
        world.run()
        settled = world.chain.ledger.get_rounds(0)
        claimed = world.chain.get_claimed()
        gas = ledger.get_gas()
    expected = memory.chain.ledger.get_rounds(0)
    assert len(expected) == SCENARIO.num_rounds
    assert [(one.round, one.root, one.base, one.sums) for one in settled] == [
        (one.round, one.root, one.base, one.sums) for one in expected
    ]
    assert claimed == memory.chain.get_claimed()
    assert sum(claimed) > 0
    assert gas.keys() == {"transfer", "approve", "fund", "register", "rotate", "submitRound", "claim"}
    assert all(gas.values())
