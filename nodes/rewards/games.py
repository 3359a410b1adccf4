"""What a round's committees were asked to measure, as far as it can be told from the chain and the data beside it.

Knows no model: `measuring` answers the same questions again.
"""

from collections.abc import Mapping

import msgspec

from nodes.rewards.blobs import Blobs
from nodes.rewards.checking import list_fitting
from nodes.rewards.reading import Book, Reading, validate_reading
from p2pfm.config import NetworkConfig
from p2pfm.errors import Reject, WorldError
from p2pfm.messages import Proposal
from p2pfm.protocol.events import Remembered, ScoreUpdates, Weighted
from p2pfm.protocol.membership import compute_shares
from p2pfm.protocol.peer import EARLIER_MAX
from p2pfm.protocol.shards import compute_shard_shares, deal, get_shard_name
from p2pfm.settlement.ledger import Roster
from p2pfm.types import Digest, PeerId, Weight

WHOLE = PeerId("")
"""Where a shard's name stands: the game of the whole network."""


class Game(msgspec.Struct, frozen=True):
    """One committee's measurement, to be made again."""

    name: PeerId
    """Of the shard whose members it measured; of the whole network `WHOLE`."""
    certified: Proposal
    action: ScoreUpdates
    has_gaps: bool
    """Something of earlier rounds is not known here, and may have been repeated."""


def list_games(
    network: NetworkConfig, blobs: Blobs, book: Book, reading: Reading, roster: Roster
) -> tuple[tuple[Game, ...], tuple[str, ...]]:
    """(what there is to measure again, with all payloads at hand; what of it cannot be).

    In a network of shards that is first the game of the shards, and then each one's inside.

    Args:
        roster: of then, with its committee.

    Raises:
        WorldError: the shards of then cannot be told, or the round's data or updates are not to be had.
        Reject: its signers lied.
    """
    proposal = validate_reading(reading)
    if proposal.shards:
        return _list_levels(network, blobs, book, reading, roster)
    validate_held(blobs, proposal)
    action, notes = make_action(network, blobs, book, reading, roster)
    return (Game(WHOLE, proposal, action, bool(notes)),), notes


def _list_levels(
    network: NetworkConfig, blobs: Blobs, book: Book, reading: Reading, roster: Roster
) -> tuple[tuple[Game, ...], tuple[str, ...]]:
    proposal = validate_reading(reading)
    dealt = deal(network, roster, proposal.round)
    if len(reading.shards) != len(proposal.updates):
        raise Reject(f"its list of shards is none: {reading.flaw}")
    shards = list(zip(proposal.updates, reading.shards, strict=True))
    at_hand = [place for place, (_, shard) in enumerate(shards) if shard is not None]
    fitting = list_fitting(dealt, proposal, reading.shards) if dealt else ()
    if dealt is None or 2 * len(fitting) < len(at_hand):
        raise WorldError("its shards are not those of the registry that is known here")
    games: list[Game] = []
    lacking: list[str] = []
    try:
        validate_held(blobs, proposal)
        if any(update.member >= len(dealt.shards) for update in proposal.updates):
            raise WorldError(f"it names others than the round's {len(dealt.shards)}")
        of_shards = compute_shard_shares(dealt, compute_shares(roster, network.stake_cap()))
        weights = {update.payload: of_shards[update.member] for update in proposal.updates}
        above = ScoreUpdates(proposal.round, proposal.base, None, _order(proposal, weights), is_compared=False)
        games.append(Game(WHOLE, proposal, above, has_gaps=False))
    except WorldError as error:
        lacking.append(f"the shards were not measured: {error}")
    before = book.get_before(reading)
    previous = before.proposal.base if before and before.proposal else None
    for place, (update, shard) in enumerate(shards):
        name = get_shard_name(update.member)
        try:
            if shard is None or not shard.updates:
                raise WorldError("it certified no updates" if shard else "nobody serves what it certified")
            if place not in fitting:
                raise WorldError("it certified updates of others than its members")
            validate_held(blobs, shard)
        except WorldError as error:
            lacking.append(f"{name}: its members were not measured: {error}")
            continue
        shares = compute_shares(dealt.shards[update.member], network.stake_cap())
        weights = {inner.payload: shares[inner.peer] for inner in shard.updates}
        # What each committee remembers of earlier rounds is not known here.
        inside = ScoreUpdates(proposal.round, proposal.base, previous, _order(shard, weights))
        games.append(Game(name, shard, inside, has_gaps=True))
    return tuple(games), tuple(lacking)


def make_action(
    network: NetworkConfig, blobs: Blobs, book: Book, reading: Reading, roster: Roster
) -> tuple[ScoreUpdates, tuple[str, ...]]:
    """(what members of a network of one shard were asked to score, what of it cannot be known).

    Raises: as `list_games`.
    """
    proposal = validate_reading(reading)
    shares = compute_shares(roster, network.stake_cap())
    weights = {update.payload: shares.get(update.peer, Weight(0)) for update in proposal.updates}
    earlier: list[Remembered] = []
    older, previous = book.get_before(reading), None
    notes = set()
    follows = reading.settled.round
    while older is not None and len(earlier) < EARLIER_MAX:
        if older.settled.round + 1 < follows:
            notes.add("updates of void rounds are not known: what was repeated of them cannot be told")
        if older.proposal is None:
            notes.add("the data of an earlier round are missing: what was repeated of it cannot be told")
            break
        if previous is None:
            previous = older.proposal.base
        if older.proposal.shards:
            notes.add("an earlier round was one of shards: what was repeated of their updates cannot be told")
            break
        best = sorted(older.proposal.updates, key=lambda update: -update.contribution)
        for update in best:
            if blobs(update.payload) is None:
                notes.add("updates of earlier rounds are not served any more: what was repeated cannot be told")
            else:
                earlier.append(Remembered(update.payload, is_paid=True))
        follows, older = older.settled.round, book.get_before(older)
    if previous is not None and blobs(previous) is None:
        notes.add("the base before is not served any more: what was repeated of the last merge cannot be told")
    action = ScoreUpdates(
        round=reading.settled.round,
        base=proposal.base,
        previous=previous,
        updates=_order(proposal, weights),
        earlier=tuple(earlier[:EARLIER_MAX]),
    )
    return action, tuple(sorted(notes))


def validate_held(blobs: Blobs, proposal: Proposal) -> None:
    """Fetch a round's payloads. Raises: WorldError, naming the peers whose update nobody serves any more."""
    missing = [update.peer for update in proposal.updates if blobs(update.payload) is None]
    if missing:
        raise WorldError(
            f"round {proposal.round}: the updates of {len(missing)} of {len(proposal.updates)} peers are not "
            f"served any more ({', '.join(peer[-6:] for peer in missing)}); a peer that kept them can be named "
            "with --node URL"
        )


def _order(certified: Proposal, weights: Mapping[Digest, Weight]) -> tuple[Weighted, ...]:
    """As members may have heard them, which nobody knows; of duplicates the one that was paid came first."""
    ordered = sorted(certified.updates, key=lambda update: (-update.contribution, update.payload))
    return tuple(Weighted(update.payload, weights[update.payload]) for update in ordered)
