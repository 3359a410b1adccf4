"""A node's base leaves as a peft checkpoint: from a stopped node's folder, by the command that people type."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from nodes.homes import CONFIG_NAME, create_home
from nodes.ports import get_free_port
from p2pfm.config import AdapterConfig, ChainConfig, HttpConfig, NetworkConfig, NodeConfig
from p2pfm.lora.delta import encode_tensors
from p2pfm.lora.layers import build_peft, get_adapter_tensors, load_backbone, set_adapter_tensors
from p2pfm.protocol.peer import initial_durable
from p2pfm.runtime.store import Store
from p2pfm.types import Millis

TINY = Path(__file__).parents[1] / "fixtures" / "tiny-llama"
TOKENS = torch.tensor([[1, 300, 301, 302, 17]])


def make_home(folder: Path, kind: str = "fed_sb") -> Path:
    network = NetworkConfig(
        name="export",
        genesis_ms=Millis(0),
        backbone="tiny",
        probe="0" * 64,
        chain=ChainConfig(1, "0x" + "1" * 40, "0x" + "2" * 40),
        adapter=AdapterConfig(kind=kind, rank=16),
    )
    config = NodeConfig(
        home=".", data="none", rpc="http://127.0.0.1:1", network=network, http=HttpConfig(port=get_free_port())
    )
    create_home(config, folder, None, is_light=True)
    return folder


def run_export(home: Path, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "nodes.cli", "adapter", "export", "-c", str(home / CONFIG_NAME), str(folder), "--json"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_stopped_nodes_base_is_loaded_by_plain_peft(tmp_path: Path) -> None:
    home = make_home(tmp_path / "node")
    model = build_peft(load_backbone(TINY, torch.float32)[0], AdapterConfig(kind="fed_sb", rank=16))
    rng = np.random.default_rng(0)
    base = {
        name: (0.1 * rng.standard_normal(part.shape)).astype(np.float32)
        for name, part in get_adapter_tensors(model).items()
    }
    set_adapter_tensors(model, base)
    with Store(home) as store:
        digest = store.put(encode_tensors(base))
        store.save_durable(initial_durable(digest))
    done = run_export(home, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"folder": str(tmp_path / "out"), "base": digest.hex(), "round": None}
    theirs = PeftModel.from_pretrained(load_backbone(TINY, torch.float32)[0], tmp_path / "out").eval()
    with torch.inference_mode():
        expected, got = (each(input_ids=TOKENS).logits.numpy() for each in (model, theirs))
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("case", "message"), [("never", "never run"), ("lost", "has lost it"), ("other", "not of the")]
)
def test_an_export_without_a_base_says_what_to_do(case: str, message: str, tmp_path: Path) -> None:
    home = make_home(tmp_path / "node")
    if case != "never":
        with Store(home) as store:
            digest = store.put(encode_tensors({"other": np.zeros(3, np.float32)}))
            store.save_durable(initial_durable(digest))
    if case == "lost":
        (home / "blobs" / digest.hex()[:2] / digest.hex()).unlink()
    done = run_export(home, tmp_path / "out")
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
