"""A whole node for attacks: the real core, door, store and transport; a toy learner, and a ledger in memory.

Arguments: home, genesis [ms], how many rogues are registered. Tells its state in lines of JSON, as
`net_peer_process.py` does. Members are this node (number 1), the honest peer (2), and rogues from `FIRST_ROGUE` on.
"""

import hashlib
import json
import logging
import sys
import time
from pathlib import Path

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID

from p2pfm.config import (
    WEI_PER_PFM,
    ChainConfig,
    CompressionConfig,
    HttpConfig,
    LimitConfig,
    NetworkConfig,
    NodeConfig,
    PhaseConfig,
    ScoringConfig,
    ServingConfig,
    SettlementConfig,
)
from p2pfm.messages import encode
from p2pfm.runtime.envelopes import seal
from p2pfm.runtime.keys import Keys
from p2pfm.runtime.log_limit import LogLimit
from p2pfm.runtime.node import Learners, Models, Node
from p2pfm.runtime.text import TextCodec
from p2pfm.serving.session import Vocabulary
from p2pfm.settlement import bls
from p2pfm.settlement.ledger import FederationParams
from p2pfm.settlement.memory_ledger import InMemoryLedger
from p2pfm.types import Millis, PeerId, Wei
from sim.learners.convex import LinearLearner, Problem

VICTIM, HONEST, FIRST_ROGUE = 1, 2, 100
CHAIN = ChainConfig(1337, "0x" + "5f" * 20, "0x" + "70" * 20)
STAKE = Wei(100 * WEI_PER_PFM)
PROBE = b"the toy learner needs no probe set" + bytes(100_000)
PHASES_MS = (1500, 1500, 300, 300, 300, 300)
ROUND_MS = sum(PHASES_MS)
TELL_S = 0.05


def make_keys(number: int) -> Keys:
    """All keys of one peer."""
    seed = bytes([number]) * 32
    peer = PeerId(str(ID.from_pubkey(create_new_key_pair(seed).public_key)))
    return Keys(peer, f"0x{number:040x}", seed, seed, bls.key_from_seed(seed))


def make_network(genesis_ms: int) -> NetworkConfig:
    """Rounds of four seconds."""
    return NetworkConfig(
        name="hostile",
        genesis_ms=Millis(genesis_ms),
        backbone="toy",
        probe=hashlib.sha256(PROBE).hexdigest(),
        chain=CHAIN,
        compression=CompressionConfig(chunk=64, keep=16),
        phases=PhaseConfig(*(Millis(phase) for phase in PHASES_MS)),
        scoring=ScoringConfig(committee_size=5),
        settlement=SettlementConfig(rounds_per_epoch=1),
        limits=LimitConfig(message_bytes_max=300_000),
    )


def make_ledger(num_rogues: int) -> InMemoryLedger:
    """A registry with everybody in it."""
    numbers = (VICTIM, HONEST, *range(FIRST_ROGUE, FIRST_ROGUE + num_rogues))
    keys = [make_keys(number) for number in numbers]
    params = FederationParams(5, STAKE, 600, Wei(100 * WEI_PER_PFM), 1)
    balances = {one.account_address: STAKE for one in keys}
    ledger = InMemoryLedger(CHAIN, params, bls.BlsVerifier(), lambda: int(time.time()), balances)
    for one in keys:
        possession = bls.prove_possession(one.bls_secret, CHAIN, one.account_address, one.peer)
        ledger.register(one.account_address, one.peer, bls.public_key(one.bls_secret), possession, STAKE)
    ledger.rotate()
    return ledger


def tell(node: Node, is_running: bool) -> None:
    """One line of state."""
    transport = node.transport
    state = {
        "peer": transport.peer_id,
        "addresses": transport.addresses(),
        "running": is_running,
        "connected": transport.connected(),
        "gossiping": [peer for peer in transport.connected() if transport.is_gossiping_with(peer)],
        "blamed": dict(transport.blamed()),
        "counters": dict(transport.counters),
        "book": len(transport.book._entries),
    }
    if is_running:
        state["round"] = node.peer.round if node.peer is not None else -1
        state["heard"] = {one.record.peer: one.record.sequence for one in node.gateway.table.live(Millis(0))}
        state["core_failures"] = node.metrics.core_failures._value.get()
        state["notes"] = [text for _, text in node.effects.notes[-5:]]
    print(json.dumps(state), flush=True)


async def main(home: str, genesis_ms: str, num_rogues: str) -> None:
    """Run until killed."""
    probe = Path(home) / "probe"
    probe.write_bytes(PROBE)
    keys = make_keys(VICTIM)
    config = NodeConfig(
        home=home,
        data="",
        rpc="",
        network=make_network(int(genesis_ms)),
        probe=str(probe),
        http=HttpConfig(port=0),
        serving=ServingConfig(enabled=False),
        auto_claim=False,
        auto_challenge=False,
    )
    learner = LinearLearner(Problem(1), 0)
    models = Models(
        codec=lambda: TextCodec(None, Vocabulary(100, frozenset({1}), 128)),
        engine=lambda: None,
        learners=lambda probe, spendings: Learners(learner),
    )
    ledger = make_ledger(int(num_rogues)).as_account(keys.account_address)
    node = Node(config, keys, ledger, models)

    async def tell_always() -> None:
        while True:
            is_running = node.stage == "running" and node.peer is not None
            if node.transport.addresses():
                tell(node, is_running)
            if is_running:  # an honest peer hears this node as soon as it listens
                await node.transport.publish(encode(seal(keys, node.network_id, node.gateway.presence())))
            await trio.sleep(TELL_S * 4)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell_always)
        await node.run()


if __name__ == "__main__":
    handler = logging.StreamHandler()
    handler.addFilter(LogLimit())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    trio.run(main, *sys.argv[1:])
