"""Every implementation of the ledger, under the same tests."""

from collections.abc import Callable, Iterator

import pytest
from ledger_worlds import IMPLEMENTATIONS, PARAMS, World, chain_world, memory_world, running_chain

from p2pfm.settlement.ledger import FederationParams


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def make_world(request: pytest.FixtureRequest) -> Iterator[Callable[[FederationParams], World]]:
    if request.param == "memory":
        yield memory_world
        return
    with running_chain(request.param) as url:
        yield lambda params: chain_world(url, params)


@pytest.fixture
def world(make_world: Callable[[FederationParams], World]) -> World:
    return make_world(PARAMS)
