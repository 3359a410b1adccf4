"""From files and addresses to a running page."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import trio
from starlette.applications import Starlette

from nodes.ending import cancel_on_signal
from nodes.explorer.app import Board, make_app
from nodes.explorer.source import Place, Source
from nodes.homes import read_config, read_network
from nodes.rewards.blobs import Blobs
from p2pfm.config import NetworkConfig
from p2pfm.errors import OperatorError
from p2pfm.runtime.endpoints import make_url
from p2pfm.runtime.http_server import serve_http
from p2pfm.runtime.store import BLOB_FOLDER
from p2pfm.runtime.web3_ledger import READ_ONLY_KEY, Web3Ledger


@dataclass
class Found:
    """One network by all that the options say of it."""

    network: NetworkConfig
    rpcs: list[tuple[str, str]] = field(default_factory=list)
    """Endpoints of its chain, each with its witness (empty: none)."""
    nodes: list[str] = field(default_factory=list)
    """HTTP addresses."""
    folder: Path | None = None
    """A node's blobs on this disk: they are there when it does not run."""


def find_networks(
    config_files: Sequence[Path], rpc: str, network_file: Path | None, node_urls: Sequence[str]
) -> list[Found]:
    """One entry a network id, in the order in which they were named first.

    Raises:
        OperatorError: nothing is named, options do not go together, or a file is wrong.
    """
    if bool(rpc) != bool(network_file):
        raise OperatorError("--rpc and --network go together: the chain's endpoint, and the network to look for there")
    found: dict[bytes, Found] = {}
    for path in config_files:
        config = read_config(path)
        entry = found.setdefault(config.network.network_id(), Found(config.network))
        entry.rpcs.append((config.rpc, config.rpc_witness))
        entry.nodes.append(make_url(config.http.host, config.http.port))
        entry.folder = entry.folder or Path(config.home) / BLOB_FOLDER
    if network_file:
        network = read_network(network_file)
        found.setdefault(network.network_id(), Found(network)).rpcs.append((rpc, ""))
    if not found:
        raise OperatorError("nothing to show: give --config alice/node.toml, or --rpc URL with --network FILE")
    for entry in found.values():
        entry.nodes += [url.rstrip("/") for url in node_urls]
    return list(found.values())


def serve(found: Sequence[Found], host: str, port: int, host_names: Sequence[str]) -> None:
    """Serve the page until SIGINT or SIGTERM. Raises: OperatorError if the address cannot be listened on."""
    sources = [Source(make_place(entry), time.time) for entry in found]
    trio.run(partial(_run, Board(sources), host, port, host_names))


def make_place(entry: Found) -> Place:
    """How to read a network that was found."""
    ledgers = [
        Web3Ledger(rpc, entry.network.chain, READ_ONLY_KEY, witness_url=witness)
        for rpc, witness in dict.fromkeys(entry.rpcs)
    ]
    nodes = list(dict.fromkeys(entry.nodes))
    return Place(entry.network, ledgers, partial(Blobs, entry.folder, nodes) if nodes else None)


async def _run(board: Board, host: str, port: int, host_names: Sequence[str]) -> None:
    app = cast(Starlette, make_app(board, host_names))
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel_on_signal, nursery.cancel_scope)
            bound = await nursery.start(serve_http, app, host, port)
            nursery.start_soon(board.run)
            sys.stdout.write(f"explorer  {make_url(host, bound)}/   (Ctrl-C ends it)\n")
            sys.stdout.flush()
    except* OperatorError:
        raise OperatorError(f"cannot listen on {host}:{port}: choose another --port or --host") from None
