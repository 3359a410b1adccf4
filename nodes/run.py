"""Runs one node in this process: from its configuration to models, ledger and `runtime.node.Node`."""

import sqlite3
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio
from prometheus_client import disable_created_metrics

from nodes.adversaries import Overpayer, corrupt
from nodes.ending import cancel_on_signal
from nodes.models import LINEAR
from nodes.ports import try_to_listen
from p2pfm.config import HttpConfig, NodeConfig
from p2pfm.errors import OperatorError
from p2pfm.lora.samples import Sample, read_samples
from p2pfm.protocol.peer import Peer
from p2pfm.runtime.keys import Keys
from p2pfm.runtime.node import Models, Node
from p2pfm.runtime.web3_ledger import open_ledger

E = TypeVar("E", bound=Exception)


def run_node(config: NodeConfig, keys: Keys) -> None:
    """Run until SIGINT or SIGTERM (`ending`).

    Raises:
        OperatorError: the first thing that an operator must mend, as one clear line.
    """
    # Half of /metrics would be the moments at which its counters began.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    _refuse_port_in_use(config.http)
    samples = read_samples(Path(config.data))
    models = _make_models(config, samples)
    ledger = open_ledger(config, keys.account_private_key)
    make_peer = Overpayer if config.adversary == "overpay" else Peer
    trio.run(_run_until_told, Node(config, keys, ledger, models, make_peer))


def _make_models(config: NodeConfig, samples: Sequence[Sample]) -> Models:
    wrap = partial(corrupt, config.adversary)
    if config.network.backbone == LINEAR:
        from nodes import linear

        return linear.make_models(config, samples, wrap)
    from nodes import transformer  # loads torch, which takes seconds and 300 MB

    return transformer.make_models(config, samples, wrap)


def _refuse_port_in_use(http: HttpConfig) -> None:
    """Before the models are loaded: an operator should not wait for this."""
    if problem := try_to_listen(http.host, http.port):
        raise OperatorError(
            f"http.host, http.port: cannot listen on {http.host}:{http.port} ({problem}). Choose others in the TOML"
        )


async def _run_until_told(node: Node) -> None:
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel_on_signal, nursery.cancel_scope)
            await node.run()
    except* OperatorError as group:
        raise _first(group) from None
    except* (OSError, sqlite3.Error) as group:  # what must be durable cannot be: better to stop than to sign twice
        raise OperatorError(f"the disk or the system refused: {_first(group)}; is there space in the home?") from None


def _first(group: BaseExceptionGroup[E]) -> E:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
