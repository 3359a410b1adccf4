"""A node's serving: gateway and replica, users' adapters, re-checks, receipts, kept streams and the HTTP side.

Puts them together. Knows these parts and how they reach other peers; nothing of rounds, but for the epoch that receipts
are counted in.
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import trio
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from p2pfm.config import NodeConfig
from p2pfm.messages import Aside, CheatReport, ExtendStream, FindStream, KeepStream, Presence, Reply
from p2pfm.protocol.phases import compute_position
from p2pfm.runtime.adapter_api import OPERATIONS, AdapterApi
from p2pfm.runtime.adapter_folder import AdapterFolder
from p2pfm.runtime.api_keys import read_api_keys
from p2pfm.runtime.backend import Backend
from p2pfm.runtime.canaries import make_question
from p2pfm.runtime.checker import Checker
from p2pfm.runtime.clock import now_ms
from p2pfm.runtime.envelopes import sign_vouch
from p2pfm.runtime.gateway import PRESENCE_INTERVAL_MS, Gateway
from p2pfm.runtime.http_api import HttpApi
from p2pfm.runtime.keys import Keys
from p2pfm.runtime.network.exchange import Downloads
from p2pfm.runtime.network.server import Send
from p2pfm.runtime.network.transport import Libp2pTransport
from p2pfm.runtime.page import make_page_routes
from p2pfm.runtime.receipt_desk import REPORT_AFTER_S, ReceiptDesk
from p2pfm.runtime.rechecker import Rechecker
from p2pfm.runtime.replica_streams import ReplicaStreams, answer_stream
from p2pfm.runtime.store import Store
from p2pfm.runtime.stream_keeper import Ask, StreamKeeper
from p2pfm.runtime.text import TextCodec
from p2pfm.runtime.user_adapters import ReadLora, UserAdapters
from p2pfm.types import Digest, PeerId

ASKED_MAX = 16
"""Peers asked for a user's adapter, beside the one who asked for it to be served."""


class Surroundings(Protocol):
    """What serving uses of its node."""

    config: NodeConfig
    keys: Keys
    network_id: Digest
    registry: CollectorRegistry
    transport: Libp2pTransport
    downloads: Downloads

    def status(self) -> Mapping[str, Any]:
        """What /status shows."""
        ...

    async def find_public(self, digest: Digest) -> bytes | None:
        """Content that anybody may have."""
        ...

    async def publish_aside(self, message: Aside) -> None:
        """Gossip what the core does not hear."""
        ...

    def get_stakes(self) -> Mapping[PeerId, int]:
        """Of the registered peers."""
        ...


class ServingSide:
    """Made when the model is loaded; `run` keeps it going."""

    def __init__(
        self,
        node: Surroundings,
        store: Store,
        codec: TextCodec,
        engine: Backend | None,
        read_lora: ReadLora | None,
        ask: Ask,
    ) -> None:
        """Reads what the store keeps of serving. `engine` None: this node only routes."""
        self._node = node
        config, keys = node.config, node.keys
        streams = ReplicaStreams(node.transport)
        self.gateway = Gateway(keys.peer, config.serving, engine, codec.vocabulary, streams, node.registry, now_ms)
        self.gateway.table.restore_bans(store.load_cheats())
        own = None if engine is None else engine.own
        folder = AdapterFolder(Path(config.home) / "adapters", config.serving.adapters_bytes_max)
        self.adapters = UserAdapters(config.network.backbone, config.serving, folder, own, self._fetch, read_lora)
        self.gateway.adapters = self.adapters
        self.checker = Checker(
            own,
            lambda vouch: sign_vouch(keys, node.network_id, vouch),
            lambda: not self.gateway.num_sessions,
            self.gateway.prepare,
        )
        self.rechecker = Rechecker(
            self.gateway,
            config.serving.recheck_share,
            self.checker,
            streams,
            node.network_id,
            lambda: codec.encode_chat([{"role": "user", "content": make_question(random.SystemRandom())}]),
            node.publish_aside,
            node.registry,
            now_ms,
        )
        self.receipts = ReceiptDesk(
            keys,
            node.network_id,
            streams,
            node.publish_aside,
            store.save_receipt,
            store.load_receipts(),
            self._compute_epoch,
            node.get_stakes,
            node.registry,
            # An epoch may be one round: its receipts are to be heard before the next one's are scored.
            min(REPORT_AFTER_S, config.network.phases.train_ms / 1000 / 4),
        )
        self.gateway.on_answer.append(self.receipts.on_answer)
        self.keeper = StreamKeeper(keys.peer, config.serving, ask, self.gateway.live_gateways, now_ms)
        self._codec = codec

    def app(self) -> Starlette:
        """The HTTP side."""
        node, config = self._node, self._node.config
        adapters = AdapterApi(self.adapters, config.network.backbone, config.serving, config.http)
        return HttpApi(
            self.gateway,
            self._codec,
            config.network.backbone,
            node.registry,
            node.status,
            now_ms,
            node.find_public,
            config.http,
            read_api_keys(config.http.api_keys_file),
            extra_routes=(*make_page_routes(), *adapters.routes()),
            extra_operations=OPERATIONS,
            keeper=self.keeper,
        ).app()

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            for task in (self._presence_loop, self.rechecker.run, self.receipts.run, self.keeper.run):
                nursery.start_soon(task)

    async def hear(self, author: PeerId, message: Aside) -> None:
        """What a registered peer gossiped. Raises: Reject, if no honest peer says so."""
        match message:
            case Presence():
                self.gateway.on_presence(author, message)
            case CheatReport():
                self.rechecker.on_report(author, message)
            case report:
                await trio.to_thread.run_sync(self.receipts.on_report, author, report)

    def answer(self, peer: PeerId, request: KeepStream | ExtendStream | FindStream) -> Reply:
        """Another gateway's request about a client's stream."""
        return self.keeper.answer(peer, request)

    async def answer_stream(self, peer: PeerId, data: bytes, send: Send) -> None:
        """Another gateway's stream. Raises: Reject."""
        await answer_stream(self.gateway, self.checker, data, send, peer, self.receipts.on_offer)

    async def _presence_loop(self) -> None:
        while True:
            await self._node.publish_aside(self.gateway.presence())
            await trio.sleep(PRESENCE_INTERVAL_MS / 1000)

    async def _fetch(self, digest: Digest, asker: PeerId | None, bytes_max: int) -> bytes:
        others = [peer for peer in self._node.transport.connected() if peer != asker]
        providers = ([asker] if asker else []) + random.SystemRandom().sample(others, min(ASKED_MAX, len(others)))
        return await self._node.downloads.fetch(digest, providers, bytes_max)

    def _compute_epoch(self) -> int:
        network = self._node.config.network
        return max(compute_position(network, now_ms()).round, 0) // network.settlement.rounds_per_epoch
