"""The page's HTTP side: static files, one JSON document a network, and an event whenever one changed.

GET only, for browsers on this machine: a foreign page reaches it neither by script (no CORS) nor by a name of its own
that resolves here (the Host header is checked), and what peers said cannot become script (Content-Security-Policy).
"""

import ipaddress
import logging
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import msgspec
import trio
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nodes.explorer.source import Source
from nodes.explorer.view import NetworkView
from p2pfm.runtime.page import HEADERS

log = logging.getLogger(__name__)

PAGE = Path(__file__).resolve().parent / "page"

POLL_S = 2.0
"""How often the chain is read again [s]."""

HEARTBEAT_S = 15.0
"""A silent stream sends a comment this often [s], so that a browser notices a dead one."""

RECONNECT_MS = 2000
"""How long a browser waits before it opens a broken stream again."""

STREAMS_MAX = 64
"""Event streams at once; one more gets 503."""

HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[^:\[\]@/\s]+)(:\d+)?")


class Board:
    """The newest view of each network, and who waits for the next."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = {source.network.network_id().hex(): source for source in sources}
        self._views: dict[str, NetworkView] = {}
        self._bodies: dict[str, tuple[str, bytes]] = {}
        self._changed: dict[str, trio.Event] = {}

    async def run(self, poll_s: float = POLL_S) -> None:
        """Read every network again and again, each at its own pace, until cancelled."""
        async with trio.open_nursery() as nursery:
            for name in self._sources:
                nursery.start_soon(self._watch, name, poll_s)

    async def _watch(self, name: str, poll_s: float) -> None:
        while True:
            read = self._sources[name].read
            view = await trio.to_thread.run_sync(read, abandon_on_cancel=True)  # type: ignore[call-arg]  # older stubs
            self._put(name, view)
            await trio.sleep(poll_s)

    def _put(self, name: str, view: NetworkView) -> None:
        body = msgspec.json.encode(view)
        digest = sha256(body).hexdigest()
        if name in self._bodies and self._bodies[name][0] == digest:
            return
        self._views[name], self._bodies[name] = view, (digest, body)
        self._changed.pop(name, trio.Event()).set()

    def names(self) -> list[str]:
        """The ids of all networks, in the order in which they were given."""
        return list(self._sources)

    def summarize(self) -> list[dict[str, object]]:
        """All networks in a line each."""
        summaries: list[dict[str, object]] = []
        for name, source in self._sources.items():
            view = self._views.get(name)
            is_live = view is not None and view.is_known and not view.problem
            summaries.append({"id": name, "name": source.network.name, "is_live": is_live})
        return summaries

    async def get(self, name: str) -> tuple[str, bytes]:
        """Digest and JSON of a network's newest view; waits for the first one."""
        while name not in self._bodies:
            await self._wait(name)
        return self._bodies[name]

    async def wait_for_other(self, name: str, digest: str) -> str:
        """The digest of a network's newest view, once it is another than `digest`."""
        while name not in self._bodies or self._bodies[name][0] == digest:
            await self._wait(name)
        return self._bodies[name][0]

    async def _wait(self, name: str) -> None:
        await self._changed.setdefault(name, trio.Event()).wait()


class Api:
    """The endpoints."""

    def __init__(self, board: Board, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._board, self._heartbeat_s = board, heartbeat_s
        self._num_streams = 0

    def routes(self) -> list[Route]:
        """Without the static files."""
        return [
            Route("/api/networks", self.networks),
            Route("/api/networks/{id}", self.network),
            Route("/api/networks/{id}/events", self.events),
        ]

    async def networks(self, request: Request) -> Response:
        """GET /api/networks: id, name, and whether the chain answers."""
        return JSONResponse({"networks": self._board.summarize()})

    async def network(self, request: Request) -> Response:
        """GET /api/networks/ID: a `NetworkView`; its digest is the ETag."""
        name = request.path_params["id"]
        if name not in self._board.names():
            return _not_found(name)
        digest, body = await self._board.get(name)
        headers = {"etag": f'"{digest}"'}
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type="application/json", headers=headers)

    async def events(self, request: Request) -> Response:
        """GET /api/networks/ID/events: server-sent events "view" with the digest of each new view; the newest first."""
        name = request.path_params["id"]
        if name not in self._board.names():
            return _not_found(name)
        if self._num_streams >= STREAMS_MAX:
            return PlainTextResponse(f"expected at most {STREAMS_MAX} event streams; close a page", 503)
        return StreamingResponse(self._stream(name), media_type="text/event-stream")

    async def _stream(self, name: str) -> AsyncGenerator[bytes, None]:
        self._num_streams += 1
        try:
            yield b"retry: %d\n\n" % RECONNECT_MS
            seen = ""
            while True:
                newest = seen
                with trio.move_on_after(self._heartbeat_s):
                    newest = await self._board.wait_for_other(name, seen)
                if newest == seen:
                    yield b": still here\n\n"
                else:
                    yield b"event: view\ndata: %s\n\n" % newest.encode()
                    seen = newest
        finally:
            self._num_streams -= 1


def make_app(board: Board, host_names: Sequence[str] = (), heartbeat_s: float = HEARTBEAT_S) -> ASGIApp:
    """The ASGI application; `host_names` are believed in a Host header beside "localhost" and plain addresses."""
    files = StaticFiles(directory=PAGE, packages=[("p2pfm.runtime.page", "shared")], html=True)
    inner = Starlette(routes=[*Api(board, heartbeat_s).routes(), Mount("/", files, name="page")])
    return Guard(inner, HEADERS, lambda host: _is_own(host, host_names))


class Guard:
    """Before everything: other methods than GET and HEAD, and other names than ours, go no further."""

    def __init__(self, app: ASGIApp, headers: Mapping[str, str], is_own: Callable[[str], bool]) -> None:
        self._app, self._headers, self._is_own = app, headers, is_own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on; every answer gets the headers."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        host = Headers(scope=scope).get("host", "")
        app: ASGIApp = self._app
        if not self._is_own(host):
            app = PlainTextResponse("expected a Host header that names this machine; see --allow-host", 421)
        elif scope["method"] not in ("GET", "HEAD"):
            app = PlainTextResponse("expected GET", 405, {"allow": "GET, HEAD"})
        await app(scope, receive, send_guarded)


def _is_own(host: str, names: Sequence[str]) -> bool:
    """DNS rebinding needs a name: an address in the Host header is what the browser really connected to."""
    parts = HOST.fullmatch(host)
    if parts is None:
        return False
    name = parts["name"]
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return name.lower() in ("localhost", *(known.lower() for known in names))
    return True


def _not_found(name: str) -> Response:
    return JSONResponse({"error": f"no network {name[:80]!r} here; GET /api/networks lists them"}, 404)
