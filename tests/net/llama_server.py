"""A real llama.cpp server for tests: PyPI's `xllamacpp` holds llama.cpp's own, built; and weights for it as GGUF.

The package is no part of p2pfm's environment: it is installed once, alone, beside the cached models (34 MB, seconds).
Where that fails, whoever needs it is skipped.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.torch import load_file

from nodes.models import get_cache_dir

PACKAGE = "xllamacpp==2026.10.11549"
INSTALL_S = 180
START_S = 60

SERVER = """
import os, sys
import xllamacpp as x
path, port, context, slots = sys.argv[1], *map(int, sys.argv[2:])
params = x.CommonParams()
params.model.path = path
params.hostnames, params.port = ["127.0.0.1"], port
params.n_ctx, params.n_parallel, params.n_gpu_layers = context * slots, slots, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = x.ggml_type.GGML_TYPE_F32
params.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = x.Server(params)
sys.stdin.read()
os._exit(0)
"""

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Layers of a block, in Hugging Face's words and in GGUF's."""


def find_package() -> Path:
    """Where the package lies; skips the test where it cannot be had."""
    folder = get_cache_dir().parent / "tests" / PACKAGE.replace("==", "-")
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
        try:
            run = subprocess.run(
                [*command, "--target", f"{fresh}/package", PACKAGE],
                capture_output=True,
                text=True,
                timeout=INSTALL_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"no llama.cpp server: {PACKAGE} was not installed within {INSTALL_S} s")
        if run.returncode:
            pytest.skip(f"no llama.cpp server: {PACKAGE} cannot be installed: {run.stderr.strip()[-200:]}")
        with suppress(OSError):  # another process of the tests was faster
            os.rename(f"{fresh}/package", folder)
    return folder


@contextmanager
def running_llama(gguf: Path, log: Path, context: int = 1024, slots: int = 4) -> Iterator[str]:
    """Its URL, while it runs."""
    package = find_package()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(gguf), str(port), str(context), str(slots)],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            env={"PYTHONPATH": str(package), "PATH": ""},
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, log)
        yield url
    finally:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise AssertionError(f"the llama.cpp server did not start: {log.read_text(errors='replace')[-2000:]}")


def write_gguf(folder: Path, path: Path, noise: float = 0.0) -> Path:
    """The Llama in a Hugging Face folder, in float32; `noise`: of its largest weight, added to each."""
    gguf = pytest.importorskip("gguf")
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, gguf, tokenizer, config)
    rng = np.random.default_rng(0)
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        weight = tensor.float().numpy()
        weight = weight + noise * np.abs(weight).max() * rng.standard_normal(weight.shape, np.float32)
        writer.add_tensor(*_convert(name, weight.astype(np.float32), config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer, gguf, tokenizer: dict, config: dict) -> None:
    special = {added["id"]: added["content"] for added in tokenizer["added_tokens"]}
    tokens = {token: piece for piece, token in tokenizer["model"]["vocab"].items()} | special
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([tokens[token] for token in range(config["vocab_size"])])
    writer.add_token_types(
        [kinds.CONTROL if token in special else kinds.NORMAL for token in range(config["vocab_size"])]
    )
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def _convert(name: str, weight: np.ndarray, config: dict) -> tuple[str, np.ndarray]:
    """Its name in GGUF, and its rows in GGUF's order: llama.cpp turns neighbouring pairs, transformers halves."""
    name = name.removeprefix("model.").removesuffix(".weight")
    whole = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    if name in whole:
        return f"{whole[name]}.weight", weight
    _, block, part = name.split(".", 2)
    heads = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
    if part in heads:
        num_heads, (rows, columns) = config[heads[part]], weight.shape
        halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)  # (heads, half, pair, in)
        weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))
    return f"blk.{block}.{NAMES[part]}.weight", weight
