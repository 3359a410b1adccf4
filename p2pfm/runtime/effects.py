"""Carries out what the core asks for: one method an action, heavy work in threads, answers back as events.

Knows the store, the transport, the learner and the gateway; decides nothing.
"""

import logging
import secrets
from collections import Counter
from collections.abc import Callable
from functools import partial
from math import prod
from typing import assert_never

import msgspec
import trio

from p2pfm import work
from p2pfm.config import NetworkConfig
from p2pfm.errors import P2PFMError, PeerUnreachable, Reject, Unjudged, WorldError
from p2pfm.learner import Learner
from p2pfm.lora.cross_term import CROSS_TERM_MAX
from p2pfm.lora.delta import decode_tensors, encode_tensors
from p2pfm.messages import Aside, Envelope, Message, Proposal, Service, SyncReply, decode_reply, encode
from p2pfm.protocol.events import (
    Accuse,
    Adopt,
    Aggregate,
    Aggregated,
    AnswerSync,
    AnyAction,
    AnyEvent,
    AskSync,
    Blame,
    Condense,
    Evaluate,
    Fetch,
    Fetched,
    FetchFailed,
    Listen,
    Merge,
    Note,
    Persist,
    Publish,
    Received,
    Rewind,
    Rewound,
    Scored,
    ScoreUpdates,
    Serve,
    SetTimer,
    Settle,
    Sign,
    Signed,
    SyncAnswered,
    Train,
)
from p2pfm.protocol.gossip import REPLY_MAX
from p2pfm.runtime.auditor import Auditor
from p2pfm.runtime.door import Door
from p2pfm.runtime.envelopes import seal
from p2pfm.runtime.gateway import Gateway
from p2pfm.runtime.keys import Keys
from p2pfm.runtime.metrics import OUT, MeteredRequests, NodeMetrics
from p2pfm.runtime.network.blobs import Priority
from p2pfm.runtime.network.exchange import Downloads, TooLarge
from p2pfm.runtime.network.transport import Libp2pTransport
from p2pfm.runtime.settler import Settler
from p2pfm.runtime.store import Store
from p2pfm.settlement import bls
from p2pfm.types import Digest, Millis, PeerId, Round

FP32_BYTES = 4

BLOB_HEADER_BYTES = 64 * 1024
"""Around the numbers of a base or payload: magic, layout, maker, tables."""

BLAMED_MAX = 256
"""Peers whose offences are counted."""

FAILURES = (WorldError, KeyError)
"""Work that failed through no fault of the code: a model that diverged, a blob that was lost with the disk."""

SYNC_TIMEOUT_S = 5.0
"""A neighbour that does not answer an anti-entropy request in this time is asked again later."""

FETCHES_MAX = {"payload": 8, "base": 2}
"""Downloads of each kind at once."""

log = logging.getLogger(__name__)


class Effects:
    """The hands of one node. `emit` is how answers come back to the core."""

    def __init__(
        self,
        config: NetworkConfig,
        keys: Keys,
        store: Store,
        transport: Libp2pTransport,
        downloads: Downloads,
        metrics: NodeMetrics,
        learner: Learner,
        gateway: Gateway,
        settler: Settler,
        auditor: Auditor,
        door: Door,
        nursery: trio.Nursery,
        emit: Callable[[AnyEvent], None],
        list_services: Callable[[int], tuple[Service, ...]],
    ) -> None:
        self.due_ms: Millis | None = None
        self.served: set[Digest] = set()
        """Blobs that may be given to whoever asks."""
        self.notes: list[tuple[Round, str]] = []
        self.num_blamed: Counter[PeerId] = Counter()
        self._config = config
        self._network_id = config.network_id()
        self._keys = keys
        self._store = store
        self._transport = transport
        self._learner = learner
        self._gateway = gateway
        self._settler = settler
        self._auditor = auditor
        self._door = door
        self._nursery = nursery
        self._emit = emit
        self._list_services = list_services
        self._shapes = dict(learner.shapes())
        self.dense_bytes = FP32_BYTES * sum(prod(shape) for shape in self._shapes.values())
        """What an update would weigh uncompressed: the reference for what is sent."""
        # Neither a base nor a payload of this adapter is larger, whatever was announced.
        self._blob_bytes_max = self.dense_bytes + BLOB_HEADER_BYTES
        self._answers: dict[int, tuple[trio.Event, list[SyncReply]]] = {}
        # One model, one core: training, scoring and evaluation take turns. Merges are short and may not wait for them.
        self.model_turns = trio.CapacityLimiter(1)
        self._downloads = downloads
        self._metrics = metrics
        self._requests = MeteredRequests(transport, metrics)
        self._fetches = {kind: trio.CapacityLimiter(number) for kind, number in FETCHES_MAX.items()}

    async def carry_out(self, action: AnyAction) -> None:
        """Start, or for what must be durable finish, one action."""
        match action:
            case SetTimer(at_ms=at_ms):
                self.due_ms = at_ms
            case Persist(durable=durable):
                await trio.to_thread.run_sync(self._store.save_durable, durable)
            case Train() | ScoreUpdates() | Evaluate():
                self._nursery.start_soon(self._use_model, action)
            case Merge():
                self._nursery.start_soon(self._merge, action)
            case Condense():
                self._nursery.start_soon(self._condense, action)
            case Listen(topics=topics, mates=mates):
                await self._transport.listen(topics, mates)
            case Publish(message=message, topic=topic, hearers=hearers):
                await self._publish(message, topic, hearers)
            case Serve(digest=digest):
                self.served.add(digest)
            case Fetch():
                self._nursery.start_soon(self._fetch, action)
            case Sign():
                self._nursery.start_soon(self._sign, action)
            case Aggregate():
                self._nursery.start_soon(self._aggregate, action)
            case Adopt(base=base):
                await self.adopt(base)
            case Rewind():
                self._nursery.start_soon(self._rewind, action)
            case Settle(certificate=certificate, rank=rank, shards=shards):
                for proposal in (certificate.proposal, *shards):
                    self.served.add(await trio.to_thread.run_sync(self._store.put, encode(proposal)))
                await self._settler.queue(certificate, rank)
            case AskSync():
                self._nursery.start_soon(self._ask_sync, action)
            case AnswerSync(token=token, reply=reply):
                if token in self._answers:
                    event, replies = self._answers.pop(token)
                    replies.append(reply)
                    event.set()
            case Blame(peer=peer, reason=reason):
                self.blame(peer, reason)
            case Accuse():
                self._nursery.start_soon(self._auditor.accuse, action)
            case Note(round=round, text=text):
                self._note(round, text)
                log.info("round %d: %s", round, text, extra={"round": round})
            case _:
                assert_never(action)

    def blame(self, peer: PeerId, reason: str) -> None:
        """Remember that a peer broke a rule, and tell the transport."""
        if peer in self.num_blamed or len(self.num_blamed) < BLAMED_MAX:
            self.num_blamed[peer] += 1
        log.warning("peer %s broke a rule: %s", peer[-6:], reason, extra={"peer": peer})
        self._transport.blame(peer, reason)

    def _note(self, round: Round, text: str) -> None:
        self.notes = [*self.notes[-99:], (round, text)]

    async def adopt(self, base: Digest) -> None:
        """Serving swaps to a base that lies in the store."""
        data = await trio.to_thread.run_sync(self._store.get, base)
        tensors = await trio.to_thread.run_sync(decode_tensors, data, self._shapes)
        await self._gateway.adopt(base, tensors)

    async def _rewind(self, action: Rewind) -> None:
        def look() -> Rewound | None:
            base = self._store.put(encode_tensors(self._learner.initial()))
            head = self._store.find_certificate(action.round, action.root)
            return Rewound(head, base) if head or action.round < 0 else None

        found = await trio.to_thread.run_sync(look, limiter=self.model_turns)
        if found is not None:
            self._emit(found)

    def wait_for_answer(self, token: int) -> tuple[trio.Event, list[SyncReply]]:
        """Where the core's `AnswerSync` with this token will be put."""
        return self._answers.setdefault(token, (trio.Event(), []))

    def forget_answer(self, token: int) -> None:
        """Nobody waits for this answer any more."""
        self._answers.pop(token, None)

    async def receive(self, envelope: Envelope) -> Message | None:
        """Open a proven envelope and hand it to the core; returns its message. A broken rule blames its author: who
        passed it on checks no more than the signature.

        What is of serving is for the gateway alone: the protocol does not depend on it.
        """
        try:
            message = await trio.to_thread.run_sync(self._door.open, envelope)
        except Reject as error:
            self.blame(envelope.author, str(error))
            return None
        except Unjudged as error:
            log.debug("message of %s: %s", envelope.author[-6:], error)
            return None
        if not isinstance(message, Aside):
            self._emit(Received(envelope, message))
        return message

    async def _publish(self, message: Message, topic: str, hearers: tuple[PeerId, ...]) -> None:
        envelope = seal(self._keys, self._network_id, message)
        self._emit(Received(envelope, message))
        if isinstance(message, Proposal):
            await trio.to_thread.run_sync(self._store.put, envelope.body)
        data = encode(envelope)
        if len(data) > self._transport.limits.gossip_bytes_max:
            log.warning("a %s of %d bytes is too large to gossip", type(message).__name__, len(data))
            return
        self._metrics.on_gossip(OUT, message, len(data))
        self._nursery.start_soon(self._transport.publish, data, topic, hearers)

    async def _use_model(self, action: Train | ScoreUpdates | Evaluate) -> None:
        def run() -> AnyEvent:
            match action:
                case Train():
                    return work.train_update(self._learner, self._store, self._config, action)
                case ScoreUpdates():
                    seed, salt = secrets.randbits(63), secrets.token_bytes(32)
                    return work.score_updates(self._learner, self._store, self._config, action, seed, salt)
                case Evaluate():
                    return work.evaluate(self._learner, self._store, action)

        try:
            answer = await trio.to_thread.run_sync(run, limiter=self.model_turns)
            if isinstance(answer, Scored) and isinstance(action, ScoreUpdates) and action.served_epoch is not None:
                services = await trio.to_thread.run_sync(self._list_services, action.served_epoch)
                answer = msgspec.structs.replace(answer, served=services)
            self._emit(answer)
        except FAILURES as error:
            self._note(action.round, f"{type(action).__name__} failed: {error}")
            told = {"round": action.round}
            log.warning("%s of round %d failed: %s", type(action).__name__, action.round, error, extra=told)

    async def _condense(self, action: Condense) -> None:
        try:
            condense = partial(work.condense_updates, self._store, self._shapes, self._config, action)
            self._emit(await trio.to_thread.run_sync(condense))
        except FAILURES as error:
            log.warning("merge of a shard failed: %s", error)

    async def _merge(self, action: Merge) -> None:
        try:
            merged = await trio.to_thread.run_sync(work.merge_updates, self._store, self._shapes, self._config, action)
            self._emit(merged)
            measure = partial(work.measure_cross_term, self._store, self._shapes, self._config, action)
            ratio = await trio.to_thread.run_sync(measure)
        except FAILURES as error:
            log.warning("merge failed: %s", error)
            return
        if ratio > CROSS_TERM_MAX:
            log.warning(
                "merge: the cross term is %.0f%% of the step: averaging factors says little of averaging what they do; "
                "lower network.training's steps or learning_rate, or take an exact adapter kind (ffa, fed_sb)",
                100 * ratio,
            )
        elif ratio > 0:
            log.info("merge: the cross term is %.1f%% of the step", 100 * ratio)

    async def _fetch(self, action: Fetch) -> None:
        """From disk, else from the providers; stored only when it is well-formed for its kind."""
        async with self._fetches[action.kind]:
            data = await trio.to_thread.run_sync(self._store.find, action.digest)
            try:
                if data is None:
                    bytes_max = min(action.bytes_max, self._blob_bytes_max)
                    priority = Priority.ROUND if action.kind == "payload" else Priority.HISTORY
                    data = await self._downloads.fetch(action.digest, action.providers, bytes_max, priority)
            except (PeerUnreachable, Reject) as error:
                if isinstance(error, TooLarge) and action.kind == "payload":
                    self._blame_announcer(action, error)
                told = {"digest": action.digest.hex()}
                log.info("could not fetch %s %s: %s", action.kind, action.digest.hex()[:10], error, extra=told)
                self._emit(FetchFailed(action.digest, is_malformed=False))
                return
            try:
                maker = await trio.to_thread.run_sync(work.validate_blob, action.kind, data, self._shapes, self._config)
            except Reject as error:
                log.warning("%s %s: %s", action.kind, action.digest.hex()[:10], error)
                self._emit(FetchFailed(action.digest, is_malformed=True))
                return
            await trio.to_thread.run_sync(self._store.put, data)
            self._emit(Fetched(action.digest, maker))

    def _blame_announcer(self, action: Fetch, error: TooLarge) -> None:
        """Who announces a payload is asked first: what it gives may not be larger than what it signed."""
        if action.providers[0] in error.peers and action.bytes_max <= self._blob_bytes_max:
            self.blame(action.providers[0], f"announced {action.bytes_max} bytes and gives more")

    async def _sign(self, action: Sign) -> None:
        signature = await trio.to_thread.run_sync(bls.sign, self._keys.bls_secret, action.message)
        self._emit(Signed(action.round, action.message, signature))

    async def _aggregate(self, action: Aggregate) -> None:
        signatures = [attestation.signature for attestation in action.attestations]
        signature = await trio.to_thread.run_sync(bls.aggregate, signatures)  # the door has verified each of them
        self._emit(Aggregated(action.round, action.message, action.absent, signature))

    async def _ask_sync(self, action: AskSync) -> None:
        try:
            data = await self._requests.request(action.peer, encode(action.request), timeout_s=SYNC_TIMEOUT_S)
            reply = decode_reply(data)
            if not isinstance(reply, SyncReply):
                raise Reject(f"expected a sync reply, got {type(reply).__name__}")
            if len(reply.envelopes) > REPLY_MAX:
                raise Reject(f"{len(reply.envelopes)} envelopes, at most {REPLY_MAX} were expected")
            for envelope in reply.envelopes:
                await trio.lowlevel.checkpoint()  # each is a signature's work: others have their turn between
                self._door.prove(envelope)
                await self.receive(envelope)
            if reply.head is not None:
                await trio.to_thread.run_sync(self._door.verify_certificate, reply.head)
            self._emit(SyncAnswered(action.peer, reply.head))
        except Reject as error:
            self.blame(action.peer, str(error))
        except P2PFMError as error:
            log.debug("sync with %s: %s", action.peer[-6:], error)
