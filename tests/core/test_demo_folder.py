"""`p2pfm demo` removes what an earlier demo made, and nothing else."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from nodes.demo import ROLES, Figures, figures_to_json
from nodes.demo_folder import MADE, MARK, claim_demo_folder
from p2pfm.errors import OperatorError

OPERATOR = 2


def write_testnet_folder(folder: Path) -> Path:
    """As `p2pfm testnet up` leaves one, with a node's home in it; returns the node's key."""
    key = folder / "alice" / "keys" / "account.json"
    key.parent.mkdir(parents=True)
    for path in (key, folder / "chain.log", folder / "network.toml"):
        path.write_text("precious")
    return key


def write_demo(folder: Path) -> None:
    with claim_demo_folder(folder):
        for path in (folder / "peer-0" / "node.toml", folder / "data" / "probe.jsonl", folder / "chain.log"):
            path.parent.mkdir(exist_ok=True)
            path.write_text("of a demo")


@pytest.mark.parametrize("options", [(), ("--chain", "bogus"), ("--json", "nowhere/figures.json")])
def test_a_folder_that_is_no_demo_is_refused_and_left_as_it_is(options: tuple[str, ...], tmp_path: Path) -> None:
    key = write_testnet_folder(tmp_path / "w")
    done = subprocess.run(
        [sys.executable, "-m", "nodes.cli", "demo", "--out", str(tmp_path / "w"), *options],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("error:")) == (OPERATOR, 1), done.stderr
    assert key.read_text() == "precious"


def test_an_earlier_demo_is_removed(tmp_path: Path) -> None:
    write_demo(tmp_path / "demo")
    with claim_demo_folder(tmp_path / "demo"):
        assert [path.name for path in (tmp_path / "demo").iterdir()] == [MARK]


def test_what_somebody_put_beside_a_demo_is_refused_by_name(tmp_path: Path) -> None:
    write_demo(tmp_path / "demo")
    key = write_testnet_folder(tmp_path / "demo")
    with pytest.raises(OperatorError, match="holds alice"), claim_demo_folder(tmp_path / "demo"):
        pass
    assert key.exists()
    assert (tmp_path / "demo" / "peer-0" / "node.toml").exists()


def test_only_the_demos_own_peers_are_its() -> None:
    assert all(MADE.fullmatch(f"peer-{index}") for index in range(len(ROLES)))
    assert not MADE.fullmatch(f"peer-{len(ROLES)}")


def test_what_a_link_in_a_demo_points_to_stays(tmp_path: Path) -> None:
    key = write_testnet_folder(tmp_path / "w")
    write_demo(tmp_path / "demo")
    (tmp_path / "demo" / "peer-1").symlink_to(tmp_path / "w")
    with claim_demo_folder(tmp_path / "demo"):
        assert key.exists()


def test_a_demo_that_runs_keeps_its_folder(tmp_path: Path) -> None:
    with claim_demo_folder(tmp_path):
        (tmp_path / "chain.log").write_text("is written")
        with pytest.raises(OperatorError, match="is running"), claim_demo_folder(tmp_path):
            pass
        assert (tmp_path / "chain.log").exists()


def test_figures_for_no_folder_are_refused_before_the_run(tmp_path: Path) -> None:
    write_demo(tmp_path / "demo")
    for json_path in (tmp_path / "nowhere" / "figures.json", tmp_path):
        with pytest.raises(OperatorError, match="--json"), claim_demo_folder(tmp_path / "demo", json_path):
            pass
    assert (tmp_path / "demo" / "chain.log").exists()


def test_figures_may_lie_in_the_demos_own_folder(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    for _ in range(2):
        with claim_demo_folder(folder, folder / "figures.json"):
            (folder / "figures.json").write_text("{}")


def test_figures_hold_no_nan() -> None:
    figures = Figures(losses_nats={-1: 2.5, 0: math.nan}, rewards=[{"ratio": math.inf}])
    read = json.loads(figures_to_json(figures), parse_constant=lambda name: pytest.fail(name))
    assert read["losses_nats"] == {"-1": 2.5, "0": None}
    assert read["rewards"] == [{"ratio": None}]
