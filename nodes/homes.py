"""A node's folder: keys, password, configuration. What `p2pfm init` makes and `p2pfm node run` reads.

Knows files and the command line's environment; nothing of the network.
"""

import os
import secrets
import shutil
import tempfile
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import tomli_w

from p2pfm.config import NetworkConfig, NodeConfig, parse_node_config
from p2pfm.errors import ConfigError, OperatorError
from p2pfm.lora.samples import read_probe, read_samples
from p2pfm.runtime.endpoints import NO_ENDPOINT, name_endpoint
from p2pfm.runtime.files import PRIVATE_FOLDER, refuse_shared, sync_folder, write_durably
from p2pfm.runtime.keys import Keys, WrongPassword, create_keys, load_keys
from p2pfm.runtime.network.peer_book import parse_address

CONFIG_NAME = "node.toml"
KEYS_NAME = "keys"
PASSWORD_NAME = "password"
PASSWORD_VARIABLE = "P2PFM_PASSWORD"


class Password(NamedTuple):
    """And where it came from, for messages."""

    text: str
    source: str


class NoPassword(OperatorError):
    """Nobody gave one, so nobody knows whether the keys are good."""


def create_home(config: NodeConfig, home: Path, password: str | None, *, is_light: bool = False) -> Keys:
    """Make keys and node.toml in `home`, to which the paths in `config` are relative.

    Without a password a random one is made and kept beside the keys (0600). Interrupted or on a full disk, nothing is
    left that a second try would stumble over: all is made in a hidden folder, and moved when it is whole.

    Raises:
        OperatorError: the folder holds a node already, or cannot be written.
    """
    path = home / CONFIG_NAME
    if path.exists():
        raise OperatorError(
            f"{home} holds a node already; choose another folder, or run `p2pfm node run --config {path}`"
        )
    held = [name for name in (KEYS_NAME, PASSWORD_NAME) if (home / name).exists()]
    if held:
        raise OperatorError(
            f"{home} holds {' and '.join(held)} of a node without its {CONFIG_NAME}: restore that file from your "
            "backup; choose another folder; or, if nothing was ever staked with these keys, remove them"
        )
    is_new = not home.exists()
    home.parent.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
    # A folder that exists may be a volume of its own, so what comes into it is made within it.
    made = Path(tempfile.mkdtemp(prefix=".init-", dir=home.parent if is_new else home))
    try:
        if password is None:
            password = secrets.token_urlsafe(24)
            write_durably(made / PASSWORD_NAME, password.encode())
        keys = create_keys(made / KEYS_NAME, password, light=is_light)
        write_config(made / CONFIG_NAME, config)
        if is_new:
            made.rename(home)
            sync_folder(home.parent)
        else:
            for name in (PASSWORD_NAME, KEYS_NAME, CONFIG_NAME):
                if (made / name).exists():
                    (made / name).rename(home / name)
            sync_folder(home)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return keys


def write_config(path: Path, config: NodeConfig) -> None:
    """The configuration as TOML, all keys spelled out but those of `limits`.

    For its owner only: the chain's endpoint may hold a key.
    """
    write_durably(path, _format(config).encode())


def _format(config: NodeConfig) -> str:
    values: dict[str, Any] = msgspec.to_builtins(config)
    return tomli_w.dumps(values)


def validate_node(config: NodeConfig) -> None:
    """Refuse now what `p2pfm node run` would refuse once the keys are made. Paths as they are from here.

    Raises:
        OperatorError: names the key or the file.
    """
    parse_node_config(_format(config))
    if name_endpoint(config.rpc) == NO_ENDPOINT or not config.rpc.startswith(("http://", "https://")):
        raise ConfigError(f"rpc: expected http://HOST:PORT of an Ethereum JSON-RPC endpoint, got {config.rpc!r}")
    if parse_address(config.listen) is None:
        raise ConfigError(f"listen: expected e.g. /ip4/127.0.0.1/tcp/4001, got {config.listen!r}")
    for address in config.bootstrap:
        parsed = parse_address(address)
        if parsed is None or not parsed.peer:
            raise ConfigError(f"bootstrap: expected /ip4/HOST/tcp/PORT/p2p/PEER_ID, got {address!r}")
    read_samples(Path(config.data))
    if config.probe and read_probe(Path(config.probe)).digest.hex() != config.network.probe:
        raise OperatorError(f"{config.probe} is not the network's probe set; without --probe a peer gives it")


def read_config(path: Path) -> NodeConfig:
    """The validated configuration in a file; relative paths in it are of that file's folder.

    Raises:
        ConfigError: no such file, or what `parse_node_config` refuses.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}. `p2pfm init` makes a node's folder") from error
    try:
        config = parse_node_config(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    folder = path.resolve().parent
    keys = config.http.api_keys_file
    return msgspec.structs.replace(
        config,
        home=str(folder / config.home),
        data=str(folder / config.data),
        probe=str(folder / config.probe) if config.probe else "",
        http=msgspec.structs.replace(config.http, api_keys_file=str(folder / keys) if keys else ""),
    )


def write_network(path: Path, network: NetworkConfig) -> None:
    """What peers agree on, as TOML that `read_network` reads."""
    path.write_text(tomli_w.dumps({"network": msgspec.to_builtins(network)}), encoding="utf-8")


def read_network(path: Path) -> NetworkConfig:
    """The [network] table of any node's TOML, or a file that holds nothing else.

    Raises:
        ConfigError: says which key is wrong.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        return msgspec.convert(values.get("network", values), NetworkConfig)
    except OSError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def find_password(password_file: Path | None) -> Password | None:
    """From a file, else from $P2PFM_PASSWORD; None: neither is there. Space around it is no part of it.

    Raises:
        OperatorError: empty, or a file that cannot be read, or that others can.
    """
    if password_file is not None:
        return _read_password(password_file)
    if PASSWORD_VARIABLE not in os.environ:
        return None
    return _as_password(os.environ[PASSWORD_VARIABLE], f"${PASSWORD_VARIABLE}")


def open_keys(config: NodeConfig, password_file: Path | None) -> Keys:
    """The node's keys; password as `find_password` has it, or from the file that `init` left beside them.

    Raises:
        NoPassword: there is none.
        OperatorError: a wrong one, or keys that cannot be used.
    """
    home = Path(config.home)
    password = find_password(password_file)
    if password is None and (home / PASSWORD_NAME).exists():
        password = _read_password(home / PASSWORD_NAME)
    if password is None:
        raise NoPassword(f"no password for {home}: set {PASSWORD_VARIABLE} or give --password-file")
    try:
        return load_keys(home / KEYS_NAME, password.text)
    except WrongPassword as error:
        raise OperatorError(f"{error}: tried the one from {password.source}") from error


def _read_password(path: Path) -> Password:
    try:
        refuse_shared(path)
        return _as_password(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise OperatorError(f"cannot read the password in {path}: {error.strerror}") from error
    except UnicodeDecodeError:  # its text would show what stands in the file
        raise OperatorError(f"{path}: expected a password in UTF-8, got other bytes") from None


def _as_password(text: str, source: str) -> Password:
    if not text.strip():
        raise OperatorError(f"{source}: expected a password, got nothing; `openssl rand -base64 24` makes one")
    return Password(text.strip(), source)
