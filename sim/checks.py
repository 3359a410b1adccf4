"""Invariants of ARCHITECTURE, asserted after every step of a simulated world. Knows peers' states, changes nothing.

Of its list: one base a certificate; what roots and claims pay; phases; sizes of the core's queues, each time a peer
leaves a phase, as they stood at its end; one word of a peer where it may say only one; what is on disk before a word or
a base goes out, and after a restart. Not here, for a simulation has none of it or compares no two runs: answers to
inference requests and messages' sizes (tests/net), and that garbage leaves no trace (tests/property, tests/net).

A violation names the seed, the step, the peers involved and a command that replays the run.
"""

import shlex
from collections.abc import Sequence, Sized

import msgspec

from p2pfm.messages import Announcement, Certificate, ShardMessage
from p2pfm.protocol.events import Adopt, AnyAction, Blame, Durable, Persist, Publish, Serve, Sign
from p2pfm.protocol.gossip import SLOTS_MAX
from p2pfm.protocol.history import ROOTS_MAX
from p2pfm.protocol.peer import LOSSES_MAX, Peer
from p2pfm.protocol.phases import Phase
from p2pfm.protocol.round_state import EARLY_MAX, RoundState
from p2pfm.settlement.ledger import SettledRound
from p2pfm.settlement.rewards import compute_sums, from_wire
from p2pfm.types import Digest, Millis, PeerId, Round
from sim.chain import Chain
from sim.host import Host
from sim.scenarios import AdversaryKind, Scenario

LIAR_KINDS: frozenset[AdversaryKind | None] = frozenset(
    {"equivocator", "two_faced", "garbler", "forger", "thief", "split_votes", "spammer", "untimely"}
)
"""Kinds that break a rule which honest peers never break, and may be blamed for it."""


WATCHED = frozenset({Adopt, Sign, Publish, Blame})
"""Actions that can break a rule, beside the frequent `Serve`."""


class Violation(AssertionError):
    """An invariant does not hold: a bug in p2pfm, found."""


def replay_command(scenario: Scenario) -> str:
    """What a person types to see the run again."""
    return f"p2pfm sim run --scenario {quote_scenario(scenario)}"


def quote_scenario(scenario: Scenario) -> str:
    """A scenario as one word of a shell's: JSON of its seed and of all that is not as usual."""
    fields = {
        name: value
        for name, value in msgspec.structs.asdict(scenario).items()
        if value != getattr(Scenario(), name) or name == "seed"
    }
    return shlex.quote(msgspec.json.encode(fields).decode())


class Checks:
    """What has been seen of one world's honest peers so far."""

    def __init__(self, scenario: Scenario) -> None:
        self.num_steps = 0
        self.steps_max: int | None = None
        """A run of more is one that does not end; None: however many it takes."""
        self.certificates: dict[Round, Certificate] = {}
        """By round, as honest peers adopted them."""
        self.holders: dict[Round, set[PeerId]] = {}
        """Who adopted each round's certificate."""
        self.blamed: set[PeerId] = set()
        self._scenario = scenario
        self._kinds: dict[PeerId, AdversaryKind | None] = {}
        self._positions: dict[PeerId, tuple[int, int]] = {}
        self._signed: dict[tuple[PeerId, Round, str], Digest] = {}
        self._announced: dict[tuple[PeerId, Round], Digest] = {}
        self._filling: dict[PeerId, tuple[Sized, tuple[RoundState, ...]]] = {}
        """What each peer's phase fills: early messages and rounds' states, which are empty again in the next round."""
        self._adopted: dict[PeerId, Digest] = {}
        self._torn: dict[PeerId, Digest] = {}
        """What a host held before the step in which it adopts, until its next: it may die before it has saved."""

    def add(self, host: Host) -> None:
        """Watch a host."""
        self._kinds[host.me] = host.kind

    def after_step(self, host: Host, now_ms: Millis, actions: Sequence[AnyAction]) -> None:
        """Check one host after an event about which it did something: what does nothing changes no phase or base.

        Raises:
            Violation: an invariant does not hold.
        """
        peer = host.peer
        assert peer is not None, "only a running peer takes steps"
        if self.steps_max is not None and self.num_steps > self.steps_max:
            self._require(False, f"a run ends within {self.steps_max} steps", now_ms, host.me)
        state = peer.leaf.state
        position = (state.round, state.phase)
        before = self._positions.get(host.me)
        if position != before:
            if before is not None and position < before:
                self._require(False, "no phase goes backwards", now_ms, host.me)
            self._positions[host.me] = position
            self._check_bounds(host, now_ms)
        self._torn.pop(host.me, None)
        saved: Durable | None = None
        for action in actions:
            if type(action) is Persist:
                saved = action.durable
            elif type(action) is Serve:
                self._check_served(peer, action.digest, now_ms, host.me)
            elif type(action) in WATCHED:
                if isinstance(action, Sign):
                    self._require(saved is not None, "what is signed is on disk before", now_ms, host.me)
                elif isinstance(action, Adopt):
                    is_saved = saved is not None and saved.base == action.base
                    self._require(is_saved, "a base that is adopted is on disk before", now_ms, host.me)
                    self._torn[host.me] = self._adopted.get(host.me, host.genesis)
                    self._adopted[host.me] = action.base
                self._check_action(host, now_ms, action)
        if saved is not None:
            is_adopted = saved.base == self._adopted.get(host.me, host.genesis)
            self._require(is_adopted, "a base that is on disk is adopted", now_ms, host.me)

    def after_start(self, host: Host, now_ms: Millis) -> None:
        """Check what a host begins with: all that it had when it died, unless its disk was lost.

        Raises:
            Violation: an invariant does not hold.
        """
        assert host.peer is not None, "it has started"
        durable = host.peer.durable
        if not host.certificates:  # a new disk
            self._adopted.pop(host.me, None)
            self._torn.pop(host.me, None)
        bases = {self._adopted.get(host.me, host.genesis), self._torn.get(host.me)}
        self._require(durable.base in bases, "a restarted peer holds the base that it adopted last", now_ms, host.me)
        needed = {durable.base, durable.residual, durable.pending_residual} - {None}
        self._require(needed <= host.disk.held, "a restarted peer's base and residual are on its disk", now_ms, host.me)

    def after_settlement(self, chain: Chain, certificate: Certificate, now_ms: Millis) -> None:
        """Check what the chain has just taken.

        Raises:
            Violation: an invariant does not hold.
        """
        head, sums = chain.get_head(), compute_sums(from_wire(certificate.proposal.leaves))
        assert head is not None, "called after a submission"
        self._require(head.sums == sums, "the leaves sum to the root's totals exactly", now_ms)
        self._require(sums.reward_wei <= chain.ledger.params.pool_per_epoch, "a root pays at most its pool", now_ms)
        self._require(sums.cumulative_wei <= chain.deposits, "roots pay at most what was deposited", now_ms)

    def after_claims(self, chain: Chain, final: SettledRound | None, now_ms: Millis) -> None:
        """Check what was drawn against the newest final round.

        Raises:
            Violation: an invariant does not hold.
        """
        total = sum(chain.get_claimed())
        self._require(total <= chain.deposits, "the sum of claims never exceeds deposits", now_ms)
        self._require(
            total == (final.sums.cumulative_wei if final else 0), "claims sum to what the newest root allots", now_ms
        )

    def _check_action(self, host: Host, now_ms: Millis, action: AnyAction) -> None:
        me, peer = host.me, host.peer
        assert peer is not None, "only a running peer acts"
        match action:
            case Adopt(round=round) if round < 0:
                pass  # back to the beginning: the chain voided all rounds
            case Adopt(round=round, base=base):
                held = self.certificates.setdefault(round, peer.durable.head) if peer.durable.head else None
                assert held is not None, "a base is adopted with its certificate"
                self._require(
                    held.proposal.new_base == base, f"holders of round {round}'s certificate hold one base", now_ms, me
                )
                self.holders.setdefault(round, set()).add(me)
            case Sign(round=round, message=message):
                # A member of the committee above signs there, too: the proposal of its shard is another affair.
                level = "top" if peer.top.is_of(message) else "shard"
                signed = self._signed.setdefault((me, round, level), message)
                self._require(signed == message, f"a member signs one proposal of round {round}", now_ms, me)
            case (
                Publish(message=ShardMessage(message=Announcement() as word)) | Publish(message=Announcement() as word)
            ):
                round, payload = word.round, word.payload
                announced = self._announced.setdefault((me, round), payload)
                self._require(announced == payload, f"a peer announces one update in round {round}", now_ms, me)
            case Blame(peer=blamed, reason=reason):
                self.blamed.add(blamed)
                self._require(
                    self._kinds[blamed] in LIAR_KINDS, f"no honest peer is blamed ({reason})", now_ms, me, blamed
                )
            case _:
                pass

    def _check_served(self, peer: Peer, digest: Digest, now_ms: Millis, me: PeerId) -> None:
        durable = peer.durable
        is_secret = (
            digest == durable.announced_payload and durable.announced_round == peer.round and peer.phase == Phase.TRAIN
        )
        self._require(not is_secret, "a payload is served only after TRAIN", now_ms, me)

    def _check_bounds(self, host: Host, now_ms: Millis) -> None:
        peer = host.peer
        assert peer is not None, "only a running peer has queues"
        early, states = self._filling.get(host.me, ((), ()))
        self._filling[host.me] = peer.early.waiting, tuple(ballot.state for ballot in peer.ballots)
        self._bound("early messages", len(early), EARLY_MAX, host, now_ms)
        self._bound("certified roots", len(peer.history.roots), ROOTS_MAX, host, now_ms)
        self._bound("losses", len(peer.losses), LOSSES_MAX, host, now_ms)
        for state in states:
            if state.roster is None:
                continue
            num_members = len(state.roster.members)
            self._bound("message log", len(state.log), SLOTS_MAX * 6 * num_members, host, now_ms)
            self._bound("payloads asked for", len(state.updates.tries), SLOTS_MAX * num_members, host, now_ms)

    def _bound(self, name: str, size: int, bound: int, host: Host, now_ms: Millis) -> None:
        if size > bound:
            self._require(False, f"{name}: {size} of at most {bound}", now_ms, host.me)

    def _require(self, is_true: bool, rule: str, now_ms: Millis, *peers: PeerId) -> None:
        if not is_true:
            raise Violation(
                f"seed {self._scenario.seed}, step {self.num_steps}, {now_ms} ms, peers {', '.join(peers) or 'none'}: "
                f"violated: {rule}. Replay: {replay_command(self._scenario)}"
            )
