"""The OpenAPI 3.1 document of a node's HTTP side, made from the very structs that read requests and write answers.

Knows no handler: `OPERATIONS` is the table of routes, as a person reads it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import msgspec

from p2pfm.runtime.api_keys import LOCKED
from p2pfm.runtime.openai_answers import ChatAnswer, ChatChunk, TextAnswer, TextChunk
from p2pfm.runtime.openai_wire import UNSUPPORTED, ChatBody, ErrorAnswer, TextBody


class ModelVersion(msgspec.Struct, frozen=True):
    """Digest of the adapter version [hex] that a name means now."""

    version: str


class ModelCard(msgspec.Struct, frozen=True):
    """A model that can be asked for."""

    id: str
    created: int
    owned_by: str
    p2pfm: ModelVersion
    object: str = "model"


class ModelList(msgspec.Struct, frozen=True):
    """All of them."""

    data: tuple[ModelCard, ...]
    object: str = "list"


class Health(msgspec.Struct, frozen=True):
    """The process lives."""

    status: str


class Readiness(msgspec.Struct, frozen=True):
    """Whether a completion can be served, and by how many adapter versions."""

    ready: bool
    versions: int


ERRORS = {
    400: "The request itself is wrong: `error.param` names the field, `error.message` what was expected.",
    401: "No API key, or one that is not known here.",
    403: "A web page of another site asks; see http.origins.",
    404: "No such model; `error.message` lists those that exist.",
    405: "No such method here; see the header `allow`.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    429: "Too much is asked of this node now: wait for as many seconds as the header `retry-after` says.",
    500: "A bug; the node's log has it.",
    503: "No replica can answer now, or all connections are in use.",
    504: "The answer took longer than this node allows.",
}

COMPLETION_ERRORS = (400, 403, 404, 408, 413, 429, 504)
ALWAYS = (500, 503)
"""Of every route: a bug, and a node whose connections are all in use."""


@dataclass(frozen=True)
class Operation:
    """One method of one route."""

    path: str
    """As Starlette has it, {name} for a part that varies."""
    summary: str
    answer: type | str
    """A struct, or a media type other than JSON."""
    method: str = "get"
    body: type | None = None
    event: type | None = None
    """What each event of a stream is, where the answer can be one."""
    errors: tuple[int, ...] = ()
    also: Mapping[int, type] | None = None
    """Statuses with another body than an error's."""
    parameters: Mapping[str, str] | None = None
    """Parts of the path and what they are."""
    pattern: str = ""
    """What those parts look like."""
    status: int = 200

    def structs(self) -> Iterator[type]:
        """All that it reads and writes."""
        kinds = (self.answer, self.body, self.event, *(self.also or {}).values())
        return (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, msgspec.Struct))


OPERATIONS = (
    Operation("/v1/models", "Models that can be asked for now, the newest certified one first", ModelList),
    Operation(
        "/v1/models/{name}",
        "One of them",
        ModelCard,
        errors=(400, 404, 504),
        parameters={"name": "As /v1/models lists it"},
    ),
    Operation(
        "/v1/chat/completions", "Answer a conversation", ChatAnswer, "post", ChatBody, ChatChunk, COMPLETION_ERRORS
    ),
    Operation("/v1/completions", "Continue a text", TextAnswer, "post", TextBody, TextChunk, COMPLETION_ERRORS),
    Operation("/health", "Whether the process lives", Health),
    Operation("/ready", "Whether a completion can be served", Readiness, also={503: Readiness}),
    Operation("/metrics", "Prometheus text", "text/plain"),
    Operation("/status", "What the node says of itself", dict),
    Operation(
        "/blobs/{digest}",
        "Public content by its SHA-256: proposals, payloads, bases",
        "application/octet-stream",
        errors=(400, 404),
        parameters={"digest": "SHA-256 in hex"},
        pattern="^[0-9a-fA-F]{64}$",
    ),
    Operation("/openapi.json", "This document", dict),
)


def make_document(extra: Sequence[Operation] = (), *, has_keys: bool) -> bytes:
    """The document as JSON; `extra`: routes of other parts of the node."""
    operations = (*OPERATIONS, *extra)
    kinds = {ErrorAnswer, *(kind for operation in operations for kind in operation.structs())}
    ordered = sorted(kinds, key=lambda kind: kind.__name__)
    found, schemas = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    references = dict(zip(ordered, found, strict=True))
    for name in ("ChatBody", "TextBody"):
        schemas[name]["properties"].update({key: _make_unsupported(key) for key in UNSUPPORTED})
    paths: dict[str, Any] = {}
    for operation in operations:
        described = _describe(operation, references, has_keys=has_keys)
        paths.setdefault(operation.path, {})[operation.method] = described
    components: dict[str, Any] = {"schemas": schemas}
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "p2pfm node",
                "version": version("p2pfm"),
                "description": "OpenAI-compatible serving of a backbone with the network's newest certified adapter.",
            },
            "paths": paths,
            "components": components,
        }
    )


def _make_unsupported(name: str) -> dict[str, Any]:
    harmless = [None, False, 0, [], {}, *UNSUPPORTED[name]]
    return {"description": "Not served: refused when it asks for anything.", "enum": harmless}


def _describe(operation: Operation, references: Mapping[Any, Any], *, has_keys: bool) -> dict[str, Any]:
    is_locked = has_keys and operation.path.startswith(LOCKED)
    if isinstance(operation.answer, str):
        content: dict[str, Any] = {operation.answer: {"schema": {}}}
    else:
        content = {"application/json": {"schema": references.get(operation.answer, {"type": "object"})}}
    if operation.event is not None:
        kinds = [
            {"type": "string", "contentMediaType": "application/json", "contentSchema": references[kind]}
            for kind in (operation.event, ErrorAnswer)
        ]
        content["text/event-stream"] = {
            "schema": {
                "type": "object",
                "description": "With `stream`: events, the last of data [DONE]; an error ends them too.",
                "properties": {"data": {"anyOf": [*kinds, {"const": "[DONE]"}]}},
                "required": ["data"],
            }
        }
    responses: dict[str, Any] = {str(operation.status): {"description": operation.summary, "content": content}}
    for status, kind in (operation.also or {}).items():
        responses[str(status)] = _respond("Not now", references[kind])
    for status in (*operation.errors, *ALWAYS, *((401,) if is_locked else ())):
        responses.setdefault(str(status), _respond(ERRORS[status], references[ErrorAnswer]))
    described: dict[str, Any] = {"summary": operation.summary, "responses": responses}
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": references[operation.body]}},
        }
    if operation.parameters:
        text = {"type": "string", "minLength": 1} | ({"pattern": operation.pattern} if operation.pattern else {})
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "description": what, "schema": text}
            for name, what in operation.parameters.items()
        ]
    if is_locked:
        described["security"] = [{"key": []}]
    return described


def _respond(description: str, schema: Any) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
