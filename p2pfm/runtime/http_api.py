"""The HTTP side of a node: its routes and its own pages.

Knows no socket (`http_server` carries it), peer's transport or model; completions are of `completions`, further routes
come from whoever starts it. Errors have OpenAI's form, so that its clients show them.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from p2pfm.config import HttpConfig
from p2pfm.lora.user_adapter import BACKBONE_VERSION
from p2pfm.runtime import stream_api
from p2pfm.runtime.api_keys import ApiKeys, KeyDoor
from p2pfm.runtime.completions import Completions
from p2pfm.runtime.gateway import Gateway
from p2pfm.runtime.http_replies import make_error, make_json
from p2pfm.runtime.openai_wire import ApiError
from p2pfm.runtime.openapi import Operation, make_document
from p2pfm.runtime.origins import OriginDoor
from p2pfm.runtime.stream_keeper import StreamKeeper
from p2pfm.runtime.text import TextCodec
from p2pfm.types import DIGEST_BYTES, Digest, Millis

DEFAULT_BOUNDS = HttpConfig()
NO_KEYS = ApiKeys({})


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
        bounds: HttpConfig = DEFAULT_BOUNDS,
        keys: ApiKeys = NO_KEYS,
        extra_routes: Sequence[BaseRoute] = (),
        extra_operations: Sequence[Operation] = (),
        keeper: StreamKeeper | None = None,
    ) -> None:
        """`model`: the backbone's name; `status`: what /status shows, JSON-able; `now_ms`: the wall clock.

        `find_blob`: public content by its digest (proposals, payloads, bases); None if it is not held or not public.
        `keys`: without any, whoever reaches the port may ask. `extra_routes`: handlers of other parts of the node,
        after these; their `ApiError`s are written as ours, and what stands under /v1/ is behind the same keys.
        `extra_operations`: the same routes for the OpenAPI document. `keeper`: with it streams can be resumed.
        """
        self.completions = Completions(gateway, codec, model, registry, now_ms, bounds, keeper)
        self._gateway, self._registry, self._status, self._find_blob = gateway, registry, status, find_blob
        self._bounds = bounds
        self._keys, self._extra_routes = keys, tuple(extra_routes)
        operations = stream_api.OPERATIONS if keeper is not None else ()
        self._document = make_document((*operations, *extra_operations), has_keys=bool(keys))

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                *self.completions.routes(),
                Route("/health", self.health),
                Route("/ready", self.ready),
                Route("/metrics", self.metrics),
                Route("/status", self.status),
                Route("/blobs/{digest}", self.blob),
                Route("/openapi.json", self.openapi),
                *self._extra_routes,
            ],
            middleware=self._doors(),
            exception_handlers={
                Exception: _on_bug,
                ApiError: _on_api_error,
                HTTPException: _on_http_exception,
                ClientDisconnect: _on_disconnect,
            },
        )

    def _doors(self) -> list[Middleware]:
        origins = list(self._bounds.origins)
        doors = [
            Middleware(OriginDoor, host=self._bounds.host, origins=origins),
            Middleware(KeyDoor, keys=self._keys),
        ]
        if origins:  # then browsers may also read the answers
            doors.insert(0, Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]))
        return doors

    async def health(self, request: Request) -> Response:
        """GET /health: the process lives."""
        return make_json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /ready: 200 when a completion can be served, else 503."""
        num_versions = len([version for version in self._gateway.versions() if version != BACKBONE_VERSION])
        return make_json({"ready": num_versions > 0, "versions": num_versions}, 200 if num_versions else 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: Prometheus text."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def status(self, request: Request) -> Response:
        """GET /status: what the node says of itself."""
        return make_json(self._status())

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

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json: all of this, for programs."""
        return Response(self._document, media_type="application/json")


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return make_error(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = HTTP_CODES.get(error.status_code, "http_error")
    hint = "; GET /openapi.json lists what there is" if code in HTTP_CODES.values() else ""
    message = f"{request.method} {request.url.path}: {error.detail}{hint}."
    response = make_error(ApiError(error.status_code, message, code))
    response.headers.update(error.headers or {})
    return response


HTTP_CODES = {404: "unknown_url", 405: "method_not_allowed"}


async def _on_bug(request: Request, error: Exception) -> Response:
    """What is told of a bug; Starlette raises it anew, so that the log has it."""
    return make_error(ApiError(500, "This node failed on the request; its log says how.", "internal_error"))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it
