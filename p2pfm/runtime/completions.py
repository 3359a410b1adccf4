"""Completions over HTTP: which model a name means, and answers as text, whole or one JSON event a piece.

Knows no peer's transport and no model: tokens come from the `Gateway`, text from the `TextCodec`. A client that goes
away cancels its generation.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import msgspec
import trio
from prometheus_client import CollectorRegistry, Counter, Gauge
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from p2pfm.config import HttpConfig
from p2pfm.errors import Reject, WorldError
from p2pfm.messages import GenerateRequest
from p2pfm.runtime.admission import Admission
from p2pfm.runtime.gateway import Busy, Gateway, Tokens
from p2pfm.runtime.http_replies import get_client, make_error_of, make_json, read_body, send_rest, send_whole
from p2pfm.runtime.model_names import ModelNames
from p2pfm.runtime.openai_answers import Choice, LogprobQueue, Piece, Writer, make_origin
from p2pfm.runtime.openai_wire import (
    CHOICES_MAX,
    LAST_EVENT,
    ApiError,
    Bounds,
    ChatBody,
    Completion,
    TextBody,
    build_completion,
    decode_body,
    write_event,
)
from p2pfm.runtime.stream_api import StreamApi
from p2pfm.runtime.stream_keeper import StreamKeeper
from p2pfm.runtime.text import TextCodec
from p2pfm.serving.session import Detokenizer, Finish, Session, StopStrings
from p2pfm.types import Digest, Millis

ENCODED_MAX = 2
"""Prompts that are turned into tokens at once: the node's other work needs its threads too."""

ALIVE_S = 1.0
ALIVE = b": waiting for a replica\n\n"
"""What a stream says when it has nothing else to say for so long, so that its reader knows a slow node from a dead one:
a comment of server-sent events, which every client passes over."""

SIBLING_S = 0.05
"""How often a choice that found all replicas busy asks again while another choice of its request runs."""

STRANGER_S = 1.0
"""How often it does when none runs: as a client does that obeys our `retry-after`, since replicas answer each time."""


class Completions:
    """The routes under /v1 of one node."""

    def __init__(
        self,
        gateway: Gateway,
        codec: TextCodec,
        model: str,
        registry: CollectorRegistry,
        now_ms: Callable[[], Millis],
        bounds: HttpConfig,
        keeper: StreamKeeper | None = None,
    ) -> None:
        """`model`: the backbone's name; `now_ms`: the wall clock; `keeper`: keeps streams for clients who come back."""
        self._gateway, self._codec, self._names = gateway, codec, ModelNames(model, gateway)
        self._now_ms, self._bounds = now_ms, bounds
        self._asked = Bounds(
            bounds.prompt_tokens_max, min(CHOICES_MAX, bounds.requests_max, bounds.client_requests_max)
        )
        self._admission = Admission(bounds)
        self._kept = None if keeper is None else StreamApi(keeper, gateway, self._resume)
        self._encoding = trio.CapacityLimiter(ENCODED_MAX)
        self._requests = Counter("p2pfm_http_completions", "Completions by outcome", ["outcome"], registry=registry)
        waiting = Gauge("p2pfm_http_waiting", "Completions that wait for their turn", registry=registry)
        waiting.set_function(lambda: self._admission.num_waiting)

    def routes(self) -> list[Route]:
        """What `HttpApi` mounts."""
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.text, methods=["POST"]),
            *(self._kept.routes() if self._kept is not None else ()),
        ]

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return make_json({"object": "list", "data": [self._describe(*pair) for pair in self._names.names().items()]})

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        version, _ = await self._resolve(name)
        return make_json(self._describe(name, version))

    async def _resolve(self, name: str) -> tuple[Digest, float]:
        """The version that `name` means, and the seconds that it took: a user's adapter may come from peers first."""
        began_s = trio.current_time()
        with trio.move_on_after(self._bounds.request_s_max):
            return await self._names.resolve(name), trio.current_time() - began_s
        raise ApiError(
            504, f"model: it was not here within {self._bounds.request_s_max:g} s; ask again later.", "timeout", "model"
        )

    def _describe(self, name: str, version: Digest) -> dict[str, Any]:
        told = {"id": name, "object": "model", "created": self._now_ms() // 1000, "owned_by": "p2pfm"}
        return {**told, "p2pfm": {"version": version.hex()}}

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = decode_body(await read_body(request, self._bounds), ChatBody)
        version, spent_s = await self._resolve(body.model)
        turns = [message.plain() for message in body.messages]
        try:
            prompt = await trio.to_thread.run_sync(self._codec.encode_chat, turns, limiter=self._encoding)
        except Reject as error:
            raise ApiError(400, f"messages: {error}.", "invalid_value", "messages") from error
        return self._make_answer(request, body, prompt, version, spent_s)

    async def text(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = decode_body(await read_body(request, self._bounds), TextBody)
        version, spent_s = await self._resolve(body.model)
        prompt = body.one_prompt()
        if isinstance(prompt, str):
            prompt = await trio.to_thread.run_sync(self._codec.encode, prompt, limiter=self._encoding)
        return self._make_answer(request, body, prompt, version, spent_s)

    def _make_answer(
        self, request: Request, body: ChatBody | TextBody, prompt: tuple[int, ...], version: Digest, spent_s: float
    ) -> "_Answer":
        client = get_client(request)
        completion = build_completion(body, prompt, version, self._codec.vocabulary, self._asked, client)
        return self._resume(request, completion, spent_s)

    def _resume(self, request: Request, completion: Completion, spent_s: float = 0.0) -> "_Answer":
        address = request.client.host if request.client is not None else ""
        return _Answer(self, completion, get_client(request) or address, spent_s)

    async def answer(self, completion: Completion, client: str, spent_s: float, send: Send) -> None:
        """Generate, and write the answer or an error. Returns when all is written; cancel it when the client leaves.

        `client`: whose share of this node it takes; `spent_s`: of `request_s_max`, before it was known what to do.
        """
        answer = self._answer_stream if completion.is_stream else self._answer_whole
        outcome = "cancelled"
        started: list[None] = []  # of a stream, with its first piece: an error before that has a status of its own
        try:
            async with self._admission.admit(client, completion.num_choices):
                with trio.move_on_after(self._bounds.request_s_max - spent_s) as patience:
                    outcome = await answer(completion, send, started)
            if patience.cancelled_caught:
                outcome = "late"
                message = f"The answer took longer than {self._bounds.request_s_max:g} s; ask for fewer tokens."
                await self._send_error(ApiError(504, message, "timeout"), send, started)
        except Busy as error:
            outcome = "busy"
            await send_whole(send, make_error_of(error))
        finally:
            self._requests.labels(outcome).inc()

    async def _answer_whole(self, completion: Completion, send: Send, started: list[None]) -> str:
        choices = [Choice() for _ in range(completion.num_choices)]
        async with self._open(completion) as pieces:
            async for piece in pieces:
                if not isinstance(piece, Piece):
                    return await self._send_error(piece, send, started)
                choices[piece.index].add(piece)
        body = self._writer(completion).whole(choices)
        await send_whole(send, Response(body, media_type="application/json"))
        return "ok"

    async def _answer_stream(self, completion: Completion, send: Send, started: list[None]) -> str:
        if self._kept is None or completion.num_choices > 1:
            return await self._write_stream(completion, send, started)
        completion = self._kept.start(completion, self._now_ms() // 1000)
        assert completion.stream is not None
        try:
            return await self._write_stream(completion, send, started)
        finally:
            self._kept.keeper.end(completion.stream)

    async def _write_stream(self, completion: Completion, send: Send, started: list[None]) -> str:
        writer = self._writer(completion)
        origin = make_origin(self._gateway.local, completion.request.version, 0)
        num_tokens = dict.fromkeys(range(completion.num_choices), 0)
        is_resumed = completion.num_received > 0
        async with self._open(completion) as pieces:
            while True:
                with trio.move_on_after(ALIVE_S) as patience:
                    piece = await anext(pieces, None)
                if patience.cancelled_caught:
                    if is_resumed and not started:
                        await self._start_stream(completion, send, started)
                    if started:
                        await send({"type": "http.response.body", "body": ALIVE, "more_body": True})
                    continue
                if piece is None:
                    break
                if not isinstance(piece, Piece):
                    return await self._send_error(piece, send, started)
                num_tokens[piece.index] = piece.num_tokens
                is_shown = piece.text or piece.finish or piece.logprobs
                if not is_shown or piece.num_tokens <= completion.num_received:
                    continue
                if not started:
                    await self._start_stream(completion, send, started)
                origin = piece.origin
                await send({"type": "http.response.body", "body": writer.chunk(piece), "more_body": True})
        if not started:  # the client had all but the end
            await self._start_stream(completion, send, started)
        usage = writer.usage_chunk(sum(num_tokens.values()), origin) if completion.wants_usage else b""
        await send_rest(send, usage + LAST_EVENT)
        return "ok"

    async def _start_stream(self, completion: Completion, send: Send, started: list[None]) -> None:
        if self._kept is not None and completion.stream is not None:
            await self._kept.keeper.wait_copied(completion.stream)  # the client hears its name only now
        await send(START_STREAM)
        started.append(None)

    async def _send_error(self, error: Reject | WorldError | ApiError, send: Send, started: list[None]) -> str:
        response = make_error_of(error)
        await (send_rest(send, write_event(bytes(response.body))) if started else send_whole(send, response))
        return "busy" if isinstance(error, Busy) else "error"

    def _writer(self, completion: Completion) -> Writer:
        return Writer(completion, completion.created_s or self._now_ms() // 1000, self._codec.get_bytes)

    # --- choices ------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _open(
        self, completion: Completion
    ) -> AsyncIterator[trio.MemoryReceiveChannel[Piece | Reject | WorldError]]:
        """All choices' pieces as they come, or the error that ends them all. Their work ends with the context."""
        running: set[int] = set()
        async with trio.open_nursery() as nursery:
            into, pieces = trio.open_memory_channel[Piece | Reject | WorldError](0)
            async with into:
                for index in range(completion.num_choices):
                    nursery.start_soon(self._feed, completion, index, running, into.clone())
            yield pieces
            nursery.cancel_scope.cancel()

    async def _feed(
        self,
        completion: Completion,
        index: int,
        running: set[int],
        into: trio.MemorySendChannel[Piece | Reject | WorldError],
    ) -> None:
        give_up = trio.current_time() + self._bounds.queue_s_max
        async with into:
            while True:
                running.add(index)
                try:
                    async with aclosing(self._pieces(completion, index)) as pieces:
                        async for piece in pieces:
                            await into.send(piece)
                    running.discard(index)
                    return
                except Busy as error:  # before its first token; room comes when another choice, or another's, ends
                    running.discard(index)
                    left_s = give_up - trio.current_time()
                    if left_s <= 0:
                        await into.send(error)
                        return
                    await trio.sleep(min(left_s, SIBLING_S if running else STRANGER_S))
                except (Reject, WorldError) as error:
                    await into.send(error)
                    return

    async def _pieces(self, completion: Completion, index: int) -> AsyncGenerator[Piece, None]:
        """Text of one choice as it becomes certain; the last piece has the finish."""
        request = completion.choice_request(index)
        detokenizer, stops = Detokenizer(self._codec.decode), StopStrings(completion.stops)
        logprobs = LogprobQueue(self._codec.get_bytes, self._codec.vocabulary.ends)
        num_tokens = 0
        async with aclosing(self._tokens(request, completion.client)) as stream:
            async for new in stream:
                if self._kept is not None and completion.stream is not None:
                    self._kept.keeper.extend(completion.stream, num_tokens, new.tokens)
                origin = make_origin(new.replica, new.version, new.num_replaced)
                # One by one: what is shown after a token may not depend on how many came at once.
                for index_new, token in enumerate(new.tokens):
                    num_tokens += 1
                    end = new.finish if index_new + 1 == len(new.tokens) else ""
                    logprobs.push((token,), new.logprobs[index_new : index_new + 1])
                    text = stops.push(detokenizer.push((token,)))
                    if end and not stops.is_stopped:
                        text += stops.push(detokenizer.flush())
                        text += stops.flush()
                    finish: Finish = "stop" if stops.is_stopped else end
                    told = logprobs.pop(text, is_end=bool(finish) and not stops.is_stopped)
                    yield Piece(index, text, finish, num_tokens, origin, told)
                    if finish:
                        return

    async def _tokens(self, request: GenerateRequest, client: str) -> AsyncGenerator[Tokens, None]:
        """All tokens of an answer: what was generated before, then the rest.

        Log-probabilities are not kept, so an answer that has them is generated anew.
        """
        kept = request.emitted
        if request.num_logprobs:
            request = msgspec.structs.replace(request, emitted=())
        elif kept:
            finish = Session(request, self._codec.vocabulary).finish
            yield Tokens(kept, self._gateway.local, request.version, 0, finish)
        position = len(request.emitted)
        async with aclosing(self._gateway.complete(request, client)) as stream:
            async for new in stream:
                again = kept[position : position + len(new.tokens)]
                if new.tokens[: len(again)] != again:
                    raise WorldError("the replica would go on with other tokens than this stream began with")
                position += len(new.tokens)
                yield new


class _Answer(Response):
    """Runs a completion while it watches for the client to go away."""

    def __init__(self, api: Completions, completion: Completion, client: str, spent_s: float) -> None:
        super().__init__()
        self._api, self._completion, self._client, self._spent_s = api, completion, client, spent_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_on_disconnect, receive, nursery.cancel_scope)
            await self._api.answer(self._completion, self._client, self._spent_s, send)
            nursery.cancel_scope.cancel()


START_STREAM = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")],
}


async def _cancel_on_disconnect(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
