"""A LoRA folder given to a running node over HTTP. Knows the node's API and the folder's two files; no model."""

import base64
from pathlib import Path
from typing import Any

import httpx
import msgspec

from p2pfm.errors import OperatorError
from p2pfm.lora.user_adapter import CONFIG_NAME, WEIGHTS_NAME
from p2pfm.runtime.adapter_api import AdapterCard

UPLOAD_S = 120.0
FILE_BYTES_MAX = 1 << 30
"""Read into memory at once; the node's own bound is lower."""


def serve_adapter(url: str, folder: Path, name: str, api_key: str = "") -> AdapterCard:
    """Have the node at `url` serve the LoRA of a peft folder; returns what it is called there.

    Raises:
        OperatorError: no such folder, no node, or it refuses the adapter; says why.
    """
    try:
        sizes = [(folder / file).stat().st_size for file in (CONFIG_NAME, WEIGHTS_NAME)]
        if max(sizes) > FILE_BYTES_MAX:
            raise OperatorError(f"{folder}: expected files of at most {FILE_BYTES_MAX} bytes, got {max(sizes)}")
        config: Any = msgspec.json.decode((folder / CONFIG_NAME).read_bytes())
        weights = base64.b64encode((folder / WEIGHTS_NAME).read_bytes()).decode()
    except OSError as error:
        raise OperatorError(f"no LoRA of peft in {folder}: {error.filename}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise OperatorError(f"{folder / CONFIG_NAME}: expected what peft writes: {error}") from error
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    body = {"name": name, "config": config, "weights": weights}
    try:
        answer = httpx.post(f"{url}/v1/adapters", json=body, headers=headers, timeout=UPLOAD_S)
        if answer.is_error:
            raise OperatorError(f"the node at {url} refused the adapter: {answer.json()['error']['message']}")
        return msgspec.json.decode(answer.content, type=AdapterCard)
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise OperatorError(f"no node answers at {url}: {error!r}. Is it running, and the address right?") from error
