"""What every handler of a node's HTTP side shares: who asks, a body within bounds, JSON and errors in OpenAI's form.

Knows no route, gateway or model.
"""

from typing import Any

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from p2pfm.config import HttpConfig
from p2pfm.errors import Reject, WorldError
from p2pfm.runtime.gateway import Busy
from p2pfm.runtime.openai_wire import RETRY_AFTER_S, ApiError

CLIENT = "p2pfm.client"
"""Where a request's scope has the name of the API key that it showed."""


def get_client(request: Request) -> str:
    """The name of the API key that the request showed; "" where this node asks for none."""
    name: str = request.scope.get(CLIENT, "")
    return name


async def read_body(request: Request, bounds: HttpConfig) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413, larger than the bound; 408, slower.
    """
    too_large = ApiError(
        413, f"expected a body of at most {bounds.body_bytes_max} bytes, got more.", "request_too_large"
    )
    told = request.headers.get("content-length", "0")
    if told.isdecimal() and int(told) > bounds.body_bytes_max:
        raise too_large
    data = bytearray()
    with trio.move_on_after(bounds.read_s_max):
        async for chunk in request.stream():
            data += chunk
            if len(data) > bounds.body_bytes_max:
                raise too_large
        return bytes(data)
    raise ApiError(408, f"The body did not come within {bounds.read_s_max:g} s.", "request_timeout")


def make_json(value: Any, status: int = 200) -> Response:
    """`value` as JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def make_error(error: ApiError) -> Response:
    """`error` in OpenAI's form."""
    response = Response(error.body(), error.status, media_type="application/json")
    if error.status == 429:
        response.headers["retry-after"] = str(RETRY_AFTER_S)
    if error.status in NOT_RETRIED:
        response.headers["x-should-retry"] = "false"
    return response


NOT_RETRIED = (408, 504)
"""OpenAI's clients would send the very same again: what took too long once does so again."""


def make_error_of(error: Reject | WorldError | ApiError) -> Response:
    """The fate of an error decides its status: the asker's 400, too busy 429, the world's 503."""
    if isinstance(error, ApiError):
        return make_error(error)
    if isinstance(error, Reject):
        return make_error(ApiError(400, str(error), "invalid_value"))
    if isinstance(error, Busy):
        return make_error(ApiError(429, str(error), "rate_limit_exceeded"))
    return make_error(ApiError(503, str(error), "no_replica"))


async def send_whole(send: Send, response: Response) -> None:
    """All of `response`."""
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send_rest(send, bytes(response.body))


async def send_rest(send: Send, data: bytes) -> None:
    """The last bytes of a response that has begun.

    Shielded: hypercorn tells the end of any answer as it tells a client's leaving, while this still runs.
    """
    with trio.CancelScope(shield=True):
        await send({"type": "http.response.body", "body": data, "more_body": False})
