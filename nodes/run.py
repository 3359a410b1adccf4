"""Runs one node in this process: from its configuration to models, ledger and `runtime.node.Node`."""

import logging
import random
import signal
import socket
import sqlite3
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
import trio
from transformers.utils import logging as transformers_logging

from nodes.adversaries import FreeRider, Overpayer
from nodes.models import resolve
from p2pfm.config import HttpConfig, NodeConfig
from p2pfm.errors import OperatorError
from p2pfm.learner import Learner, SpendingLog
from p2pfm.lora.batches import encode_all
from p2pfm.lora.layers import choose_device, load_backbone
from p2pfm.lora.personal import split_samples
from p2pfm.lora.samples import Sample, encode_lines, parse_probe, read_samples
from p2pfm.lora.torch_learner import Data, TorchLearner
from p2pfm.protocol.peer import Peer
from p2pfm.runtime.engine import Engine
from p2pfm.runtime.keys import Keys
from p2pfm.runtime.node import Learners, Models, Node
from p2pfm.runtime.text import load_text_codec
from p2pfm.runtime.web3_ledger import open_ledger
from p2pfm.types import compute_digest

E = TypeVar("E", bound=Exception)

log = logging.getLogger(__name__)


def run_node(config: NodeConfig, keys: Keys) -> None:
    """Run until SIGINT or SIGTERM.

    Raises:
        OperatorError: the first thing that an operator must mend, as one clear line.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.disable_progress_bar()
    _refuse_port_in_use(config.http)
    samples = read_samples(Path(config.data))
    backbone = resolve(config.network.backbone)
    models = Models(
        codec=partial(load_text_codec, backbone, config.network.adapter.num_virtual),
        engine=partial(_make_engine, config, backbone),
        learners=partial(_make_learners, config, backbone, samples),
    )
    ledger = open_ledger(config, keys.account_private_key)
    make_peer = Overpayer if config.adversary == "overpay" else Peer
    trio.run(_run_until_told, Node(config, keys, ledger, models, make_peer))


def _refuse_port_in_use(http: HttpConfig) -> None:
    """Before the models are loaded: an operator should not wait for this."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((http.host, http.port))
        except OSError as error:
            raise OperatorError(
                f"http.port: cannot listen on {http.host}:{http.port} ({error.strerror}). Choose another in the TOML"
            ) from error


async def _run_until_told(node: Node) -> None:
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_on_signal, nursery.cancel_scope)
            await node.run()
    except* OperatorError as group:
        raise _first(group) from None
    except* (OSError, sqlite3.Error) as group:  # what must be durable cannot be: better to stop than to sign twice
        raise OperatorError(f"the disk or the system refused: {_first(group)}; is there space in the home?") from None


async def _cancel_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for number in signals:
            log.info("ending on %s", signal.Signals(number).name)
            scope.cancel()


def _first(group: BaseExceptionGroup[E]) -> E:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _make_engine(config: NodeConfig, backbone: str) -> Engine | None:
    serving = config.serving
    return Engine(backbone, config.network.adapter, serving.versions_kept) if serving.enabled else None


def _make_learners(
    config: NodeConfig, backbone: str, samples: Sequence[Sample], probe: bytes, spendings: SpendingLog
) -> Learners:
    model, tokenizer = load_backbone(backbone, device=choose_device())
    held_out: Sequence[Sample] = ()
    if config.personal.enabled:
        samples, held_out = split_samples(samples, config.personal.held_out)
    parsed = parse_probe(probe, "the probe set")
    learner = TorchLearner(model, tokenizer, config.network, samples, parsed, spendings, config.rank)
    own = _make_own(config, learner, tokenizer, samples, held_out) if config.personal.enabled else None
    return Learners(_make_shared(config, learner, spendings), own)


def _make_shared(config: NodeConfig, learner: TorchLearner, spendings: SpendingLog) -> Learner:
    if config.adversary in ("zero", "replay"):
        return FreeRider(learner, config.adversary)
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
