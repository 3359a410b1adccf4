"""How a large network is dealt into shards, and what each shard counts for one level up (ALGORITHMS, part 1).

A round of a network of shards is two rounds of the same protocol. In each shard the members' updates are merged and
certified as in a small network, but the result is compressed: it is the shard's update. One level up the shards are the
members: the committee that the chain has drawn measures their updates and certifies the new base and everybody's
rewards. Pure functions of a roster and a round; knows no peer's state.
"""

import itertools
from collections.abc import Mapping
from functools import cached_property

import msgspec

from p2pfm.config import NetworkConfig
from p2pfm.protocol.membership import compute_shares
from p2pfm.settlement.ledger import Member, Roster
from p2pfm.settlement.sampling import draw_committee
from p2pfm.types import MemberIndex, PeerId, Round, Wei, Weight, compute_digest

EVERYBODY = "all"
"""The topic that all peers hear: certificates, and who serves."""

TOP = "top"
"""The topic of the committee above the shards."""

FOLLOWED_MAX = 16
"""Shards whose payloads are less to pull than the base that they make: two bits a parameter each, and 32 bits. Of more
only those with a seat in their shard follow by the payloads, and the others get the base from them."""

HOLDERS_MAX = 16
"""Members of a shard that are asked for what it made."""


class Deal(msgspec.Struct, frozen=True, dict=True):
    """One epoch's shards."""

    shards: tuple[Roster, ...]
    """Each with its own members and its own committee."""

    @cached_property
    def names(self) -> tuple[tuple[PeerId, ...], ...]:
        """By shard: its members, in registry order."""
        return tuple(tuple(member.peer for member in shard.members) for shard in self.shards)

    @cached_property
    def seats(self) -> tuple[tuple[PeerId, ...], ...]:
        """By shard: its committee, in registry order."""
        return tuple(list_seats(shard) for shard in self.shards)

    @cached_property
    def shard_of(self) -> dict[PeerId, MemberIndex]:
        """By peer: the number of its shard."""
        return {
            member.peer: MemberIndex(number) for number, shard in enumerate(self.shards) for member in shard.members
        }

    def list_holders(self, shard: int, number: int, me: PeerId) -> tuple[PeerId, ...]:
        """Members of a shard that `me` asks for what it made, beginning with another one for each `number`."""
        known: dict[tuple[int, int], tuple[PeerId, ...]] = self.__dict__.setdefault("_holders", {})
        mates = self.names[shard]
        start = number % len(mates)
        first = known.get((shard, start))
        if first is None:  # kept for all peers of a process
            first = known[(shard, start)] = (mates[start:] + mates[:start])[:HOLDERS_MAX]
        return first if self.shard_of.get(me) != shard else tuple(peer for peer in first if peer != me)


def deal(config: NetworkConfig, roster: Roster, round: Round) -> Deal | None:
    """The shards of the epoch that `round` lies in; None: one shard holds everybody.

    Active members in the order of a hash of their name and the epoch's seed, cut into equal parts of at most
    `limits.shard_peers_max`. The seed holds the chain's committee, which nobody could steer when it registered.
    """
    if round < 0 or not config.has_shards or len(roster.by_peer) <= config.limits.shard_peers_max:
        return None
    epoch = round // config.settlement.rounds_per_epoch
    cache: dict[tuple[int, int, int], Deal] = roster.__dict__.setdefault("_deals", {})
    key = (epoch, config.limits.shard_peers_max, config.scoring.committee_size)
    found = cache.get(key)
    if found is None:
        if len(cache) > 2:
            cache.clear()
        cache[key] = found = _deal(config, roster, epoch)
    return found


def _deal(config: NetworkConfig, roster: Roster, epoch: int) -> Deal:
    words = (roster.epoch, roster.nonce, epoch, *roster.committee)
    seed = compute_digest(b"p2pfm/1 deal" + b"".join(word.to_bytes(8, "big") for word in words))
    active = sorted(roster.by_peer.values(), key=lambda member: compute_digest(seed + member.peer.encode()))
    num_shards = -(-len(active) // config.limits.shard_peers_max)
    cuts = [number * len(active) // num_shards for number in range(num_shards + 1)]
    parts = [active[start:end] for start, end in itertools.pairwise(cuts)]
    return Deal(tuple(_make_shard(config, roster, seed, number, part) for number, part in enumerate(parts)))


def _make_shard(config: NetworkConfig, roster: Roster, seed: bytes, number: int, part: list[Member]) -> Roster:
    members = tuple(sorted(part, key=lambda member: member.index))
    drawn = draw_committee(
        compute_digest(seed + number.to_bytes(8, "big")),
        [member.stake for member in members],
        config.scoring.committee_size,
    )
    return Roster(roster.epoch, roster.nonce, members, tuple(members[position].index for position in drawn))


def get_shard_name(number: int) -> PeerId:
    """What a shard is called where peers' ids stand one level up."""
    return PeerId(f"shard-{number}")


def is_shard_name(name: PeerId) -> bool:
    """Whether this names a shard and no peer."""
    return name.startswith("shard-")


def compute_shard_shares(dealt: Deal, shares: Mapping[PeerId, Weight]) -> tuple[Weight, ...]:
    """What each shard counts for in the game of shards: the sum of its members' shares of the whole network."""
    return tuple(Weight(sum(shares[member.peer] for member in shard.members)) for shard in dealt.shards)


def compute_shares_of(roster: Roster, stake_cap: Wei) -> dict[PeerId, Weight]:
    """`membership.compute_shares`, once a roster."""
    cache: dict[Wei, dict[PeerId, Weight]] = roster.__dict__.setdefault("_shares", {})
    if stake_cap not in cache:
        cache[stake_cap] = compute_shares(roster, stake_cap)
    return cache[stake_cap]


def list_seats(roster: Roster) -> tuple[PeerId, ...]:
    """A roster's committee by name, in registry order."""
    return tuple(roster.by_index[index].peer for index in sorted(roster.committee))


def get_shard_topic(number: int) -> str:
    """What all members of one shard hear: what it certified."""
    return f"shard-{number}"


def get_committee_topic(number: int) -> str:
    """What the committee of one shard hears: all words of its round. Its other members only speak there."""
    return f"committee-{number}"


def list_spoken_topics(config: NetworkConfig) -> tuple[str, ...]:
    """Topics in which a peer may have to speak without hearing them."""
    if not config.has_shards:
        return ()
    num_shards = -(-config.limits.peers_max // config.limits.shard_peers_max)
    return (TOP, *map(get_committee_topic, range(num_shards)))
