"""A world of peers in virtual time: the simulator's driver. It drives the very `Peer` that the node runs.

Knows every part of a simulation and no rule of the protocol. All randomness comes from the scenario's seed, so a run is
the same to the last byte on every machine; its trace digest proves it.
"""

from collections.abc import Callable, Iterable
from functools import partial
from hashlib import sha256
from random import Random
from typing import assert_never

import msgspec

from p2pfm.errors import ChainError, Reverted
from p2pfm.messages import (
    Attestation,
    Certificate,
    Envelope,
    Message,
    SyncReply,
    SyncRequest,
    decode_message,
    encode,
    signed_bytes,
)
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
    Evaluate,
    Fetch,
    Fetched,
    FetchFailed,
    Merge,
    Note,
    PeersChanged,
    Persist,
    Publish,
    Received,
    Rewind,
    Rewound,
    RosterChanged,
    ScoreUpdates,
    Serve,
    SetTimer,
    Settle,
    SettledChanged,
    Sign,
    Signed,
    SyncAnswered,
    SyncAsked,
    Tick,
    Train,
)
from p2pfm.protocol.log import encode_header, encode_record
from p2pfm.protocol.membership import is_outdated_for
from p2pfm.protocol.peer import Peer, initial_durable
from p2pfm.protocol.phases import compute_round_start
from p2pfm.types import Digest, Millis, PeerId, Round
from sim.chain import Chain
from sim.checks import Checks
from sim.disk import Disk
from sim.faults import make_filter
from sim.host import Host
from sim.network import Network
from sim.scenarios import Scenario, compute_kinds, make_network, validate_scenario
from sim.schedule import Schedule
from sim.signatures import Signatures
from sim.workshop import make_workshop

PROVIDERS_MAX = 8
"""Providers that a fetch tries before it fails."""

REQUEST_BYTES = 100
"""What a request for a blob weighs [bytes]."""

TIMEOUT_MS = 2_000
"""A host that does not answer is given up after this [ms]."""

BLOCK_MS = 1_000
"""A transaction is seen by everybody after at most this [ms]."""

RANK_DELAY_MS = 2_000
"""The k-th ranked waits k times this before it brings a round on chain [ms]."""

SUBMIT_TRIES_MAX = 8
"""A certificate that the contract refuses this often is given up."""

RETRY_MS = 2_000
"""How long a host waits before it tries the chain again [ms]."""

COOL_DOWN_MS = 15_000
"""After the last round: time for laggards to catch up and for the last root to be settled [ms]."""

NOTICE_MS = 300
"""A peer's coming or going is noticed by the others after this [ms]."""

KEEP_ROUNDS = 2
"""Blobs that no host's durable state has named for so many rounds are dropped."""


class World:
    """All hosts of a scenario, their network and their chain."""

    def __init__(self, scenario: Scenario) -> None:
        """Raises: ConfigError: a scenario that cannot run."""
        validate_scenario(scenario)
        self.scenario = scenario
        self.config = make_network(scenario)
        self.schedule = Schedule(Millis(self.config.genesis_ms - 1_000))
        self.checks = Checks(scenario)
        self.losses: dict[Round, int] = {}
        """Held-out loss of the base certified in a round [nano-nats/token]."""
        self.num_crashes = 0
        self.num_steps_by_round: dict[Round, int] = {}
        self._rng = {name: Random(f"{scenario.seed} {name}") for name in ("network", "work", "faults")}
        self._network = Network(scenario.network, scenario.num_peers, self.config.genesis_ms, self._rng["network"])
        self._signatures = Signatures(Random(f"{scenario.seed} secret").randbytes(32))
        self._network_id = self.config.network_id()
        self._pool: dict[Digest, bytes] = {}
        self._pool_rounds: dict[Digest, Round] = {}
        self._askers: dict[int, tuple[Host, int, Host]] = {}
        self._num_tokens = 0
        self._trace = sha256()
        self._round = Round(-1)
        self._kinds = compute_kinds(scenario)
        self.workshop = make_workshop(scenario, self.config, self._kinds)
        genesis = self.workshop.get_genesis()
        self.hosts = [self._make_host(index, genesis) for index in range(scenario.num_peers)]
        self._by_peer = {host.me: host for host in self.hosts}
        self.chain = Chain(
            scenario, self.config, self._signatures, lambda: self.schedule.now_ms, [host.me for host in self.hosts]
        )

    def run(self, on_round: Callable[[Round], None] | None = None) -> None:
        """All rounds of the scenario, a time to cool down, and the claims.

        Args:
            on_round: told each round's number when it is over.

        Raises:
            Violation: an invariant does not hold.
        """
        for host in self.hosts:
            self._start(host)
        for number in range(self.scenario.num_rounds):
            self._round = Round(number)
            self._plan_crashes(Round(number))
            self.schedule.run(Millis(compute_round_start(self.config, Round(number + 1)) - 1))
            self._drop_old_blobs()
            if on_round:
                on_round(Round(number))
        self._round = Round(self.scenario.num_rounds)
        self.schedule.run(Millis(self.schedule.now_ms + COOL_DOWN_MS))
        self.schedule.run(Millis(self.schedule.now_ms + 1000 * self._challenge_window_s()))
        self._claim()

    def trace_digest(self) -> str:
        """SHA-256 (hex) over every step so far: when, who, what happened, what was done."""
        return self._trace.hexdigest()

    def base_of(self, host: Host) -> Digest:
        """The base that a host holds."""
        return host.durable.base

    # --- hosts

    def _make_host(self, index: int, genesis: bytes) -> Host:
        seed, kind = self.scenario.seed, self._kinds[index]
        skew_ms = self.scenario.clocks.skew_ms
        disk = Disk(self._pool)
        base = disk.put(genesis)
        host = Host(
            index=index,
            me=PeerId(f"peer-{index:05d}"),
            kind=kind,
            filter=make_filter(kind, self.workshop.make_empty_payload, disk, self.config),
            disk=disk,
            rng=Random(f"{seed} host {index}"),
            offset_ms=self._rng["faults"].randint(-skew_ms, skew_ms),
            durable=initial_durable(base),
            genesis=base,
        )
        self.checks.add(host)
        return host

    def _start(self, host: Host) -> None:
        host.life += 1
        host.peer = Peer(host.me, self.config, host.durable)
        host.served = {host.durable.base}
        host.wake_ms = host.alarm_ms = host.actions_left = None
        if host.index in self.scenario.keep_logs:
            host.logs.append(bytearray(encode_header(self.config, host.me, host.durable)))
        self._emit(host, 0, RosterChanged(self.chain.roster))
        head = self.chain.get_head()
        if head is not None:
            self._emit(host, 0, SettledChanged(head))
        for certificate in host.unsettled.values():
            self._settle(host, certificate, 0)
        self._tell_peers()

    def _tell_peers(self) -> None:
        up = tuple(host.me for host in self.hosts if host.peer is not None)
        for host in self.hosts:
            self._emit(host, NOTICE_MS, PeersChanged(tuple(peer for peer in up if peer != host.me)))

    def _plan_crashes(self, round: Round) -> None:
        """Choose who is killed in this round, when, and for how long."""
        rng, start = self._rng["faults"], compute_round_start(self.config, round)
        length = compute_round_start(self.config, Round(round + 1)) - start
        for host in rng.sample(self.hosts, round_half_up(self.scenario.churn.crash * len(self.hosts))):
            when, num_actions = start + rng.randrange(length), rng.randrange(6)
            self.schedule.at(max(when, self.schedule.now_ms), partial(self._doom, host, num_actions))

    def _doom(self, host: Host, num_actions: int) -> None:
        if host.peer is not None:
            host.actions_left = num_actions

    def _kill(self, host: Host) -> None:
        self.num_crashes += 1
        host.peer = None
        self._tell_peers()
        self.schedule.after(self._rng["faults"].randint(*self.scenario.churn.down_ms), partial(self._start, host))

    # --- steps

    def _emit(self, host: Host, delay_ms: int, event: AnyEvent) -> None:
        """Let an event reach a host later, if it is still in the same life."""
        life = host.life
        self.schedule.after(delay_ms, lambda: self._step(host, event) if host.life == life else None)

    def _step(self, host: Host, event: AnyEvent) -> None:
        heard = host.filter.hear(event)
        if host.peer is None or heard is None:
            return
        now_ms = self._clock(host)
        actions = host.peer.handle(heard, now_ms)
        self.num_steps_by_round[self._round] = self.num_steps_by_round.get(self._round, 0) + 1
        self._trace.update(msgspec.msgpack.encode((now_ms, host.index, type(heard).__name__, actions)))
        if host.logs:
            host.logs[-1] += encode_record(now_ms, heard, actions)
        self.checks.after_step(host, now_ms, actions)
        for deed in host.filter.act(actions):
            if host.actions_left is not None:
                if host.actions_left == 0:
                    self._kill(host)
                    return
                host.actions_left -= 1
            if isinstance(deed.action, Publish):
                self._publish(host, deed.action.message, deed.audience, deed.but)
            else:
                self._carry_out(host, deed.action)

    def _clock(self, host: Host) -> Millis:
        return Millis(self.schedule.now_ms + host.offset_ms)

    def _carry_out(self, host: Host, action: AnyAction) -> None:
        times = self.scenario.work
        match action:
            case SetTimer(at_ms=at_ms):
                self._set_timer(host, at_ms)
            case Persist(durable=durable):
                host.durable = durable
                if durable.head is not None:
                    host.certificates[durable.head.proposal.round] = durable.head
            case Rewind():
                self._rewind(host, action)
            case Train():
                if action.round < self.scenario.num_rounds:
                    self.workshop.expect(host.index, host.disk, action)
                    self._work(host, times.train_ms, lambda: self.workshop.train(host.index, host.disk, action))
            case ScoreUpdates():
                self._work(
                    host,
                    self.scenario.work.score_ms,
                    lambda: self.workshop.score(host.index, host.disk, action, host.rng),
                )
            case Merge():
                self._work(host, times.merge_ms, lambda: self._merge(host, action))
            case Evaluate():
                self._work(host, times.evaluate_ms, lambda: self._evaluate(host, action))
            case Sign():
                self._work(host, times.sign_ms, lambda: self._sign(host, action))
            case Aggregate():
                self._work(host, times.aggregate_ms, lambda: self._aggregate(action))
            case Publish(message=message):
                self._publish(host, message, "all")
            case Serve(digest=digest):
                host.served.add(digest)
            case Fetch():
                self._fetch(host, host.life, action, 0)
            case Adopt() | Note() | Blame() | Accuse():
                pass  # serving, logs, connections and slashing: a simulation has none
            case Settle(certificate=certificate, rank=rank):
                host.unsettled[certificate.proposal.round] = certificate
                self._settle(host, certificate, rank * RANK_DELAY_MS)
            case AskSync(peer=peer, request=request):
                self._ask_sync(host, self._by_peer[peer], request)
            case AnswerSync(token=token, reply=reply):
                self._answer_sync(token, reply)
            case _:
                assert_never(action)

    def _rewind(self, host: Host, action: Rewind) -> None:
        head = host.certificates.get(action.round)
        if action.round < 0 or (head is not None and head.proposal.root == action.root):
            self._emit(host, 0, Rewound(head, host.genesis))

    def _set_timer(self, host: Host, at_ms: Millis) -> None:
        """One wake-up call a host; a later one stays, and is put off when it rings too early."""
        host.wake_ms = Millis(max(at_ms - host.offset_ms, self.schedule.now_ms + 1))
        if host.alarm_ms is None or host.wake_ms < host.alarm_ms:
            host.alarm_ms = host.wake_ms
            life, alarm_ms = host.life, host.alarm_ms
            self.schedule.at(alarm_ms, lambda: self._ring(host, life, alarm_ms))

    def _ring(self, host: Host, life: int, alarm_ms: Millis) -> None:
        if host.life != life or host.alarm_ms != alarm_ms:
            return
        host.alarm_ms = None
        assert host.wake_ms is not None, "an alarm was set for it"
        if host.wake_ms <= self.schedule.now_ms:
            self._step(host, Tick())
        else:
            self._set_timer(host, Millis(host.wake_ms + host.offset_ms))

    # --- heavy work

    def _work(self, host: Host, times_ms: tuple[int, int], do: Callable[[], AnyEvent]) -> None:
        """Let a host work for some virtual time; the real work is done when it ends, if the host still lives."""
        life = host.life

        def finish() -> None:
            if host.life == life and host.peer is not None:
                self._step(host, do())

        self.schedule.after(self._rng["work"].randint(*times_ms), finish)

    def _merge(self, host: Host, action: Merge) -> AnyEvent:
        missing = [update for update in action.updates if update.payload not in host.disk.held]
        assert not missing, "the core merges only what it has heard of as fetched"
        return self.workshop.merge(host.index, host.disk, action)

    def _evaluate(self, host: Host, action: Evaluate) -> AnyEvent:
        evaluated = self.workshop.evaluate(host.disk, action)
        self.losses[action.round] = evaluated.loss_nano
        return evaluated

    def _sign(self, host: Host, action: Sign) -> AnyEvent:
        signature = self._signatures.sign(self._signatures.bls_key(host.me), action.message)
        return Signed(action.round, action.message, signature)

    def _aggregate(self, action: Aggregate) -> AnyEvent:
        signature = self._signatures.aggregate([attestation.signature for attestation in action.attestations])
        return Aggregated(action.round, action.message, action.absent, signature)

    # --- gossip

    def _publish(self, host: Host, message: Message, audience: str, but: frozenset[PeerId] = frozenset()) -> None:
        """Sign and send to all who hear it; the author hears itself at once."""
        body = encode(message)
        signature = self._signatures.seal(host.me, signed_bytes(self._network_id, host.me, body))
        envelope = Envelope(host.me, body, signature)
        message = decode_message(body, self.config.limits.message_bytes_max)
        if not self._is_genuine(message):
            return  # every door rejects it
        received = Received(envelope, message)
        if audience != "odd":
            self._emit(host, 0, received)
        num_bytes = len(body) + len(signature)
        others = [
            other.index for other in self.hosts if other is not host and other.me not in but and _is_in(other, audience)
        ]
        host.num_bytes_sent += num_bytes * len(others)
        for delay_ms, targets in self._network.draw_wave(host.index, others, num_bytes, self.schedule.now_ms):
            self.schedule.after(delay_ms, partial(self._arrive, targets, received, num_bytes))

    def _arrive(self, targets: Iterable[int], received: Received, num_bytes: int) -> None:
        for index in targets:
            host = self.hosts[index]
            if host.peer is not None:
                host.num_bytes_received += num_bytes
                self._step(host, received)

    def _is_genuine(self, message: Message) -> bool:
        """Whether the BLS signatures inside a message are what they claim: what a node's door checks."""
        match message:
            case Attestation():
                return self.chain.verify_attestation(message)
            case Certificate():
                return self.chain.verify_certificate(message)
            case _:
                return True

    # --- requests

    def _ask_sync(self, host: Host, target: Host, request: SyncRequest) -> None:
        num_bytes = len(encode(request))
        host.num_bytes_sent += num_bytes
        delay_ms = self._network.draw_delay(host.index, target.index, num_bytes, self.schedule.now_ms)
        if delay_ms is None:
            return
        self._num_tokens += 1
        self._askers[self._num_tokens] = (host, host.life, target)
        asked = SyncAsked(host.me, request, self._num_tokens)
        self.schedule.after(delay_ms, lambda: self._hear_sync(target, asked))

    def _hear_sync(self, target: Host, asked: SyncAsked) -> None:
        if target.peer is None:
            del self._askers[asked.token]
            return
        self._step(target, asked)

    def _answer_sync(self, token: int, reply: SyncReply) -> None:
        host, life, target = self._askers.pop(token)
        num_bytes = len(encode(reply))
        target.num_bytes_sent += num_bytes
        delay_ms = self._network.draw_delay(target.index, host.index, num_bytes, self.schedule.now_ms)
        if delay_ms is None:
            return

        def deliver() -> None:
            if host.life != life or host.peer is None:
                return
            host.num_bytes_received += num_bytes
            for envelope in reply.envelopes:
                message = decode_message(envelope.body, self.config.limits.message_bytes_max)
                self._emit(host, 0, Received(envelope, message))
            is_good = reply.head is not None and self.chain.verify_certificate(reply.head)
            self._emit(host, 0, SyncAnswered(target.me, reply.head if is_good else None))

        self.schedule.after(delay_ms, deliver)

    def _fetch(self, host: Host, life: int, action: Fetch, attempt: int) -> None:
        """From the host's own disk, else from one provider after the other."""
        if host.life != life or host.peer is None:
            return
        if action.digest in host.disk.held:
            _, maker = self.workshop.validate(action.kind, action.digest, host.disk.get(action.digest))
            self._emit(host, 0, Fetched(action.digest, maker))
            return
        if attempt == min(len(action.providers), PROVIDERS_MAX):
            self._emit(host, 0, FetchFailed(action.digest, is_malformed=False))
            return
        target = self._by_peer[action.providers[attempt]]
        host.num_bytes_sent += REQUEST_BYTES
        delay_ms = self._network.draw_delay(host.index, target.index, REQUEST_BYTES, self.schedule.now_ms)
        if delay_ms is None or target.peer is None:
            self.schedule.after(TIMEOUT_MS, lambda: self._fetch(host, life, action, attempt + 1))
        else:
            self.schedule.after(delay_ms, lambda: self._serve(host, life, target, action, attempt))

    def _serve(self, host: Host, life: int, target: Host, action: Fetch, attempt: int) -> None:
        is_held = target.peer is not None and action.digest in target.served and action.digest in target.disk.held
        data = target.disk.get(action.digest) if is_held else b""
        target.num_bytes_sent += len(data)
        delay_ms = self._network.draw_delay(target.index, host.index, len(data), self.schedule.now_ms)
        if delay_ms is None:
            self.schedule.after(TIMEOUT_MS, lambda: self._fetch(host, life, action, attempt + 1))
        elif not data or len(data) > action.bytes_max:
            self.schedule.after(delay_ms, lambda: self._fetch(host, life, action, attempt + 1))
        else:
            self.schedule.after(delay_ms, lambda: self._take(host, life, action, data))

    def _take(self, host: Host, life: int, action: Fetch, data: bytes) -> None:
        if host.life != life or host.peer is None:
            return
        host.num_bytes_received += len(data)
        is_valid, maker = self.workshop.validate(action.kind, action.digest, data)
        if is_valid:
            host.disk.put(data)
            self._step(host, Fetched(action.digest, maker))
        else:
            self._step(host, FetchFailed(action.digest, is_malformed=True))

    # --- the chain

    def _settle(self, host: Host, certificate: Certificate, delay_ms: int, tries: int = 0) -> None:
        life = host.life
        self.schedule.after(delay_ms, lambda: self._submit(host, life, certificate, tries))

    def _submit(self, host: Host, life: int, certificate: Certificate, tries: int) -> None:
        """In the order of rounds, each root linking to the one before; what the chain refuses is tried again."""
        if host.life != life or host.peer is None:
            return
        round = certificate.proposal.round
        if round not in host.unsettled:
            return
        if is_outdated_for(self.chain.roster, certificate.proposal):
            del host.unsettled[round]
            return
        if min(host.unsettled) < round:
            self._settle(host, certificate, RETRY_MS, tries)
            return
        try:
            is_new = self.chain.submit(certificate)
        except Reverted:
            if tries + 1 < SUBMIT_TRIES_MAX:
                self._settle(host, certificate, RETRY_MS, tries + 1)
            else:
                del host.unsettled[round]
            return
        except ChainError:
            self._settle(host, certificate, RETRY_MS, tries)
            return
        del host.unsettled[round]
        if is_new:
            self.checks.after_settlement(self.chain, certificate, self.schedule.now_ms)
            self.tell_chain()

    def tell_chain(self) -> None:
        """Everybody reads the chain: its newest round, and registry and committee where they have changed."""
        head, before = self.chain.get_head(), self.chain.roster
        roster = self.chain.read_roster()
        for host in self.hosts:
            delay_ms = self._rng["network"].randint(0, BLOCK_MS)
            self._emit(host, delay_ms, SettledChanged(head))
            if roster != before:
                self._emit(host, delay_ms, RosterChanged(roster))

    def _claim(self) -> None:
        """All draw what the newest final round owes them: one that was settled late is still open to challenge."""
        final = [settled for settled in self.chain.ledger.get_rounds(Round(0)) if settled.is_final]
        if final:
            self.chain.claim(self.checks.certificates[final[-1].round])
        self.checks.after_claims(self.chain, final[-1] if final else None, self.schedule.now_ms)

    def _challenge_window_s(self) -> int:
        return self.chain.ledger.params.challenge_window_s

    # --- memory

    def _drop_old_blobs(self) -> None:
        """Forget bytes that no host can need any more."""
        needed: set[Digest | None] = set()
        for host in self.hosts:
            durable = host.durable
            needed |= {durable.base, durable.residual, durable.pending_residual, durable.announced_payload}
            needed.add(host.genesis)
        rounds = self.chain.ledger.get_rounds(Round(0))  # a void leads back to one of these
        needed |= {settled.base for settled in rounds if settled is rounds[-1] or not settled.is_final}
        for digest in self._pool:
            # Counted from when it was last needed: work that began then may still read it.
            if digest in needed or digest not in self._pool_rounds:
                self._pool_rounds[digest] = self._round
        old = {digest for digest, since in self._pool_rounds.items() if since <= self._round - KEEP_ROUNDS}
        for digest in old:
            del self._pool[digest], self._pool_rounds[digest]
        for host in self.hosts:
            host.disk.held -= old
            host.served -= old


def round_half_up(value: float) -> int:
    """The nearest integer; halves go up."""
    return int(value + 0.5)


def _is_in(host: Host, audience: str) -> bool:
    return audience == "all" or (host.index % 2 == 0) == (audience == "even")
