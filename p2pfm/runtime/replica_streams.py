"""Streams of tokens between peers: the gateway's `ReplicaTransport` on libp2p, and the replica's answer to it.

Knows frames and their messages; nothing of models, routing or clients.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import trio

from p2pfm.errors import PeerUnreachable, Reject
from p2pfm.messages import (
    CheckReply,
    CheckRequest,
    Envelope,
    GenerateRequest,
    ReceiptOffer,
    ReceiptReply,
    Reply,
    TokenChunk,
    Vouch,
    VouchReply,
    decode_reply,
    decode_request,
    encode,
)
from p2pfm.runtime.checker import Checker
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

    async def check(self, peer: PeerId, request: CheckRequest) -> CheckReply:
        """`peer`'s word on an answer. Raises as `generate`."""
        reply = await self._ask(peer, request)
        if not isinstance(reply, CheckReply):
            raise Reject(f"expected a check, got {type(reply).__name__}")
        return reply

    async def vouch(self, peer: PeerId, vouch: Vouch) -> VouchReply:
        """`peer`'s signature under its own answer. Raises as `generate`."""
        reply = await self._ask(peer, vouch)
        if not isinstance(reply, VouchReply):
            raise Reject(f"expected a vouch, got {type(reply).__name__}")
        return reply

    async def offer(self, peer: PeerId, sealed: Envelope) -> ReceiptReply:
        """`peer`'s signature under a receipt for it. Raises as `generate`."""
        reply = await self._ask(peer, ReceiptOffer(sealed))
        if not isinstance(reply, ReceiptReply):
            raise Reject(f"expected a receipt's signature, got {type(reply).__name__}")
        return reply

    async def _ask(self, peer: PeerId, request: CheckRequest | Vouch | ReceiptOffer) -> Reply:
        """The one frame of its answer."""
        async with self._transport.open_stream_request(peer, encode(request)) as frames:
            async for frame in frames:
                with trio.move_on_after(END_S):
                    await _read_end(peer, frames.__anext__)
                return decode_reply(frame, FRAME_BYTES_MAX)
        raise PeerUnreachable("the replica closed the stream without an answer")


async def _read_end(peer: PeerId, read: Callable[[], Awaitable[bytes]]) -> None:
    try:
        await read()
    except (StopAsyncIteration, PeerUnreachable):
        return  # its last chunk is here: how it goes does not matter
    raise Reject(f"expected nothing after the last chunk, got more from {peer}")


async def answer_stream(
    gateway: Gateway,
    checker: Checker,
    data: bytes,
    send: Callable[[bytes], Awaitable[None]],
    asker: PeerId | None = None,
    take_receipt: Callable[[Envelope], ReceiptReply] = lambda sealed: ReceiptReply(b""),
) -> None:
    """Answer one streamed request of another peer, `asker`; cancel it to stop the work within a step.

    Raises:
        Reject: `data` is not a request to generate, check, vouch or take a receipt.
    """
    match decode_request(data):
        case GenerateRequest() as request:
            await _answer_generate(gateway, checker, request, send, asker)
        case CheckRequest() as request:
            await send(encode(await checker.check(request, asker)))
        case Vouch() as vouch:
            await send(encode(checker.vouch(vouch)))
        case ReceiptOffer(sealed=sealed):
            await send(encode(await trio.to_thread.run_sync(take_receipt, sealed)))
        case other:
            raise Reject(f"expected a request to generate, check or vouch, got {type(other).__name__}")


async def _answer_generate(
    gateway: Gateway,
    checker: Checker,
    request: GenerateRequest,
    send: Callable[[bytes], Awaitable[None]],
    asker: PeerId | None,
) -> None:
    given: list[int] = []
    async with aclosing(gateway.serve(request, asker)) as chunks:
        async for chunk in chunks:
            given.extend(chunk.tokens)
            if chunk.finish:
                checker.on_given(request, tuple(given))
            await send(encode(chunk))
