"""The `p2pfm` command: one verb a command, --json for machines, named exit codes, errors that name the next step.

Environment, files and time zones end here; everything below takes plain values.

Exit codes: 0 done; 1 the world (network, chain, time) refused; 2 wrong use or something the operator can mend;
3 a check found something wrong; 130 interrupted.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads slow two processes 10-fold

import json
import logging
import signal
import sys
import threading
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from p2pfm import __version__
from p2pfm.errors import OperatorError, P2PFMError

out = Console()
err = Console(stderr=True)


class Exit(IntEnum):
    """What a script can tell apart."""

    DONE = 0
    WORLD = 1
    OPERATOR = 2
    FINDING = 3
    INTERRUPTED = 130


app = typer.Typer(
    name="p2pfm",
    help="Decentralized federated learning of foundation models, with rewards on chain.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
node_app = typer.Typer(no_args_is_help=True, help="Run a peer, and look at it.")
testnet_app = typer.Typer(no_args_is_help=True, help="A local Ethereum testnet with the contracts on it.")
localnet_app = typer.Typer(no_args_is_help=True, help="Several peers on this machine.")
models_app = typer.Typer(no_args_is_help=True, help="Backbone models.")
rewards_app = typer.Typer(no_args_is_help=True, help="What the chain paid, to whom, and whether it was right.")
for name, group in (
    ("node", node_app),
    ("testnet", testnet_app),
    ("localnet", localnet_app),
    ("models", models_app),
    ("rewards", rewards_app),
):
    app.add_typer(group, name=name)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The node's TOML file.")]
Url = Annotated[str, typer.Option("--url", help="A node's HTTP address.")]


def main() -> None:
    """Run the command line; one clear line for every error that is not a bug."""
    try:
        app(standalone_mode=True)
    except OperatorError as error:
        _fail(error, Exit.OPERATOR)
    except P2PFMError as error:
        _fail(error, Exit.WORLD)
    except KeyboardInterrupt:
        err.print("interrupted; everything that was started is ended")
        raise SystemExit(Exit.INTERRUPTED) from None


def _fail(error: Exception, code: Exit) -> None:
    err.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
    raise SystemExit(int(code))


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


@app.command()
def version(as_json: Json = False) -> None:
    """Print the version.

    Example: `p2pfm version`
    """
    if as_json:
        _print_json({"version": __version__})
    else:
        out.print(f"p2pfm {__version__}")


# --- models ---


@models_app.command("fetch")
def models_fetch(name: Annotated[str, typer.Argument(help="smollm2-135m or tiny")] = "smollm2-135m") -> None:
    """Download a backbone once, check its hashes, and keep it in the cache.

    Example: `p2pfm models fetch smollm2-135m`
    """
    from nodes.models import fetch

    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=err) as progress:
        task = progress.add_task(name, total=1.0)
        folder = fetch(name, lambda what, part: progress.update(task, description=what, completed=part))
    out.print(f"{name}: {folder}", soft_wrap=True)


# --- init and node ---


@app.command()
def init(
    home: Annotated[Path, typer.Argument(help="The new node's folder.")],
    network: Annotated[Path, typer.Option(help="TOML with the [network] table: any node's node.toml will do.")],
    data: Annotated[Path, typer.Option(help='Private samples, JSON lines of {"topic", "prompt", "completion"}.')],
    rpc: Annotated[str, typer.Option(help="Ethereum JSON-RPC endpoint of the network's chain.")],
    bootstrap: Annotated[list[str] | None, typer.Option(help="Address of any peer: /ip4/.../tcp/.../p2p/ID.")] = None,
    probe: Annotated[Path | None, typer.Option(help="The probe set's file; without it a peer gives it.")] = None,
    listen: Annotated[str, typer.Option(help="libp2p listen address.")] = "/ip4/127.0.0.1/tcp/0",
    http_port: Annotated[int, typer.Option(help="Port of the HTTP side.")] = 8000,
    password_file: Annotated[
        Path | None, typer.Option(help="Password for the keys; else a random one is kept.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a node: its keys (files 0600) and its node.toml.

    Example: `p2pfm init alice --network net/peer-0/node.toml --data alice.jsonl --rpc http://127.0.0.1:8545
    --bootstrap /ip4/127.0.0.1/tcp/4001/p2p/12D3...`
    """
    from nodes.homes import CONFIG_NAME, create_home, read_network
    from p2pfm.config import HttpConfig, NodeConfig

    config = NodeConfig(
        home=".",
        data=str(data.resolve()),
        rpc=rpc,
        network=read_network(network),
        probe=str(probe.resolve()) if probe else "",
        listen=listen,
        bootstrap=tuple(bootstrap or ()),
        http=HttpConfig(port=http_port),
    )
    password = password_file.read_text(encoding="utf-8").strip() if password_file else None
    keys = create_home(config, home, password)
    told = {"peer": keys.peer, "account": keys.account_address, "config": str(home / CONFIG_NAME)}
    if as_json:
        _print_json(told)
        return
    for key, value in told.items():
        out.print(f"{key:8} {value}", highlight=False, soft_wrap=True)
    out.print(
        f"\nSend the account its stake ({config.stake_pfm} PFM) and some ether "
        f"(`p2pfm testnet endow {keys.account_address}` on a local testnet), then:\n"
        f"  p2pfm node run --config {home / CONFIG_NAME}",
        soft_wrap=True,
    )


@node_app.command("run")
def node_run(
    config_file: ConfigFile,
    password_file: Annotated[Path | None, typer.Option(help="File with the keys' password.")] = None,
    tied: Annotated[bool, typer.Option(hidden=True, help="End when standard input closes.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Run a peer until Ctrl-C: train, exchange, measure, certify, settle, serve.

    Example: `p2pfm node run --config alice/node.toml`
    """
    from nodes.homes import open_keys, read_config
    from nodes.run import run_node

    config = read_config(config_file)
    _set_up_logging(logging.DEBUG if verbose else logging.INFO, as_json=config.log_json)
    if tied:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    run_node(config, open_keys(config, password_file))


def _end_with_stdin() -> None:
    """End this process when the one that started it is gone."""
    while os.read(sys.stdin.fileno(), 4096):  # not sys.stdin: its lock would be held when the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One JSON object a line."""
        told = {"time": record.created, "level": record.levelname, "name": record.name, "text": record.getMessage()}
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(told)


def _set_up_logging(level: int, *, as_json: bool) -> None:
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")
    handler.setFormatter(_JsonLines() if as_json else plain)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for ours in ("p2pfm", "nodes"):
        logging.getLogger(ours).setLevel(level)


@node_app.command("status")
def node_status(
    url: Url = "http://127.0.0.1:8000",
    config_file: Annotated[
        Path | None, typer.Option("--config", "-c", help="The node's TOML, instead of --url.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a running node is doing.

    Example: `p2pfm node status --url http://127.0.0.1:8000`
    """
    from nodes.screens import make_status_table

    status = _get_status(_get_url(url, config_file))
    if as_json:
        _print_json(status)
    else:
        out.print(make_status_table(status))


def _get_url(url: str, config_file: Path | None) -> str:
    if config_file is None:
        return url.rstrip("/")
    from nodes.homes import read_config

    http = read_config(config_file).http
    return f"http://{http.host}:{http.port}"


def _get_status(url: str) -> dict[str, Any]:
    try:
        status: dict[str, Any] = httpx.get(f"{url}/status", timeout=10).raise_for_status().json()
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        raise OperatorError(f"no node answers at {url}: {error}. Start one: p2pfm node run --config FILE") from error
    return status


@app.command()
def chat(
    url: Url = "http://127.0.0.1:8000",
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Ask once and end; without it: a conversation.")] = "",
    model: Annotated[str, typer.Option(help="Model name as in /v1/models; empty: the newest certified base.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: the likeliest word each time.")] = 0.0,
) -> None:
    """Talk to the network's model through any node; shows which replica and version answered.

    Example: `p2pfm chat --prompt "What is a computer?"`
    """
    from nodes.chat import run_chat

    run_chat(url.rstrip("/"), prompt=prompt, model=model, max_tokens=max_tokens, temperature=temperature)


if __name__ == "__main__":
    main()
