"""The committed artifacts are what the committed sources compile to, byte for byte."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

CONTRACTS = Path(__file__).resolve().parents[2] / "contracts"
COMPILE_SECONDS_MAX = 120


def test_the_artifacts_name_their_sources() -> None:
    digest = hashlib.sha256()
    for path in sorted((CONTRACTS / "src").rglob("*.sol"), key=lambda path: path.relative_to(CONTRACTS).as_posix()):
        digest.update(f"{path.relative_to(CONTRACTS).as_posix()}\n{path.read_text()}\n".encode())
    for contract in ("PFMToken", "Federation", "ServingPool"):
        artifact = json.loads((CONTRACTS / "artifacts" / f"{contract}.json").read_text())
        assert artifact["sourceHash"] == digest.hexdigest(), "sources changed: run `npm run build --prefix contracts`"


def test_recompiling_gives_the_committed_artifacts(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None or not (CONTRACTS / "node_modules" / "solc").is_dir():
        pytest.skip("needs Node.js and `npm install --prefix contracts`; .ci/run has both")
    command = [node, str(CONTRACTS / "build.mjs"), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS_MAX)
    for contract in ("PFMToken", "Federation", "ServingPool"):
        name = f"{contract}.json"
        assert (tmp_path / name).read_bytes() == (CONTRACTS / "artifacts" / name).read_bytes()
