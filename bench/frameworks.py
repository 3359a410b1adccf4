"""What a peer-round costs in other frameworks, each in a virtual environment of its own, on the simulator's work.

A worker script (simulator_frameworks/run_NAME.py) runs so many peers for so many rounds. It is run twice, for FEW and
for MANY rounds, and the difference is divided by the peer-rounds between: starting up and winding down cancel. CPU is
that of the whole tree of processes, since some of these frameworks run peers in processes of their own.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent / "simulator_frameworks"
HOME = Path.home() / ".cache" / "p2pfm" / "frameworks"
PACKAGES = {"flwr": "flwr[simulation]==1.41.0", "fluke": "fluke-fl==0.8.1", "pfl": "pfl[pytorch]==0.6.0"}
TORCH = "torch==2.13.0"
"""First, and the CPU build where one is offered; a framework that wants another one takes it."""

FEW, MANY = 2, {"flwr": 22, "fluke": 102, "pfl": 102}
"""Rounds: so many more that what the start varies by is small beside them."""

LIMIT_S = 240
LOOK_S = 0.1


def measure(names: list[str], sizes: list[int]) -> list[dict[str, Any]]:
    """A row a framework and number of peers; one that does not install or finish is told with its reason."""
    rows = []
    for name in names:
        if name not in PACKAGES:
            raise SystemExit(f"--frameworks: expected of {', '.join(PACKAGES)}, got {name}")
        try:
            python = _install(name)
        except subprocess.CalledProcessError as error:
            rows.append({"framework": name, "num_peers": 0, "cpu_ms_per_peer_round": None, "note": str(error)})
            continue
        for size in sizes:
            try:
                few, many = (_run(python, name, size, rounds) for rounds in (FEW, MANY[name]))
                cost: float | None = (many - few) / (size * (MANY[name] - FEW)) * 1000
                note = ""
            except (subprocess.SubprocessError, RuntimeError) as error:
                cost, note = None, str(error)
            rows.append({"framework": name, "num_peers": size, "cpu_ms_per_peer_round": cost, "note": note})
            sys.stdout.flush()
    return rows


def _install(name: str) -> Path:
    python = HOME / name / "bin" / "python"
    if not (HOME / name / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", HOME / name], check=True)
        pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, TORCH, "scikit-learn"], check=True)
        subprocess.run([*pip, PACKAGES[name]], check=True)
        (HOME / name / ".ready").touch()
    return python


def _run(python: Path, name: str, num_peers: int, num_rounds: int) -> float:
    """CPU seconds of a worker and all that it starts."""
    command = [str(python), str(HERE / f"run_{name}.py")]
    environment = {
        "HOME": str(Path.home()),
        "NUM_PEERS": str(num_peers),
        "NUM_ROUNDS": str(num_rounds),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{python.parent}:/usr/bin:/bin",
        "PYTHONPATH": str(HERE),  # workers that a framework starts import the work, too
    }
    spent: dict[tuple[int, float], float] = {}
    with subprocess.Popen(
        command, cwd="/tmp", env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        root = psutil.Process(process.pid)
        give_up = time.monotonic() + LIMIT_S
        family: dict[int, psutil.Process] = {}
        while process.poll() is None:
            if time.monotonic() > give_up:
                for one in family.values():
                    if one.is_running():
                        one.kill()
                process.kill()
                raise RuntimeError(f"{name} with {num_peers} peers did not finish {num_rounds} rounds in {LIMIT_S} s")
            try:
                family |= {one.pid: one for one in (root, *root.children(recursive=True))}
            except psutil.NoSuchProcess:
                continue
            for one in family.values():
                try:
                    times = one.cpu_times()
                    spent[one.pid, one.create_time()] = times.user + times.system
                except psutil.NoSuchProcess:
                    continue
            time.sleep(LOOK_S)
        if process.returncode:
            lines = (process.stderr.read() if process.stderr else b"").decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"{name} ended with {process.returncode}: {lines[-1] if lines else ''}")
    return sum(spent.values())
