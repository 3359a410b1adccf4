"""The server under a node's HTTP side: hypercorn's connections, with a bound on how many there are and how slow.

Knows no route. Hypercorn itself would hold any number of connections, and wait for ever for a client that does not
read.
"""

import errno
import logging
import resource
import socket
from contextlib import suppress
from typing import Protocol, cast

import h11
import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.events import Event, Updated
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ASGIFramework, ConnectionState
from hypercorn.utils import parse_socket_addr, wrap_app
from starlette.applications import Starlette

from p2pfm.config import HttpConfig
from p2pfm.errors import OperatorError
from p2pfm.runtime.openai_wire import RETRY_AFTER_S, ApiError

log = logging.getLogger(__name__)

DEFAULT_BOUNDS = HttpConfig()

HEADER_BYTES_MAX = 1 << 16
"""A request's line and headers."""

BACKLOG = 256
"""A burst of new clients waits here. With fewer places TCP tries again after a second; with more a flood delays all."""

SLICE_BYTES = 1 << 16
"""A client that reads must take so much within `write_s_max`."""

OPEN_FILES_SHARE = 2
"""Connections take at most one half of the files that this process may open; peers and the disk need the rest."""

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
PAUSE_S = 0.1
"""After the machine had no room for a connection."""

_BODY = ApiError(503, "All of this node's connections are in use; try again in a moment.", "overloaded").body()
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"retry-after: %d\r\ncontent-length: %d\r\n\r\n%s" % (RETRY_AFTER_S, len(_BODY), _BODY)
)


class _PortStatus(Protocol):
    def started(self, value: int, /) -> None: ...


async def serve_http(
    app: Starlette,
    host: str,
    port: int,
    bounds: HttpConfig = DEFAULT_BOUNDS,
    task_status: _PortStatus = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `app` until cancelled. Reports the port in use through `task_status` (`port` 0: any free one).

    Raises:
        OperatorError: the address cannot be listened on.
    """
    config = HypercornConfig()
    config.bind = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}"]
    config.errorlog, config.accesslog = log, None
    config.include_server_header = False
    config.keep_alive_timeout = bounds.idle_s_max
    config.h11_max_incomplete_size = HEADER_BYTES_MAX
    try:
        listening = config.create_sockets().insecure_sockets[0]
    except OSError as error:
        reason = "another process uses it" if error.errno == errno.EADDRINUSE else error.strerror
        raise OperatorError(
            f"cannot listen on {host}:{port}: {reason}. Choose another http.port in the TOML"
        ) from error
    with listening:
        listening.set_inheritable(False)  # a child process must not hold the port
        listening.listen(BACKLOG)
        task_status.started(listening.getsockname()[1])
        await _Server(app, config, bounds).run(listening)


class _Server:
    """Accepts connections, at most so many at once."""

    def __init__(self, app: Starlette, config: HypercornConfig, bounds: HttpConfig) -> None:
        self._app = wrap_app(cast(ASGIFramework, app), 0, "asgi")
        self._config, self._bounds = config, bounds
        self._context = WorkerContext(None)
        files_max = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._connections_max = max(1, min(bounds.connections_max, files_max // OPEN_FILES_SHARE))
        self._connections: dict[_Connection, None] = {}
        """In the order in which they became idle, those that work somewhere among them."""

    async def run(self, listening: socket.socket) -> None:
        """Until cancelled."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(listening))
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:
                    if error.errno not in EXHAUSTED:
                        raise
                    log.warning("no room for a connection: %s; closing an idle one", error.strerror)
                    await self._close_oldest_idle()
                    await trio.sleep(PAUSE_S)
                    continue
                if len(self._connections) < self._connections_max or await self._close_oldest_idle():
                    connection = _Connection(self, self._app, self._config, self._context, stream, self._bounds)
                    self._connections[connection] = None
                    nursery.start_soon(self._run_one, connection)
                else:
                    await _refuse(stream)

    async def _run_one(self, connection: "_Connection") -> None:
        try:
            await connection.run()
        except Exception:
            log.exception("a connection failed")
        finally:
            self._connections.pop(connection, None)
            await trio.aclose_forcefully(connection.patient)
            await trio.aclose_forcefully(connection.patient)  # hypercorn leaves it open when it is cancelled

    async def _close_oldest_idle(self) -> bool:
        """False: there is none."""
        oldest = next((connection for connection in self._connections if connection.is_idle), None)
        if oldest is None:
            return False
        del self._connections[oldest]
        await trio.aclose_forcefully(oldest.patient)
        return True

    def on_idle(self, connection: "_Connection") -> None:
        """From now on it is the youngest of the idle."""
        if connection in self._connections:
            del self._connections[connection]
            self._connections[connection] = None


async def _refuse(stream: trio.SocketStream) -> None:
    with trio.move_on_after(PAUSE_S):  # a new socket has room for this; nobody is waited for
        with suppress(trio.BrokenResourceError):
            await stream.send_all(REFUSAL)
    await trio.aclose_forcefully(stream)


class _Connection(TCPServer):
    """One of hypercorn's connections that knows whether a request is under way."""

    def __init__(
        self,
        server: _Server,
        app: AppWrapper,
        config: HypercornConfig,
        context: WorkerContext,
        stream: trio.SocketStream,
        bounds: HttpConfig,
    ) -> None:
        self.patient = _PatientStream(stream, bounds.write_s_max)
        super().__init__(app, config, context, ConnectionState({}), self.patient)  # type: ignore[arg-type]
        self._server = server
        self.is_idle = True

    async def run(self) -> None:
        """Until it is closed. A client that sends nothing costs no parser and no tasks."""
        has_come = False
        with trio.move_on_after(self.config.keep_alive_timeout), suppress(trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(self.patient.socket.fileno())
            has_come = True
        if has_come:
            await super().run()

    async def protocol_send(self, event: Event) -> None:
        """Notes what hypercorn tells its own timer of idle connections."""
        if isinstance(event, Updated):
            self.is_idle = event.idle
            if event.idle:
                self._server.on_idle(self)
        await super().protocol_send(event)

    async def _read_data(self) -> None:
        address = self.patient.socket.getpeername(), self.patient.socket.getsockname()
        client, server = (parse_socket_addr(self.patient.socket.family, each) for each in address)
        self.protocol = _Http1(  # type: ignore[assignment]
            self.app,
            self.config,
            self.context,
            self._task_group,
            ConnectionState({}),
            False,
            client,
            server,
            self.protocol_send,
        )
        await super()._read_data()
        await self.idle_task.stop()  # or its timer would keep a closed connection's memory


class _Http1(H11Protocol):
    """Hypercorn's HTTP/1.1 and nothing else: a connection of HTTP/2 holds many requests, and is never idle."""

    async def _check_protocol(self, event: h11.Request) -> None:
        """Never changes to another."""

    async def _send_error_response(self, status_code: int) -> None:
        message = f"expected an HTTP/1.1 request with headers of at most {HEADER_BYTES_MAX} bytes, got something else."
        body = ApiError(status_code, message, "invalid_http").body()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        await self._send_h11_event(h11.Response(status_code=status_code, headers=headers))
        await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())


class _PatientStream(trio.abc.HalfCloseableStream):
    """A socket stream that is closed when its client stops reading.

    Hypercorn shields what it sends from cancellation, so no deadline of a handler can end it.
    """

    def __init__(self, stream: trio.SocketStream, write_s_max: float) -> None:
        self._stream, self._write_s_max = stream, write_s_max
        self.socket = stream.socket

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """All of `data`. Raises: trio.BrokenResourceError, also when the client does not read."""
        view = memoryview(data)
        for start in range(0, len(view), SLICE_BYTES):
            with trio.move_on_after(self._write_s_max) as patience:
                try:
                    await self._stream.send_all(view[start : start + SLICE_BYTES])
                except trio.BusyResourceError as error:  # hypercorn ends the stream at this very moment
                    raise trio.BrokenResourceError("the connection is being closed") from error
            if patience.cancelled_caught:
                log.info("closed a connection whose client did not read for %g s", self._write_s_max)
                await trio.aclose_forcefully(self._stream)
                raise trio.BrokenResourceError("the client does not read")

    async def wait_send_all_might_not_block(self) -> None:
        """As trio has it."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As trio has it."""
        return await self._stream.receive_some(max_bytes)

    async def send_eof(self) -> None:
        """As trio has it."""
        await self._stream.send_eof()

    async def aclose(self) -> None:
        """As trio has it."""
        await self._stream.aclose()
