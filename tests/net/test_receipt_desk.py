"""Receipts over real connections: an answer by another's replica ends with one on both sides, and it outlives them."""

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
from prometheus_client import CollectorRegistry
from serving_world import V1, make_engine, prompt_of

from p2pfm.config import ServingConfig
from p2pfm.errors import Reject
from p2pfm.messages import GenerateRequest, Receipt, ServiceReport, decode_receipt, encode
from p2pfm.runtime.batcher import Batcher
from p2pfm.runtime.checker import Checker
from p2pfm.runtime.engine import Engine
from p2pfm.runtime.envelopes import seal
from p2pfm.runtime.gateway import Gateway
from p2pfm.runtime.keys import Keys
from p2pfm.runtime.network.transport import Libp2pTransport
from p2pfm.runtime.receipt_desk import ReceiptDesk
from p2pfm.runtime.replica_streams import ReplicaStreams, answer_stream
from p2pfm.runtime.store import Store
from p2pfm.serving.receipts import ONE
from p2pfm.types import Digest, Millis, PeerId, compute_digest

NETWORK = Digest(b"n" * 32)
NO_CHECKER = Checker(None, lambda vouch: b"", lambda: True)


def make_keys(number: int) -> Keys:
    seed = bytes([number]) * 32
    return Keys(PeerId(str(ID.from_pubkey(create_new_key_pair(seed).public_key))), "0x", seed, seed, 1)


ALICE, BOB, CAROL = (make_keys(number) for number in (1, 2, 3))
STAKES = {keys.peer: 100 for keys in (ALICE, BOB, CAROL)}


@dataclass
class Member:
    """One node's gateway and desk, with everything it said of its epochs."""

    transport: Libp2pTransport
    gateway: Gateway
    desk: ReceiptDesk
    epoch: int = 5
    said: list[ServiceReport] = field(default_factory=list)


@asynccontextmanager
async def member(
    keys: Keys, folder: Path, engine: Engine, bootstrap: list[str], is_serving: bool
) -> AsyncIterator[Member]:
    pair = create_new_key_pair(keys.peer_seed)
    transport = Libp2pTransport(pair, "/ip4/127.0.0.1/tcp/0", bootstrap, NETWORK)
    streams = ReplicaStreams(transport)
    clock = lambda: Millis(int(trio.current_time() * 1000))  # noqa: E731
    backend = Batcher(engine) if is_serving else None
    registry = CollectorRegistry()
    with Store(folder) as store:
        async with transport, trio.open_nursery() as nursery:
            gateway = Gateway(keys.peer, ServingConfig(), backend, engine.vocabulary, streams, registry, clock)

            async def publish(report: ServiceReport) -> None:
                made.said.append(report)

            desk = ReceiptDesk(
                keys,
                NETWORK,
                streams,
                publish,
                store.save_receipt,
                store.load_receipts(),
                lambda: made.epoch if made else 5,
                lambda: STAKES,
                CollectorRegistry(),
            )
            made = Member(transport, gateway, desk)
            gateway.on_answer.append(desk.on_answer)
            transport.set_stream_handler(
                lambda peer, data, send: answer_stream(gateway, NO_CHECKER, data, send, peer, desk.on_offer)
            )
            nursery.start_soon(desk.run)
            yield made
            nursery.cancel_scope.cancel()


async def wait_until(is_so) -> None:
    with trio.fail_after(10):
        while not is_so():
            await trio.sleep(0.02)


def test_an_answer_leaves_a_receipt_on_both_sides_that_outlives_them_and_pays(tmp_path: Path) -> None:
    engine = make_engine()
    request = GenerateRequest(V1, prompt_of(engine), (), 12, 0, 1000, 0, 0)

    async def ask(alice: Member, num: int) -> None:
        alice.gateway.on_presence(BOB.peer, presence)
        for _ in range(num):
            async with aclosing(alice.gateway.complete(request, "laptop")) as tokens:
                async for _ in tokens:
                    pass

    async def main() -> None:
        nonlocal presence
        async with member(BOB, tmp_path / "bob", engine, [], True) as bob:
            presence = bob.gateway.presence()
            address = bob.transport.addresses()
            async with member(ALICE, tmp_path / "alice", engine, [address[0]], False) as alice:
                await ask(alice, 2)
                await wait_until(lambda: bob.desk.to_status()["earned_tokens"] == 24)
                assert alice.desk.to_status()["given_tokens"] == 24
            # Alice's node starts again: her next receipt goes on from the sum.
            async with member(ALICE, tmp_path / "alice", engine, [address[0]], False) as alice:
                await ask(alice, 1)
                await wait_until(lambda: bob.desk.to_status()["earned_tokens"] == 36)
        async with member(BOB, tmp_path / "bob", engine, [], True) as bob:  # so does Bob's
            (sealed,) = bob.desk._sealed.values()
            receipt = decode_receipt(sealed.body)
            assert (receipt.number, receipt.num_tokens, receipt.total_tokens) == (3, 12, 36)
            assert receipt.client == compute_digest(f"p2pfm/1 client {ALICE.peer} laptop".encode())
            async with member(CAROL, tmp_path / "carol", engine, [], False) as carol:
                await trio.to_thread.run_sync(carol.desk.on_report, BOB.peer, ServiceReport(5, (sealed,)))
                carol.epoch = 6
                assert carol.desk.to_status()["shares"] == {"5": {BOB.peer: 0}}  # one gateway is not two thirds
                theirs = seal(CAROL, NETWORK, msgspec.structs.replace(receipt, gateway=CAROL.peer))
                await trio.to_thread.run_sync(carol.desk.on_report, BOB.peer, ServiceReport(5, (theirs,)))
                assert carol.desk.to_status()["shares"] == {"5": {BOB.peer: ONE * 2 // 3}}

    presence = None
    trio.run(main)


@pytest.mark.parametrize(
    "change",
    [
        {"replica": CAROL.peer},
        {"epoch": 9},
        {"gateway": CAROL.peer},  # sealed by Alice
        {"num_tokens": 100},
    ],
)
def test_a_replica_takes_no_receipt_that_is_not_its_own(tmp_path: Path, change: dict) -> None:
    zeros = Digest(bytes(32))
    good = Receipt(ALICE.peer, BOB.peer, 5, 1, zeros, zeros, 7, 7, zeros)
    with Store(tmp_path) as store:
        desk = ReceiptDesk(
            BOB, NETWORK, None, None, store.save_receipt, (), lambda: 5, lambda: STAKES, CollectorRegistry()
        )
        with pytest.raises(Reject):
            desk.on_offer(seal(ALICE, NETWORK, msgspec.structs.replace(good, **change)))
        forged = msgspec.structs.replace(seal(CAROL, NETWORK, good), author=ALICE.peer)
        with pytest.raises(Reject):
            desk.on_offer(forged)
        with pytest.raises(Reject):
            desk.on_report(BOB.peer, ServiceReport(5, (forged,)))
        assert desk.on_offer(seal(ALICE, NETWORK, good)).signature
        assert [decode_receipt(sealed.body) for sealed in store.load_receipts()] == [good]
        assert encode(good) == store.load_receipts()[0].body
