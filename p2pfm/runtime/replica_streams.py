"""Streams of tokens between peers: the gateway's `ReplicaTransport` on libp2p, and the replica's answer to it.

Knows frames and their messages; nothing of models, routing or clients.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import trio

from p2pfm.errors import PeerUnreachable, Reject
from p2pfm.messages import GenerateRequest, TokenChunk, decode_reply, decode_request, encode
from p2pfm.runtime.gateway import Gateway
from p2pfm.runtime.network.transport import Libp2pTransport
from p2pfm.types import PeerId

FRAME_BYTES_MAX = 64 * 1024
"""A chunk is at most 4,096 token ids of at most 9 bytes."""

END_S = 1.0
"""How long a replica may take to close its stream after the last chunk, before it is reset."""


class ReplicaStreams:
    """`runtime.gateway.ReplicaTransport` over the node's libp2p transport."""

    def __init__(self, transport: Libp2pTransport) -> None:
        """`transport`: running, or entered before the first request."""
        self._transport = transport

    async def generate(self, peer: PeerId, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Chunks of `peer`; closing the generator early makes the replica stop.

        Raises:
            PeerUnreachable: no connection, or it broke.
            Reject: bytes that are not a chunk.
        """
        async with self._transport.open_stream_request(peer, encode(request)) as frames:
            async for frame in frames:
                chunk = decode_reply(frame, FRAME_BYTES_MAX)
                if not isinstance(chunk, TokenChunk):
                    raise Reject(f"expected a chunk of tokens, got {type(chunk).__name__}")
                if chunk.finish:  # read the stream's own end, so that it closes and is not reset
                    with trio.move_on_after(END_S):
                        await _read_end(peer, frames.__anext__)
                yield chunk


async def _read_end(peer: PeerId, read: Callable[[], Awaitable[bytes]]) -> None:
    try:
        await read()
    except (StopAsyncIteration, PeerUnreachable):
        return  # its last chunk is here: how it goes does not matter
    raise Reject(f"expected nothing after the last chunk, got more from {peer}")


async def answer_generate(gateway: Gateway, data: bytes, send: Callable[[bytes], Awaitable[None]]) -> None:
    """Answer one streamed request of another peer; cancel it to stop the generation within a step.

    Raises:
        Reject: `data` is not a request to generate.
    """
    request = decode_request(data)
    if not isinstance(request, GenerateRequest):
        raise Reject(f"expected a request to generate, got {type(request).__name__}")
    async with aclosing(gateway.serve(request)) as chunks:
        async for chunk in chunks:
            await send(encode(chunk))
