"""Addresses of HTTP servers: as one asks them, and as others may see them. Knows no server."""

import ipaddress
from urllib.parse import urlsplit

SECRET_CHARS_MIN = 4
"""A shorter part of an address is no secret, and stands in too many words to be looked for."""
HIDDEN = "..."
NO_ENDPOINT = "an address that is none"


def make_url(host: str, port: int) -> str:
    """Where to ask who listens on `host` and `port`, from the same machine."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"http://{host}:{port}"
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://{host}:{port}" if address.version == 4 else f"http://[{host}]:{port}"


def name_endpoint(url: str) -> str:
    """scheme://host:port of `url`: a name, a password, a path and a query may each hold a key, so they are left out."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return NO_ENDPOINT
    if not parts.scheme or not parts.hostname:
        return NO_ENDPOINT
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{port}" if port is not None else "")


def hide_endpoint(text: str, url: str) -> str:
    """`text`, written by whoever asked at `url`, without the parts of `url` that may hold a key."""
    text = text.replace(url, name_endpoint(url))
    try:
        parts = urlsplit(url)
    except ValueError:
        return text
    for part in (parts.path, parts.query, parts.username, parts.password, *parts.path.split("/")):
        if part and len(part) >= SECRET_CHARS_MIN:
            text = text.replace(part, HIDDEN)
    return text
