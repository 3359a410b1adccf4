"""What people see of texts that others wrote: the text itself, as it is."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from page_status import make_status
from rich.console import Console
from test_init import make_command, run

from nodes.screens import make_network_table, make_status_table
from p2pfm.errors import OperatorError

STRANGE = "a[/b] [red]c \x1b[2J"
PLAIN = "a[/b] [red]c \ufffd[2J"


def render(what: object) -> str:
    screen = io.StringIO()
    Console(file=screen, width=300).print(what)
    return screen.getvalue()


def make_strange() -> dict[str, object]:
    status = make_status(STRANGE, "starting")
    status["chain"] |= {"rpc": STRANGE, "error": STRANGE}
    return status | {"peer": STRANGE, "stage": STRANGE, "account": STRANGE, "addresses": [STRANGE], "phase": STRANGE}


def test_what_a_node_says_is_shown_as_it_is() -> None:
    told = render(make_status_table(make_strange()))
    assert told.count(PLAIN) >= 8
    assert "\x1b" not in told
    assert render(make_network_table([("peer 0", "honest", make_strange())])).count(PLAIN) == 2


@pytest.mark.parametrize("status", [[], {"peer": 1}, "x", None, make_status() | {"peers": 3}])
def test_a_status_that_is_none_is_the_operators_to_mend(status: object) -> None:
    with pytest.raises(OperatorError, match="/status of a p2pfm node"):
        make_status_table(status)


def test_an_error_is_one_line_whatever_it_names(tmp_path: Path) -> None:
    path = str(tmp_path / "x[" / "y]" / "[/red]" / "node.toml")
    done = subprocess.run(
        [sys.executable, "-m", "nodes.cli", "node", "run", "--config", path],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert path in line


def test_init_names_the_path_that_it_made(tmp_path: Path) -> None:
    folder = tmp_path / "a[b]c"
    folder.mkdir()
    done = run(make_command(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(folder / "home" / "node.toml")) == 2
    assert os.path.exists(folder / "home" / "node.toml")
