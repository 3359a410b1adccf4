"""Six nodes for two minutes: no growth, no leak, no message lost, every round certified (bench/soak.py)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.alone]

ROOT = Path(__file__).parent.parent.parent
MINUTES = 2
START_AND_END_S = 60


def test_six_nodes_run_for_minutes_without_growth_loss_or_void_round(tmp_path: Path) -> None:
    figures = tmp_path / "soak.json"
    command = [sys.executable, str(ROOT / "bench" / "soak.py"), "--check", "--json", str(figures)]
    run = subprocess.run(
        [*command, "--minutes", str(MINUTES), "--nodes", "6"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60 * MINUTES + START_AND_END_S,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    told = json.loads(figures.read_text())
    assert (told["nodes"], told["rounds"] >= 5 * MINUTES) == (6, True), "it ran as long as it should"
