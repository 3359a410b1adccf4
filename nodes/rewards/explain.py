"""One peer's reward in one round, step by step: from what each committee member measured to the proof on chain. Pure.

What the update was good for is measured in `measuring`; here everything follows from a Book.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import msgspec

from nodes.rewards.checking import find_roster
from nodes.rewards.reading import Book, Fetch, Reading, advise, list_rosters, validate_reading
from nodes.rewards.views import Status, get_status
from p2pfm import work
from p2pfm.config import NetworkConfig, ScoringConfig
from p2pfm.errors import OperatorError, Reject, WorldError
from p2pfm.messages import IncludedUpdate, Proposal
from p2pfm.protocol.committee import MERGE_CAP, compute_shard_sums
from p2pfm.protocol.membership import compute_shares
from p2pfm.protocol.shards import deal
from p2pfm.settlement import merkle
from p2pfm.settlement.faults import compute_pool
from p2pfm.settlement.ledger import LeafValue, Member
from p2pfm.settlement.rewards import compute_reward, compute_weights
from p2pfm.types import Contribution, Digest, Epoch, MemberIndex, PeerId, Round, Wei, Weight

EXCLUDED_MAX = 256
"""Each is fetched for its maker's name. Honest vectors differ in a few; one shard's liars could name 160,000."""

Verdict = Literal["passed", "failed", "off", "unknown"]


class Judgement(msgspec.Struct, frozen=True):
    """What one committee member made of the update."""

    member: MemberIndex
    peer: PeerId
    is_revealed: bool
    """Its vector stands in the proposal."""
    contribution: Contribution | None
    """As it measured [nano-nats/token]; None: not in its vector."""


class Gate(msgspec.Struct, frozen=True):
    """A condition of being merged or paid, and whether this update met it, as far as the data tell."""

    name: str
    verdict: Verdict
    text: str


class ShardPart(msgspec.Struct, frozen=True):
    """In a network of shards: what became of an update's median."""

    shard: MemberIndex
    """Which one scored it."""
    num_shards: int
    contribution: Contribution
    """Of the whole shard, as the committee above the shards certified it [nano-nats/token]."""
    sum_positive: int
    """Of all medians inside [nano-nats/token]: in this proportion the shard's contribution is divided."""
    weight: Weight
    """Of the whole shard, in the merge [parts per 10**9]."""


class Explanation(msgspec.Struct, frozen=True):
    """All that can be said without measuring anything again."""

    round: Round
    epoch: Epoch
    """Settlement epoch."""
    member: MemberIndex
    peer: PeerId
    account: str
    is_included: bool
    payload: Digest | None
    """Of its update; None: the proposal holds none of it."""
    judgements: tuple[Judgement, ...]
    """By the committee, in the order of its draw."""
    median: Contribution | None
    """Certified: of those that scored it [nano-nats/token]."""
    contribution: Contribution | None
    """What of it counts [nano-nats/token]: the median; in a network of shards, its part of its shard's contribution."""
    part: ShardPart | None
    """None: the network was one shard, or no update of this peer was included."""
    accumulated: int
    """Over the epoch's settled rounds, this one included [nano-nats/token]: what pays and weighs."""
    rank: int | None
    """By contribution among the round's updates, from 1; equals share the better one."""
    num_updates: int
    weight: Weight
    """In the merge [parts per 10**9]."""
    wanted_weight: Weight | None
    """In proportion to the accumulated contributions, before the cap."""
    weight_max: Weight | None
    """MERGE_CAP times its share of the capped stakes; both None: the registry of then cannot be told."""
    is_capped: bool
    gates: tuple[Gate, ...]
    pool_wei: Wei
    """What this round divides; 0: no epoch ends with it."""
    payout_round: Round
    """The first one, from this one on, that ends an epoch."""
    sum_positive: int
    """Of all accumulated contributions [nano-nats/token], as the root holds it."""
    share: float
    """max(0, accumulated) / sum_positive."""
    expected_wei: Wei
    """By the floor rule."""
    reward_wei: Wei
    """As the leaf says."""
    cumulative_wei: Wei
    """Allotted to it up to this round."""
    served_wei: Wei
    """The same for serving, out of the serving pool."""
    root: Digest
    siblings: tuple[merkle.Node, ...]
    """From the leaf up."""
    is_proven: bool
    """The leaf and the siblings give the root and the sums on chain."""
    status: Status
    until_s: int
    """Contestable until then [s since 1970]; 0 when final."""
    claimed_wei: Wei
    """Drawn by the peer so far, against any round."""
    owed_wei: Wei
    """By this round's leaf, and not drawn."""


def explain(
    book: Book,
    member: Member,
    round: Round,
    network: NetworkConfig,
    committee: Sequence[MemberIndex],
    excluded: Digest | None = None,
) -> Explanation:
    """Why `member` got what it got in `round`.

    Args:
        committee: that of the round's epoch.
        excluded: the payload that this member made and that was scored, but not included, if it could be found.

    Raises:
        OperatorError: no such settled round, or the peer joined after it.
        WorldError, Reject: the round's data are not to be had, or are a lie.
    """
    reading = book.get_reading(round)
    proposal = validate_reading(reading)
    if member.index >= len(reading.leaves):
        raise OperatorError(f"peer {member.peer} joined after round {round}: its tree has no leaf for it")
    leaf, update = reading.leaves[member.index], reading.get_update(member.index)
    if update is None and reading.flaw:
        raise Reject(f"{reading.gap}: whether it merged an update of this peer cannot be told")
    if update is None and reading.gap:
        raise WorldError(f"{reading.gap}, perhaps of this peer; {advise(reading)}")
    payload = update.payload if update else excluded
    ballot, seats, part = _find_ballot(book, reading, proposal, member, payload, network)
    told = next((inner for inner in ballot.updates if inner.payload == payload), None)
    judgements = _list_judgements(book, ballot, payload, committee if seats is None else seats)
    wanted, weight_max = _compute_cap(book, reading, ballot, part, member, network) if update else (None, None)
    before = book.get_before(reading)
    pool = compute_pool(book.params, round, before.settled.round if before else None)
    settled = reading.settled
    siblings = merkle.prove(merkle.build(reading.leaves), member.index)
    status, until_s = get_status(book, settled)
    per_epoch, total = book.params.rounds_per_epoch, settled.sums.contribution
    return Explanation(
        round=round,
        epoch=Epoch(round // per_epoch),
        member=member.index,
        peer=member.peer,
        account=member.account,
        is_included=update is not None,
        payload=payload,
        judgements=judgements,
        median=told.contribution if told else None,
        contribution=update.contribution if update else None,
        part=part if update else None,
        accumulated=leaf.contribution,
        rank=1 + sum(other.contribution > update.contribution for other in reading.updates) if update else None,
        num_updates=len(reading.updates),
        weight=update.weight if update else Weight(0),
        wanted_weight=wanted,
        weight_max=weight_max,
        is_capped=wanted is not None and weight_max is not None and wanted > weight_max,
        gates=_list_gates(ballot, update, leaf, judgements, payload, wanted, weight_max, network.scoring),
        pool_wei=pool,
        payout_round=round if pool else Round(-(-(round + 1) // per_epoch) * per_epoch - 1),
        sum_positive=total,
        share=max(0, leaf.contribution) / total if total else 0.0,
        expected_wei=compute_reward(pool, leaf.contribution, total),
        reward_wei=leaf.reward_wei,
        cumulative_wei=leaf.cumulative_wei,
        served_wei=leaf.served_wei,
        root=settled.root,
        siblings=siblings,
        is_proven=merkle.verify(settled.root, settled.sums, settled.num_leaves, member.index, leaf, siblings),
        status=status,
        until_s=until_s,
        claimed_wei=book.claimed[member.index],
        owed_wei=Wei(max(0, leaf.cumulative_wei - book.claimed[member.index])),
    )


def list_excluded(reading: Reading) -> tuple[Digest, ...]:
    """Peers' payloads that somebody scored and nobody merged: half of the vectors or fewer have them.

    Those that most scored come first; of equals the lower digest.
    """
    merged = {update.payload for update in reading.updates}
    counts = Counter(
        score.payload for ballot in reading.ballots for reveal in ballot.reveals for score in reveal.scores
    )
    excluded = sorted(counts.keys() - merged, key=lambda payload: (-counts[payload], payload))
    return tuple(excluded[:EXCLUDED_MAX])


def find_makers(fetch: Fetch, payloads: Sequence[Digest]) -> dict[Digest, PeerId]:
    """Who made payloads, as their first bytes tell; those that nobody serves are left out."""
    held = ((payload, fetch(payload)) for payload in payloads)
    return {payload: work.split_payload(data)[0] for payload, data in held if data is not None}


def _find_ballot(
    book: Book, reading: Reading, proposal: Proposal, member: Member, payload: Digest | None, network: NetworkConfig
) -> tuple[Proposal, Sequence[MemberIndex] | None, ShardPart | None]:
    """(where the member's update was scored, its committee if that is a shard's, what became of that shard)."""
    if not proposal.shards:
        return proposal, None, None
    roster = find_roster(book, reading.settled.position, network)
    dealt = deal(network, roster, proposal.round) if roster else None
    at_hand = [
        (update, shard) for update, shard in zip(proposal.updates, reading.shards, strict=False) if shard is not None
    ]
    # Where it was certified, whatever it was dealt; of one that was not, where it should have been.
    number = dealt.shard_of.get(member.peer) if dealt else None
    found = [pair for pair in at_hand if payload in pair[1].payloads]
    found += [pair for pair in at_hand if pair[0].member == number]
    if dealt is None or not found or found[0][0].member >= len(dealt.shards):
        return msgspec.structs.replace(proposal, updates=(), reveals=()), (), None  # its shard's round is not known
    update, shard = found[0]
    positive = sum(max(0, inner.contribution) for inner in shard.updates)
    part = ShardPart(update.member, len(dealt.shards), update.contribution, positive, update.weight)
    return shard, dealt.shards[update.member].committee, part


def _list_judgements(
    book: Book, proposal: Proposal, payload: Digest | None, committee: Sequence[MemberIndex]
) -> tuple[Judgement, ...]:
    vectors = {reveal.member: {s.payload: s.contribution for s in reveal.scores} for reveal in proposal.reveals}
    # Who is no committee member cannot have revealed; if somebody did all the same, it is to be seen.
    seats = dict.fromkeys((*committee, *sorted(vectors)))
    return tuple(
        Judgement(
            member=index,
            peer=book.roster.members[index].peer,
            is_revealed=index in vectors,
            contribution=vectors.get(index, {}).get(payload) if payload else None,
        )
        for index in seats
        if index < len(book.roster.members)
    )


def _compute_cap(
    book: Book, reading: Reading, ballot: Proposal, part: ShardPart | None, member: Member, network: NetworkConfig
) -> tuple[Weight | None, Weight | None]:
    """(wanted weight, greatest one), with the registry of then: the one with which all certified weights come out.

    In a network of shards both are of the merge inside of the shard.
    """
    before = book.get_before(reading)
    place = next((place for place, update in enumerate(ballot.updates) if update.member == member.index), None)
    if place is None or (part is None and any(update.member >= len(reading.leaves) for update in ballot.updates)):
        return None, None  # nonsense that the committee signed
    measured = [(update.member, update.contribution) for update in ballot.updates]
    sums = (
        [reading.leaves[update.member].contribution for update in ballot.updates]
        if part is None
        else compute_shard_sums(before.proposal if before else None, part.num_shards, measured)
    )
    wanted = compute_weights(sums)
    for roster in list_rosters(book, reading.settled.position):
        dealt = deal(network, roster, ballot.round) if part else None
        among = dealt.shards[part.shard] if dealt and part and part.shard < len(dealt.shards) else roster
        shares = compute_shares(among, network.stake_cap())
        most = [Weight(MERGE_CAP * shares.get(update.peer, 0)) for update in ballot.updates]
        if [update.weight for update in ballot.updates] == list(map(min, wanted, most)):
            return wanted[place], most[place]
    return None, None


def _list_gates(
    proposal: Proposal,
    update: IncludedUpdate | None,
    leaf: LeafValue,
    judgements: Sequence[Judgement],
    payload: Digest | None,
    wanted: Weight | None,
    weight_max: Weight | None,
    scoring: ScoringConfig,
) -> tuple[Gate, ...]:
    readings = [judgement.contribution for judgement in judgements if judgement.contribution is not None]
    gates = [_judge_scored(update, payload, len(readings), len(proposal.reveals))]
    if update is not None:
        gates += [_judge_duplicate(readings, scoring), _judge_work(readings, scoring)]
        gates.append(
            Gate(
                "repeats of earlier rounds",
                "unknown",
                "what an update repeats of public work earns nothing; each member subtracts it while it measures, and "
                "reveals only the rest (p2pfm rewards verify --deep measures again)",
            )
        )
    is_worth = leaf.contribution > 0
    gates.append(
        Gate(
            "positive over the epoch",
            "passed" if is_worth else "failed",
            "only a positive sum weighs in the merge and is paid"
            if is_worth
            else "its contributions of this epoch sum to nothing or less: no weight, no reward (and no debt)",
        )
    )
    if update is not None:
        gates.append(_judge_cap(wanted, weight_max))
    return tuple(gates)


def _judge_scored(update: IncludedUpdate | None, payload: Digest | None, num_scores: int, num_reveals: int) -> Gate:
    name = "scored by more than half"
    if update is not None:
        return Gate(name, "passed", f"{num_scores} of {num_reveals} revealed vectors have it")
    if payload is not None:
        return Gate(name, "failed", f"only {num_scores} of {num_reveals} revealed vectors have it: it was not merged")
    return Gate(
        name,
        "failed",
        "no update of this peer was merged. The data cannot tell which of these it was: it did not train or announce "
        "in time, announced twice, started from another base, its payload could not be fetched or is malformed, or "
        "too few members had it. Where there are shards, its shard may have certified nothing",
    )


def _judge_duplicate(readings: Sequence[Contribution], scoring: ScoringConfig) -> Gate:
    name, zeros = "no duplicate", sum(reading == 0 for reading in readings)
    if scoring.duplicate_cosine >= 1 and scoring.duplicate_overlap >= 1:
        return Gate(name, "off", "this network does not look for duplicates")
    if not zeros:
        return Gate(name, "passed", "no member read exactly 0, as it would of a duplicate")
    verdict: Verdict = "failed" if 2 * zeros > len(readings) else "unknown"
    return Gate(
        name,
        verdict,
        f"{zeros} of {len(readings)} members read exactly 0: they heard a similar update earlier in the round, or it "
        "is empty; the proposal does not tell which",
    )


def _judge_work(readings: Sequence[Contribution], scoring: ScoringConfig) -> Gate:
    name = "proof of computation"
    if not scoring.work_steps:
        return Gate(name, "off", "this network asks for none (network.scoring.work_steps is 0)")
    trusting = sum(reading > 0 for reading in readings)
    if 2 * trusting > len(readings):
        return Gate(name, "passed", f"{trusting} of {len(readings)} members credited it, which they do only on trust")
    return Gate(
        name,
        "unknown",
        f"{len(readings) - trusting} of {len(readings)} members read 0 or less: they measured that, or its proofs of "
        "late failed with them; a vector does not tell which",
    )


def _judge_cap(wanted: Weight | None, weight_max: Weight | None) -> Gate:
    name = "weight within the cap"
    if wanted is None or weight_max is None:
        return Gate(name, "unknown", "the certified weights do not come out with the registry of that time")
    if wanted > weight_max:
        return Gate(
            name,
            "failed",
            f"its weight was cut to {MERGE_CAP} times its share of the stakes; the reward is not touched by that",
        )
    return Gate(name, "passed", f"at most {MERGE_CAP} times its share of the stakes")
