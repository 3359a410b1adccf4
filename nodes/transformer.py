"""Nodes with a backbone of transformers: tokenizer, engine, and learners on torch.

Knows no peer and no socket. Loading torch takes seconds: imported only by a node that needs it.
"""

import random
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
import trio
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from nodes.adversaries import Wrap
from nodes.models import resolve
from p2pfm.config import NodeConfig
from p2pfm.learner import Learner, SpendingLog
from p2pfm.lora.batches import encode_all
from p2pfm.lora.checkpoint import read_lora, write_checkpoint
from p2pfm.lora.layers import choose_device, describe_form, load_backbone
from p2pfm.lora.personal import split_samples
from p2pfm.lora.samples import Sample, encode_lines, parse_probe
from p2pfm.lora.torch_learner import Data, TorchLearner
from p2pfm.runtime.backend import Backend
from p2pfm.runtime.batcher import Batcher
from p2pfm.runtime.engine import Engine
from p2pfm.runtime.node import Learners, Models
from p2pfm.runtime.text import load_text_codec
from p2pfm.runtime.train_share import TrainShare
from p2pfm.runtime.upstream import Upstream
from p2pfm.runtime.upstream_adapters import VllmAdapters
from p2pfm.runtime.upstream_check import connect_upstream
from p2pfm.types import compute_digest


def make_models(config: NodeConfig, samples: Sequence[Sample], wrap: Wrap) -> Models:
    """How the node loads the network's backbone; raises OperatorError where it is not on this machine."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.disable_progress_bar()
    backbone = resolve(config.network.backbone)
    backends: list[Backend] = []  # filled before anything is trained
    share = TrainShare(config.serving.train_share, lambda: any(backend.is_busy() for backend in backends))
    return Models(
        codec=partial(load_text_codec, backbone, config.network.adapter.num_virtual),
        engine=partial(_make_backend, config, backbone, backends),
        learners=partial(_make_learners, config, backbone, samples, wrap, share),
        read_lora=read_lora,
    )


def _make_backend(config: NodeConfig, backbone: str, backends: list[Backend]) -> Backend | None:
    serving = config.serving
    if not serving.enabled:
        return None
    if serving.backend != "own":
        made: Backend = _connect_upstream(config, backbone)
    else:
        made = Batcher(_load_engine(config, backbone, serving.versions_kept, serving.dtype))
    backends.append(made)
    return made


def _load_engine(config: NodeConfig, backbone: str, versions_max: int, dtype: str) -> Engine:
    device = choose_device(config.serving.device)
    return Engine(backbone, config.network.adapter, versions_max, device=device, dtype=dtype)


def _connect_upstream(config: NodeConfig, backbone: str) -> Upstream:
    network = config.network
    codec = load_text_codec(backbone, network.adapter.num_virtual)
    form = describe_form(AutoConfig.from_pretrained(backbone), network.adapter)
    adapters = VllmAdapters(
        Path(config.home) / "upstream",
        config.serving.versions_kept,
        lambda folder, tensors: write_checkpoint(folder, form, tensors, network.backbone),
    )
    load = lambda: _load_engine(config, backbone, 1, "stored").compute_logits  # noqa: E731
    return trio.run(connect_upstream, config.serving, codec, load, adapters)


def _make_learners(
    config: NodeConfig,
    backbone: str,
    samples: Sequence[Sample],
    wrap: Wrap,
    share: TrainShare,
    probe: bytes,
    spendings: SpendingLog,
) -> Learners:
    model, tokenizer = load_backbone(backbone, device=choose_device())
    model.register_forward_pre_hook(share.pause)
    held_out: Sequence[Sample] = ()
    if config.personal.enabled:
        samples, held_out = split_samples(samples, config.personal.held_out)
    parsed = parse_probe(probe, "the probe set")
    learner = TorchLearner(model, tokenizer, config.network, samples, parsed, spendings, config.rank)
    own = _make_own(config, learner, tokenizer, samples, held_out) if config.personal.enabled else None
    return Learners(wrap(_make_shared(config, learner, spendings)), own)


def _make_shared(config: NodeConfig, learner: TorchLearner, spendings: SpendingLog) -> Learner:
    if config.privacy.enabled:
        from p2pfm.lora.privacy import PrivateLearner  # opacus is an extra, and takes seconds to import

        return PrivateLearner(learner, config.privacy, config.network.training, spendings, random.SystemRandom())
    return learner


def _make_own(
    config: NodeConfig, learner: TorchLearner, tokenizer: Any, samples: Sequence[Sample], held_out: Sequence[Sample]
) -> Learner:
    """On the same model: private steps need no noise, since what they give never leaves this node."""
    training = msgspec.structs.replace(config.network.training, steps=config.personal.steps)
    judge = {"own": encode_all(tokenizer, held_out, training.tokens_max)}
    digest = compute_digest(b"p2pfm own batches" + encode_lines(samples))  # other batches than the shared steps'
    data = Data(encode_all(tokenizer, samples, training.tokens_max), probe=judge, test=judge, digest=digest)
    return learner.beside(data, training)
