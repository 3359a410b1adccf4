"""vLLM's documented HTTP contract over a real transformers and peft model: vLLM itself needs CUDA.

Holds what `runtime.upstream_wire.Vllm` and `runtime.upstream_adapters` rely on: prompts as token ids,
`return_token_ids`, `logprobs` up to `--max-logprobs` with `token_id:N` keys, `ignore_eos`, `/tokenize`, adapters loaded
from peft folders by name, and errors where vLLM gives them. It computes each answer anew.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from p2pfm.lora.layers import load_backbone

NAME = "our-llama"


class Vllm:
    """One server's models."""

    def __init__(self, folder: Path, max_logprobs: int) -> None:
        self.model, self.tokenizer = load_backbone(folder, torch.float32)
        self.adapters: dict[str, Any] = {}
        self._folder, self._max_logprobs = folder, max_logprobs
        self._lock = threading.Lock()

    def models(self) -> dict:
        listed = [{"id": NAME, "max_model_len": 1024, "parent": None}]
        return {"data": listed + [{"id": name, "max_model_len": 1024, "parent": NAME} for name in self.adapters]}

    def post(self, path: str, body: dict) -> tuple[int, Any]:
        with self._lock:
            if path == "/tokenize":
                tokens = self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
                return 200, {"tokens": tokens, "count": len(tokens), "max_model_len": 1024}
            if path == "/v1/load_lora_adapter":
                return self._load(body["lora_name"], body["lora_path"])
            if path == "/v1/unload_lora_adapter":
                found = self.adapters.pop(body["lora_name"], None)
                return (404, {"error": {"message": "no such adapter"}}) if found is None else (200, "Success")
            if path == "/v1/completions":
                return self._complete(body)
        return 404, {"detail": "Not Found"}

    def _load(self, name: str, path: str) -> tuple[int, Any]:
        if name in self.adapters:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        try:
            adapted = PeftModel.from_pretrained(load_backbone(self._folder, torch.float32)[0], path)
        except (OSError, ValueError) as error:
            return 400, {"error": {"message": str(error)}}
        self.adapters[name] = adapted.eval()
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _complete(self, body: dict) -> tuple[int, Any]:
        model = self.model if body["model"] == NAME else self.adapters.get(body["model"])
        if model is None:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        num_logprobs = body.get("logprobs")
        if num_logprobs is not None and self._max_logprobs != -1 and num_logprobs > self._max_logprobs:
            message = f"Requested sample logprobs of {num_logprobs}, which is greater than max allowed"
            return 400, {"error": {"message": f"{message}: {self._max_logprobs}"}}
        assert body["temperature"] == 0
        assert body["ignore_eos"]
        assert body["return_token_ids"]
        tokens, told = [], []
        for _ in range(body["max_tokens"]):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*body["prompt"], *tokens]])).logits[0, -1]
            logprobs = logits.float().log_softmax(-1)
            tokens.append(int(logprobs.argmax()))
            if num_logprobs:
                top = logprobs.topk(num_logprobs)
                pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
                told.append({f"token_id:{token}": max(logprob, -9999.0) for token, logprob in pairs})
        choice = {"index": 0, "text": self.tokenizer.decode(tokens), "token_ids": tokens, "finish_reason": "length"}
        choice["logprobs"] = {"top_logprobs": told} if num_logprobs else None
        return 200, {"object": "text_completion", "choices": [choice]}


@contextmanager
def running_vllm(folder: Path, max_logprobs: int = -1) -> Iterator[tuple[str, Vllm]]:
    """Its URL, and what it holds."""
    vllm = Vllm(folder, max_logprobs)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(*((200, vllm.models()) if self.path == "/v1/models" else (404, {"detail": "Not Found"})))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self._reply(*vllm.post(self.path, body))

        def _reply(self, status: int, body: Any) -> None:
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Tests say what they find."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", vllm
    finally:
        server.shutdown()
        server.server_close()
