"""`p2pfm node doctor`: everything a node needs, looked at one by one, before or while it runs.

Each check gives one line: what was found, and for what is wrong the next step. Changes nothing. Knows files, sockets, a
Ledger and a running node's /status; loads no model.
"""

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

import httpx
import msgspec

from nodes.homes import KEYS_NAME, NoPassword
from nodes.models import LINEAR, resolve
from nodes.stakes import describe_pool, describe_stake
from p2pfm.config import WEI_PER_PFM, NodeConfig
from p2pfm.errors import ChainError, ConfigError, OperatorError, P2PFMError
from p2pfm.lora.samples import read_samples
from p2pfm.runtime.clock import describe_offset
from p2pfm.runtime.endpoints import make_url, name_endpoint
from p2pfm.runtime.network.peer_book import PRIVATE, get_scope, parse_address
from p2pfm.runtime.node import validate_rules
from p2pfm.runtime.web3_ledger import READ_ONLY_KEY, Web3Ledger, open_ledger

DISK_BYTES_MIN = 2 << 30
"""Blobs of a week of rounds of a small adapter, and room for the database [bytes]."""
DISK_BYTES_WANTED = 8 << 30
"""A node keeps up to 4 GiB of blobs, and models lie beside them [bytes]."""
CLOCK_WARN_S = 15
"""A chain's newest block is rarely older. Rounds follow the clock: who is early or late is not heard [s]."""
CLOCK_FAIL_S = 120
ETHER_WANTED_WEI = 10**16
"""Enough for some dozen transactions at quiet prices [wei]."""
DIAL_S = 3.0

Verdict = Literal["ok", "warn", "fail"]


class Check(msgspec.Struct, frozen=True):
    """One line of the report."""

    name: str
    verdict: Verdict
    found: str
    step: str = ""
    """What to do about it; empty when nothing is wrong."""


def examine(config: NodeConfig, account: str, problem: OperatorError | None = None) -> Iterator[Check]:
    """All checks, in the order in which a node needs things. `account`: its Ethereum address, "" when not known;
    `problem`: why its keys could not be opened."""
    ledger = open_ledger(config, READ_ONLY_KEY)
    checks: dict[str, Callable[[], Check]] = {
        "keys": lambda: _check_home(config, problem),
        "disk": lambda: _check_disk(config),
        "data": lambda: _check_data(config),
        "probe": lambda: _check_probe(config),
        "model": lambda: _check_model(config),
        "chain": lambda: _check_chain(config, ledger),
        "clock": lambda: _check_clock(config, ledger),
        "membership": lambda: _check_membership(config, ledger, account),
        "gas": lambda: _check_gas(ledger, account),
        "pool": lambda: _check_pool(ledger),
        "reachability": lambda: _check_listen(config),
        "bootstrap": lambda: _check_bootstrap(config),
        "node": lambda: _check_running(config),
        "discovery": lambda: _check_discovery(config),
    }
    for name, check in checks.items():
        try:
            yield check()
        except (P2PFMError, OSError) as error:
            yield Check(name, "fail", str(error), "mend what the line says, and look again")
        except (LookupError, TypeError, ValueError, AttributeError) as error:  # of another program's /status
            found = f"{_get_url(config)} answers what no node of this version does ({error!r:.80})"
            yield Check(name, "fail", found, "is `http.port` of another program? Choose another in the TOML")


# --- this machine -----------------------------------------------------------------------------------------------------


def _check_home(config: NodeConfig, problem: OperatorError | None) -> Check:
    home = Path(config.home)
    keys = home / KEYS_NAME
    if not keys.is_dir():
        return Check("keys", "fail", f"no keys in {keys}", "`p2pfm init` makes a node's folder")
    for path in sorted(keys.iterdir()):
        if path.stat().st_mode & 0o077:
            return Check("keys", "fail", f"{path} can be read by others", f"chmod 600 {path}")
    if not os.access(home, os.W_OK):
        return Check("keys", "fail", f"{home} cannot be written", "run as its owner")
    if isinstance(problem, NoPassword):
        return Check("keys", "warn", str(problem), "without it nobody can tell whether the keys are whole")
    if problem is not None:
        return Check("keys", "fail", str(problem), "`p2pfm node run` would say the same: mend what the line says")
    return Check("keys", "ok", f"{keys}, readable by their owner only")


def _check_disk(config: NodeConfig) -> Check:
    free = shutil.disk_usage(config.home).free
    found = f"{free / (1 << 30):.1f} GiB free at {config.home}"
    if free < DISK_BYTES_MIN:
        return Check("disk", "fail", found, "free some: a node that cannot write ends, lest it sign twice")
    if free < DISK_BYTES_WANTED:
        return Check("disk", "warn", found, f"{DISK_BYTES_WANTED >> 30} GiB last for long")
    return Check("disk", "ok", found)


def _check_data(config: NodeConfig) -> Check:
    try:
        samples = read_samples(Path(config.data))
    except (ConfigError, OperatorError) as error:
        return Check("data", "fail", str(error), "`data` in the TOML: JSON lines of topic, prompt, completion")
    return Check("data", "ok", f"{len(samples)} samples in {config.data}")


def _check_probe(config: NodeConfig) -> Check:
    if not config.probe:
        return Check("probe", "ok", "no file: it is fetched from a peer by its digest")
    path = Path(config.probe)
    if not path.is_file():
        return Check("probe", "fail", f"no file {path}", "remove `probe` from the TOML to fetch it from a peer")
    if sha256(path.read_bytes()).hexdigest() != config.network.probe:
        return Check("probe", "fail", f"{path} is not the declared set", "remove `probe` to fetch the right one")
    return Check("probe", "ok", f"{path}, as the network declares it")


def _check_model(config: NodeConfig) -> Check:
    name = config.network.backbone
    if name == LINEAR:
        return Check("model", "ok", f"{name}: no language model, nothing to load")
    try:
        where = resolve(name)
    except OperatorError as error:
        return Check("model", "fail", str(error), f"p2pfm models fetch {name}")
    return Check("model", "ok", f"{name}: {where}")


# --- the chain --------------------------------------------------------------------------------------------------------


def _check_chain(config: NodeConfig, ledger: Web3Ledger) -> Check:
    place = name_endpoint(config.rpc)
    try:
        validate_rules(config.network, ledger.get_params())
        head, roster = ledger.get_head(), ledger.get_roster()
    except ChainError as error:
        return Check("chain", "fail", str(error), f"`rpc` is {place}; `p2pfm testnet up` starts a local chain")
    except OperatorError as error:
        return Check("chain", "fail", str(error), "the TOML and the contract belong to different networks")
    newest = f"round {head.round} settled" if head else "no round settled yet"
    count = sum(member.active for member in roster.members)
    return Check("chain", "ok", f"{place}: {newest}, {count} active members, restart {roster.nonce}")


def _check_clock(config: NodeConfig, ledger: Web3Ledger) -> Check:
    clock = _get_status(config).get("clock", {})
    if clock.get("offset_ms") is not None:  # the running node's peers know better than a chain that may rest
        found = f"this machine is {describe_offset(clock['offset_ms'])} the median of {clock['num_peers']} peers"
        if clock["is_off"]:
            return Check("clock", "fail", found, "set the clock (NTP): nobody hears this node")
        return Check("clock", "ok", f"right, by the clocks of {clock['num_peers']} peers")
    try:
        offset_s = time.time() - ledger.get_time()
    except ChainError as error:
        return Check("clock", "warn", f"cannot be compared: {error}", "see `chain`")
    found = f"this machine is {abs(offset_s):.0f} s {'ahead of' if offset_s > 0 else 'behind'} the newest block"
    step = "set the clock (NTP), unless the chain itself stands still: rounds follow it"
    if abs(offset_s) < CLOCK_WARN_S:
        return Check("clock", "ok", found)
    return Check("clock", "fail" if abs(offset_s) >= CLOCK_FAIL_S else "warn", found, step)


def _check_membership(config: NodeConfig, ledger: Web3Ledger, account: str) -> Check:
    if not account:
        return Check("membership", "warn", "the account is not known without the password", "give --password-file")
    told = describe_stake(ledger, account)
    if told["state"] == "active":
        return Check("membership", "ok", f"member {told['member']} with {told['stake_pfm']:g} PFM staked")
    if told["state"] in ("not registered", "left"):
        held = ledger.get_balance(account) / WEI_PER_PFM
        if held < config.stake_pfm:
            return Check(
                "membership",
                "fail",
                f"not a member, and {account} holds {held:g} of {config.stake_pfm} PFM",
                f"send it the stake (on a local testnet: p2pfm testnet endow {account})",
            )
        return Check("membership", "ok", f"not a member yet: `p2pfm node run` stakes {config.stake_pfm} PFM")
    return Check("membership", "fail", f"this node is {told['state']}", told["free"])


def _check_gas(ledger: Web3Ledger, account: str) -> Check:
    if not account:
        return Check("gas", "warn", "the account is not known without the password", "give --password-file")
    wei = ledger.get_ether(account)
    found = f"{account} holds {wei / 10**18:.4f} ether"
    if wei < ETHER_WANTED_WEI:
        return Check(
            "gas", "fail" if wei == 0 else "warn", found, "send it some: joining, settling and claims cost gas"
        )
    return Check("gas", "ok", found)


def _check_pool(ledger: Web3Ledger) -> Check:
    told = describe_pool(ledger)
    found = f"{told['pool_pfm']:g} PFM for {told['paying_rounds_left']} paying rounds"
    if told["per_epoch_pfm"] and told["paying_rounds_left"] == "0":
        return Check("pool", "warn", found, "settlement waits for a sponsor: p2pfm pool fund AMOUNT")
    return Check("pool", "ok", found)


# --- the network ------------------------------------------------------------------------------------------------------


def _check_listen(config: NodeConfig) -> Check:
    parsed = parse_address(config.listen)
    host = parsed.host if parsed else ""
    try:
        address = ip_address(host)
    except ValueError:
        return Check(
            "reachability", "warn", f"listens on {config.listen}", "other machines need an address they can dial"
        )
    if address.is_loopback:
        return Check(
            "reachability",
            "warn",
            f"listens on {config.listen}: this machine only",
            "set `listen` to an address that others can reach; relay and hole punching are not built",
        )
    if get_scope(host) == PRIVATE:
        return Check("reachability", "ok", f"listens on {config.listen}: from the local network")
    return Check("reachability", "ok", f"listens on {config.listen}")


def _check_bootstrap(config: NodeConfig) -> Check:
    if not config.bootstrap:
        return Check("bootstrap", "ok", "none: this node is where others begin")
    answers = []
    for address in config.bootstrap:
        parsed = parse_address(address)
        if parsed is None:
            return Check("bootstrap", "fail", f"{address!r} is no address", "expected /ip4/HOST/tcp/PORT/p2p/PEER_ID")
        try:
            socket.create_connection((parsed.host, parsed.port), DIAL_S).close()
            answers.append(address)
        except OSError:
            continue
    found = f"{len(answers)} of {len(config.bootstrap)} accept connections"
    if not answers:
        return Check("bootstrap", "fail", found, "is one of them running? Ask for newer addresses: p2pfm node status")
    return Check("bootstrap", "ok", found)


def _check_discovery(config: NodeConfig) -> Check:
    status = _get_status(config)
    if not status:
        return Check("discovery", "warn", "not known: the node does not run", "see `node`")
    reach: dict[str, dict[str, str]] = status.get("reach", {})
    ways = [f"{name.replace('_', ' ')}: {way['found']}" for name, way in reach.items() if way["state"] == "ok"]
    found = "; ".join(ways) or "no way to find peers works yet: `p2pfm node status` shows each"
    if reach and reach["inbound"]["state"] != "ok":
        step = "nobody has dialled in yet: if that stays so, open the port of `listen` in the router or firewall"
        return Check("discovery", "warn", found, step)
    return Check("discovery", "ok", found)


def _check_running(config: NodeConfig) -> Check:
    status = _get_status(config)
    if not status:
        return Check("node", "warn", f"no node answers at {_get_url(config)}", "start it: p2pfm node run")
    peers, error = status.get("peers", []), status.get("chain", {}).get("error", "")
    found = f"{status.get('stage')}, round {status.get('round')} {status.get('phase')}, {len(peers)} peers connected"
    if error:
        return Check("node", "warn", f"{found}; chain: {error}", "settlement waits, training and serving go on")
    if not peers:
        return Check("node", "warn", found, "alone: see `bootstrap` and `reachability`")
    return Check("node", "ok", found)


def _get_url(config: NodeConfig) -> str:
    return make_url(config.http.host, config.http.port) + "/status"


def _get_status(config: NodeConfig) -> dict[str, Any]:
    """The running node's; empty when none answers."""
    try:
        status: Any = httpx.get(_get_url(config), timeout=DIAL_S).json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        return {}
    return status if isinstance(status, dict) else {}
