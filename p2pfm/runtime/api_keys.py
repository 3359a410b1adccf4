"""API keys of a node's clients: who may ask it. Knows a file's lines and ASGI requests; keeps hashes of secrets."""

import hmac
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from p2pfm.errors import OperatorError
from p2pfm.runtime.files import refuse_shared
from p2pfm.runtime.http_replies import CLIENT, make_error
from p2pfm.runtime.openai_wire import ApiError

KEYS_MAX = 1000
"""Each request is compared with every key."""

SECRET_CHARACTERS_MIN = 20
"""Shorter ones could be guessed over the network."""

KEYS_BYTES_MAX = 1 << 20

LOCKED = "/v1/"
"""Paths that need a key; the node's own pages (health, metrics, status, public blobs) stay open."""


class ApiKeys:
    """Names of clients by their secrets' hashes; `repr` shows neither."""

    def __init__(self, secrets: Mapping[str, str]) -> None:
        """`secrets`: name to secret; empty: no key is needed."""
        self._hashes = {name: sha256(secret.encode()).digest() for name, secret in secrets.items()}

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def find_client(self, secret: str) -> str | None:
        """The name of the key `secret`; None: it is no key. Takes equally long whichever it is."""
        given = sha256(secret.encode()).digest()
        matches = [name for name, known in self._hashes.items() if hmac.compare_digest(given, known)]
        return matches[0] if matches else None


def read_api_keys(file: str) -> ApiKeys:
    """The keys in `file`: lines of NAME SECRET; empty ones and those that begin with # are passed over. "": no keys.

    Raises:
        OperatorError: unreadable, readable by others, or a line that is no key; no message holds a secret.
    """
    if not file:
        return ApiKeys({})
    path = Path(file)
    try:
        refuse_shared(path)
        if path.stat().st_size > KEYS_BYTES_MAX:
            raise OperatorError(f"{path}: expected at most {KEYS_BYTES_MAX} bytes; is http.api_keys_file this file?")
        lines = path.read_text(encoding="ascii").splitlines()
    except UnicodeDecodeError:  # its text would show what stands in the file
        raise OperatorError(f"{path}: expected ASCII, lines of NAME SECRET") from None
    except OSError as error:
        raise OperatorError(f"http.api_keys_file: cannot read {path}: {error.strerror}") from error
    return ApiKeys(_parse_keys(path, lines))


def _parse_keys(path: Path, lines: list[str]) -> dict[str, str]:
    secrets: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, secret = line.strip().partition(" ")
        secret = secret.strip()
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
            raise OperatorError(f"{path}, line {number}: expected NAME SECRET, a name of letters, digits, . _ -")
        if not re.fullmatch(rf"[!-~]{{{SECRET_CHARACTERS_MIN},200}}", secret):
            raise OperatorError(  # names no name either: it may be the secret, in the wrong place
                f"{path}, line {number}: expected NAME SECRET, a secret of {SECRET_CHARACTERS_MIN} to 200 characters; "
                "`openssl rand -hex 24` makes one"
            )
        if name in secrets or secret in secrets.values():
            raise OperatorError(f"{path}, line {number}: expected each name and each secret once")
        secrets[name] = secret
    if not 1 <= len(secrets) <= KEYS_MAX:
        raise OperatorError(f"{path}: expected 1 to {KEYS_MAX} keys, got {len(secrets)}")
    return secrets


class KeyDoor:
    """ASGI: lets a request under /v1/ pass that shows a key, and notes whose it is (`http_replies.get_client`)."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if not self._keys or scope["type"] != "http" or not scope["path"].startswith(LOCKED):
            await self._app(scope, receive, send)
            return
        scheme, _, secret = HTTPConnection(scope).headers.get("authorization", "").partition(" ")
        client = self._keys.find_client(secret.strip()) if scheme.lower() == "bearer" else None
        if client is None:
            what = "This API key is not known here" if secret else "This node asks for an API key"
            message = f"{what}: send 'Authorization: Bearer KEY' with a key that its operator gave you."
            response = make_error(ApiError(401, message, "invalid_api_key"))
            response.headers["www-authenticate"] = "Bearer"
            await response(scope, receive, send)
            return
        scope[CLIENT] = client
        await self._app(scope, receive, send)
