"""More members than seats, as real processes: a new committee every epoch, and no round is void because of it."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from nodes.localnet import PRESETS, Role, localnet
from p2pfm.types import Round

pytestmark = [pytest.mark.slow, pytest.mark.alone]

NUM_PEERS, NUM_SEATS, NUM_ROUNDS = 6, 4, 4
PRESET = replace(PRESETS["toy"], scoring=msgspec.structs.replace(PRESETS["toy"].scoring, committee_size=NUM_SEATS))


def test_a_new_committee_is_drawn_every_epoch_and_voids_nothing(tmp_path: Path) -> None:
    roles: tuple[Role, ...] = ("honest",) * NUM_PEERS
    with localnet(tmp_path, roles, PRESET, print) as net:
        for node in net.nodes:
            net.wait_until_running(node)
        get_rounds, get_roster = net.ledger.get_rounds, net.ledger.get_roster
        net.wait_until("rounds on chain", lambda: len(get_rounds(Round(0))) >= NUM_ROUNDS, 120)
        # Rounds are so short here that the moment for a draw passes every other time.
        net.wait_until("two more draws", lambda: get_roster().epoch >= 3, 60)
        net.wait_until("a round by the third", lambda: get_rounds(Round(0))[-1].epoch >= 3, 60)
        rounds = get_rounds(Round(0))
        print([(settled.round, settled.epoch) for settled in rounds])
        assert [settled.round - rounds[0].round for settled in rounds] == list(range(len(rounds))), "none is void"
        assert all(len(net.ledger.get_committee(settled.epoch)) == NUM_SEATS for settled in rounds)
