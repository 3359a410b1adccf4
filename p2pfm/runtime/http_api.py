"""The OpenAI-compatible HTTP side of a node: text in, text out, one JSON event a piece.

Knows no peer's transport and no model: tokens come from the `Gateway`, text from the `TextCodec`. Errors have OpenAI's
form, so that its clients show them. A client that goes away cancels its generation.
"""

import errno
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import msgspec
import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.run import worker_serve
from hypercorn.typing import ASGIFramework
from hypercorn.utils import wrap_app
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from p2pfm.errors import OperatorError, Reject, WorldError
from p2pfm.runtime.gateway import Busy, Gateway, Tokens
from p2pfm.runtime.openai_wire import (
    LAST_EVENT,
    RETRY_AFTER_S,
    ApiError,
    ChatBody,
    Completion,
    TextBody,
    Writer,
    build_completion,
    decode_body,
    write_event,
)
from p2pfm.runtime.text import TextCodec
from p2pfm.serving.session import Detokenizer, StopStrings
from p2pfm.types import DIGEST_BYTES, Digest, Millis

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds of one node's HTTP side."""

    body_bytes_max: int = 1 << 20
    requests_max: int = 16
    """Completions at once; one more gets 429."""
    read_ms_max: int = 30_000
    """How long a client may take to send its body."""
    write_ms_max: int = 30_000
    """How long a client may stop reading before its stream is closed."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of answer text and where it came from."""

    text: str
    origin: Tokens
    num_tokens: int
    """Generated in the whole stream so far."""
    finish: str


class HttpApi:
    """The endpoints of one node."""

    def __init__(
        self,
        gateway: Gateway,
        codec: TextCodec,
        model: str,
        registry: CollectorRegistry,
        status: Callable[[], Mapping[str, Any]],
        now_ms: Callable[[], Millis],
        find_blob: Callable[[Digest], Awaitable[bytes | None]],
        limits: HttpLimits = HttpLimits(),
    ) -> None:
        """`model`: the backbone's name; `status`: what /status shows, JSON-able; `now_ms`: the wall clock.

        `find_blob`: public content by its digest (proposals, payloads, bases); None if it is not held or not public.
        """
        self._gateway, self._codec, self._model = gateway, codec, model
        self._registry, self._status, self._now_ms, self._limits = registry, status, now_ms, limits
        self._find_blob = find_blob
        self._num_requests = 0
        self._requests = Counter("p2pfm_http_completions", "Completions by outcome", ["outcome"], registry=registry)

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.one_model),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/completions", self.text, methods=["POST"]),
                Route("/health", self.health),
                Route("/ready", self.ready),
                Route("/metrics", self.metrics),
                Route("/status", self.status),
                Route("/blobs/{digest}", self.blob),
            ],
            exception_handlers={
                ApiError: _on_api_error,
                HTTPException: _on_http_exception,
                ClientDisconnect: _on_disconnect,
            },
        )

    # --- what is served -----------------------------------------------------------------------------------------------

    def model_names(self) -> dict[str, Digest]:
        """Names that a request may give: the newest base, this node's private adapter on it, then each version by its
        digest's beginning.
        """
        versions, base = self._gateway.versions(), self._gateway.base
        newest = {f"{self._model}+base": base} if base is not None and base in versions else {}
        private = self._gateway.private
        if private is not None:
            newest[f"{self._model}+private"] = private
        # Of two versions that begin alike (someone made them so) the first is meant: our own stand first.
        pinned = {f"{self._model}+base@{version.hex()[:16]}": version for version in reversed(versions)}
        return {**newest, **dict(reversed(pinned.items()))}

    def resolve_model(self, name: str) -> Digest:
        """The adapter version that `name` means: `BACKBONE+base`, `BACKBONE+base@DIGEST` (8 or more hex digits), or
        `BACKBONE+private`, which only this node serves, and only here.

        Raises:
            ApiError: 404, says which models exist.
        """
        versions = self._gateway.versions()
        newest, prefix = f"{self._model}+base", name.removeprefix(f"{self._model}+base@").lower()
        if name == newest and self._gateway.base in versions and self._gateway.base is not None:
            return self._gateway.base
        if name == f"{self._model}+private" and self._gateway.private is not None:
            return self._gateway.private
        found = [version for version in versions if version.hex().startswith(prefix)]
        if name.startswith(f"{newest}@") and len(prefix) >= 8 and len(found) == 1:
            return found[0]
        exist = ", ".join(self.model_names()) or "none yet: this node has no certified base and knows no replica"
        raise ApiError(
            404, f"The model '{name}' does not exist. Models served now: {exist}.", "model_not_found", "model"
        )

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return _json({"object": "list", "data": [self._describe(*pair) for pair in self.model_names().items()]})

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        return _json(self._describe(name, self.resolve_model(name)))

    def _describe(self, name: str, version: Digest) -> dict[str, Any]:
        told = {"id": name, "object": "model", "created": self._now_ms() // 1000, "owned_by": "p2pfm"}
        return {**told, "p2pfm": {"version": version.hex()}}

    # --- the node's own pages -----------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """GET /health: the process lives."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /ready: 200 when a completion can be served, else 503."""
        num_versions = len(self._gateway.versions())
        return _json({"ready": num_versions > 0, "versions": num_versions}, 200 if num_versions else 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: Prometheus text."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def status(self, request: Request) -> Response:
        """GET /status: what the node says of itself."""
        return _json(self._status())

    async def blob(self, request: Request) -> Response:
        """GET /blobs/SHA256: content-addressed bytes that an auditor checks himself."""
        name = request.path_params["digest"]
        try:
            digest = Digest(bytes.fromhex(name))
        except ValueError:
            digest = Digest(b"")
        if len(digest) != DIGEST_BYTES:
            raise ApiError(400, f"expected a SHA-256 in hex, got {name[:80]!r}.", "invalid_value", "digest")
        data = await self._find_blob(digest)
        if data is None:
            raise ApiError(404, f"This node does not serve {name}; another may.", "not_found", "digest")
        return Response(data, media_type="application/octet-stream")

    # --- completions --------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = decode_body(await self._read_body(request), ChatBody)
        if not body.messages:
            raise ApiError(400, "messages: expected at least one message, got none.", "invalid_value", "messages")
        prompt = await trio.to_thread.run_sync(self._codec.encode_chat, [message.plain() for message in body.messages])
        return _Answer(self, build_completion(body, prompt, self.resolve_model(body.model), self._codec.vocabulary))

    async def text(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = decode_body(await self._read_body(request), TextBody)
        prompt = body.one_prompt()
        if isinstance(prompt, str):
            prompt = await trio.to_thread.run_sync(self._codec.encode, prompt)
        return _Answer(self, build_completion(body, prompt, self.resolve_model(body.model), self._codec.vocabulary))

    async def _read_body(self, request: Request) -> bytes:
        data = bytearray()
        with trio.move_on_after(self._limits.read_ms_max / 1000):
            async for chunk in request.stream():
                data += chunk
                if len(data) > self._limits.body_bytes_max:
                    message = f"The body is larger than {self._limits.body_bytes_max} bytes."
                    raise ApiError(413, message, "request_too_large")
            return bytes(data)
        raise ApiError(408, f"The body did not come within {self._limits.read_ms_max} ms.", "request_timeout")

    async def answer(self, completion: Completion, send: Send) -> None:
        """Generate, and write the answer or an error. Returns when all is written, or the client stopped reading."""
        if self._num_requests >= self._limits.requests_max:
            self._requests.labels("busy").inc()
            await _send_whole(
                send, _on_error(Busy(f"{self._num_requests} completions run here; try again in a moment"))
            )
            return
        self._num_requests += 1
        outcome = "cancelled"
        try:
            if completion.is_stream:
                outcome = await self._answer_stream(completion, send)
            else:
                outcome = await self._answer_whole(completion, send)
        finally:
            self._num_requests -= 1
            self._requests.labels(outcome).inc()

    async def _answer_whole(self, completion: Completion, send: Send) -> str:
        writer = Writer(completion, self._now_ms() // 1000)
        text = ""
        try:
            async with aclosing(self._pieces(completion)) as pieces:
                async for piece in pieces:
                    text += piece.text
        except (Reject, WorldError) as error:
            await _send_whole(send, _on_error(error))
            return "error"
        body = writer.whole(text, piece.finish, piece.num_tokens, _describe_origin(piece.origin))
        await _send_whole(send, Response(body, media_type="application/json"))
        return "ok"

    async def _answer_stream(self, completion: Completion, send: Send) -> str:
        writer = Writer(completion, self._now_ms() // 1000)
        is_started = False
        try:
            async with aclosing(self._pieces(completion)) as pieces:
                async for piece in pieces:
                    if not piece.text and not piece.finish:
                        continue
                    extra = _describe_origin(piece.origin)
                    data = writer.chunk(piece.text, piece.finish, extra, is_first=not is_started)
                    if not is_started:  # only now: an error before the first token still has its own status
                        await send(START_STREAM)
                        is_started = True
                    if not await self._send_in_time(send, data):
                        return "stalled"
        except (Reject, WorldError) as error:
            response = _on_error(error)
            await (_send_rest(send, write_event(bytes(response.body))) if is_started else _send_whole(send, response))
            return "error"
        usage = writer.usage_chunk(piece.num_tokens, extra) if completion.wants_usage else b""
        await _send_rest(send, usage + LAST_EVENT)
        return "ok"

    async def _send_in_time(self, send: Send, data: bytes) -> bool:
        with trio.move_on_after(self._limits.write_ms_max / 1000):
            await send({"type": "http.response.body", "body": data, "more_body": True})
            return True
        log.info("closed a stream whose client did not read for %d ms", self._limits.write_ms_max)
        return False

    async def _pieces(self, completion: Completion) -> AsyncGenerator[Piece, None]:
        """Text as it becomes certain; the last piece has the finish."""
        detokenizer, stops = Detokenizer(self._codec.decode), StopStrings(completion.stops)
        num_tokens = 0
        async with aclosing(self._gateway.complete(completion.request)) as stream:
            async for origin in stream:
                num_tokens += len(origin.tokens)
                text = stops.push(detokenizer.push(origin.tokens))
                if origin.finish and not stops.is_stopped:
                    text += stops.push(detokenizer.flush())
                    text += stops.flush()
                finish = "stop" if stops.is_stopped else origin.finish
                yield Piece(text, origin, num_tokens, finish)
                if finish:
                    return


class _Answer(Response):
    """Runs a completion while it watches for the client to go away."""

    def __init__(self, api: HttpApi, completion: Completion) -> None:
        super().__init__()
        self._api, self._completion = api, completion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_on_disconnect, receive, nursery.cancel_scope)
            await self._api.answer(self._completion, send)
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


async def _send_whole(send: Send, response: Response) -> None:
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await _send_rest(send, bytes(response.body))


async def _send_rest(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": False})


def _describe_origin(origin: Tokens) -> dict[str, Any]:
    return {"replica": origin.replica, "version": origin.version.hex(), "replaced": origin.num_replaced}


def _on_error(error: Reject | WorldError) -> Response:
    """The fate of an error decides its status: the asker's 400, too busy 429, the world's 503."""
    if isinstance(error, Reject):
        return _write_error(ApiError(400, str(error), "invalid_value"))
    if isinstance(error, Busy):
        return _write_error(ApiError(429, str(error), "rate_limit_exceeded"))
    return _write_error(ApiError(503, str(error), "no_replica"))


def _write_error(error: ApiError) -> Response:
    headers = {"retry-after": str(RETRY_AFTER_S)} if error.status == 429 else None
    return Response(error.body(), error.status, headers, "application/json")


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _write_error(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _write_error(
        ApiError(error.status_code, message, "unknown_url" if error.status_code == 404 else "http_error")
    )


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


class _PortStatus(Protocol):
    def started(self, value: int, /) -> None: ...


async def serve_http(app: Starlette, host: str, port: int, task_status: _PortStatus = trio.TASK_STATUS_IGNORED) -> None:
    """Serve `app` until cancelled. Reports the port in use through `task_status` (`port` 0: any free one).

    Raises:
        OperatorError: the address cannot be listened on.
    """
    config = HypercornConfig()
    config.bind = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"]
    config.errorlog, config.accesslog = log, None
    config.include_server_header = False
    try:
        sockets = config.create_sockets()
    except OSError as error:
        reason = "another process uses it" if error.errno == errno.EADDRINUSE else error.strerror
        raise OperatorError(
            f"cannot listen on {host}:{port}: {reason}. Choose another http.port in the TOML"
        ) from error
    try:
        for sock in sockets.insecure_sockets:
            sock.set_inheritable(False)  # a child process must not hold the port
            sock.listen(config.backlog)
        bound = sockets.insecure_sockets[0].getsockname()[1]
        async with trio.open_nursery() as nursery:
            await nursery.start(
                partial(worker_serve, wrap_app(cast(ASGIFramework, app), 0, "asgi"), config, sockets=sockets)
            )
            task_status.started(bound)
    finally:
        for sock in sockets.insecure_sockets:
            sock.close()
