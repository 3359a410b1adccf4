"""`[limits]` in a node's TOML: what strangers may take of it."""

import pytest

from nodes.homes import read_config, write_config
from p2pfm.config import TransportLimits, parse_node_config
from p2pfm.errors import ConfigError

NODE = f"""
home = "."
data = "d"
rpc = "r"
[network]
name = "n"
genesis_ms = 0
backbone = "tiny"
probe = "{"0" * 64}"
chain = {{ chain_id = 1, federation = "0x{"0" * 40}", token = "0x{"0" * 40}" }}
"""


def test_what_is_not_named_keeps_its_default():
    limits = parse_node_config(NODE + "[limits]\nconnections_max = 20\nbuffered_max = 1_000_000").limits
    assert limits == TransportLimits(connections_max=20, buffered_max=1_000_000)
    assert parse_node_config(NODE).limits == TransportLimits()


def test_a_written_configuration_names_only_what_differs(tmp_path):
    path = tmp_path / "node.toml"
    write_config(path, parse_node_config(NODE + "[limits]\nping_s = 2.0"))
    assert path.read_text().split("[limits]\n")[1].split("\n\n")[0] == "ping_s = 2.0"
    assert read_config(path).limits == TransportLimits(ping_s=2.0)


def test_the_share_of_answers_that_is_rechecked_is_a_share():
    assert parse_node_config(NODE).serving.recheck_share == 0.05
    for share in ("1.5", "-0.1", "nan"):
        with pytest.raises(ConfigError, match=r"serving.recheck_share: expected 0 to 1"):
            parse_node_config(NODE + f"[serving]\nrecheck_share = {share}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("connections_max = 0", "limits.connections_max: expected a positive number, got 0"),
        ("window_slack_bytes = -1", "limits.window_slack_bytes: expected a positive number, got -1"),
        ("gossip_bytes_max = 2_000_000", "limits.gossip_bytes_max: at most 1000000 .*, got 2000000"),
        ("silent_s = 5.0", "limits.silent_s: expected at least twice ping_s .* got 5"),
        ("negotiate_s = 0.5", "limits.negotiate_s: expected at least 1"),
        ("conections_max = 5", "unknown field `conections_max`"),
    ],
)
def test_what_cannot_work_is_refused_by_its_name(line, message):
    with pytest.raises(ConfigError, match=message):
        parse_node_config(NODE + "[limits]\n" + line)
