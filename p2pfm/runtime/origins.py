"""Which web pages may make a browser ask this node: its own, and those that its operator names. Knows only headers.

Without this any page that a person opens could spend the node's time behind the person's back, and one whose own name
leads to 127.0.0.1 could read the answers of a private model.
"""

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from p2pfm.config import is_loopback
from p2pfm.runtime.http_replies import make_error
from p2pfm.runtime.openai_wire import ApiError

HARMLESS_METHODS = ("GET", "HEAD", "OPTIONS")
"""They change nothing and cost nothing; a browser keeps their answers from other pages."""


class OriginDoor:
    """ASGI: refuses what a browser asks on behalf of another site's page. Programs name no origin, and pass."""

    def __init__(self, app: ASGIApp, host: str, origins: Collection[str]) -> None:
        """`host`: where the node listens; `origins`: further pages that may ask, as `HttpConfig.origins`."""
        self._app, self._is_local, self._origins = app, is_loopback(host), origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["method"] not in HARMLESS_METHODS:
            headers = HTTPConnection(scope).headers
            origin = headers.get("origin")
            if origin is not None and not self._is_known(origin, headers.get("host", "")):
                message = f"A page of {origin[:80]} may not ask this node; its operator can add it to http.origins."
                await make_error(ApiError(403, message, "unknown_origin"))(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_known(self, origin: str, host: str) -> bool:
        if "*" in self._origins or origin in self._origins:
            return True
        try:
            page = urlsplit(origin)
            name = page.hostname or ""
        except ValueError:
            return False
        is_own = page.netloc.lower() == host.lower()
        return is_own and (is_loopback(name) or not self._is_local)
