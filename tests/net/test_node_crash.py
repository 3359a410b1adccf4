"""A node that is killed at random moments, again and again: it keeps its keys, its residual and its certified base."""

import random
import signal
import time
from pathlib import Path

import pytest

from nodes.localnet import Localnet, LocalNode, Preset, localnet
from p2pfm.config import CompressionConfig, PhaseConfig, ScoringConfig, TrainingConfig
from p2pfm.protocol.events import Durable
from p2pfm.runtime.store import Store
from p2pfm.types import Millis

pytestmark = pytest.mark.slow

NUM_KILLS = 8
QUICK = Preset(
    backbone="tiny",
    training=TrainingConfig(steps=1, batch=1, tokens_max=64),
    scoring=ScoringConfig(committee_size=1, samples_per_stratum=1),
    compression=CompressionConfig(),
    phases=PhaseConfig(
        train_ms=Millis(1200),
        exchange_ms=Millis(300),
        score_ms=Millis(1200),
        reveal_ms=Millis(300),
        attest_ms=Millis(500),
        merge_ms=Millis(500),
    ),
    startup_s=1,
)
"""A network of one, whose rounds of four seconds leave no quiet moment to be killed in."""


def read_durable(node: LocalNode) -> Durable | None:
    """What lies on disk while nobody runs on it; every blob it names is there and is what its digest says."""
    with Store(node.home) as store:
        durable = store.load_durable()
        if durable is not None:
            for digest in (durable.base, durable.residual, durable.pending_residual, durable.announced_payload):
                assert digest is None or store.find(digest) is not None
        return durable


def certified_round(durable: Durable | None) -> int:
    return durable.head.proposal.round if durable and durable.head else -1


def run_and_kill(net: Localnet, node: LocalNode, draw: random.Random) -> None:
    net.wait_until_running(node)
    time.sleep(draw.uniform(0, 5))  # the moment of death, not a synchronisation
    net.kill(node)
    assert node.process is not None
    assert node.process.returncode == -signal.SIGKILL


def test_sigkill_at_any_moment_loses_no_key_no_residual_and_no_certified_base(tmp_path: Path) -> None:
    draw = random.Random(20)
    with localnet(tmp_path / "net", ("honest",), QUICK, print) as net:
        node = net.nodes[0]
        last: Durable | None = None
        for _ in range(NUM_KILLS):
            run_and_kill(net, node, draw)
            durable = read_durable(node)
            assert certified_round(durable) >= certified_round(last), "a certified base was lost"
            if last is not None:
                assert durable is not None
                assert durable.signed_round >= last.signed_round, "it could sign a round twice"
                assert durable.announced_round >= last.announced_round
            last = durable
            net.start(node)
        net.wait_until_running(node)
        assert net.get_status(node)["peer"] == node.peer
        reached = certified_round(last)
        net.wait_until(
            "rounds go on after all the kills",
            lambda: (net.get_status(node)["protocol"]["certified_round"] or -1) > reached,
            60,
        )
        assert reached >= 1, "it got somewhere between the kills"
        assert last is not None
        assert last.residual is not None
