"""The `p2pfm` command: one verb a command, --json for machines, named exit codes, errors that name the next step.

Environment, files and time zones end here; everything below takes plain values.

Exit codes: 0 done; 1 the world (network, chain, time) refused; 2 wrong use or something the operator can mend;
3 a check found something wrong; 130 interrupted; 143 told to end (SIGTERM), 129 the terminal is gone (SIGHUP).
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads slow two processes 10-fold

import io
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from nodes.explorer.command import explorer
from nodes.logs import is_json, set_up_logging
from nodes.printable import make_printable
from nodes.rewards.cli import app as rewards_app
from nodes.signals import end_in_order, hear_interrupts
from nodes.stakes import pool_app, stake_app
from nodes.tied import describe_end, end_with_stdin
from p2pfm import __version__
from p2pfm.errors import OperatorError, P2PFMError, WorldError
from sim.cli import app as sim_app
from sim.report import OTHER_LEDGERS
from sim.scenarios import Scenario
from sim.world import World

CONFIG_NAME = "node.toml"

out = Console()
err = Console(stderr=True)
log = logging.getLogger("nodes.cli")


class Exit(IntEnum):
    """What a script can tell apart."""

    DONE = 0
    WORLD = 1
    OPERATOR = 2
    FINDING = 3
    INTERRUPTED = 130


class LogFormat(StrEnum):
    """Lines for people, or JSON objects."""

    PLAIN = "plain"
    JSON = "json"


@contextmanager
def _open_evm(scenario: Scenario) -> Iterator[World]:
    from nodes.evm_world import open_evm_world  # an EVM takes a second to import

    with open_evm_world(scenario) as (world, _):
        yield world


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
adapter_app = typer.Typer(no_args_is_help=True, help="What the network has trained, for other tools.")
for name, group in (
    ("node", node_app),
    ("testnet", testnet_app),
    ("localnet", localnet_app),
    ("models", models_app),
    ("adapter", adapter_app),
    ("rewards", rewards_app),
):
    app.add_typer(group, name=name)
app.add_typer(stake_app, name="stake")
app.add_typer(pool_app, name="pool")
app.add_typer(sim_app, name="sim")
OTHER_LEDGERS["evm"] = _open_evm
app.command()(explorer)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The node's TOML file.")]
Url = Annotated[str, typer.Option("--url", help="A node's HTTP address.")]


def main() -> None:
    """Run the command line; one clear line for every error that is not a bug."""
    hear_interrupts()
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character shows another, and all the rest
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app(standalone_mode=True)
    except OperatorError as error:
        _fail(error, Exit.OPERATOR)
    except P2PFMError as error:
        _fail(error, Exit.WORLD)
    except OSError as error:
        _fail(OperatorError(f"{error.filename or 'the system'}: {error.strerror or error}"), Exit.OPERATOR)
    except KeyboardInterrupt:  # before a command began; later typer ends with the same code
        raise SystemExit(Exit.INTERRUPTED) from None


def _fail(error: Exception, code: Exit) -> None:
    if is_json():
        log.critical("%s", error)
    else:
        err.print("[red]error:[/]", escape(make_printable(str(error))), highlight=False, soft_wrap=True)
    raise SystemExit(int(code))


def _say(text: str) -> None:
    """Text for people as it is: paths, names and what others wrote are no markup."""
    out.print(make_printable(text), markup=False, highlight=False, soft_wrap=True)


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
    end_in_order()
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
        Path | None, typer.Option(help="Password for the keys; else $P2PFM_PASSWORD, else a random one is kept.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a node: its keys (files 0600) and its node.toml.

    Example: `p2pfm init alice --network net/peer-0/node.toml --data alice.jsonl --rpc http://127.0.0.1:8545
    --bootstrap /ip4/127.0.0.1/tcp/4001/p2p/12D3...`
    """
    from nodes.homes import CONFIG_NAME, create_home, find_password, read_network, validate_node
    from nodes.models import LINEAR
    from p2pfm.config import HttpConfig, NodeConfig, ServingConfig, make_transport_limits

    rules = read_network(network)
    config = NodeConfig(
        home=".",
        data=str(data.resolve()),
        rpc=rpc,
        network=rules,
        probe=str(probe.resolve()) if probe else "",
        listen=listen,
        bootstrap=tuple(bootstrap or ()),
        http=HttpConfig(port=http_port),
        serving=ServingConfig(enabled=rules.backbone != LINEAR),
        limits=make_transport_limits(rules),
    )
    password = find_password(password_file)
    validate_node(config)
    keys = create_home(config, home, password.text if password else None)
    told = {"peer": keys.peer, "account": keys.account_address, "config": str(home / CONFIG_NAME)}
    if as_json:
        _print_json(told)
        return
    for key, value in told.items():
        _say(f"{key:8} {value}")
    _say(
        f"\nSend the account its stake ({config.stake_pfm} PFM) and some ether "
        f"(`p2pfm testnet endow {keys.account_address}` on a local testnet), then:\n"
        f"  p2pfm node run --config {home / CONFIG_NAME}"
    )


@node_app.command("run")
def node_run(
    config_file: ConfigFile,
    password_file: Annotated[Path | None, typer.Option(help="File with the keys' password.")] = None,
    tied: Annotated[bool, typer.Option(hidden=True, help="End when standard input closes.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
    log_format: Annotated[LogFormat | None, typer.Option(help="Instead of what the TOML's log_json says.")] = None,
) -> None:
    """Run a peer until Ctrl-C: train, exchange, measure, certify, settle, serve.

    Example: `p2pfm node run --config alice/node.toml`
    """
    from nodes.homes import open_keys, read_config

    level = logging.DEBUG if verbose else logging.INFO
    if log_format is not None:
        set_up_logging(level, as_json=log_format is LogFormat.JSON)
    config = read_config(config_file)
    keys = open_keys(config, password_file)
    from nodes.run import run_node  # loads libp2p: after what is quick to refuse

    if log_format is None:
        set_up_logging(level, as_json=config.log_json)
    if tied:
        end_with_stdin()
    run_node(config, keys)


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


@node_app.command("doctor")
def node_doctor(
    config_file: ConfigFile,
    password_file: Annotated[Path | None, typer.Option(help="File with the keys' password.")] = None,
    as_json: Json = False,
) -> None:
    """Look at everything a node needs: keys, disk, data, model, chain, clock, stake, peers; exit code 3 on a failure.

    The node may be running or not. Example: `p2pfm node doctor --config alice/node.toml`
    """
    from nodes.doctor import examine
    from nodes.homes import open_keys, read_config

    config = read_config(config_file)
    account, problem = "", None
    try:
        account = open_keys(config, password_file).account_address
    except OperatorError as error:
        problem = error
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    checks = []
    for check in examine(config, account, problem):
        checks.append(check)
        if not as_json:
            line = f"[{colours[check.verdict]}]{check.verdict:4}[/] {check.name:13}"
            out.print(line, escape(make_printable(check.found)), highlight=False, soft_wrap=True)
            if check.step:
                step = escape(make_printable(check.step))
                out.print(f"{'':19}{step}", style="dim", highlight=False, soft_wrap=True)
    if as_json:
        _print_json([{f: getattr(check, f) for f in check.__struct_fields__} for check in checks])
    if any(check.verdict == "fail" for check in checks):
        raise typer.Exit(int(Exit.FINDING))


def _get_url(url: str, config_file: Path | None) -> str:
    if config_file is None:
        return url.rstrip("/")
    from nodes.homes import read_config
    from p2pfm.runtime.endpoints import make_url

    http = read_config(config_file).http
    return make_url(http.host, http.port)


def _get_status(url: str) -> dict[str, Any]:
    try:
        status: Any = httpx.get(f"{url}/status", timeout=10).raise_for_status().json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:  # ValueError: no JSON, or no UTF-8
        raise OperatorError(f"no node answers at {url}: {error}. Start one: p2pfm node run --config FILE") from error
    if not isinstance(status, dict):
        raise OperatorError(f"expected the /status of a p2pfm node at {url}, got other JSON; is the address right?")
    return status


@app.command()
def chat(
    url: Annotated[
        list[str] | None, typer.Option(help="A node's HTTP address; give several, and one may die in mid-answer.")
    ] = None,
    message: Annotated[
        str, typer.Option("--message", "-m", "--prompt", "-p", help="Ask once and end; without it: a conversation.")
    ] = "",
    model: Annotated[str, typer.Option(help="Model name as in /v1/models; empty: the newest certified base.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: the likeliest word each time.")] = 0.7,
    seed: Annotated[int | None, typer.Option(min=0, help="The same seed gives the same answer.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file that holds the node's API key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With -m: one JSON object, for machines.")] = False,
) -> None:
    """Talk to the network's model through any node; shows which replica and version answered.

    Example: `p2pfm chat -m "What is a computer?"`, or with two gateways
    `p2pfm chat --url http://127.0.0.1:8000 --url http://127.0.0.1:8001`
    """
    from nodes.chat import ChatOptions, read_api_key, run_chat

    options = ChatOptions(url or ChatOptions().urls, model, max_tokens, temperature, seed, read_api_key(api_key_file))
    run_chat(options, out, message or None, is_json=as_json)


# --- testnet and localnet ---


@testnet_app.command("up")
def up_testnet(
    folder: Annotated[Path, typer.Option("--out", help="Where network.toml and the data go.")] = Path("net"),
    port: Annotated[int, typer.Option(min=1, max=65_535, help="JSON-RPC port.")] = 8545,
    peers: Annotated[int, typer.Option(min=1, max=10, help="Deal ChatterBot's topics to so many shards.")] = 3,
    model: Annotated[str, typer.Option(help="demo (SmolLM2), tiny, or toy (no language model).")] = "demo",
    chain: Annotated[str, typer.Option(envvar="CHAIN", help="embedded or anvil.")] = "embedded",
    adapter: Annotated[str, typer.Option(help="lora, ffa, fed_sb, ia3 or prompt.")] = "lora",
    starts_in: Annotated[int, typer.Option(min=1, help="Seconds until the first round.")] = 120,
) -> None:
    """Run a local Ethereum testnet with the contracts on it, and write down a network that lives on it.

    Example: `p2pfm testnet up --out net`
    """
    end_in_order()
    from nodes.homes import write_network
    from nodes.localnet import create_network, get_preset
    from nodes.testnet import run_testnet
    from p2pfm.lora.corpus import build_shards

    preset = replace(get_preset(model, adapter), startup_s=starts_in)
    shards = build_shards(peers, folder / "data", 0, frozenset())
    with run_testnet(port, _is_anvil(chain), folder / "chain.log") as testnet:
        network, _ = create_network(testnet, preset, shards.probe)
        write_network(folder / "network.toml", network)
        for key, value in (
            ("chain", f"{testnet.rpc_url} ({chain}, chain id {network.chain.chain_id})"),
            ("contract", network.chain.federation),
            ("network", f"{folder / 'network.toml'}, first round in {starts_in} s"),
            ("data", f"{folder / 'data'}: {', '.join(path.name for path in shards.peers)}, {shards.probe.name}"),
        ):
            out.print(f"{key:9} {value}", highlight=False, soft_wrap=True)
        out.print("Ctrl-C ends the chain.")
        code = testnet.process.wait()
    raise WorldError(f"the chain {describe_end(code)}; its log is {folder / 'chain.log'}")


@testnet_app.command("endow")
def endow_account(
    account: Annotated[str, typer.Argument(help="The newcomer's account, as `p2pfm init` prints it.")],
    network: Annotated[Path, typer.Option(help="The network's TOML.")] = Path("net/network.toml"),
    rpc: Annotated[str, typer.Option(help="JSON-RPC endpoint of the testnet.")] = "http://127.0.0.1:8545",
) -> None:
    """Give an account its stake and ether for gas, on a local testnet.

    Example: `p2pfm testnet endow 0xAbC... --network net/network.toml`
    """
    from nodes.homes import read_network
    from nodes.localnet import endow
    from nodes.testnet import account_keys
    from p2pfm.runtime.web3_ledger import Web3Ledger

    endow(Web3Ledger(rpc, read_network(network).chain, account_keys(1)[0]), account)
    out.print(f"{account} has its stake and gas")


@localnet_app.command("up")
def localnet_up(
    peers: Annotated[int, typer.Option("--peers", "-n", min=1, max=10, help="How many peers.")] = 4,
    model: Annotated[str, typer.Option(help="demo (SmolLM2), tiny, or toy (no language model).")] = "demo",
    adapter: Annotated[str, typer.Option(help="lora, ffa, fed_sb, ia3 or prompt.")] = "lora",
    chain: Annotated[str, typer.Option(envvar="CHAIN", help="embedded or anvil.")] = "embedded",
    folder: Annotated[
        Path | None, typer.Option("--out", help="A new folder; else a temporary one, removed unless something fails.")
    ] = None,
) -> None:
    """Run a chain and several honest peers on this machine until Ctrl-C.

    Example: `p2pfm localnet up --peers 3 --model tiny`
    """
    end_in_order()
    from nodes.demo_folder import MARK
    from nodes.localnet import Role, get_preset, localnet
    from nodes.screens import watch_localnet

    preset, kind = get_preset(model, adapter), _get_chain(chain)
    honest: Role = "honest"
    if folder is not None and (folder / MARK).exists():  # the next demo there would remove these homes
        raise OperatorError(f"{folder} is a demo's folder; choose another --out")
    with _open_folder(folder) as home, localnet(home, (honest,) * peers, preset, out.print, chain=kind) as net:
        for node in net.nodes:
            out.print(f"peer {node.index}: {node.url}  config {node.home / CONFIG_NAME}", soft_wrap=True)
        try:
            watch_localnet(net, out)
        finally:
            out.print("ending the peers and the chain")


@contextmanager
def _open_folder(folder: Path | None) -> Iterator[Path]:
    """That folder, or a temporary one: it goes at the end, but stays with its logs, and is named, after an error."""
    if folder is not None:
        yield folder
        return
    home = Path(tempfile.mkdtemp(prefix="p2pfm-localnet-"))
    is_kept = False
    try:
        yield home
    except Exception:
        is_kept = any(home.iterdir())
        if is_kept:
            err.print(f"keys and logs stay in {home}", highlight=False, soft_wrap=True)
        raise
    finally:
        if not is_kept:
            shutil.rmtree(home)


def _is_anvil(chain: str) -> bool:
    return _get_chain(chain) == "anvil"


def _get_chain(chain: str) -> Literal["embedded", "anvil"]:
    if chain not in ("embedded", "anvil"):
        raise OperatorError(f"chain: expected embedded or anvil, got {chain!r}")
    return "anvil" if chain == "anvil" else "embedded"


# --- adapter ---


@adapter_app.command("export")
def adapter_export(
    config_file: ConfigFile,
    folder: Annotated[Path, typer.Argument(help="Where the checkpoint goes; an older one there is replaced.")],
    as_json: Json = False,
) -> None:
    """Write a node's newest base as a peft checkpoint, for `PeftModel.from_pretrained(backbone, FOLDER)`.

    The node may be running or stopped. Example: `p2pfm adapter export --config alice/node.toml alice-adapter`
    """
    from nodes.adapters import export_base
    from nodes.homes import read_config

    base = export_base(read_config(config_file), folder)
    if as_json:
        _print_json({"folder": str(folder), "base": base.digest.hex(), "round": base.round})
    else:
        when = "from before the first round" if base.round is None else f"of round {base.round}"
        _say(f"{folder}: base {base.digest.hex()[:16]} {when}")


@adapter_app.command("serve")
def adapter_serve(
    folder: Annotated[Path, typer.Argument(help="A LoRA folder of peft: adapter_config.json and the safetensors.")],
    name: Annotated[str, typer.Option(help="Served as BACKBONE+NAME; without one by its digest alone.")] = "",
    url: Url = "http://127.0.0.1:8000",
    api_key_file: Annotated[Path | None, typer.Option(help="A file that holds the node's API key.")] = None,
    as_json: Json = False,
) -> None:
    """Have a running node serve a LoRA of your own beside the network's, and its peers by the digest.

    Example: `p2pfm adapter serve my-lora --name french`
    """
    from nodes.adapter_upload import serve_adapter
    from nodes.chat import read_api_key

    card = serve_adapter(url, folder, name, read_api_key(api_key_file))
    if as_json:
        _print_json({"id": card.id, "model": card.model, "version": card.version, "rank": card.rank})
    else:
        here = f"{card.model} here, " if card.model else ""
        _say(f"{here}{card.id} on every node")


# --- demo ---


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Option("--out", help="Where homes, logs and pictures go; an earlier demo's are removed.")
    ] = Path("demo-out"),
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
    chain: Annotated[str, typer.Option(envvar="CHAIN", help="embedded or anvil.")] = "embedded",
) -> None:
    """Five peers, a chain, two deaths and a return: the whole system in a few minutes; exit code 3 if a check fails.

    Example: `p2pfm demo --json demo.json`
    """
    end_in_order()
    kind = _get_chain(chain)
    from nodes.demo import run_demo
    from nodes.demo_folder import claim_demo_folder

    with claim_demo_folder(folder, json_path):
        holds = run_demo(folder, out, chain=kind, json_path=json_path)
    if not holds:
        raise typer.Exit(int(Exit.FINDING))


if __name__ == "__main__":
    main()
