"""Scenario files: TOML of a `Scenario`. Those beside this module are shipped, each with the question it answers.

Knows files and their faults; whether a scenario can run is asked of `sim.scenarios`.
"""

import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from re import fullmatch, match
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import tomli_w

from p2pfm.errors import ConfigError
from sim.churn import load_trace
from sim.scenarios import Scenario, validate_scenario

SUFFIX = ".toml"

FOLDER = Path(__file__).parent

ANY = "[*]"
"""A place in a table whose key msgspec does not tell."""


def list_names() -> tuple[str, ...]:
    """Names of the shipped scenarios, in order."""
    return tuple(sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}")))


def load_scenario(name: str) -> Scenario:
    """A shipped scenario by its name, a TOML or JSON file by its path, or inline JSON; of a hunt's file the scenario.

    Raises:
        ConfigError: not there, not readable, or it holds what a scenario does not.
    """
    if name.lstrip().startswith("{"):
        return parse_json(name)
    if name in list_names():
        return parse_toml((FOLDER / f"{name}{SUFFIX}").read_text(encoding="utf-8"), name, FOLDER)
    path = Path(name)
    if not path.is_file():
        near = get_close_matches(name, list_names(), 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"no scenario {name!r}: {hint}expected the path of a TOML or JSON file, or one of {', '.join(list_names())}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a text file, got {error}") from error
    parse = parse_json if path.suffix == ".json" else parse_toml
    return parse(text, str(path), path.parent)


def parse_toml(text: str, name: str = "scenario", folder: Path = Path()) -> Scenario:
    """A scenario from TOML; `name` is what errors call it, `folder` what the name of a trace's file is relative to.

    Raises:
        ConfigError: names the key, what was expected, and what it was.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: expected TOML, got a fault: {error}") from error
    return convert_scenario(raw, name, folder)


def parse_json(text: str, name: str = "scenario", folder: Path = Path()) -> Scenario:
    """A scenario from JSON, as a violation prints it or as a hunt saved it; see `parse_toml`.

    Raises:
        ConfigError: see `parse_toml`.
    """
    try:
        raw = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{name}: expected JSON, got a fault: {error}") from error
    if isinstance(raw, dict) and "scenario" in raw:  # a sim.hunt.Seed
        raw = raw["scenario"]
    return convert_scenario(raw, name, folder)


def dump_toml(scenario: Scenario) -> str:
    """All fields of a scenario as TOML; its inverse is `parse_toml`."""
    return tomli_w.dumps(_without_none(msgspec.to_builtins(scenario)))


def get_changes(scenario: Scenario) -> dict[str, Any]:
    """The fields in which a scenario differs from the default one, in builtin types."""
    fields, usual = msgspec.to_builtins(scenario), msgspec.to_builtins(Scenario())
    return {name: value for name, value in fields.items() if value != usual[name]}


def change_scenario(scenario: Scenario, changes: Mapping[str, Any]) -> Scenario:
    """A scenario with other values at dotted keys, as in `{"network.loss": 0.1}`, found to be one that can run.

    Raises:
        ConfigError: see `parse_toml`.
    """
    raw = msgspec.to_builtins(scenario)
    for key, value in changes.items():
        *tables, last = key.split(".")
        inner = raw
        for table in tables:
            if inner.get(table) is None:  # a table that is absent where nobody asks for it
                inner[table] = {}
            inner = inner[table]
            if not isinstance(inner, dict):
                raise ConfigError(f"{key}: {table} holds no keys")
        inner[last] = value
    changed = convert_scenario(raw, "scenario")
    validate_scenario(changed)
    return changed


def convert_scenario(raw: Any, name: str, folder: Path = Path()) -> Scenario:
    """A scenario from builtin types, its trace's file read; whether it can run is not asked.

    Raises:
        ConfigError: names the key, what was expected, and what it was.
    """
    try:
        scenario = msgspec.convert(raw, Scenario)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name}: {_explain(str(error), raw)}") from error
    return msgspec.structs.replace(scenario, churn=load_trace(scenario.churn, folder))


def _explain(text: str, raw: Any) -> str:
    """What msgspec says of a fault, with the value that stands there and the key that may have been meant."""
    found = match(r"(?P<what>.*?)(?: - at `(?P<path>[^`]*)`(?: in `(?P<table>[^`]*)`)?)?$", text)
    assert found, "the pattern takes any text"
    what, path = found["what"], found["table"] or found["path"] or "$"
    keys = [part for part in path.removeprefix("$").replace("[...]", ANY).replace("[", ".[").split(".") if part]
    unknown = fullmatch(r"Object contains unknown field `(.*)`", what)
    if unknown:
        allowed = _get_keys(keys)
        near = get_close_matches(unknown[1], allowed, 1)
        where = f"[{_join(keys)}] " if keys else ""
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(sorted(allowed))}"
        return f"{where}unknown key {unknown[1]!r}: {hint}"
    name = _join(keys)
    value = _get_value(raw, keys)
    what = what.replace("`", "")
    if what.startswith("Invalid enum value"):
        allowed = _get_choices(keys, is_key=bool(found["table"]))
        bad = what.removeprefix("Invalid enum value ").strip("'")
        near = get_close_matches(bad, allowed, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{name}: expected one of {', '.join(allowed)}; got {bad!r}{hint}"
    what = what[0].lower() + what[1:]
    return f"{name or 'scenario'}: {what.split(', got ')[0]}, got {value!r}"


def _join(keys: Sequence[str]) -> str:
    return "".join(key if key.startswith("[") else f".{key}" for key in keys).lstrip(".")


def _get_value(raw: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if key != ANY:
            raw = raw[int(key[1:-1])] if key.startswith("[") else raw[key]
    return raw


def _get_type(keys: Sequence[str]) -> Any:
    """The annotated type at a path into a Scenario."""
    here: Any = Scenario
    for key in keys:
        is_inner = key.startswith("[")
        here = get_args(here)[1 if key == ANY else 0] if is_inner else get_type_hints(_get_struct(here))[key]
    return here


def _get_struct(here: Any) -> Any:
    """A struct, also where it may be absent."""
    return next((item for item in get_args(here) if isinstance(item, type) and item is not type(None)), here)


def _get_keys(keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(_get_struct(_get_type(keys)).__struct_fields__)


def _get_choices(keys: Sequence[str], is_key: bool) -> tuple[str, ...]:
    here = _get_type(keys)
    here = get_args(here)[0] if is_key else here
    literals = [here] if get_origin(here) is Literal else [one for one in get_args(here) if get_origin(one) is Literal]
    return tuple(word for literal in literals for word in get_args(literal))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list | tuple) else value
