"""Users' adapters over HTTP: which are served here, bring one, take its name away.

Knows requests and their bounds; what an adapter is, `user_adapters` knows.
"""

from pathlib import Path
from typing import Any

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from p2pfm.config import HttpConfig, ServingConfig
from p2pfm.errors import Reject, WorldError
from p2pfm.lora.user_adapter import CONFIG_NAME, WEIGHTS_NAME
from p2pfm.runtime.http_replies import make_json, read_body
from p2pfm.runtime.model_names import LORA
from p2pfm.runtime.openai_wire import ApiError, decode_body
from p2pfm.runtime.openapi import Operation
from p2pfm.runtime.user_adapters import Described, UserAdapters
from p2pfm.serving.session import UnknownVersion

SMALL_BYTES_MAX = 1 << 20
"""What a body has beside the weights: the configuration."""


UPLOADS_MAX = 2
"""Adapters that are brought at once: each lies in memory several times while it is read."""


class AdapterBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A LoRA in peft's format: a folder on the node's machine, or the two files of one."""

    name: str = ""
    """It is then served as BACKBONE+NAME; without one by its digest alone."""
    path: str = ""
    """A folder below serving.adapters_dir, relative to it or absolute."""
    config: dict[str, Any] | None = None
    """adapter_config.json."""
    weights: bytes = b""
    """adapter_model.safetensors in base64."""


class AdapterCard(msgspec.Struct, frozen=True):
    """An adapter that lies here."""

    id: str
    """The model to ask for, on any node of the network."""
    version: str
    object: str = "adapter"
    name: str = ""
    model: str = ""
    """The model to ask for here, by its name."""
    size_bytes: int = 0
    num_layers: int = 0
    rank: int = 0


class AdapterList(msgspec.Struct, frozen=True):
    """The named ones."""

    data: list[AdapterCard]
    object: str = "list"


class AdapterDeleted(msgspec.Struct, frozen=True):
    """The name means nothing any more."""

    name: str
    deleted: bool = True
    object: str = "adapter.deleted"


OPERATIONS = (
    Operation("/v1/adapters", "Users' adapters that have a name here", AdapterList),
    Operation(
        "/v1/adapters",
        "Serve a LoRA of this backbone, from a peft folder or its two files",
        AdapterCard,
        "post",
        AdapterBody,
        errors=(400, 408, 413, 429, 503),
        status=201,
    ),
    Operation(
        "/v1/adapters/{name}",
        "Take an adapter's name away",
        AdapterDeleted,
        "delete",
        errors=(404,),
        parameters={"name": "As it was given"},
    ),
)


class AdapterApi:
    """The routes of one node."""

    def __init__(self, adapters: UserAdapters, backbone: str, serving: ServingConfig, bounds: HttpConfig) -> None:
        """`backbone`: its name, as models begin."""
        self._adapters, self._backbone, self._serving = adapters, backbone, serving
        self._turns = trio.Semaphore(UPLOADS_MAX)
        weights_bytes_max = serving.adapter_bytes_max * 4 // 3  # base64
        self._bounds = msgspec.structs.replace(bounds, body_bytes_max=weights_bytes_max + SMALL_BYTES_MAX)

    def routes(self) -> list[Route]:
        """For `HttpApi`'s `extra_routes`."""
        return [
            Route("/v1/adapters", self.all, methods=["GET", "POST"]),
            Route("/v1/adapters/{name}", self.delete, methods=["DELETE"]),
        ]

    async def all(self, request: Request) -> Response:
        """GET and POST /v1/adapters: one route, so that a 405 tells both."""
        return await (self.add(request) if request.method == "POST" else self.list())

    async def list(self) -> Response:
        """GET /v1/adapters."""
        cards = []
        for name, version in sorted(self._adapters.names().items()):
            try:
                cards.append(self._make_card(name, await self._adapters.describe(version)))
            except UnknownVersion:
                continue  # it was damaged on disk
        return make_json(AdapterList(cards))

    async def add(self, request: Request) -> Response:
        """POST /v1/adapters."""
        try:
            self._turns.acquire_nowait()
        except trio.WouldBlock:
            message = f"{UPLOADS_MAX} other adapters are being brought; try again in a moment."
            raise ApiError(429, message, "rate_limit_exceeded") from None
        try:
            return await self._add(request)
        finally:
            self._turns.release()

    async def _add(self, request: Request) -> Response:
        body = decode_body(await read_body(request, self._bounds), AdapterBody)
        is_upload = body.config is not None and bool(body.weights)
        if is_upload == bool(body.path) or (body.path and (body.config is not None or body.weights)):
            raise _bad(f"expected either `path`, or `config` ({CONFIG_NAME}) and `weights` ({WEIGHTS_NAME} in base64)")
        try:
            if body.path:
                described = await self._adapters.add_folder(self._find_folder(body.path), body.name)
            else:
                config = msgspec.json.encode(body.config)
                described = await self._adapters.add_files(config, body.weights, body.name)
        except Reject as error:
            raise _bad(str(error)) from error
        except WorldError as error:
            raise ApiError(503, f"{error}.", "adapter_unavailable") from error
        return make_json(self._make_card(body.name, described), 201)

    async def delete(self, request: Request) -> Response:
        """DELETE /v1/adapters/NAME."""
        name = request.path_params["name"]
        if not self._adapters.drop_name(name):
            exist = ", ".join(sorted(self._adapters.names())) or "none"
            raise ApiError(404, f"No adapter is named {name[:80]!r} here. Names: {exist}.", "not_found", "name")
        return make_json(AdapterDeleted(name))

    def _find_folder(self, path: str) -> Path:
        if not self._serving.adapters_dir:
            raise _bad("`path` is taken only where serving.adapters_dir is set; upload `config` and `weights`")
        if "\0" in path:
            raise _bad("`path` holds a NUL")
        root = Path(self._serving.adapters_dir).resolve()
        folder = (root / path).resolve()
        if not folder.is_relative_to(root):
            raise _bad("`path` must lie below the operator's serving.adapters_dir")
        return folder

    def _make_card(self, name: str, described: Described) -> AdapterCard:
        version = described.version.hex()
        return AdapterCard(
            id=f"{self._backbone}+{LORA}@{version}",
            version=version,
            name=name,
            model=f"{self._backbone}+{name}" if name else "",
            size_bytes=described.num_bytes,
            num_layers=described.num_layers,
            rank=described.rank,
        )


def _bad(message: str) -> ApiError:
    return ApiError(400, f"{message}.", "invalid_adapter")
