"""What the page shows of one network: a pure function of what the chain tells and what peers serve beside it.

Knows no socket, clock or HTML. Amounts of wei are decimal strings, since a browser's numbers end at 2**53.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from nodes.explorer.evidence import MISSING, Evidence, State
from nodes.rewards.inequality import compute_gini, compute_lorenz
from p2pfm.config import NetworkConfig
from p2pfm.settlement.ledger import (
    Accepted,
    Claimed,
    Closed,
    Contested,
    Demand,
    Demanded,
    Entry,
    FederationParams,
    Ledger,
    Member,
    Restarted,
    Roster,
    Rotated,
    SettledRound,
    Shown,
    Slashed,
    Voided,
    Withdrawn,
)
from p2pfm.settlement.rewards import from_wire
from p2pfm.settlement.sampling import compute_quorum
from p2pfm.types import Digest, MemberIndex, Round, Wei

ROUNDS_MAX = 200
"""The newest so many rounds are shown: with 128 peers each some 3 MB."""

CLAIMS_MAX = 500
CONTESTS_MAX = 500
"""The newest so many are shown; all are counted."""

FIRST = Round(0)

Standing = Literal["final", "contestable", "void"]
MemberState = Literal["active", "leaving", "left", "slashed"]
ContestKind = Literal["demand", "shown", "unanswered", "fault", "void", "slashed", "restart"]


class Facts(msgspec.Struct, frozen=True):
    """All that the chain tells of one federation, as of about one time."""

    params: FederationParams
    roster: Roster
    rounds: tuple[SettledRound, ...]
    entries: tuple[Entry, ...]
    demands: tuple[Demand, ...]
    pool: Wei


class Share(msgspec.Struct, frozen=True):
    """One member in one round."""

    member: int
    contribution: int | None
    """Of this round's update [nano-nats/token]; None: no update of this member was included."""
    total: int
    """Over the settlement epoch so far [nano-nats/token]."""
    weight: int
    """In this round's merge [parts per 10**9]."""
    reward_wei: str
    cumulative_wei: str


class RoundView(msgspec.Struct, frozen=True):
    """A round that the chain accepted."""

    key: str
    """ROUND-NONCE: a voided round's number may be accepted again, with a later nonce."""
    round: int
    epoch: int
    nonce: int
    standing: Standing
    accepted_s: int
    contestable_until_s: int | None
    """At the latest [s since 1970]; None: final or void."""
    is_held: bool
    """A demand for a leaf keeps it from becoming final."""
    transaction: str
    block: int
    reward_wei: str
    cumulative_wei: str
    contribution: int
    """Sum of the positive ones over the settlement epoch so far [nano-nats/token]."""
    num_leaves: int
    root: str
    prev_root: str
    data_digest: str
    base: str
    committee: tuple[int, ...]
    absent: tuple[int, ...]
    evidence: State
    findings: tuple[str, ...]
    proposer: int | None
    shares: tuple[Share, ...]
    """By registry index; empty if nobody serves the round's data, or it is not believed."""


class PeerView(msgspec.Struct, frozen=True):
    """A registered peer."""

    index: int
    peer: str
    account: str
    state: MemberState
    is_seated: bool
    """On the present committee."""
    stake_wei: str
    allotted_wei: str | None
    """Up to the newest round whose data is at hand; None: of no round."""
    claimed_wei: str
    contribution: int
    """Sum over the rounds shown [nano-nats/token]."""
    num_updates: int
    """Included in the rounds shown."""


class Distribution(msgspec.Struct, frozen=True):
    """How unequally the rewards so far are divided among all registered peers."""

    gini: float
    """0: all alike; towards 1: all to one."""
    lorenz: tuple[float, ...]
    """Share of all rewards that the k lowest paid peers have together, for k of 0 to n."""
    round: int
    """As of which."""


class ClaimView(msgspec.Struct, frozen=True):
    """A payment."""

    member: int
    round: int
    amount_wei: str
    time_s: int
    block: int
    transaction: str


class ContestView(msgspec.Struct, frozen=True):
    """A step of a contest: somebody demanded a leaf, showed one, or proved a fault; what followed."""

    kind: ContestKind
    time_s: int
    block: int
    transaction: str
    round: int | None = None
    member: int | None = None
    account: str = ""
    amount_wei: str | None = None
    """Bounty, or the stake that was lost."""
    fault: str = ""
    until_s: int | None = None
    is_open: bool = False


class NetworkView(msgspec.Struct, frozen=True):
    """A network, as the page shows it."""

    id: str
    name: str
    backbone: str
    chain_id: int
    contract: str
    token: str
    problem: str
    """Why the chain could not be read; empty: what is shown is of now."""
    stale_since_s: int | None
    """When the chain was read last [s since 1970]; None: just now, or never."""
    is_known: bool
    """The chain was read at least once."""
    evidence_problem: str
    """Why data beside the chain is missing, as far as that is known."""
    epoch: int = 0
    nonce: int = 0
    quorum: int = 0
    committee: tuple[int, ...] = ()
    pool_wei: str = "0"
    pool_per_epoch_wei: str = "0"
    rounds_per_epoch: int = 0
    challenge_window_s: int = 0
    stakes_wei: str = "0"
    num_active: int = 0
    num_rounds: int = 0
    num_claims: int = 0
    num_contests: int = 0
    members: tuple[PeerView, ...] = ()
    rounds: tuple[RoundView, ...] = ()
    """In the order of acceptance, void ones too; the newest ROUNDS_MAX."""
    claims: tuple[ClaimView, ...] = ()
    """Newest first."""
    contests: tuple[ContestView, ...] = ()
    """Newest first."""
    distribution: Distribution | None = None
    """None: nothing was allotted, or nobody serves the data."""


def read_facts(ledger: Ledger) -> Facts:
    """All that the page needs of the chain. Raises: ChainError."""
    return Facts(
        ledger.get_params(),
        ledger.get_roster(),
        ledger.get_rounds(FIRST),
        ledger.get_entries(),
        ledger.get_demands(),
        ledger.get_pool(),
    )


def build_unknown(network: NetworkConfig, problem: str) -> NetworkView:
    """A network whose chain was never read."""
    return NetworkView(
        id=network.network_id().hex(),
        name=network.name,
        backbone=network.backbone,
        chain_id=network.chain.chain_id,
        contract=network.chain.federation,
        token=network.chain.token,
        problem=problem,
        stale_since_s=None,
        is_known=False,
        evidence_problem="",
    )


def build_view(
    network: NetworkConfig, facts: Facts, evidence: Mapping[Digest, Evidence], evidence_problem: str = ""
) -> NetworkView:
    """The page's content.

    Args:
        evidence: by the data hash on chain; a round without one counts as missing.
        evidence_problem: told where data is missing.
    """
    rounds = _make_rounds(facts, evidence)
    standing = [round for round in rounds if round.standing != "void"]
    claims = [entry for entry in facts.entries if isinstance(entry.what, Claimed)]
    contests = _make_contests(facts)
    return msgspec.structs.replace(
        build_unknown(network, ""),
        is_known=True,
        evidence_problem=evidence_problem,
        epoch=facts.roster.epoch,
        nonce=facts.roster.nonce,
        quorum=compute_quorum(len(facts.roster.committee)) if facts.roster.committee else 0,
        committee=facts.roster.committee,
        pool_wei=str(facts.pool),
        pool_per_epoch_wei=str(facts.params.pool_per_epoch),
        rounds_per_epoch=facts.params.rounds_per_epoch,
        challenge_window_s=facts.params.challenge_window_s,
        stakes_wei=str(sum(member.stake for member in facts.roster.members)),
        num_active=sum(member.active for member in facts.roster.members),
        num_rounds=sum(isinstance(entry.what, Accepted) for entry in facts.entries),
        num_claims=len(claims),
        num_contests=len(contests),
        members=_make_peers(facts, standing),
        rounds=tuple(rounds),
        claims=tuple(_make_claim(entry) for entry in reversed(claims[-CLAIMS_MAX:])),
        contests=tuple(reversed(contests[-CONTESTS_MAX:])),
        distribution=_make_distribution(facts.roster.members, standing),
    )


def _make_rounds(facts: Facts, evidence: Mapping[Digest, Evidence]) -> list[RoundView]:
    accepted = [entry for entry in facts.entries if isinstance(entry.what, Accepted)][-ROUNDS_MAX:]
    committees = {entry.what.epoch: entry.what.committee for entry in facts.entries if isinstance(entry.what, Rotated)}
    standing, hold = _find_standing(facts.entries), _find_hold(facts)
    final = {(settled.round, settled.nonce) for settled in facts.rounds if settled.is_final}
    rounds = []
    for entry in accepted:
        assert isinstance(entry.what, Accepted), "filtered above"
        told = entry.what.settled
        name = (told.round, told.nonce)
        state: Standing = "void" if name not in standing else "final" if name in final else "contestable"
        known = evidence.get(told.data_digest, MISSING)
        until_s, is_held = _get_deadline(told, facts.params, hold) if state == "contestable" else (None, False)
        rounds.append(
            RoundView(
                key=f"{told.round}-{told.nonce}",
                round=told.round,
                epoch=told.epoch,
                nonce=told.nonce,
                standing=state,
                accepted_s=told.accepted_s,
                contestable_until_s=until_s,
                is_held=is_held,
                transaction=entry.transaction,
                block=entry.block,
                reward_wei=str(told.sums.reward_wei),
                cumulative_wei=str(told.sums.cumulative_wei),
                contribution=told.sums.contribution,
                num_leaves=told.num_leaves,
                root=told.root.hex(),
                prev_root=told.prev_root.hex(),
                data_digest=told.data_digest.hex(),
                base=told.base.hex(),
                committee=committees.get(told.epoch, ()),
                absent=told.absent,
                evidence=known.state,
                findings=known.findings,
                proposer=known.proposal.proposer if known.proposal else None,
                shares=_make_shares(known),
            )
        )
    return rounds


def _find_standing(entries: Sequence[Entry]) -> set[tuple[Round, int]]:
    """Round and nonce of what was accepted and not voided. From the entries alone, which other reads may lag behind."""
    standing: list[tuple[Round, int]] = []
    for entry in entries:
        if isinstance(entry.what, Accepted):
            standing.append((entry.what.settled.round, entry.what.settled.nonce))
        elif isinstance(entry.what, Voided):
            del standing[entry.what.position :]
    return set(standing)


class _Hold(msgspec.Struct, frozen=True):
    """Demands keep rounds from this position on contestable until this time [s]."""

    position: int = 0
    until_s: int = 0


def _find_hold(facts: Facts) -> _Hold:
    """As the contract keeps it: one hold, which later demands widen and a void round ends."""
    hold = _Hold()
    for entry in facts.entries:
        if isinstance(entry.what, Demanded):
            demand = entry.what.demand
            until_s = demand.deadline_s + facts.params.response_s
            is_over = entry.time_s >= hold.until_s
            position = demand.position if is_over else min(hold.position, demand.position)
            hold = _Hold(position, until_s if is_over else max(hold.until_s, until_s))
        elif isinstance(entry.what, Voided) and hold.position >= entry.what.position:
            hold = _Hold()
    return hold


def _get_deadline(settled: SettledRound, params: FederationParams, hold: _Hold) -> tuple[int, bool]:
    """Until when a round can be contested at the latest [s], and whether a demand prolongs it."""
    end_s = settled.accepted_s + params.challenge_window_s
    if settled.position < hold.position or hold.until_s <= end_s:
        return end_s, False
    return min(hold.until_s, settled.accepted_s + params.contest_s), True


def _make_shares(known: Evidence) -> tuple[Share, ...]:
    if known.proposal is None:
        return ()
    updates = {update.member: update for update in known.updates}
    shares = []
    for position, leaf in enumerate(from_wire(known.proposal.leaves)):
        update = updates.get(MemberIndex(position))
        shares.append(
            Share(
                member=position,
                contribution=update.contribution if update else None,
                total=leaf.contribution,
                weight=update.weight if update else 0,
                reward_wei=str(leaf.reward_wei),
                cumulative_wei=str(leaf.cumulative_wei),
            )
        )
    return tuple(shares)


def _make_peers(facts: Facts, standing: Sequence[RoundView]) -> tuple[PeerView, ...]:
    states = _find_states(facts)
    claimed: dict[MemberIndex, int] = {}
    for entry in facts.entries:
        if isinstance(entry.what, Claimed):
            claimed[entry.what.index] = claimed.get(entry.what.index, 0) + entry.what.amount
    newest = next((round.shares for round in reversed(standing) if round.shares), None)
    measured: dict[int, list[int]] = {}
    for round in standing:
        for share in round.shares:
            if share.contribution is not None:
                measured.setdefault(share.member, []).append(share.contribution)
    return tuple(
        PeerView(
            index=member.index,
            peer=member.peer,
            account=member.account,
            state=states[member.index],
            is_seated=member.index in facts.roster.committee,
            stake_wei=str(member.stake),
            allotted_wei=_get_allotted(newest, member),
            claimed_wei=str(claimed.get(member.index, 0)),
            contribution=sum(measured.get(member.index, ())),
            num_updates=len(measured.get(member.index, ())),
        )
        for member in facts.roster.members
    )


def _get_allotted(newest: Sequence[Share] | None, member: Member) -> str | None:
    if newest is None:
        return None
    return newest[member.index].cumulative_wei if member.index < len(newest) else "0"  # joined after it


def _find_states(facts: Facts) -> dict[MemberIndex, MemberState]:
    states: dict[MemberIndex, MemberState] = {
        member.index: "active" if member.active else "leaving" for member in facts.roster.members
    }
    for entry in facts.entries:
        if isinstance(entry.what, Slashed):
            states[entry.what.index] = "slashed"
        elif isinstance(entry.what, Withdrawn):
            states[entry.what.index] = "left"
    return states


def _make_distribution(members: Sequence[Member], standing: Sequence[RoundView]) -> Distribution | None:
    newest = next((round for round in reversed(standing) if round.shares), None)
    if newest is None or int(newest.cumulative_wei) == 0:
        return None
    amounts = [int(share.cumulative_wei) for share in newest.shares]
    amounts += [0] * (len(members) - len(amounts))
    lorenz = tuple(round(share, 6) for _, share in compute_lorenz(amounts))
    return Distribution(round(compute_gini(amounts), 6), lorenz, newest.round)


def _make_claim(entry: Entry) -> ClaimView:
    assert isinstance(entry.what, Claimed), "filtered by the caller"
    claimed = entry.what
    return ClaimView(claimed.index, claimed.round, str(claimed.amount), entry.time_s, entry.block, entry.transaction)


def _make_contests(facts: Facts) -> list[ContestView]:
    """Every step, in order."""
    still_open = {demand.number for demand in facts.demands if demand.is_open}
    rounds: list[int] = []  # the round at each position, as of the entry
    asked: dict[int, tuple[int | None, MemberIndex]] = {}  # by demand: round, whose leaf
    steps: list[ContestView] = []
    for entry in facts.entries:
        place = (entry.time_s, entry.block, entry.transaction)
        match entry.what:
            case Accepted(settled=settled):
                rounds = [*rounds[: settled.position], settled.round]
            case Demanded(demand=demand):
                round = rounds[demand.position] if demand.position < len(rounds) else None
                asked[demand.number] = (round, demand.index)
                is_open = demand.number in still_open
                until_s = demand.deadline_s
                account = demand.account
                steps.append(
                    ContestView("demand", *place, round, demand.index, account, until_s=until_s, is_open=is_open)
                )
            case Shown(number=number, account=account):
                round, member = asked.get(number, (None, None))
                steps.append(ContestView("shown", *place, round, member, account))
            case Closed(number=number):
                round, member = asked.get(number, (None, None))
                steps.append(ContestView("unanswered", *place, round, member))
            case Contested(round=contested, fault=fault, account=account, bounty=bounty):
                steps.append(
                    ContestView("fault", *place, contested, None, account, amount_wei=str(bounty), fault=fault)
                )
            case Voided(position=position, round=voided):
                del rounds[position:]
                steps.append(ContestView("void", *place, voided))
            case Slashed(index=index, amount=amount):
                steps.append(ContestView("slashed", *place, None, index, amount_wei=str(amount)))
            case Restarted():
                steps.append(ContestView("restart", *place))
            case _:
                pass
    return steps
