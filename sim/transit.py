"""What travels between hosts in virtual time: gossip in waves, anti-entropy, blobs. Knows no rule of the protocol.

What many hosts hear at once, and what one host asks of many, shares entries of the schedule: a network of thousands
costs tens of entries a message and not one a receiver.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from p2pfm.config import NetworkConfig
from p2pfm.messages import (
    Attestation,
    Certificate,
    Envelope,
    Message,
    ShardMessage,
    SyncReply,
    SyncRequest,
    decode_message,
    encode,
    signed_bytes,
)
from p2pfm.protocol.events import AnyEvent, Fetch, Fetched, FetchFailed, Publish, Received, SyncAnswered, SyncAsked
from p2pfm.protocol.shards import EVERYBODY
from p2pfm.types import PeerId
from sim.adversaries.filters import Deed
from sim.chain import Chain
from sim.host import Host
from sim.network import Network
from sim.schedule import Schedule
from sim.signatures import Signatures
from sim.workshop import Workshop

PROVIDERS_MAX = 8
"""Providers that a fetch tries before it fails."""

REQUEST_BYTES = 100
"""What a request for a blob weighs [bytes]."""

DIGEST_BYTES = 34
"""What a digest weighs in a message [bytes]."""

TIMEOUT_MS = 2_000
"""A host that does not answer is given up after this [ms]."""

REFUSED_MS = 300
"""A provider that does not serve yet (its clock may be a little behind), or lacks the blob, is left for this [ms]."""

PULL_QUANTUM_MS = 50
"""Of many blobs that one host pulls, those which arrive within this are taken together [ms]."""

FEW_PULLS = 8
"""So many are not worth gathering."""

Pull = tuple[Fetch, int, Host, int]
"""A blob that is wanted, which of its providers is asked, that host, and the size [bytes] once it gives it."""

Step = Callable[[Host, AnyEvent], None]
StepAll = Callable[[Host, Sequence[AnyEvent]], None]
Deliver = Callable[[Iterable[int], AnyEvent], None]


class Transit:
    """All links of one world."""

    def __init__(
        self,
        config: NetworkConfig,
        schedule: Schedule,
        network: Network,
        hosts: Sequence[Host],
        signatures: Signatures,
        chain: Chain,
        workshop: Workshop,
        step: Step,
        step_all: StepAll,
        deliver: Deliver,
    ) -> None:
        """Args: step: lets an event reach one running host now; step_all: several events; deliver: several hosts."""
        self._config = config
        self._schedule = schedule
        self._network = network
        self._quantum_ms = network.quantum_ms
        self._hosts = hosts
        self._by_peer = {host.me: host for host in hosts}
        self._signatures = signatures
        self._chain = chain
        self._workshop = workshop
        self._step = step
        self._step_all = step_all
        self._deliver = deliver
        self._network_id = config.network_id()
        self._listeners: dict[str, list[int]] = {}
        self._askers: dict[int, tuple[Host, int, Host]] = {}
        self._num_tokens = 0

    # --- gossip

    def listen(self, host: Host, topics: tuple[str, ...]) -> None:
        """A host hears these topics from now on, and what everybody hears."""
        for topic in set(host.topics) - set(topics):
            self._listeners[topic].remove(host.index)
        for topic in set(topics) - set(host.topics):
            self._listeners.setdefault(topic, []).append(host.index)
        host.topics = topics

    def publish(self, host: Host, deed: Deed) -> None:
        """Sign a message and send it to all who hear it; the author hears itself at once."""
        assert isinstance(deed.action, Publish), "only what is published is sent"
        received = self._seal(host, deed.action.message)
        if received is None:
            return
        if deed.audience != "odd":
            self._schedule.after(0, partial(self._hear_own, host, host.life, received))
        num_bytes = len(received.envelope.body) + len(received.envelope.signature)
        others = self._get_audience(host, deed)
        wave = self._network.draw_wave(host.index, others, num_bytes, self._schedule.now_ms)
        self._book_broadcast(host, wave, num_bytes * len(others))
        for delay_ms, targets in wave:
            self._schedule.after(delay_ms, partial(self._arrive, targets, received, num_bytes))

    def _book_broadcast(self, host: Host, wave: list[tuple[int, list[int]]], num_bytes: int) -> None:
        """Gossip is handed on by whoever hears it: its author and they send equal parts, the author what is left."""
        reached = [self._hosts[index] for _, targets in wave for index in targets]
        carriers = [hearer for hearer in reached if hearer.peer is not None]
        share, left = divmod(num_bytes, len(carriers) + 1)
        host.num_bytes_sent += share + left
        for hearer in carriers:
            hearer.num_bytes_sent += share

    def _seal(self, host: Host, message: Message) -> Received | None:
        body = encode(message)
        signature = self._signatures.seal(host.me, signed_bytes(self._network_id, host.me, body))
        decoded = decode_message(body, self._config.limits.message_bytes_max)
        return Received(Envelope(host.me, body, signature), decoded) if self._is_genuine(decoded) else None

    def _get_audience(self, host: Host, deed: Deed) -> list[int]:
        assert isinstance(deed.action, Publish), "only what is published has hearers"
        topic = deed.action.topic
        heard = range(len(self._hosts)) if topic == EVERYBODY else self._listeners.get(topic, ())
        if deed.audience == "all" and not deed.but:
            others = list(heard)
            if host.index in others:
                others.remove(host.index)
            return others
        parity = {"all": None, "even": 0, "odd": 1}[deed.audience]
        return [
            index
            for index in heard
            if index != host.index
            and (parity is None or index % 2 == parity)
            and not (deed.but and self._hosts[index].me in deed.but)
        ]

    def _hear_own(self, host: Host, life: int, received: Received) -> None:
        if host.life == life and host.peer is not None:
            self._step(host, received)

    def _arrive(self, targets: list[int], received: Received, num_bytes: int) -> None:
        for index in targets:
            host = self._hosts[index]
            if host.peer is not None:
                host.num_bytes_received += num_bytes
        self._deliver(targets, received)

    def _is_genuine(self, message: Message) -> bool:
        """Whether the BLS signatures inside a message are what they claim: what a node's door checks."""
        match message:
            case Attestation() | ShardMessage(message=Attestation()):
                word = message.message if isinstance(message, ShardMessage) else message
                return isinstance(word, Attestation) and self._chain.verify_attestation(word)
            case Certificate():
                return self._chain.verify_certificate(message)
            case ShardMessage(shard=shard, message=Certificate() as certificate):
                return self._chain.verify_shard_certificate(shard, certificate)
            case _:
                return True

    # --- anti-entropy

    def ask_sync(self, host: Host, peer: PeerId, request: SyncRequest) -> None:
        """A host asks another what it lacks."""
        target = self._by_peer[peer]
        num_bytes = REQUEST_BYTES + DIGEST_BYTES * len(request.have)
        host.num_bytes_sent += num_bytes
        delay_ms = self._network.draw_delay(host.index, target.index, num_bytes, self._schedule.now_ms)
        if delay_ms is not None:
            self._schedule.after(delay_ms, partial(self._hear_sync, host, host.life, target, request, num_bytes))

    def _hear_sync(self, host: Host, life: int, target: Host, request: SyncRequest, num_bytes: int) -> None:
        if target.peer is None:
            return
        target.num_bytes_received += num_bytes
        self._num_tokens += 1
        self._askers[self._num_tokens] = (host, life, target)
        self._step(target, SyncAsked(host.me, request, self._num_tokens))

    def answer_sync(self, token: int, reply: SyncReply) -> None:
        """The answer goes back to whoever asked."""
        host, life, target = self._askers.pop(token)
        if not reply.envelopes and not reply.head:  # what tells nothing changes nothing
            target.num_bytes_sent += REQUEST_BYTES
            if host.life == life and host.peer is not None:
                host.num_bytes_received += REQUEST_BYTES
            return
        num_bytes = len(encode(reply))
        target.num_bytes_sent += num_bytes
        delay_ms = self._network.draw_delay(target.index, host.index, num_bytes, self._schedule.now_ms)
        if delay_ms is not None:
            self._schedule.after(delay_ms, partial(self._take_sync, host, life, target, reply, num_bytes))

    def _take_sync(self, host: Host, life: int, target: Host, reply: SyncReply, num_bytes: int) -> None:
        if host.life != life or host.peer is None:
            return
        host.num_bytes_received += num_bytes
        bytes_max = self._config.limits.message_bytes_max
        told: list[AnyEvent] = [Received(each, decode_message(each.body, bytes_max)) for each in reply.envelopes]
        is_good = reply.head is not None and self._chain.verify_certificate(reply.head)
        self._step_all(host, [*told, SyncAnswered(target.me, reply.head if is_good else None)])

    # --- blobs

    def fetch(self, host: Host, wanted: Sequence[Fetch]) -> None:
        """Get blobs from the host's own disk, else each from one provider after the other."""
        self._pull(host, host.life, [(action, 0) for action in wanted])

    def _pull(self, host: Host, life: int, wanted: Iterable[tuple[Fetch, int]]) -> None:
        if host.life != life or host.peer is None:
            return
        asked: list[Pull] = []
        held, by_peer = host.disk.held, self._by_peer
        for action, attempt in wanted:
            providers = action.providers
            if action.digest in held:
                _, maker = self._workshop.validate(action.kind, action.digest, host.disk)
                self._later(host, Fetched(action.digest, maker))
            elif not providers or attempt > min(len(providers), PROVIDERS_MAX):
                self._later(host, FetchFailed(action.digest, is_malformed=False))
            else:  # the first provider twice, since its blob may not be public at the first time
                asked.append((action, attempt, by_peer[providers[attempt - 1 if attempt else 0]], 0))
        if not asked:
            return
        host.num_bytes_sent += REQUEST_BYTES * len(asked)
        sources = [target.index for _, _, target, _ in asked]
        now_ms = self._schedule.now_ms
        delays = self._network.draw_delays(host.index, sources, REQUEST_BYTES, now_ms)
        self._gather(asked, delays, partial(self._serve, host, life), partial(self._give_up, host, life))

    def _serve(self, host: Host, life: int, pulls: list[Pull]) -> None:
        """Requests reach their providers."""
        given: list[Pull] = []
        sources, sizes = [], []
        refused: list[Pull] = []
        silent: list[Pull] = []
        read = host.disk.read  # all disks share their bytes
        for pull in pulls:
            action, attempt, target, _ = pull
            if target.peer is None:
                silent.append(pull)
                continue
            target.num_bytes_received += REQUEST_BYTES
            digest = action.digest
            size = len(read(digest)) if digest in target.served and digest in target.disk.held else 0
            if not 0 < size <= action.bytes_max:
                refused.append(pull)
                continue
            given.append((action, attempt, target, size))
            sources.append(target.index)
            sizes.append(size)
            target.num_bytes_sent += size
        if refused:
            self._schedule.after(REFUSED_MS, partial(self._ask_next, host, life, refused))
        if silent:
            self._give_up(host, life, silent)
        if given:
            delays = self._network.draw_transfers(sources, host.index, sizes, self._schedule.now_ms)
            self._gather(given, delays, partial(self._take, host, life), partial(self._give_up, host, life))

    def _take(self, host: Host, life: int, pulls: list[Pull]) -> None:
        """Blobs have come."""
        if host.life != life or host.peer is None:
            return
        told: list[AnyEvent] = []
        disk, validate = host.disk, self._workshop.validate
        for action, _, _, size in pulls:
            digest = action.digest
            host.num_bytes_received += size
            if not disk.can_read(digest):  # under way for rounds, over a slow link: nobody needs it any more
                told.append(FetchFailed(digest, is_malformed=False))
                continue
            is_valid, maker = validate(action.kind, digest, disk)
            if is_valid:
                disk.held.add(digest)
                told.append(Fetched(digest, maker))
            else:
                told.append(FetchFailed(digest, is_malformed=True))
        self._step_all(host, told)

    def _give_up(self, host: Host, life: int, pulls: list[Pull]) -> None:
        """Nobody answered: the next ones are asked when that is certain."""
        self._schedule.after(TIMEOUT_MS, partial(self._ask_next, host, life, pulls))

    def _ask_next(self, host: Host, life: int, pulls: list[Pull]) -> None:
        self._pull(host, life, [(action, attempt + 1) for action, attempt, *_ in pulls])

    def _gather(
        self,
        pulls: list[Pull],
        delays: Sequence[int | None],
        arrive: Callable[[list[Pull]], None],
        lose: Callable[[list[Pull]], None],
    ) -> None:
        """Put what arrives within one quantum of time into one entry of the schedule."""
        groups: dict[int, list[Pull]] = {}
        lost = []
        quantum = PULL_QUANTUM_MS if len(pulls) > FEW_PULLS else self._quantum_ms
        for pull, delay in zip(pulls, delays, strict=True):
            if delay is None:
                lost.append(pull)
            else:
                groups.setdefault(-(-delay // quantum) * quantum, []).append(pull)
        for delay, group in groups.items():
            self._schedule.after(delay, partial(arrive, group))
        if lost:
            lose(lost)

    def _later(self, host: Host, event: AnyEvent) -> None:
        life = host.life

        def reach() -> None:
            if host.life == life and host.peer is not None:
                self._step(host, event)

        self._schedule.after(0, reach)
