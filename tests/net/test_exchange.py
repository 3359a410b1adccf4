"""Payloads between peers: chunks, several providers, liars, cuts, budgets."""

import pytest
import trio
from net_hosts import network
from net_peer_process import Blobs, make_blob

from p2pfm.errors import Reject
from p2pfm.messages import BlobReply, BlobRequest, decode_request, encode
from p2pfm.runtime.network.exchange import CHUNK_BYTES, answer_blob, fetch
from p2pfm.runtime.network.transport import Libp2pTransport
from p2pfm.types import PeerId, compute_digest


def serve_blobs(peer: Libp2pTransport, *sizes: int) -> None:
    blobs = Blobs(*sizes)

    async def answer(asker: PeerId, data: bytes) -> bytes:
        request = decode_request(data)
        assert isinstance(request, BlobRequest)
        return encode(answer_blob(blobs, lambda digest: True, request))

    peer.set_handler(answer)


@pytest.mark.parametrize("size", [1, CHUNK_BYTES, 1_000_000, 5_000_000])
def test_a_blob_is_fetched_from_the_provider_that_has_it(size: int) -> None:
    async def main() -> None:
        async with network(3) as (asker, empty, server):
            serve_blobs(empty)
            serve_blobs(server, size)
            data = make_blob(size)
            providers = (empty.peer_id, server.peer_id)
            assert await fetch(asker, compute_digest(data), providers, size) == data
            assert asker.counters["blames"] == 0

    trio.run(main)


def test_a_liar_is_named_and_an_honest_provider_after_it_still_serves() -> None:
    async def lie(peer: PeerId, data: bytes) -> bytes:
        request = decode_request(data)
        assert isinstance(request, BlobRequest)
        total = 300_000
        return encode(BlobReply(total, bytes(min(CHUNK_BYTES, total - request.start))))

    async def main() -> None:
        async with network(3) as (asker, liar, server):
            liar.set_handler(lie)
            serve_blobs(server, 1_000_000)
            data = make_blob(1_000_000)
            digest = compute_digest(data)
            with pytest.raises(Reject, match=liar.peer_id[-6:]):
                await fetch(asker, digest, (liar.peer_id,), 1_000_000)
            assert await fetch(asker, digest, (liar.peer_id, server.peer_id), 1_000_000) == data

    trio.run(main)


def test_several_providers_give_one_blob_together() -> None:
    async def main() -> None:
        async with network(4) as (asker, *servers):
            for server in servers:
                serve_blobs(server, 5_000_000)
            data = make_blob(5_000_000)
            providers = [server.peer_id for server in servers]
            assert await fetch(asker, compute_digest(data), providers, 5_000_000) == data
            assert all(server.counters["requests_served"] >= 3 for server in servers)
            assert asker.counters["request_bytes_in"] < 5_000_000 + CHUNK_BYTES, "no chunk comes twice"

    trio.run(main)


def test_a_provider_that_stops_at_half_way_costs_the_chunks_in_flight() -> None:
    async def main() -> None:
        async with network(3) as (asker, server, dying):
            serve_blobs(server, 5_000_000)
            blobs, num_given = Blobs(5_000_000), 0

            async def give_some(peer: PeerId, data: bytes) -> bytes:
                nonlocal num_given
                num_given += 1
                if num_given > 5:
                    raise Reject("dead")
                request = decode_request(data)
                assert isinstance(request, BlobRequest)
                return encode(answer_blob(blobs, lambda digest: True, request))

            dying.set_handler(give_some)
            data = make_blob(5_000_000)
            providers = (dying.peer_id, server.peer_id)
            assert await fetch(asker, compute_digest(data), providers, 5_000_000) == data
            assert num_given > 5
            assert asker.counters["request_bytes_in"] < 5_000_000 + CHUNK_BYTES

    trio.run(main)


def test_who_lies_about_the_size_first_does_not_keep_others_from_giving() -> None:
    async def lie(peer: PeerId, data: bytes) -> bytes:
        request = decode_request(data)
        assert isinstance(request, BlobRequest)
        return encode(BlobReply(600_000, bytes(min(CHUNK_BYTES, 600_000 - request.start))))

    async def main() -> None:
        async with network(3) as (asker, liar, server):
            liar.set_handler(lie)
            serve_blobs(server, 1_000_000)
            data = make_blob(1_000_000)
            providers = (liar.peer_id, server.peer_id)
            assert await fetch(asker, compute_digest(data), providers, 1_000_000) == data

    trio.run(main)


def test_a_blob_announced_above_its_bound_is_refused_before_it_comes() -> None:
    async def main() -> None:
        async with network(2) as (asker, server):
            serve_blobs(server, 5_000_000)
            with pytest.raises(Reject, match="at most 1000000"):
                await fetch(asker, compute_digest(make_blob(5_000_000)), (server.peer_id,), 1_000_000)
            assert asker.counters["request_bytes_in"] < 2 * CHUNK_BYTES

    trio.run(main)


def test_what_is_not_served_yet_is_not_given() -> None:
    blobs = Blobs(1000)
    digest = compute_digest(make_blob(1000))
    request = BlobRequest(digest, 0, 1000)
    assert answer_blob(blobs, lambda d: False, request) == BlobReply(0, b"")
    assert answer_blob(blobs, lambda d: d == digest, request).chunk == make_blob(1000)
