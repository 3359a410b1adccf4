"""A node's newest certified base as a peft checkpoint: asked of the node while it runs, else read from its folder.

Knows files, HTTP and the store; no key and no protocol.
"""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from transformers.utils import logging as transformers_logging

from nodes.models import resolve
from p2pfm.config import NodeConfig
from p2pfm.errors import OperatorError, Reject
from p2pfm.lora.checkpoint import export_checkpoint
from p2pfm.lora.delta import decode_tensors
from p2pfm.lora.layers import adapter_shapes, build_peft, load_backbone
from p2pfm.runtime.endpoints import make_url
from p2pfm.runtime.store import DATABASE, Store
from p2pfm.types import Digest, Round, compute_digest


class Base(NamedTuple):
    """A base's bytes, and the round that certified it (None: no round has been certified yet)."""

    digest: Digest
    data: bytes
    round: Round | None


def export_base(config: NodeConfig, folder: Path) -> Base:
    """Write the node's newest base to `folder`, for plain `PeftModel.from_pretrained`; returns it.

    Raises:
        OperatorError: the node has no base yet, or the folder cannot be written.
    """
    base = _ask_node(config) or _read_folder(config)
    if compute_digest(base.data) != base.digest:
        raise OperatorError(f"the base {base.digest.hex()[:10]} came damaged; run the command again")
    backbone = resolve(config.network.backbone)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.disable_progress_bar()
    model = build_peft(load_backbone(backbone)[0], config.network.adapter)
    try:
        tensors = decode_tensors(base.data, adapter_shapes(model))
    except Reject as error:
        raise OperatorError(f"the node's base is not of the adapter in its TOML: {error}") from error
    export_checkpoint(folder, model, tensors, backbone)
    return base


def _ask_node(config: NodeConfig) -> Base | None:
    """What the running node says; None when nothing listens there."""
    url = make_url(config.http.host, config.http.port)
    try:
        status: dict[str, Any] = httpx.get(f"{url}/status", timeout=10).raise_for_status().json()
        if status["network"]["id"] != config.network.network_id().hex():
            raise OperatorError(f"http.port: {url} is a node of another network ({status['network']['name']})")
        if "protocol" not in status:
            raise OperatorError(f"the node at {url} is still starting ({status['stage']}); run the command again")
        digest = Digest(bytes.fromhex(status["protocol"]["base"]))
        data = httpx.get(f"{url}/blobs/{digest.hex()}", timeout=60).raise_for_status().content
    except httpx.ConnectError:
        return None
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise OperatorError(f"no node answers at {url}: {error!r}. Is `http.port` in its TOML right?") from error
    return Base(digest, data, status["protocol"]["certified_round"])


def _read_folder(config: NodeConfig) -> Base:
    home = Path(config.home)
    if not (home / DATABASE).exists():
        raise OperatorError(f"the node in {home} has never run: it has no base yet. `p2pfm node run` starts it")
    with Store(home) as store:
        durable = store.load_durable()
        data = store.find(durable.base) if durable else None
    if durable is None or data is None:
        raise OperatorError(f"the node in {home} has no base yet, or has lost it; run it once, it fetches the newest")
    return Base(durable.base, data, durable.head.proposal.round if durable.head else None)
