"""Streams while nodes are killed and stopped (bench/failover.py): all are answered, with the undisturbed texts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.alone]

ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 900


def test_every_stream_ends_with_its_undisturbed_text_while_nodes_die(tmp_path: Path) -> None:
    figures = tmp_path / "failover.json"
    command = [sys.executable, str(ROOT / "bench" / "failover.py"), "--check", "--json", str(figures)]
    run = subprocess.run(
        [*command, "--requests", "20"], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    runs = json.loads(figures.read_text())["runs"]
    assert all(told["killed"] + told["stopped"] >= 3 for told in runs if "killed" in told), "there was trouble"
    assert runs[-1]["run"] == "one is left"
    assert runs[-1]["fewest up"] == 1
