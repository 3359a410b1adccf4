"""A peer by another implementation speaks with ours: js-libp2p, with @msgpack/msgpack as its reader (docs/wire.md)."""

import json
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import trio
from net_hosts import NETWORK, make_transport
from net_peer_process import Blobs, make_blob

from p2pfm.messages import (
    Announcement,
    BlobRequest,
    DeclaredPrivacy,
    Envelope,
    Message,
    ScoreCommit,
    decode_envelope,
    decode_request,
    encode,
)
from p2pfm.runtime.envelopes import open_envelope, seal, verify_envelope
from p2pfm.runtime.keys import Keys
from p2pfm.runtime.network.exchange import answer_blob
from p2pfm.runtime.network.transport import Libp2pTransport
from p2pfm.types import Digest, MemberIndex, PeerId, Round, compute_digest

FOLDER = Path(__file__).with_name("js")
NODE = shutil.which("node")
BLOB_BYTES = 300_000  # two chunks
NUMBER = 1
"""Our host's identity."""

pytestmark = pytest.mark.skipif(
    NODE is None or not (FOLDER / "node_modules" / "libp2p").exists(),
    reason="needs Node.js and `npm install --prefix tests/net/js`; `make test` has both",
)


class JsPeer:
    """The other peer's process: lines of JSON."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._buffer = b""

    async def expect(self, event: str) -> dict[str, Any]:
        """What it says next, which must be `event`."""
        assert self._process.stdout is not None
        while b"\n" not in self._buffer:
            data = await self._process.stdout.receive_some()
            assert data, f"the js peer ended before it said {event!r} (see its error above)"
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        said: dict[str, Any] = json.loads(line)
        assert said["event"] == event
        return said


def make_keys(transport: Libp2pTransport) -> Keys:
    """Enough of a node's keys to seal envelopes as this transport's peer."""
    return Keys(transport.peer_id, "", bytes([NUMBER]) * 32, b"", 1)


def serve_one_blob(transport: Libp2pTransport) -> None:
    blobs = Blobs(BLOB_BYTES)

    async def answer(asker: PeerId, data: bytes) -> bytes:
        request = decode_request(data)
        assert isinstance(request, BlobRequest)
        return encode(answer_blob(blobs, lambda digest: True, request))

    transport.set_handler(answer)


def test_a_js_peer_connects_identifies_pings_hears_fetches_and_speaks() -> None:
    async def main() -> None:
        async with make_transport(NUMBER) as ours:
            serve_one_blob(ours)
            ours.set_gate(lambda data: verify_envelope(NETWORK, decode_envelope(data)))
            announcement = Announcement(
                round=Round(41),
                peer=ours.peer_id,
                base=compute_digest(b"base"),
                payload=compute_digest(b"payload"),
                payload_bytes=70_000,
                num_tokens=2**40,
                privacy=DeclaredPrivacy(2_500_000, 10_000_000),
            )
            async with trio.open_nursery() as nursery:
                process = await nursery.start(start_js, ours)
                try:
                    with trio.fail_after(90):
                        await speak(ours, JsPeer(process), announcement)
                finally:
                    nursery.cancel_scope.cancel()
            assert ours.counters["blames"] == 0

    trio.run(main)


async def start_js(ours: Libp2pTransport, task_status: trio.TaskStatus[trio.Process]) -> None:
    assert NODE is not None
    topic = f"/p2pfm/{NETWORK.hex()[:32]}"
    digest = compute_digest(make_blob(BLOB_BYTES))
    command = [NODE, str(FOLDER / "peer.mjs"), ours.addresses()[0], topic, NETWORK.hex(), digest.hex()]
    process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        task_status.started(process)
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                await pipe.aclose()


async def speak(ours: Libp2pTransport, js: JsPeer, announcement: Announcement) -> None:
    identified = await js.expect("identified")
    assert identified["peer"] == ours.peer_id
    assert {"/p2pfm/request/1", "/p2pfm/stream/1", "/p2pfm/peers/2", "/meshsub/1.1.0"} <= set(identified["protocols"])
    assert (identified["encryption"], identified["multiplexer"]) == ("/noise", "/yamux/1.0.0")
    assert 0 <= (await js.expect("pinged"))["rttMs"] < 10_000
    joined = await js.expect("joined")
    assert joined["subscribers"] == [ours.peer_id]
    assert ours.is_gossiping_with(identified["me"])

    await ours.publish(encode(seal(make_keys(ours), NETWORK, announcement)))
    heard = await js.expect("announcement")
    assert heard["from"] == heard["author"] == ours.peer_id
    assert heard["isSigned"] is True
    assert ours._pubsub.seen_messages.has(bytes.fromhex(heard["id"])), "both sides name a message alike"
    assert announcement.privacy is not None
    assert heard["fields"] == {
        "tag": "announcement",
        "round": announcement.round,
        "peer": announcement.peer,
        "base": announcement.base.hex(),
        "payload": announcement.payload.hex(),
        "payloadBytes": announcement.payload_bytes,
        "numTokens": announcement.num_tokens,
        "privacy": [announcement.privacy.epsilon_micro, announcement.privacy.delta_pico],
    }

    blob = await js.expect("blob")
    assert blob == {"event": "blob", "bytes": BLOB_BYTES, "sha256": sha256(make_blob(BLOB_BYTES)).hexdigest()}

    await js.expect("published")
    envelope, message = await receive_one(ours, NETWORK)
    assert envelope.author == identified["me"]
    assert message == ScoreCommit(Round(41), MemberIndex(3), compute_digest(b"scores"))
    assert encode(message) == envelope.body, "another library writes the same bytes"


async def receive_one(ours: Libp2pTransport, network: Digest) -> tuple[Envelope, Message]:
    """The next gossip message that passed the gate, opened."""
    forwarder, data = await ours.gossip.receive()
    envelope, message = open_envelope(network, data)
    assert forwarder == envelope.author
    return envelope, message
