"""A world of peers in virtual time: the simulator's driver. It drives the very `Peer` that the node runs.

Knows every part of a simulation and no rule of the protocol. All randomness comes from the scenario's seed, so a run is
the same to the last byte wherever its learner's sums are; its trace digest proves it.
"""

import gc
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from random import Random
from struct import Struct
from typing import assert_never

import msgspec

from p2pfm.config import NetworkConfig
from p2pfm.errors import ConfigError
from p2pfm.messages import Certificate
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
    Listen,
    Merge,
    Note,
    PeersChanged,
    Persist,
    Publish,
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
    Tick,
    Train,
)
from p2pfm.protocol.log import encode_header, encode_record
from p2pfm.protocol.peer import Peer, initial_durable
from p2pfm.protocol.phases import compute_round_start
from p2pfm.types import Digest, Millis, PeerId, Round
from sim.adversaries.filters import Deed, Honest
from sim.breakdowns import telling_breakdowns
from sim.chain import Chain, OtherLedger
from sim.checks import Checks
from sim.churn import Churn, Departure
from sim.clocks import Clocks
from sim.disk import Disk
from sim.faults import make_filter
from sim.host import Host
from sim.network import Network
from sim.scenarios import Scenario, compute_kinds, make_network, validate_scenario
from sim.schedule import Schedule
from sim.settling import BLOCK_MS, ROTATES_AT, Settling
from sim.signatures import Signatures
from sim.transit import Transit
from sim.workshop import Workshop, make_workshop

COOL_DOWN_MS = 15_000
"""After the last round: time for laggards to catch up and for the last root to be settled [ms]."""

NOTICE_MS = 300
"""A peer's coming or going is noticed by its neighbours after this [ms]."""

NEIGHBOURS = 32
"""Connections of a host in a network of more than `ALL_CONNECTED_MAX`; in a smaller one all are connected."""

ALL_CONNECTED_MAX = 128

KEEP_ROUNDS = 2
"""Blobs that no host's durable state has named for so many rounds are dropped."""


UNTOLD = frozenset({SetTimer, Serve, AskSync, AnswerSync, Note})
"""What the trace only counts."""

IDLE = frozenset({Adopt, Note, Blame})
"""Serving, logs and connections: a simulation has none."""

_encode = msgspec.msgpack.Encoder().encode
_pack = Struct(">qIH").pack


class World:
    """All hosts of a scenario, their network and their chain."""

    def __init__(
        self,
        scenario: Scenario,
        config: NetworkConfig | None = None,
        names: Sequence[PeerId] | None = None,
        workshop: Workshop | None = None,
        ledger: OtherLedger | None = None,
        signatures: Signatures | None = None,
    ) -> None:
        """Args: config, names, workshop: the rules, the peers' ids and what they learn with, where another driver's
        network is to be followed, or somebody else does the work; else as the scenario says. ledger, signatures: those
        of a chain that checks for itself.

        Raises:
            ConfigError: a scenario that cannot run.
        """
        validate_scenario(scenario)
        if scenario.ledger == "evm" and ledger is None:
            raise ConfigError(
                "ledger evm: the simulator alone has no EVM; nodes.evm_world.open_evm_world makes such a world"
            )
        self.scenario = scenario
        self.config = config or make_network(scenario)
        self.schedule = Schedule(Millis(self.config.genesis_ms - 1_000))
        self.checks = Checks(scenario)
        self.losses: dict[Round, int] = {}
        """Held-out loss of the base certified in a round [nano-nats/token]."""
        self.num_departures = 0
        """Crashes and all other goings: hosts that left, or were down by their schedule."""
        self.num_steps = 0
        self.num_steps_by_round: dict[Round, int] = {}
        self._rng = {name: Random(f"{scenario.seed} {name}") for name in ("network", "work", "faults", "churn")}
        num_peers, genesis_ms = scenario.num_peers, self.config.genesis_ms
        self.network = Network(scenario.network, num_peers, genesis_ms, self._rng["network"])
        self.churn = Churn(scenario.churn, num_peers, genesis_ms, self._rng["churn"], self.network.get_utc_hours())
        self.clocks = Clocks(scenario.clocks, num_peers, self._rng["faults"], genesis_ms)
        signatures = signatures or Signatures(Random(f"{scenario.seed} secret").randbytes(32))
        self._pool: dict[Digest, bytes] = {}
        self._pool_rounds: dict[Digest, Round] = {}
        self._trace = sha256()
        self._round = Round(-1)
        self._kinds = compute_kinds(scenario)
        self.workshop = workshop or make_workshop(scenario, self.config, self._kinds)
        genesis = self.workshop.get_genesis()
        names = names or [PeerId(f"peer-{index:05d}") for index in range(num_peers)]
        self.hosts = [self._make_host(index, name, genesis) for index, name in enumerate(names)]
        self.chain = Chain(scenario, self.config, signatures, lambda: self.schedule.now_ms, names, ledger)
        self._signatures = signatures
        self.transit = Transit(
            self.config,
            self.schedule,
            self.network,
            self.hosts,
            signatures,
            self.chain,
            self.workshop,
            self._step,
            self._step_all,
            self._deliver,
        )
        self.settling = Settling(
            self.config,
            self.schedule,
            self.chain,
            self.checks,
            self.hosts,
            self._deliver,
            lambda: self._rng["network"].randrange(0, BLOCK_MS, self.network.quantum_ms),
        )
        self._neighbours = self._connect()
        self._noticing: set[int] = set()

    def run(self, on_round: Callable[[Round], None] | None = None) -> None:
        """All rounds of the scenario, a time to cool down, and the claims.

        Args:
            on_round: told each round's number when it is over.

        Raises:
            Violation: an invariant does not hold; a Breakdown, if code of ours raised.
        """
        with _quiet_collector(), telling_breakdowns(self.scenario, self.tell_moment):
            self._run(on_round)

    def _run(self, on_round: Callable[[Round], None] | None) -> None:
        for host in self.hosts:
            first_ms = self.churn.first_up_ms(host.index)
            if self.churn.is_up_at_start(host.index):
                self._start(host)
            elif first_ms is not None:
                self.schedule.at(first_ms, partial(self._start, host))
        for number in range(self.scenario.num_rounds):
            self._round = Round(number)
            start_ms = compute_round_start(self.config, Round(number))
            end_ms = compute_round_start(self.config, Round(number + 1))
            for departure in self.churn.plan(start_ms, end_ms):
                self.schedule.at(max(departure.when_ms, self.schedule.now_ms), partial(self._depart, departure))
            self.schedule.at(start_ms + self.config.phases.train_ms // ROTATES_AT, self.settling.rotate)
            self.schedule.run(Millis(end_ms - 1))
            self._drop_old_blobs()
            if on_round:
                on_round(Round(number))
        self._round = Round(self.scenario.num_rounds)
        self.schedule.run(Millis(self.schedule.now_ms + COOL_DOWN_MS))
        self.schedule.run(Millis(self.schedule.now_ms + 1000 * self.chain.ledger.params.challenge_window_s))
        self.settling.claim()

    def tell_moment(self) -> str:
        """How far the run has come, for people."""
        return f"step {self.num_steps}, {self.schedule.now_ms} ms"

    def trace_digest(self) -> str:
        """SHA-256 (hex) over all that happened so far: when, who, what, and what was done about it."""
        return self._trace.hexdigest()

    def base_of(self, host: Host) -> Digest:
        """The base that a host holds."""
        return host.durable.base

    # --- hosts

    def _make_host(self, index: int, name: PeerId, genesis: bytes) -> Host:
        kind = self._kinds[index]
        disk = Disk(self._pool)
        base = disk.put(genesis)
        filter = make_filter(kind, self.workshop.make_empty_payload, disk, self.config)
        host = Host(
            index=index,
            me=name,
            kind=kind,
            filter=None if type(filter) is Honest else filter,
            disk=disk,
            rng=Random(f"{self.scenario.seed} host {index}"),
            durable=initial_durable(base),
            genesis=base,
        )
        self.checks.add(host)
        return host

    def _connect(self) -> list[list[int]]:
        """By host: to whom it is connected."""
        everybody = range(len(self.hosts))
        if len(self.hosts) <= ALL_CONNECTED_MAX:
            return [[other for other in everybody if other != index] for index in everybody]
        links: list[set[int]] = [set() for _ in everybody]
        for index in everybody:
            for other in self._rng["network"].sample(everybody, NEIGHBOURS // 2):
                if other != index:
                    links[index].add(other)
                    links[other].add(index)
        return [sorted(known) for known in links]

    def _start(self, host: Host) -> None:
        host.life += 1
        host.peer = Peer(host.me, self.config, host.durable)
        self.checks.after_start(host, self.schedule.now_ms)
        host.served = {host.durable.base}
        host.wake_ms = host.alarm_ms = host.actions_left = None
        if host.index in self.scenario.keep_logs:
            host.logs.append(bytearray(encode_header(self.config, host.me, host.durable)))
        self._emit(host, 0, RosterChanged(self.chain.roster))
        head = self.chain.get_head()
        if head is not None:
            self._emit(host, 0, SettledChanged(head))
        for certificate in host.unsettled.values():
            self.settling.settle(host, certificate)
        self._notice(host)

    def _notice(self, host: Host) -> None:
        """A host came or went: it and its neighbours learn who is there a moment later, together."""
        if not self._noticing:
            self.schedule.after(NOTICE_MS, self._tell_peers)
        self._noticing.update((host.index, *self._neighbours[host.index]))

    def _tell_peers(self) -> None:
        changed, self._noticing = sorted(self._noticing), set()
        for index in changed:
            host = self.hosts[index]
            if host.peer is not None:
                up = tuple(self.hosts[i].me for i in self._neighbours[index] if self.hosts[i].peer is not None)
                self._step(host, PeersChanged(up))

    def _depart(self, departure: Departure) -> None:
        host = self.hosts[departure.index]
        if host.peer is None:
            return
        if host.departure is None:
            host.departure, host.actions_left = departure, departure.num_actions
            if departure.num_actions is not None:
                return
        self._kill(host)  # also by a crash that still waits for its action: its peer would be gone before

    def _kill(self, host: Host) -> None:
        departure, host.departure = host.departure, None
        assert departure is not None, "whoever goes was sent"
        self.num_departures += 1
        host.peer = None
        host.actions_left = None
        self.transit.listen(host, ())
        if departure.loses_disk:
            self._wipe(host)
        self._notice(host)
        back_ms = self.churn.get_back_ms(departure, self.schedule.now_ms)
        if back_ms is not None:
            self.schedule.at(back_ms, partial(self._start, host))

    def _wipe(self, host: Host) -> None:
        """A new disk: it takes part from the next round on, since it cannot know what it has signed in this one."""
        host.disk.held = {host.genesis}
        host.certificates, host.unsettled = {}, {}
        host.durable = msgspec.structs.replace(
            initial_durable(host.genesis),
            signed_round=self._round,
            signed_shard_round=self._round,
            announced_round=self._round,
        )

    # --- steps

    def _emit(self, host: Host, delay_ms: int, event: AnyEvent) -> None:
        """Let an event reach a host later, if it is still in the same life."""
        self.schedule.after(delay_ms, partial(self._step_in, host, host.life, event))

    def _step_in(self, host: Host, life: int, event: AnyEvent) -> None:
        if host.life == life:
            self._step(host, event)

    def _deliver(self, targets: Iterable[int], event: AnyEvent) -> None:
        """Let an event reach several hosts now."""
        now_ms, hosts, tell = self.schedule.now_ms, self.hosts, self.clocks.tell
        self._trace.update(array("I", targets).tobytes())
        for index in targets:
            host = hosts[index]
            if host.filter is not None or host.logs:
                self._step(host, event)
            elif host.peer is not None:
                self.num_steps += 1
                local_ms = tell(index, now_ms)
                actions = host.peer.handle(event, local_ms)
                if actions:
                    self._act(host, local_ms, event, actions)

    def _step(self, host: Host, event: AnyEvent) -> None:
        """Let an event reach a host now."""
        heard = event if host.filter is None else host.filter.hear(event)
        if heard is not None:
            self._handle(host, (heard,))

    def _step_all(self, host: Host, events: Sequence[AnyEvent]) -> None:
        """The same of several that come at one moment: what an honest host does about them is carried out together."""
        if host.filter is None:
            self._handle(host, events)
        else:
            for event in events:
                self._step(host, event)

    def _handle(self, host: Host, events: Sequence[AnyEvent]) -> None:
        if host.peer is None:
            return
        self.num_steps += len(events)
        local_ms = self.clocks.tell(host.index, self.schedule.now_ms)
        actions: list[AnyAction] = []
        for event in events:
            done = host.peer.handle(event, local_ms)
            if host.logs:
                host.logs[-1] += encode_record(local_ms, event, done)
            actions = actions + done if actions else done
        if actions or host.filter is not None:
            self._act(host, local_ms, events[-1], actions)

    def _act(self, host: Host, local_ms: Millis, event: AnyEvent, actions: list[AnyAction]) -> None:
        told = [_name(action) for action in actions if type(action) not in UNTOLD]
        if told:
            self._trace.update(_encode((local_ms, host.index, type(event).__name__, len(actions), told)))
        else:
            self._trace.update(_pack(local_ms, host.index, len(actions)))
        self.checks.num_steps = self.num_steps
        self.checks.after_step(host, local_ms, actions)
        fetches: list[Fetch] = []
        deeds = host.filter.act(actions) if host.filter else None
        for position, action in enumerate(actions if deeds is None else [deed.action for deed in deeds]):
            if host.actions_left is not None:
                if host.actions_left == 0:
                    self._kill(host)
                    return
                host.actions_left -= 1
            if type(action) in IDLE:
                continue
            # What is most frequent comes first, and what is left is matched.
            if isinstance(action, SetTimer):
                self._set_timer(host, action.at_ms)
            elif isinstance(action, Serve):
                host.served.add(action.digest)
            elif isinstance(action, Fetch):
                fetches.append(action)
            elif isinstance(action, Publish):
                self.transit.publish(host, deeds[position] if deeds else Deed(action))
            else:
                self._carry_out(host, action)
        if fetches:
            self.transit.fetch(host, fetches)

    def _carry_out(self, host: Host, action: AnyAction) -> None:
        times = self.scenario.work
        match action:
            case Persist(durable=durable):
                host.durable = durable
                if durable.head is not None:
                    host.certificates[durable.head.proposal.round] = durable.head
            case AskSync(peer=peer, request=request):
                self.transit.ask_sync(host, peer, request)
            case AnswerSync(token=token, reply=reply):
                self.transit.answer_sync(token, reply)
            case Rewind():
                self._rewind(host, action)
            case Train():
                if action.round < self.scenario.num_rounds:
                    self.workshop.expect(host.index, host.disk, action)
                    self._work(host, times.train_ms, partial(self.workshop.train, host.index, host.disk, action))
            case ScoreUpdates():
                score = partial(self.workshop.score, host.index, host.disk, action, host.rng)
                self._work(host, times.score_ms, score)
            case Merge() | Condense():
                self._work(host, times.merge_ms, partial(self._merge, host, action))
            case Evaluate():
                self._work(host, times.evaluate_ms, partial(self._evaluate, host, action))
            case Sign():
                self._work(host, times.sign_ms, partial(self._sign, host, action))
            case Aggregate():
                self._work(host, times.aggregate_ms, partial(self._aggregate, action))
            case SetTimer() | Serve() | Publish() | Fetch() | Adopt() | Note() | Blame():
                raise AssertionError("carried out above")
            case Listen(topics=topics):
                self.transit.listen(host, topics)
            case Accuse():
                self.settling.accuse(host, action)
            case Settle(certificate=certificate, rank=rank):
                host.unsettled[certificate.proposal.round] = certificate
                self.settling.settle(host, certificate, rank)
            case _:
                assert_never(action)

    def _rewind(self, host: Host, action: Rewind) -> None:
        head = host.certificates.get(action.round)
        if action.round < 0 or (head is not None and head.proposal.root == action.root):
            self._emit(host, 0, Rewound(head, host.genesis))

    def _set_timer(self, host: Host, at_ms: Millis) -> None:
        """One wake-up call a host; a later one stays, and is put off when it rings too early."""
        host.wake_ms = Millis(max(self.clocks.to_true(host.index, at_ms), self.schedule.now_ms + 1))
        if host.alarm_ms is None or host.wake_ms < host.alarm_ms:
            self._set_alarm(host, host.wake_ms)

    def _set_alarm(self, host: Host, alarm_ms: Millis) -> None:
        host.alarm_ms = alarm_ms
        self.schedule.at(alarm_ms, partial(self._ring, host, host.life, alarm_ms))

    def _ring(self, host: Host, life: int, alarm_ms: Millis) -> None:
        if host.life != life or host.alarm_ms != alarm_ms:
            return
        host.alarm_ms = None
        assert host.wake_ms is not None, "an alarm was set for it"
        if host.wake_ms <= self.schedule.now_ms:
            self._step(host, Tick())
        else:
            self._set_alarm(host, host.wake_ms)

    # --- heavy work

    def _work(self, host: Host, times_ms: tuple[int, int], do: Callable[[], AnyEvent]) -> None:
        """Let a host work for some virtual time; the real work is done when it ends, if the host still lives."""
        life = host.life

        def finish() -> None:
            if host.life == life and host.peer is not None:
                self._step(host, do())

        self.schedule.after(self._rng["work"].randint(*times_ms), finish)

    def _merge(self, host: Host, action: Merge | Condense) -> AnyEvent:
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

    # --- memory

    def _drop_old_blobs(self) -> None:
        """Forget bytes that no host can need any more."""
        needed: set[Digest | None] = set()
        for host in self.hosts:
            durable = host.durable
            needed |= {durable.base, durable.residual, durable.pending_residual, durable.announced_payload}
            # What repeats the last merge is told by the base before it, also after rounds that were void.
            needed |= {host.genesis, durable.head.proposal.base if durable.head else None}
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
        self.workshop.forget(old)


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """No search for cycles among millions of objects that are all in use: it takes half of a large run's time."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _name(action: AnyAction) -> object:
    """What the trace holds of an action: all of it, but for what is long and follows from the rest."""
    match action:
        case Fetch(digest=digest, providers=providers):
            return (digest, providers[:1])
        case Settle(certificate=certificate) | Publish(message=Certificate() as certificate):
            return certificate.signature
        case Publish(message=message, topic=topic):
            return (topic, message)
        case Listen(topics=topics):
            return topics
        case Merge(request=request) | Condense(request=request):
            return request
        case Persist(durable=durable):
            return (durable.base, durable.signed_round, durable.announced_payload)
        case _:
            return action
