"""Bounds that need no network: bytes held for slow peers, the log, addresses that count as one."""

import logging

import pytest
import trio

from p2pfm.runtime.log_limit import LogLimit
from p2pfm.runtime.network.held import HeldBytes, Holding
from p2pfm.runtime.network.host import get_address_group


def test_when_too_much_is_held_the_oldest_is_dropped() -> None:
    async def main() -> None:
        held = HeldBytes(100)
        seen: list[Holding] = []

        async def hold(size: int, position: int) -> None:
            with held.hold() as holding:
                seen.append(holding)
                await trio.sleep(0.01 * position)
                holding.grow(size)
                await trio.sleep(0.2)

        async with trio.open_nursery() as nursery:
            for position in range(4):
                nursery.start_soon(hold, 40, position)
        by_age = [holding.was_dropped for holding in seen]
        assert sum(by_age) == 2
        assert held.total == 0
        assert held.num_dropped == 2

    trio.run(main)


def test_what_is_done_makes_room() -> None:
    async def main() -> None:
        held = HeldBytes(100)
        for _ in range(10):
            with held.hold() as holding:
                holding.grow(90)
                await trio.lowlevel.checkpoint()
            assert not holding.was_dropped

    trio.run(main)


def test_a_line_of_the_source_writes_so_often_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("tests.bounds")
    caplog.handler.addFilter(limit := LogLimit(burst=3, every_s=3600))
    try:
        for number in range(100):
            log.warning(f"peer {number} broke a rule")
        log.warning("another line")
    finally:
        caplog.handler.removeFilter(limit)
    assert [record.getMessage() for record in caplog.records] == [
        "peer 0 broke a rule",
        "peer 1 broke a rule",
        "peer 2 broke a rule",
        "another line",
    ]


@pytest.mark.parametrize(
    ("host", "group"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::ffff:1", "2001:db8::/64"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_one_line_of_ipv6_is_one_sender(host: str, group: str) -> None:
    assert get_address_group(host) == group
