"""A stream by its name: what of a completion is kept with it, and the route where a client goes on reading it.

Knows HTTP and completions; no peer and no model. Any gateway answers for any gateway's stream: `StreamKeeper` finds it.
"""

from collections.abc import Callable
from dataclasses import replace

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from p2pfm.errors import Reject
from p2pfm.runtime.gateway import Gateway
from p2pfm.runtime.openai_wire import ApiError, Completion, Stop
from p2pfm.runtime.openapi import Operation
from p2pfm.runtime.stream_keeper import StreamKeeper
from p2pfm.types import DIGEST_BYTES, Digest

PREFIXES = ("chatcmpl-", "cmpl-")
"""Of OpenAI's names; ours have the digest in hex after it."""


class KeptAnswer(msgspec.Struct, frozen=True):
    """`KeepStream.state`: what the answer's text needs beside its tokens."""

    model: str
    stops: tuple[Stop, ...]
    is_chat: bool
    wants_usage: bool
    created_s: int


class StreamApi:
    """Keeps this node's streamed completions, and gives them out again."""

    def __init__(
        self, keeper: StreamKeeper, gateway: Gateway, answer: Callable[[Request, Completion], Response]
    ) -> None:
        """`answer`: runs a completion, from its `num_received` on."""
        self.keeper, self._gateway, self._answer = keeper, gateway, answer

    def routes(self) -> list[Route]:
        """What `HttpApi` mounts."""
        return [Route("/v1/streams/{name}", self.resume)]

    def start(self, completion: Completion, now_s: int) -> Completion:
        """The same with a name, under which it is kept, and copied until `keeper.end`."""
        if completion.stream is None:
            told = (completion.model, completion.stops, completion.is_chat, completion.wants_usage)
            state = msgspec.json.encode(KeptAnswer(*told, now_s))
            is_private = self._gateway.is_private(completion.request.version)
            completion = replace(
                completion, stream=self.keeper.begin(completion.request, state, is_private=is_private), created_s=now_s
            )
        assert completion.stream is not None
        self.keeper.start(completion.stream)
        return completion

    async def resume(self, request: Request) -> Response:
        """GET /v1/streams/NAME: the events after the one that the client had last (`after`, or Last-Event-ID)."""
        name = request.path_params["name"]
        told = request.query_params.get("after", request.headers.get("last-event-id", "0"))
        if not (told.isascii() and told.isdecimal() and len(told) <= AFTER_DIGITS_MAX):
            raise ApiError(
                400, f"after: expected the id of the last event read, got {told[:80]!r}.", "invalid_value", "after"
            )
        stream = _read_name(name)
        kept = None if stream is None else await self.keeper.find(stream)
        if stream is None or kept is None:
            message = (
                f"No stream {name[:100]!r} is kept here or with this node's peers; streams are forgotten some minutes "
                "after their last token."
            )
            raise ApiError(404, message, "stream_not_found", "name")
        try:
            state = msgspec.json.decode(kept.state, type=KeptAnswer)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Reject(f"expected a stream of this kind of gateway, got {error}") from error
        self.keeper.hold(kept)
        completion = Completion(
            kept.request,
            state.model,
            state.stops,
            state.is_chat,
            is_stream=True,
            wants_usage=state.wants_usage,
            stream=stream,
            created_s=state.created_s,
            num_received=int(told),
        )
        return self._answer(request, completion)


AFTER_DIGITS_MAX = 9

OPERATIONS = (
    Operation(
        "/v1/streams/{name}",
        "Go on reading a stream, also one that another node began; `after` or Last-Event-ID: the last event read",
        "text/event-stream",
        errors=(400, 404, 429, 504),
        parameters={"name": "The `id` of a streamed answer's events"},
    ),
)


def _read_name(name: str) -> Digest | None:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    try:
        stream = Digest(bytes.fromhex(name))
    except ValueError:
        return None
    return stream if len(stream) == DIGEST_BYTES else None
