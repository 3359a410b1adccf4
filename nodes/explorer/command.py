"""The `p2pfm explorer` command: its options. What it does is in `serve`, which loads a chain's client, when run."""

from pathlib import Path
from typing import Annotated

import typer

PORT = 8600


def explorer(
    config_files: Annotated[
        list[Path] | None, typer.Option("--config", "-c", help="A node's TOML; repeat it for more networks or nodes.")
    ] = None,
    rpc: Annotated[str, typer.Option(help="Without a node: an Ethereum JSON-RPC endpoint, with --network.")] = "",
    network_file: Annotated[
        Path | None, typer.Option("--network", help="Without a node: TOML with the [network] table.")
    ] = None,
    node_urls: Annotated[
        list[str] | None, typer.Option("--node-url", "--node", help="A node to ask for data too; repeat it for more.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = PORT,
    allow_hosts: Annotated[
        list[str] | None, typer.Option("--allow-host", help="A name of this machine by which browsers may ask.")
    ] = None,
    tied: Annotated[bool, typer.Option(hidden=True, help="End when standard input closes.")] = False,
) -> None:
    """Serve a page of networks, rounds and rewards, for a browser on this machine, until Ctrl-C.

    Example: `p2pfm explorer --config alice/node.toml`
    """
    from nodes.explorer.serve import find_networks, serve
    from nodes.tied import end_with_stdin

    found = find_networks(config_files or [], rpc, network_file, node_urls or [])
    if tied:
        end_with_stdin()
    serve(found, host, port, allow_hosts or [])
