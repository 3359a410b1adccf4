"""Idle connections on a node's HTTP server beside hypercorn's own, which has no bound: 10,000, as fast as can be.

Each server runs in a process of its own and serves /health, which is asked all the time. `ulimit -n` must allow the
connections to this process.
"""

import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx
import psutil
import trio
from harness import Target, finish, parse_options, print_table
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio import serve
from hypercorn.typing import ASGIFramework
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from p2pfm.config import HttpConfig
from p2pfm.runtime.http_server import serve_http

NUM_CONNECTIONS, NUM_QUICK = 10_000, 300
CONNECT_S = 10
ANSWER_S = 60
MEMORY_MIB_MAX = 64
FILES_MORE_MAX = 16
"""Beside the connections: a server opens a few files of its own."""


async def health(request: Request) -> Response:
    """The one page."""
    return Response(b"ok")


async def serve_one(name: str, port: int) -> None:
    """One of the servers, until it is killed."""
    app = Starlette(routes=[Route("/health", health)])
    if name == "ours":
        await serve_http(app, "127.0.0.1", port)
    config = HypercornConfig()
    config.bind = [f"127.0.0.1:{port}"]
    config.keep_alive_timeout = HttpConfig().idle_s_max
    await serve(cast(ASGIFramework, app), config)


def open_many(port: int, num: int, opened: list[socket.socket]) -> None:
    for _ in range(num):
        try:
            opened.append(socket.create_connection(("127.0.0.1", port), timeout=CONNECT_S))
        except OSError:
            continue


def ask_health(port: int) -> tuple[float, bool]:
    """Seconds, and whether it was answered."""
    started = time.monotonic()
    try:
        is_ok = httpx.get(f"http://127.0.0.1:{port}/health", timeout=ANSWER_S).status_code == 200
    except httpx.HTTPError:
        is_ok = False
    return time.monotonic() - started, is_ok


def measure(name: str, num: int) -> dict[str, Any]:
    """What one server bears."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, str(Path(__file__)), "--serve", name, str(port)])
    try:
        while not ask_health(port)[1]:
            time.sleep(0.1)
        process = psutil.Process(server.pid)
        memory = process.memory_info().rss
        opened: list[socket.socket] = []
        opening = threading.Thread(target=open_many, args=(port, num, opened))
        started = time.monotonic()
        opening.start()
        answers, files, memory_most = [], 0, memory
        while opening.is_alive():
            answers.append(ask_health(port))
            files, memory_most = max(files, process.num_fds()), max(memory_most, process.memory_info().rss)
        seconds = time.monotonic() - started
        for each in opened:
            each.close()
    finally:
        server.kill()
        server.wait()
    return {
        "opened": len(opened),
        "seconds": seconds,
        "health_asked": len(answers),
        "health_ok_share": sum(is_ok for _, is_ok in answers) / len(answers),
        "health_median_s": sorted(answers)[len(answers) // 2][0],
        "health_max_s": max(answers)[0],
        "memory_more_mib": (memory_most - memory) / 2**20,
        "files_max": files,
    }


def main() -> None:
    """Both servers, one after the other."""
    options = parse_options(__doc__ or "")
    num = NUM_QUICK if options.quick else NUM_CONNECTIONS
    figures = {name: measure(name, num) for name in ("ours", "hypercorn")}
    columns = ["server", *figures["ours"]]
    print_table(f"{num} idle connections", columns, [[name, *told.values()] for name, told in figures.items()])
    ours = figures["ours"]
    finish(
        options,
        figures,
        [
            Target("health_ok_share", ours["health_ok_share"], 1, "more"),
            Target("memory_more_mib", ours["memory_more_mib"], MEMORY_MIB_MAX, "less"),
            Target("files_max", ours["files_max"], HttpConfig().connections_max + FILES_MORE_MAX, "less"),
        ],
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        trio.run(partial(serve_one, sys.argv[2], int(sys.argv[3])))
    else:
        main()
