"""The section [http] of a node's TOML, and its file of API keys: what is refused, and how it is said."""

from pathlib import Path

import pytest
from test_personal import NODE

from nodes.homes import read_config
from p2pfm.config import HttpConfig, parse_node_config
from p2pfm.errors import ConfigError, OperatorError
from p2pfm.runtime.api_keys import read_api_keys

SECRET = "0123456789abcdef-secret"


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("port = 65536", "http.port: expected 0 to 65535, got 65536"),
        ("body_bytes_max = 10", "http.body_bytes_max"),
        ("prompt_tokens_max = -1", "http.prompt_tokens_max"),
        ("requests_max = 0", "http.requests_max"),
        ("queue_max = -1", "http.queue_max"),
        ("client_requests_max = 0", "http.client_requests_max"),
        ("request_s_max = 0", "http.request_s_max"),
        ("connections_max = 0", "http.connections_max"),
        ("connection_max = 5", "connection_max"),
        ('origins = ["app.example"]', "http.origins"),
        ('api_keys_file = 5', "api_keys_file"),
    ],
)  # fmt: skip
def test_a_bound_that_cannot_work_is_refused_by_name(line: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        parse_node_config(f"{NODE}[http]\n{line}\n")


def write(folder: Path, text: bytes, mode: int = 0o600) -> str:
    path = folder / "keys"
    path.write_bytes(text)
    path.chmod(mode)
    return str(path)


def test_a_file_of_keys_names_its_clients(tmp_path: Path) -> None:
    keys = read_api_keys(write(tmp_path, f"# who\n\nalice {SECRET}\nbob   {SECRET}2\n".encode()))
    assert (keys.find_client(SECRET), keys.find_client(f"{SECRET}2")) == ("alice", "bob")
    assert keys.find_client("") is None
    assert keys.find_client(SECRET[:-1]) is None
    assert SECRET not in repr(vars(keys))
    assert not read_api_keys("")


@pytest.mark.parametrize(
    ("text", "mode", "hint"),
    [
        (f"alice {SECRET}\n", 0o644, "chmod 600"),
        ("", 0o600, "expected 1 to"),
        (f"alice {SECRET}\nalice {SECRET}2\n", 0o600, "line 2: .*once"),
        (f"alice {SECRET}\nbob {SECRET}\n", 0o600, "line 2: .*once"),
        (f"{SECRET}\n", 0o600, "line 1: .*openssl"),
        (f"{SECRET} alice\n", 0o600, "line 1: .*20 to 200"),
        ("alice short\n", 0o600, "line 1: .*20 to 200"),
        (f"al/ice {SECRET}\n", 0o600, "line 1: .*NAME SECRET"),
        (f"alice {SECRET}é\n", 0o600, "ASCII"),
    ],
)
def test_a_file_that_is_no_list_of_keys_is_refused_without_showing_a_secret(
    tmp_path: Path, text: str, mode: int, hint: str
) -> None:
    with pytest.raises(OperatorError, match=hint) as refused:
        read_api_keys(write(tmp_path, text.encode(), mode))
    shown = str(refused.value).replace(str(tmp_path), "")
    assert SECRET not in shown


def test_a_missing_file_of_keys_is_told(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="No such file"):
        read_api_keys(str(tmp_path / "none"))


def test_the_file_of_keys_lies_where_the_toml_does(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text(f'{NODE}[http]\napi_keys_file = "keys"\n')
    assert read_config(config).http.api_keys_file == str(tmp_path / "keys")


def test_the_guide_tells_every_key() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "serving.md").read_text()
    assert [key for key in HttpConfig.__struct_fields__ if f"`{key}" not in guide] == []
