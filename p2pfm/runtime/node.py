"""One node: puts the parts together, feeds events to the core in one queue, and ends when it is told to.

Knows every part and no rule: rules are in `protocol`, work in `work`, verdicts on bytes in `door`.
"""

import gc
import logging
import math
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import trio
from prometheus_client import CollectorRegistry

from p2pfm.config import WEI_PER_PFM, NetworkConfig, NodeConfig
from p2pfm.errors import ChainError, OperatorError, PeerUnreachable, Reject, Reverted
from p2pfm.learner import Learner, SpendingLog
from p2pfm.lora.delta import encode_tensors
from p2pfm.messages import (
    Aside,
    BlobReply,
    BlobRequest,
    ExtendStream,
    FindStream,
    KeepStream,
    Request,
    Service,
    SyncRequest,
    decode_envelope,
    decode_request,
    encode,
)
from p2pfm.protocol.events import AnyAction, AnyEvent, Durable, Evaluate, PeersChanged, SyncAsked, Tick, Trained
from p2pfm.protocol.peer import Peer, initial_durable
from p2pfm.protocol.phases import compute_position
from p2pfm.protocol.shards import list_spoken_topics
from p2pfm.runtime.auditor import Auditor, read_proposal
from p2pfm.runtime.backend import Backend
from p2pfm.runtime.clock import ClockReport, compute_offset_max, now_ms
from p2pfm.runtime.door import Door
from p2pfm.runtime.effects import Effects
from p2pfm.runtime.endpoints import name_endpoint
from p2pfm.runtime.envelopes import seal
from p2pfm.runtime.event_log import EventLogWriter
from p2pfm.runtime.gateway import Gateway
from p2pfm.runtime.http_server import serve_http
from p2pfm.runtime.keys import Keys
from p2pfm.runtime.metrics import IN, OUT, MeteredRequests, NodeMetrics, NodeState
from p2pfm.runtime.network.exchange import Downloads, answer_blob
from p2pfm.runtime.network.server import Send
from p2pfm.runtime.network.transport import Libp2pTransport
from p2pfm.runtime.personal import Personal
from p2pfm.runtime.serving_side import ServingSide
from p2pfm.runtime.settler import Settler
from p2pfm.runtime.status import RoundFigures, make_status
from p2pfm.runtime.store import Store
from p2pfm.runtime.text import TextCodec
from p2pfm.runtime.user_adapters import ReadLora
from p2pfm.serving.receipts import list_services
from p2pfm.settlement import bls
from p2pfm.settlement.ledger import FederationParams, Ledger
from p2pfm.types import Digest, Millis, PeerId, Round, Wei

PROBE_BYTES_MAX = 64 * 1024 * 1024
PROBE_WAIT_S = 60.0
"""How long a node without a probe file asks its peers for one."""

EVENTS_MAX = 100_000
"""Events that wait for the core. More than the transport's own bounds let in means the core hangs: then we stop."""

CLOCK_S = 5.0
"""How often the clock is compared with what peers told."""

PRUNE_S = 60.0
"""How often old blobs are dropped."""

MEMORY_FIRST_S, MEMORY_S = 2.0, 60.0
"""How soon after the start, and then how often, the peer book is saved where nobody is banned."""

MEMORY_PAUSE_S = 1.0
"""At least so long between two saves, whatever strangers do."""

ANSWER_S = 5.0
"""A neighbour's question waits so long for the core."""

BLOB_BYTES_MAX = 4 << 30
"""Disk that blobs may take: thousands of rounds of payloads and bases of a small adapter."""

PROPOSAL_TAG = b"\xa8proposal"
"""Begins a proposal, after one byte. No payload, base or residual: they have magics."""

log = logging.getLogger(__name__)

MakePeer = Callable[[PeerId, NetworkConfig, Durable], Peer]


@dataclass(frozen=True, slots=True)
class Learners:
    """On one model: what the network asks for, and, where personalisation is on, this node's own data."""

    shared: Learner
    own: Learner | None = None


@dataclass(frozen=True, slots=True)
class Models:
    """How a node gets its models; blocking functions, called in a thread."""

    codec: Callable[[], TextCodec]
    engine: Callable[[], Backend | None]
    learners: Callable[[bytes, SpendingLog], Learners]
    """Takes the probe set's bytes, and where training is accounted for."""
    read_lora: ReadLora | None = None
    """For users' own adapters; None: this node takes no peft folders."""


def validate_rules(network: NetworkConfig, params: FederationParams) -> None:
    """The network's peers compute what the contract takes.

    Raises:
        OperatorError: names the first key that differs, or that the contract's registry can outgrow.
    """
    pairs = (
        ("network.scoring.committee_size", network.scoring.committee_size, params.committee_size),
        ("network.settlement.rounds_per_epoch", network.settlement.rounds_per_epoch, params.rounds_per_epoch),
        ("network.settlement.pool_per_epoch_pfm [wei]", network.pool_per_epoch(), params.pool_per_epoch),
        ("network.settlement.serving_per_epoch_pfm [wei]", network.serving_per_epoch(), params.serving_per_epoch),
    )
    for name, ours, theirs in pairs:
        if ours != theirs:
            raise OperatorError(
                f"{name}: the network's TOML says {ours}, its contract {theirs}; get the network's own file, or "
                "another contract (network.chain.federation)"
            )
    if network.has_shards and params.members_max > network.limits.peers_max:
        raise OperatorError(
            f"network.limits.peers_max: the network's TOML says {network.limits.peers_max}, and its contract takes "
            f"{params.members_max} members: those beyond would make shards that nobody hears; get the network's own "
            "file, or another contract (network.chain.federation)"
        )


class Node:
    """Everything one process runs. `run` ends only when cancelled, or when an operator must mend something."""

    def __init__(
        self, config: NodeConfig, keys: Keys, ledger: Ledger, models: Models, make_peer: MakePeer = Peer
    ) -> None:
        """`make_peer`: the core of this node; another one than `Peer` only to demonstrate an attack."""
        self.config = config
        self.keys = keys
        self.network_id = config.network.network_id()
        self.registry = CollectorRegistry()
        self.peer: Peer | None = None
        self.personal: Personal | None = None
        self.stage = "starting"
        """What a person waits for: starting, loading, running."""
        self._ledger = ledger
        self._models = models
        self._make_peer = make_peer
        self._store = Store(Path(config.home))
        self._door = Door(config.network)
        self.metrics = NodeMetrics(self.registry)
        self.registry.register(NodeState(self))
        self.figures = RoundFigures()
        self.clock = ClockReport(compute_offset_max(config.network.phases))
        self._events_in, self._events = trio.open_memory_channel[AnyEvent](EVENTS_MAX)
        self._num_tokens_given = 0
        self._was_member = False
        """Registered before this start."""
        self._wake = trio.Event()
        self.settler = Settler(keys.peer, config.network, ledger, self._store, self._on_chain, config.auto_claim)
        self.auditor = Auditor(keys.peer, ledger, self.find_public, is_contesting=config.auto_challenge)
        self.transport = Libp2pTransport(
            keys.keypair,
            config.listen,
            config.bootstrap,
            self.network_id,
            config.limits,
            memory=self._store.load_network_memory(),
            discovery=config.discovery,
            watched=list_spoken_topics(config.network),
        )
        self._requests = MeteredRequests(self.transport, self.metrics)
        self.downloads = Downloads(self._requests, on_whole=self.metrics.on_fetched)
        self.effects: Effects
        self.serving: ServingSide

    async def run(self) -> None:
        """Start all parts in the order in which they need one another, then serve until cancelled.

        Raises:
            OperatorError: a part cannot start; says which and what to do.
        """
        async with self.transport, trio.open_nursery() as nursery:
            self.transport.set_gate(self._prove)
            self.transport.set_handler(self._on_request)
            self.transport.set_stream_handler(self._on_stream)
            await self._join_chain()
            self.stage = "loading"
            codec = await trio.to_thread.run_sync(self._models.codec)
            engine = await trio.to_thread.run_sync(self._models.engine)
            read_lora, ask = self._models.read_lora, self._requests.request
            self.serving = ServingSide(self, self._store, codec, engine, read_lora, ask)
            self.metrics.on_round_trip = self.gateway.table.on_round_trip
            http = self.config.http
            await nursery.start(serve_http, self.serving.app(), http.host, http.port, http)
            learners = await self._load_learners()
            learner = learners.shared
            self.effects = Effects(
                self.config.network,
                self.keys,
                self._store,
                self.transport,
                self.downloads,
                self.metrics,
                learner,
                self.gateway,
                self.settler,
                self.auditor,
                self._door,
                nursery,
                self._emit,
                self._list_services,
            )
            await self._restore(learner)
            if learners.own is not None:
                home, turns = Path(self.config.home), self.effects.model_turns
                self.personal = Personal(self.config.personal, home, learners.own, learner, self.gateway, turns)
                await self.personal.restore()
                nursery.start_soon(self.personal.run)
            # Models and libraries stay: a collector that went on looking through them would stop the network for up to
            # a second at a time.
            gc.collect()
            gc.freeze()
            self.stage = "running"
            for task in (
                self.settler.run,
                self.auditor.run,
                self._gossip_loop,
                self._peers_loop,
                self._memory_loop,
                self._timer_loop,
                self._prune_loop,
                self._clock_loop,
                self.serving.run,
            ):
                nursery.start_soon(task)
            await self._event_loop()

    @property
    def gateway(self) -> Gateway:
        """Of `serving`."""
        return self.serving.gateway

    @property
    def num_events_waiting(self) -> int:
        """Events that wait for the core."""
        return self._events.statistics().current_buffer_used

    def status(self) -> Mapping[str, Any]:
        """What `/status` and `p2pfm node status` show."""
        return make_status(self, now_ms())

    # --- starting ---

    async def _join_chain(self) -> None:
        """Read the registry; stake and join if this peer is not in it.

        Raises:
            OperatorError: the chain is unreachable at first start, the stake is missing, or the contract has other
                rules than the network.
        """
        try:
            validate_rules(self.config.network, await trio.to_thread.run_sync(self._ledger.get_params))
            roster = await trio.to_thread.run_sync(self._ledger.get_roster)
            mine = next((member for member in reversed(roster.members) if member.peer == self.keys.peer), None)
            self._was_member = mine is not None and mine.active
            if mine is None or (not mine.active and not mine.stake):
                await trio.to_thread.run_sync(self._register)
            elif not mine.active:
                raise OperatorError(
                    "this node is leaving the network: `p2pfm stake show` tells when its stake is free, "
                    "`p2pfm stake withdraw` takes it; then it can join anew"
                )
            elif (mine.account, mine.bls_key) != (
                self.keys.account_address,
                bls.public_key(self.keys.bls_secret),
            ):
                raise OperatorError(
                    f"this peer id is registered by {mine.account}, who would draw its rewards; "
                    "make a new home with `p2pfm init`"
                )
            await self.settler.refresh()
        except ChainError as error:
            if self._store.load_durable() is None:
                raise OperatorError(
                    f"chain: {error}. Check `rpc` in the node's TOML (now {name_endpoint(self.config.rpc)}); "
                    "`p2pfm testnet up` starts a local one"
                ) from error
            log.warning("chain: %s; going on with what is known", error)

    def _register(self) -> None:
        """Stake and join. Raises: OperatorError, naming the account that lacks something."""
        self.stage = "registering"
        key = bls.public_key(self.keys.bls_secret)
        chain = self.config.network.chain
        possession = bls.prove_possession(self.keys.bls_secret, chain, self.keys.account_address, self.keys.peer)
        stake = Wei(self.config.stake_pfm * WEI_PER_PFM)
        try:
            index = self._ledger.register(self.keys.peer, key, possession, stake)
        except ChainError as error:
            if isinstance(error, Reverted) and error.reason == "AlreadyRegistered":
                raise OperatorError(
                    f"account {self.keys.account_address} was slashed: a signature of it was proven false, and it can "
                    "join no more. A new home (`p2pfm init`) joins with a new stake"
                ) from error
            raise OperatorError(
                f"could not register on chain: {error}. Account {self.keys.account_address} needs "
                f"{self.config.stake_pfm} PFM of stake and some ether for gas (on a local testnet: "
                f"p2pfm testnet endow {self.keys.account_address})"
            ) from error
        log.info("registered as member %d with a stake of %d PFM", index, self.config.stake_pfm)

    async def _load_learners(self) -> Learners:
        probe = await self._get_probe()
        learners = await trio.to_thread.run_sync(self._models.learners, probe, self._store)
        if self.config.privacy.enabled:
            self.figures.epsilon = await trio.to_thread.run_sync(self._compute_epsilon)
        self._probe = await trio.to_thread.run_sync(self._store.put, probe)
        return learners

    def _compute_epsilon(self) -> float | None:
        """What was spent before this run."""
        from p2pfm.lora.privacy import compute_epsilon  # opacus is an extra

        epsilon = compute_epsilon(self._store.get_spendings(), self.config.privacy.delta)
        return epsilon if math.isfinite(epsilon) else None

    async def _get_probe(self) -> bytes:
        """The declared probe set: from the configured file, from disk, or from any peer; its digest proves it.

        Raises:
            OperatorError: a file with another digest, or nobody gave one.
        """
        digest = Digest(bytes.fromhex(self.config.network.probe))
        if self.config.probe:
            data = await trio.Path(self.config.probe).read_bytes()
            stored = await trio.to_thread.run_sync(self._store.put, data)
            if stored != digest:
                raise OperatorError(
                    f"probe: {self.config.probe} has SHA-256 {stored.hex()}, the network declares {digest.hex()}; "
                    "remove the key to fetch the right one from a peer"
                )
            return data
        with trio.move_on_after(PROBE_WAIT_S):
            while True:
                data_or_none = await trio.to_thread.run_sync(self._store.find, digest)
                if data_or_none is not None:
                    return data_or_none
                try:
                    peers = self.transport.connected()
                    return await self.downloads.fetch(digest, peers, PROBE_BYTES_MAX)
                except (PeerUnreachable, Reject) as error:
                    log.info("probe: %s; asking again", error)
                    await trio.sleep(1)
        raise OperatorError(
            f"probe: no file is configured and no peer gave the probe set within {PROBE_WAIT_S:g} s; "
            "check `bootstrap`, or set `probe` to the file"
        )

    async def _restore(self, learner: Learner) -> None:
        """The state of the last run, or of a newcomer; the base is served from the first moment."""
        durable = await trio.to_thread.run_sync(self._store.load_durable)
        if durable is not None and durable.head is not None:
            # Killed between adopting and queueing, nobody else may know this certificate.
            await self.settler.queue(durable.head, 0)
        durable = await trio.to_thread.run_sync(self._make_whole, durable, learner)
        self.peer = self._make_peer(self.keys.peer, self.config.network, durable)
        self.effects.served |= {self._probe, durable.base}
        self.effects.served |= await trio.to_thread.run_sync(self._find_released)
        older_max = self.config.serving.versions_kept - 1
        for base in await trio.to_thread.run_sync(self._store.get_older_bases, durable.base, older_max):
            if await trio.to_thread.run_sync(self._store.find, base) is not None:  # else it was damaged
                await self.effects.adopt(base)
        await self.effects.adopt(durable.base)
        if durable.head is None:  # where the story begins: people compare with it
            await self.effects.carry_out(Evaluate(Round(-1), durable.base))
        self._event_log: EventLogWriter | None = EventLogWriter(
            Path(self.config.home) / "events", self.config.network, self.keys.peer, durable
        )

    def _find_released(self) -> set[Digest]:
        """What certified rounds have made public: auditors ask for it long after."""
        released: set[Digest] = set()
        for certificate in self._store.get_certificates(-1):
            proposal = certificate.proposal
            released |= {proposal.new_base, *proposal.payloads}
            for digest in proposal.shards:
                data = self._store.find(digest)
                shard = read_proposal(data) if data is not None else None
                if shard is not None:  # else it is not here, or was named by liars
                    released |= {digest, *shard.payloads}
        return released

    def _make_whole(self, durable: Durable | None, learner: Learner) -> Durable:
        """The durable state without what its blobs were lost of; what was signed and announced is never forgotten."""
        if durable is None or self._store.find(durable.base) is None:  # `find` also notices a damaged file
            # A base that was lost with the disk is fetched again with the next certificate.
            fresh = initial_durable(self._store.put(encode_tensors(learner.initial())))
            if durable is None and not self._was_member:
                return fresh
            if durable is None:
                # A member without memory: what it said in the round that runs now it may not contradict, on pain of
                # its stake.
                now_in = compute_position(self.config.network, now_ms()).round
                return msgspec.structs.replace(
                    fresh, signed_round=now_in, signed_shard_round=now_in, announced_round=now_in
                )
            return msgspec.structs.replace(
                fresh,
                signed_round=durable.signed_round,
                signed_shard_round=durable.signed_shard_round,
                announced_round=durable.announced_round,
            )
        kept = {
            name: digest if digest is not None and self._store.find(digest) is not None else None
            for name, digest in (("residual", durable.residual), ("pending_residual", durable.pending_residual))
        }
        return msgspec.structs.replace(durable, **kept)

    def get_stakes(self) -> Mapping[PeerId, int]:
        """Of the registered peers; none before the chain was read."""
        roster = self.settler.roster
        return {peer: int(member.stake) for peer, member in roster.by_peer.items()} if roster else {}

    def _list_services(self, epoch: int) -> tuple[Service, ...]:
        """What replicas are due for an epoch, by the receipts shown here; the committee's median pays."""
        roster = self.settler.roster
        members = {peer: member.index for peer, member in roster.by_peer.items()} if roster else {}
        return list_services(self.serving.receipts.compute_shares(epoch), members)

    async def publish_aside(self, message: Aside) -> None:
        """Gossip what is of serving alone: the core does not hear it."""
        data = encode(seal(self.keys, self.network_id, message))
        self.metrics.on_gossip(OUT, message, len(data))
        await self.transport.publish(data)

    # --- the queue ---

    def _prove(self, data: bytes) -> None:
        """The transport's gate: gossip that its author did not sign is neither heard nor passed on."""
        self._door.prove_bytes(data)

    def _emit(self, event: AnyEvent) -> None:
        self._events_in.send_nowait(event)

    async def _on_chain(self, event: AnyEvent) -> None:
        await self._events_in.send(event)

    async def _event_loop(self) -> None:
        assert self.peer is not None, "restored before"
        self._emit(Tick())
        async for event in self._events:
            self._door.on_event(event)
            now = now_ms()
            try:
                actions = self.peer.handle(event, now)
            except Exception:  # the driver's top loop: a bug in the core must not take serving down
                log.exception("the core failed on %s", type(event).__name__)
                self.metrics.core_failures.inc()
                continue
            self._log_event(now, event, actions)
            self.metrics.events.labels(type(event).__name__).inc()
            self.figures.on_event(self.peer.round, event, self.transport.counters)
            for action in actions:
                await self.effects.carry_out(action)
            if isinstance(event, Trained) and self.personal is not None:
                self.personal.on_trained(event.round)
            self._wake.set()

    def _log_event(self, now: Millis, event: AnyEvent, actions: list[AnyAction]) -> None:
        """For replays and people: a full disk ends the log, not the node."""
        try:
            if self._event_log is not None:
                self._event_log.append(now, event, actions)
        except OSError as error:
            log.warning("the event log ends here: %s", error)
            self._event_log = None

    async def _timer_loop(self) -> None:
        """One timer: the core names the next moment at which it must be woken."""
        while True:
            due = self.effects.due_ms
            wait_s = float("inf") if due is None else (due - now_ms()) / 1000
            if wait_s <= 0:
                self.effects.due_ms = None
                self._emit(Tick())
                continue
            with trio.move_on_after(wait_s):
                await self._wake.wait()
            self._wake = trio.Event()

    async def _gossip_loop(self) -> None:
        async for _, data in self.transport.gossip:
            envelope = decode_envelope(data)  # the gate has proven it
            message = await self.effects.receive(envelope)
            if message is not None:
                self.metrics.on_gossip(IN, message, len(data))
            if isinstance(message, Aside):
                try:
                    await self.serving.hear(envelope.author, message)
                except Reject as error:
                    self.effects.blame(envelope.author, str(error))

    async def _peers_loop(self) -> None:
        async for peers in self.transport.peers_changed:
            self._emit(PeersChanged(peers))
            self.gateway.on_connected(peers)

    async def _memory_loop(self) -> None:
        """Keep the peer book, and at once what a restart must not undo: a ban."""
        wait_s = MEMORY_FIRST_S
        while True:
            with trio.move_on_after(wait_s):
                await self.transport.has_banned.wait()
            try:
                await trio.to_thread.run_sync(self._store.save_network_memory, self.transport.get_memory())
                await trio.to_thread.run_sync(self._store.save_cheats, self.gateway.table.bans())
            except (sqlite3.Error, OSError) as error:
                log.warning("the peer book could not be saved: %s; trying again", error)
            wait_s = min(wait_s * 2, MEMORY_S)
            await trio.sleep(MEMORY_PAUSE_S)

    async def _clock_loop(self) -> None:
        """Compare this machine's clock with the peers' clocks."""
        while True:
            connected = self.transport.connected()
            told = self.transport.clocks.compute_offset(connected, now_ms(), trio.current_time() * 1000)
            if warning := self.clock.update(*told):
                log.warning("%s", warning)
            await trio.sleep(CLOCK_S)

    async def _prune_loop(self) -> None:
        while True:
            await trio.sleep(PRUNE_S)
            gone = await trio.to_thread.run_sync(self._prune, tuple(self.effects.served))
            self.effects.served.difference_update(gone)

    def _prune(self, served: tuple[Digest, ...]) -> list[Digest]:
        """Drop the oldest blobs beyond the bound, never what this peer needs; returns what is served no more."""
        assert self.peer is not None, "runs only once the core does"
        durable = self.peer.durable
        needed = (durable.base, durable.residual, durable.pending_residual, durable.announced_payload)
        keep = {digest for digest in needed if digest is not None} | {self._probe, *self.settler.data_digests}
        keep |= self.settler.bases | {*self._store.get_older_bases(durable.base, self.config.serving.versions_kept - 1)}
        freed = self._store.prune(keep, BLOB_BYTES_MAX)
        if freed:
            log.info("dropped %d bytes of old blobs", freed)
        return [digest for digest in served if not self._store.has(digest)]

    # --- what peers ask ---

    def _is_public(self, digest: Digest) -> bool:
        """Served to whoever asks: what the core released, and the data of every round on chain. These are proposals: a
        committee can sign the digest of anything, also of what may not be given yet. Reads the disk.
        """
        if digest in self.effects.served:
            return True
        if digest not in self.settler.data_digests:
            return False
        _, start = self._store.get_part(digest, 0, 1 + len(PROPOSAL_TAG))  # an array of up to 15, and its first element
        return start[1:] == PROPOSAL_TAG

    async def find_public(self, digest: Digest) -> bytes | None:
        """A blob that anyone may have; the data of a settled round that is not here is fetched from a peer."""
        is_named = digest in self.settler.data_digests
        if self.stage != "running" or not (is_named or digest in self.effects.served):
            return None
        data = await trio.to_thread.run_sync(self._store.find, digest)
        if data is None and is_named:
            try:
                bytes_max = self.config.network.limits.message_bytes_max
                data = await self.downloads.fetch(digest, self.transport.connected(), bytes_max)
            except (PeerUnreachable, Reject) as error:
                log.info("data %s of a settled round: %s", digest.hex()[:10], error)
                return None
            await trio.to_thread.run_sync(self._store.put, data)
            self.settler.learn_shards(data)
        return data if await trio.to_thread.run_sync(self._is_public, digest) else None

    async def _on_request(self, peer: PeerId, data: bytes) -> bytes:
        request = decode_request(data)
        self.metrics.on_frame(IN, data)
        reply = await self._answer_request(peer, request)
        self.metrics.on_frame(OUT, reply)
        return reply

    async def _answer_request(self, peer: PeerId, request: Request) -> bytes:
        match request:
            case BlobRequest():
                if self.stage != "running":
                    return encode(BlobReply(0, b""))
                return await trio.to_thread.run_sync(self._answer_blob, request)
            case SyncRequest():
                return await self._answer_sync(peer, request)
            case KeepStream() | ExtendStream() | FindStream():
                if self.stage != "running":
                    raise PeerUnreachable("this node is still starting")
                return encode(self.serving.answer(peer, request))
            case _:
                raise Reject(f"expected a request for blobs, sync or kept streams, got {type(request).__name__}")

    def _answer_blob(self, request: BlobRequest) -> bytes:
        adapters = self.serving.adapters
        if adapters.is_known(request.digest):
            return encode(answer_blob(adapters.folder, adapters.is_known, request))
        return encode(answer_blob(self._store, self._is_public, request))

    async def _answer_sync(self, peer: PeerId, request: SyncRequest) -> bytes:
        if self.stage != "running":
            raise PeerUnreachable("this node is still starting")
        self._num_tokens_given += 1
        answered, replies = self.effects.wait_for_answer(self._num_tokens_given)
        self._emit(SyncAsked(peer, request, self._num_tokens_given))
        with trio.move_on_after(ANSWER_S):
            await answered.wait()
        if not replies:
            self.effects.forget_answer(self._num_tokens_given)
            raise PeerUnreachable("the core did not answer")
        return encode(replies[0])

    async def _on_stream(self, peer: PeerId, data: bytes, send: Send) -> None:
        if self.stage == "running":
            await self.serving.answer_stream(peer, data, send)
