"""Every script of bench/ runs in its smallest size, prints its targets last and writes its figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SHARED = {"attacked", "estimate", "frameworks", "harness", "tasks"}  # estimate fits coefficients, and judges nothing
RUN_ELSEWHERE = {"soak", "failover"}  # many processes and the clock: tests/net/test_soak.py, test_failover.py
SCRIPTS = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if path.stem not in SHARED | RUN_ELSEWHERE)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_runs_in_its_smallest_size(script, tmp_path):
    figures = tmp_path / "figures.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, str(ROOT / "bench" / f"{script}.py"), "--quick", "--check", "--json", str(figures)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    targets = json.loads(figures.read_text())["targets"]
    assert targets, "a script without a target claims nothing"
    last = run.stdout.rstrip().splitlines()[-len(targets) :]
    for line, target in zip(last, targets, strict=True):
        assert line.startswith(target["name"] + " ")
        assert line.endswith(" ok" if target["ok"] else " short")
