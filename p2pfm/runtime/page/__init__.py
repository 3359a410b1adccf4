"""The page at `/` of a node: static files, and the headers with which no text of a stranger can become script.

Knows no node: the page itself asks the API beside it. The look and the small parts in `shared` are the explorer's too.
"""

from hashlib import sha256
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).resolve().parent
SHARED = FOLDER / "shared"

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}
"""No script but our files, no HTML from strings, nothing from elsewhere, in nobody's frame."""


def make_page_routes() -> list[Route]:
    """GET / and GET /page/NAME, from memory; who has a file already is told so (ETag)."""
    files = {
        path.name: (path.read_bytes(), MEDIA_TYPES[path.suffix])
        for folder in (FOLDER, SHARED)
        for path in sorted(folder.iterdir())
        if path.suffix in MEDIA_TYPES
    }
    etags = {name: f'"{sha256(data).hexdigest()}"' for name, (data, _) in files.items()}

    async def serve(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in files:
            raise HTTPException(404, f"the page has no file {name[:80]!r}")
        headers = {**HEADERS, "etag": etags[name]}
        if request.headers.get("if-none-match") == etags[name]:
            return Response(status_code=304, headers=headers)
        data, media_type = files[name]
        return Response(data, headers=headers, media_type=media_type)

    return [Route("/", serve), Route("/page/{name}", serve)]
