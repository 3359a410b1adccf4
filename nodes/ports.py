"""TCP ports of this machine: one that is free, and why one cannot be listened on."""

import contextlib
import secrets
import socket

PORTS = range(20_000, 32_000)
"""Below those that systems give to outgoing connections: one of these would be gone before its server binds it."""


def get_free_port() -> int:
    """A TCP port of this machine's loopback that is free now, and that no outgoing connection takes meanwhile."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def try_to_listen(host: str, port: int) -> str:
    """Why nobody can listen there now, in the system's words; "": one can."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do: or a port just left is taken
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""
