"""How bytes travel: regions, links, NATs, loss, partitions, and the moments at which a broadcast arrives.

Knows no message and no peer, only hosts by their number. A broadcast is a wave: receivers that it reaches within one
quantum of time share one entry of the schedule, so that a gossip message costs tens of entries and not one a receiver.
All arithmetic on what is drawn is of integers, so a wave is the same on every machine.
"""

from collections.abc import Sequence
from random import Random
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from p2pfm.errors import ConfigError
from p2pfm.types import Millis
from sim.hops import NEVER_MS, Ints, draw_samples

US_PER_MS = 1_000
"""Bandwidth is booked in microseconds: a payload of 1 KB on a fast link takes less than a millisecond."""

ONE = 1 << 32
"""Chances and fractions are integers of 32 bits: a draw of 32 bits below p * ONE has chance p."""

LOW_BITS = ONE - 1

FEW = 12
"""Fewer than this are drawn one by one: numpy's calls would cost more."""

OPEN, PUNCHABLE, SYMMETRIC = range(3)
NatClass = Literal["open", "punchable", "symmetric"]
NATS: tuple[NatClass, ...] = ("open", "punchable", "symmetric")
"""What stands between a host and the others, by its number."""

NUM_SAMPLES = 1_024
"""Arrivals kept for a pair of regions: the quantiles of a wave's delays are within about 3 % of rank."""

NUM_FLOODS = 48
"""Floods from which those are taken, each over a mesh of its own: all arrivals of one share the source's first hops, so
fewer would tell of a few sources' luck."""


class Partition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From `start_ms` to `end_ms` after genesis, some hosts and the others do not hear each other.

    The hosts of one side are named in one of four ways.
    """

    start_ms: int
    end_ms: int
    num_hosts: int = 0
    """The first so many."""
    share: float = 0.0
    """A share of all, drawn from the seed."""
    regions: tuple[str, ...] = ()
    """Those that are in these regions."""
    hosts: tuple[int, ...] = ()
    """Those of these numbers."""
    bridges: tuple[int, ...] = ()
    """Hosts that reach both sides all the same: attackers who eclipse the others."""


class Regions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where hosts are and how far apart."""

    names: tuple[str, ...]
    shares: tuple[float, ...]
    """Of all hosts, by region; they sum to 1."""
    latency_ms: tuple[tuple[int, ...], ...]
    """Least time from a host in one region (row) to a host in another (column) [ms]."""
    jitter: float = 0.2
    """A delivery takes up to this share longer, evenly spread."""
    utc_hours: tuple[int, ...] = ()
    """Local time less UTC, by region [h]; empty: unknown. Hosts that sleep at night need it (`sim.churn`)."""


WORLD = Regions(
    names=("north_america", "europe", "south_america", "asia_pacific", "japan", "australia"),
    shares=(0.3316, 0.4998, 0.0090, 0.1177, 0.0224, 0.0195),
    latency_ms=(
        (32, 124, 184, 198, 151, 189),
        (124, 11, 227, 237, 252, 294),
        (184, 227, 88, 325, 301, 322),
        (198, 237, 325, 85, 58, 198),
        (151, 252, 301, 58, 12, 126),
        (189, 294, 322, 198, 126, 16),
    ),
    utc_hours=(-6, 1, -3, 8, 9, 10),
)
"""Latency between six regions and the shares of Bitcoin's nodes in them, measured in 2019, as SimBlock has them (Aoki
et al., "SimBlock: a blockchain network simulator", 2019; LATENCY_2019 and REGION_DISTRIBUTION_BITCOIN_2019 in its
NetworkConfiguration). Taken as one-way times, as there: rather slow than fast."""


class LinkClass(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kind of access link; 125 bytes/ms are 1 Mbit/s."""

    share: float
    """Of all hosts; the classes' shares sum to 1."""
    up_bytes_per_ms: int
    down_bytes_per_ms: int
    loss: float = 0.0
    """Share of deliveries that this link loses, sent or received, beside the network's own `loss`."""


class Gossip(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A broadcast travels over a mesh of the hosts that hear it."""

    degree: int = 8
    """Neighbours of a host; even. libp2p's gossipsub aims at 6 to 8."""
    forward_ms: int = 5
    """A host takes this to check a message and hand it on [ms]."""


class NetworkModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a scenario says of its network."""

    latency_ms: tuple[int, int] = (20, 200)
    """Least and greatest time from one peer to another, a few gossip hops included [ms]; unused where there are
    regions, and the time of one hop where there is `gossip`."""
    loss: float = 0.0
    """Share of deliveries that never arrive: each receiver of a broadcast, each request, each payload. Where there is
    `gossip`: each hop of a broadcast, so that few receivers miss it."""
    bytes_per_ms: int = 12_500
    """Bandwidth of a transfer between two peers, whatever else they send: 100 Mbit/s [bytes/ms]. Unused where there
    are `links`."""
    quantum_ms: int = 10
    """Receivers of a broadcast are gathered in steps of this [ms]: to the nearest, and never before the first."""
    partitions: tuple[Partition, ...] = ()
    regions: Literal["none", "world"] | Regions = "none"
    """"world" is `WORLD`."""
    links: tuple[LinkClass, ...] = ()
    """Hosts' links, each shared by all that its host sends or receives in bulk; empty: nothing is shared."""
    behind_nat: float = 0.0
    """Share of the hosts that no other can dial, though they can dial out. Two of them meet by hole punching, if at
    all (`punched`), and what they exchange takes one more round trip. Gossip goes round by others."""
    symmetric_nat: float = 0.0
    """Share of the hosts, beside those, behind NATs that give each connection another port: with those of `behind_nat`
    they meet as these do with each other; two of them never exchange anything straight."""
    punched: float = 0.7
    """Share of the pairs of hosts behind NATs, not both symmetric, that hole punching connects. 0.7 is what libp2p's
    DCUtR was measured at (Trautwein et al. 2025)."""
    gossip: Gossip | None = None
    """None: a broadcast takes as long as a direct message."""


def get_regions(model: NetworkModel) -> Regions:
    """The regions of a network; one where it has none."""
    if isinstance(model.regions, Regions):
        return model.regions
    if model.regions == "world":
        return WORLD
    return Regions(names=("everywhere",), shares=(1.0,), latency_ms=((model.latency_ms[0],),), jitter=0.0)


def validate_network_model(model: NetworkModel, num_hosts: int) -> None:
    """Refuse a network that cannot be.

    Raises:
        ConfigError: names the field, what is allowed, and what it was.
    """
    regions, size = get_regions(model), len(get_regions(model).names)
    low, high = model.latency_ms
    checks: list[tuple[str, float, float, float]] = [
        ("latency_ms", low, 0, high),
        ("latency_ms", high, low, 3_600_000),
        ("loss", model.loss, 0, 1),
        ("bytes_per_ms", model.bytes_per_ms, 1, 1 << 40),
        ("quantum_ms", model.quantum_ms, 1, 60_000),
        ("behind_nat", model.behind_nat, 0, 1),
        ("symmetric_nat", model.symmetric_nat, 0, 1 - model.behind_nat + 1e-9),
        ("punched", model.punched, 0, 1),
        ("regions.jitter", regions.jitter, 0, 100),
        ("regions.shares (number of)", len(regions.shares), size, size),
        ("regions.latency_ms (rows)", len(regions.latency_ms), size, size),
        ("regions.utc_hours (number of)", len(regions.utc_hours) or size, size, size),
        ("regions.shares (sum)", sum(regions.shares), 0.99, 1.01),
    ]
    for row in regions.latency_ms:
        checks.append(("regions.latency_ms (columns)", len(row), size, size))
        checks += [("regions.latency_ms", latency, 0, 3_600_000) for latency in row]
    checks += [("regions.shares", share, 0, 1) for share in regions.shares]
    for link in model.links:
        checks.append(("links.share", link.share, 0, 1))
        checks.append(("links.up_bytes_per_ms", link.up_bytes_per_ms, 1, 1 << 40))
        checks.append(("links.down_bytes_per_ms", link.down_bytes_per_ms, 1, 1 << 40))
        checks.append(("links.loss", link.loss, 0, 1))
    if model.links:
        checks.append(("links.share (sum)", sum(link.share for link in model.links), 0.99, 1.01))
    if model.gossip:
        checks.append(("gossip.degree", model.gossip.degree, 2, 64))
        checks.append(("gossip.degree (odd part)", model.gossip.degree % 2, 0, 0))
        checks.append(("gossip.forward_ms", model.gossip.forward_ms, 0, 60_000))
    for part in model.partitions:
        num_ways = bool(part.num_hosts) + bool(part.share) + bool(part.regions) + bool(part.hosts)
        checks.append(("partitions (one of num_hosts, share, regions, hosts)", num_ways, 1, 1))
        checks += [("partitions.hosts", host, 0, num_hosts - 1) for host in part.hosts]
        checks += [("partitions.bridges", host, 0, num_hosts - 1) for host in part.bridges]
        if not 0 <= part.start_ms < part.end_ms:
            raise ConfigError(
                "scenario network.partitions: expected a start_ms of 0 or more and a later end_ms, got "
                f"{part.start_ms} and {part.end_ms}"
            )
        checks.append(("partitions.num_hosts", part.num_hosts, 0, num_hosts))
        checks.append(("partitions.share", part.share, 0, 1))
        unknown = set(part.regions) - set(regions.names)
        if unknown:
            known = ", ".join(regions.names)
            raise ConfigError(f"scenario network.partitions.regions: expected of {known}; got {min(unknown)}")
    for key, value, least, most in checks:
        if not least <= value <= most:
            raise ConfigError(f"scenario network.{key}: expected {least:g} to {most:g}, got {value:g}")
    for number, part in enumerate(model.partitions):
        # Which hosts a share or a region has is not known yet, so whether bridges are all of a side is not asked there.
        is_drawn = part.share or part.regions
        sides = deal_sides(
            msgspec.structs.replace(part, bridges=()) if is_drawn else part,
            regions,
            deal_classes(regions.shares, num_hosts, Random(0)),
            Random(0),
        )
        if 1 not in sides or 2 not in sides:
            raise ConfigError(
                f"scenario network.partitions[{number}]: expected hosts on both sides, got all {num_hosts} on one side "
                "or on both: cut off fewer, or add peers"
            )


def deal_classes(shares: Sequence[float], num_hosts: int, rng: Random) -> Ints:
    """Who is of which class: (num_hosts,), as many of each as its share, rounded, and which ones is drawn."""
    ends, total = [], 0.0
    for share in shares:
        total += share
        ends.append(total)
    classes = [
        next(index for index, end in enumerate(ends) if number + 0.5 < end * num_hosts / total + 1e-9)
        for number in range(num_hosts)
    ]
    rng.shuffle(classes)
    return np.array(classes, np.int64)


def deal_nats(model: NetworkModel, num_hosts: int, rng: Random) -> Ints:
    """What each host is behind, by its number: (num_hosts,)."""
    shares = (model.behind_nat, model.symmetric_nat, 1 - model.behind_nat - model.symmetric_nat)
    return np.array([PUNCHABLE, SYMMETRIC, OPEN])[deal_classes(shares, num_hosts, rng)]


def deal_sides(part: Partition, regions: Regions, region_of: Ints, rng: Random) -> NDArray[np.int8]:
    """(num_hosts,): which sides of a partition each host is on, 1 or 2 or both (3)."""
    num_hosts = len(region_of)
    hosts = np.arange(num_hosts)
    if part.share:
        is_inside = np.equal(deal_classes((part.share, 1 - part.share), num_hosts, rng), 0)
    elif part.regions:
        is_inside = np.isin(region_of, [regions.names.index(name) for name in part.regions])
    else:
        is_inside = np.isin(hosts, part.hosts) if part.hosts else hosts < part.num_hosts
    return np.where(np.isin(hosts, part.bridges), 3, np.where(is_inside, 1, 2)).astype(np.int8)


class Network:
    """One world's network: a model, what was dealt to each host, and the randomness it draws from."""

    def __init__(self, model: NetworkModel, num_hosts: int, genesis_ms: Millis, rng: Random) -> None:
        """Args: model: a valid one, see `validate_network_model`."""
        self.quantum_ms = model.quantum_ms
        """What happens within this is put into one entry of the schedule [ms]."""
        self._model = model
        self._genesis_ms = genesis_ms
        self._num_hosts = num_hosts
        self._rng = Random(rng.getrandbits(64))
        self._bits = np.random.PCG64(rng.getrandbits(64))
        self._regions = get_regions(model)
        self._links = links = model.links or (LinkClass(1.0, model.bytes_per_ms, model.bytes_per_ms),)
        self._region_of = deal_classes(self._regions.shares, num_hosts, self._rng)
        self._link_of = deal_classes([link.share for link in links], num_hosts, self._rng)
        self._nat_of = deal_nats(model, num_hosts, self._rng)
        self._sides = [deal_sides(part, self._regions, self._region_of, self._rng) for part in model.partitions]

        latency = np.array(self._regions.latency_ms, np.int64)
        self._low_ms = latency  # (num_regions, num_regions)
        self._span_ms = np.floor(latency * self._regions.jitter + 0.5).astype(np.int64) + 1
        if model.regions == "none":
            self._span_ms[:] = model.latency_ms[1] - model.latency_ms[0] + 1
        kept = 1 - np.array([link.loss for link in links])
        loss = 1 - (1 - model.loss) * np.outer(kept, kept)  # (num_links, num_links)
        self._loss = np.floor(loss * ONE + 0.5).astype(np.int64)
        self._is_lossy = bool(self._loss.any())
        up = np.array([link.up_bytes_per_ms for link in links], np.int64)
        down = np.array([link.down_bytes_per_ms for link in links], np.int64)
        self._rate = np.minimum.outer(up, down)  # (num_links, num_links) [bytes/ms]
        self._up, self._down = up[self._link_of], down[self._link_of]  # (num_hosts,) [bytes/ms]
        self._up_free_us = np.zeros(num_hosts, np.int64)
        self._down_free_us = np.zeros(num_hosts, np.int64)
        # The same as plain lists, for what is drawn singly: indexing an array costs more than the draw.
        self._places: list[int] = self._region_of.tolist()
        self._cables: list[int] = self._link_of.tolist()
        self._lows: list[list[int]] = self._low_ms.tolist()
        self._spans: list[list[int]] = self._span_ms.tolist()
        self._rates: list[list[int]] = self._rate.tolist()
        self._losses: list[list[int]] = self._loss.tolist()
        self._samples_seed = self._rng.getrandbits(64)
        self._samples: dict[tuple[int, int], Ints] = {}
        self._has_nats = bool(self._nat_of.any())
        self._lots = self._draw_lots() if self._has_nats else np.zeros(num_hosts, np.uint64)

    def _draw_lots(self) -> NDArray[np.uint64]:
        """(num_hosts,) odd numbers: the upper half of two hosts' product is a chance that is theirs for good, as in
        multiplicative hashing. A table of pairs would not fit."""
        drawn: NDArray[np.uint64] = np.random.PCG64(self._rng.getrandbits(64)).random_raw(self._num_hosts)
        return drawn | np.uint64(1)

    # --- who can reach whom

    def get_utc_hours(self) -> tuple[int, ...]:
        """Every host's local time less UTC [h]; empty where the regions do not say."""
        hours = self._regions.utc_hours
        return tuple(hours[region] for region in self._region_of.tolist()) if hours else ()

    def get_region(self, index: int) -> str:
        """The name of the region where a host is."""
        return self._regions.names[int(self._region_of[index])]

    def get_link(self, index: int) -> LinkClass:
        """A host's link."""
        return self._links[int(self._link_of[index])]

    def is_cut(self, left: int, right: int, now_ms: Millis) -> bool:
        """Whether a partition lies between two hosts now."""
        return any(not side[left] & side[right] for side in self._get_cuts(now_ms))

    def get_nat(self, index: int) -> NatClass:
        """What a host is behind."""
        return NATS[int(self._nat_of[index])]

    def can_meet(self, left: int, right: int) -> bool:
        """Whether anything passes straight between two hosts: one can be dialled, or hole punching works for them."""
        return not self._punch(left, np.array([right]))[1][0]

    def _punch(self, source: int, at: Ints) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """(num_targets,) each: with whom hole punching is needed, and with whom of them it fails."""
        nat, others = self._nat_of[source], self._nat_of[at]
        is_needed = (others != OPEN) & (nat != OPEN)
        is_unlucky = (self._lots[at] * self._lots[source]) >> np.uint64(32) >= np.uint64(self._model.punched * ONE)
        return is_needed, is_needed & (is_unlucky | ((others == SYMMETRIC) & (nat == SYMMETRIC)))

    def _get_cuts(self, now_ms: Millis) -> list[NDArray[np.int8]]:
        if not self._sides:
            return []
        elapsed = now_ms - self._genesis_ms
        parts = zip(self._model.partitions, self._sides, strict=True)
        return [side for part, side in parts if part.start_ms <= elapsed < part.end_ms]

    # --- small messages

    def draw_delay(self, source: int, target: int, num_bytes: int, now_ms: Millis) -> int | None:
        """How long `num_bytes` take from one host to another, straight [ms]; None: they do not arrive.

        Between two that need a hole punched every message takes twice the latency: a question and its answer take one
        more round trip. Their NATs forget them between two exchanges, which are most of a round apart.
        """
        latency_ms = self._draw_latency(source, target, now_ms)
        if latency_ms is None:
            return None
        return latency_ms + num_bytes // self._rates[self._cables[source]][self._cables[target]]

    def _draw_latency(self, source: int, target: int, now_ms: Millis) -> int | None:
        latency_ms = self._draw_straight(source, target, now_ms)
        if latency_ms is None or not self._has_nats:
            return latency_ms
        (is_punched,), (is_barred,) = self._punch(source, np.array([target]))
        return None if is_barred else latency_ms * (1 + int(is_punched))

    def _draw_straight(self, source: int, target: int, now_ms: Millis) -> int | None:
        bits = self._rng.getrandbits(64)
        if self._is_lossy and (bits & LOW_BITS) < self._losses[self._cables[source]][self._cables[target]]:
            return None
        if self._sides and self.is_cut(source, target, now_ms):
            return None
        near, far = self._places[source], self._places[target]
        return self._lows[near][far] + ((bits >> 32) * self._spans[near][far] >> 32)

    def draw_delays(
        self, source: int, targets: Sequence[int] | Ints, num_bytes: int, now_ms: Millis
    ) -> list[int | None]:
        """`draw_delay` to many targets, `num_bytes` to each: what one host asks of others at once."""
        if len(targets) < FEW:
            return [self.draw_delay(source, target, num_bytes, now_ms) for target in targets]
        at = np.asarray(targets, np.int64)  # (num_targets,)
        bits = self._bits.random_raw(len(at)).view(np.int64)
        delays, is_heard = self._draw_direct(source, at, 0, bits)
        if self._has_nats:
            is_punched, is_barred = self._punch(source, at)
            delays *= 1 + is_punched  # half of a round trip here, half with the answer
            is_heard = ~is_barred if is_heard is None else is_heard & ~is_barred
        delays += (num_bytes // self._rate[self._link_of[source]])[self._link_of[at]]
        is_heard = self._cut(source, at, is_heard, now_ms)
        if is_heard is not None:
            delays[~is_heard] = -1
        return [delay if delay >= 0 else None for delay in delays.tolist()]

    def draw_wave(
        self, source: int, targets: Sequence[int] | Ints, num_bytes: int, now_ms: Millis
    ) -> list[tuple[int, list[int]]]:
        """A broadcast as (delay [ms], hosts that it reaches then), in order of time."""
        if len(targets) < FEW and not self._model.gossip:
            return self._draw_few(source, targets, num_bytes, now_ms)
        at = np.asarray(targets, np.int64)  # (num_targets,)
        bits = self._bits.random_raw(len(at)).view(np.int64)
        delays, is_heard = (self._draw_hops if self._model.gossip else self._draw_direct)(source, at, num_bytes, bits)
        is_heard = self._cut(source, at, is_heard, now_ms)
        if is_heard is not None:
            at, delays = at[is_heard], delays[is_heard]
        return gather(at, delays, self.quantum_ms)

    def _draw_few(
        self, source: int, targets: Sequence[int] | Ints, num_bytes: int, now_ms: Millis
    ) -> list[tuple[int, list[int]]]:
        """`draw_wave` to so few that arrays would take longer."""
        rates, reached = self._rates[self._cables[source]], dict[int, list[int]]()
        for target in targets:
            latency_ms = self._draw_straight(source, target, now_ms)
            if latency_ms is not None:
                delay_ms = latency_ms + num_bytes // rates[self._cables[target]]
                step = max(1, (delay_ms + self.quantum_ms // 2) // self.quantum_ms)
                reached.setdefault(step * self.quantum_ms, []).append(target)
        return sorted(reached.items())

    def _cut(
        self, source: int, at: Ints, is_heard: NDArray[np.bool_] | None, now_ms: Millis
    ) -> NDArray[np.bool_] | None:
        """Which of those that hear it (None: all) still do with the partitions of now (None: all)."""
        for side in self._get_cuts(now_ms):
            is_near = np.not_equal(side[at] & side[source], 0)
            is_heard = is_near if is_heard is None else is_heard & is_near
        return is_heard

    def _draw_direct(self, source: int, at: Ints, num_bytes: int, bits: Ints) -> tuple[Ints, NDArray[np.bool_] | None]:
        """The delays of direct deliveries [ms], and which of them arrive (None: all)."""
        region, link = self._region_of[source], self._link_of[source]
        to, over = self._region_of[at], self._link_of[at]
        fractions = (bits >> 32) & LOW_BITS
        delays = self._low_ms[region][to] + (fractions * self._span_ms[region][to] >> 32)
        delays += (num_bytes // self._rate[link])[over]
        return delays, (bits & LOW_BITS) >= self._loss[link][over] if self._is_lossy else None

    def _draw_hops(self, source: int, at: Ints, num_bytes: int, bits: Ints) -> tuple[Ints, NDArray[np.bool_] | None]:
        """The same over the mesh of those that hear it."""
        samples = self._get_samples(len(at) + 1, num_bytes)
        picks = ((bits >> 32) & LOW_BITS) * NUM_SAMPLES >> 32
        delays = samples[self._region_of[source]][self._region_of[at], picks]
        return delays, delays >= 0 if self._is_lossy else None

    def _get_samples(self, num_nodes: int, num_bytes: int) -> Ints:
        """(num_regions, num_regions, NUM_SAMPLES) arrivals [ms] in a mesh of so many hosts (next power of two) of so
        many bytes (rounded to three leading bits).
        """
        assert self._model.gossip, "only a mesh has hops"
        num_nodes = min(1 << (num_nodes - 1).bit_length(), self._num_hosts)
        unit = 1 << max(0, num_bytes.bit_length() - 3)
        num_bytes = (num_bytes + unit // 2) // unit * unit
        if num_bytes * self._model.gossip.degree < self._up.min():
            num_bytes = 0  # sent within a millisecond
        key = num_nodes, num_bytes
        if key not in self._samples:
            self._samples[key] = self._draw_samples(self._model.gossip, num_nodes, num_bytes)
        return self._samples[key]

    def _draw_samples(self, gossip: Gossip, num_nodes: int, num_bytes: int) -> Ints:
        # Seeded by what is asked, so that it does not matter which wave comes first.
        bits = np.random.PCG64([self._samples_seed, num_nodes, num_bytes])
        num_regions = len(self._regions.names)
        # Two hosts of every region at least, for each is somebody's target; small meshes are a little too diverse.
        num_nodes = max(num_nodes, gossip.degree + 2, 2 * num_regions)
        hosts = (bits.random_raw(num_nodes) % np.uint64(self._num_hosts)).astype(np.int64)
        links, up, regions = self._link_of[hosts], self._up[hosts], self._region_of[hosts]
        regions[: 2 * num_regions] = np.arange(2 * num_regions) % num_regions

        def draw_links(mesh: Ints) -> Ints:
            drawn, turns = bits.random_raw(2 * mesh.size).view(np.int64).reshape(2, *mesh.shape)
            pair = regions[mesh], regions[None, :]
            link_ms: Ints = self._low_ms[pair] + (((drawn >> 32) & LOW_BITS) * self._span_ms[pair] >> 32)
            link_ms += gossip.forward_ms
            # A neighbour is served first, last, or between.
            link_ms += (1 + ((turns & LOW_BITS) * gossip.degree >> 32)) * num_bytes // up[mesh]
            link_ms[(drawn & LOW_BITS) < self._loss[links[mesh], links[None, :]]] = NEVER_MS
            return link_ms

        sources = [number % (2 * num_regions) for number in range(-(-NUM_FLOODS // num_regions) * num_regions)]
        return draw_samples(regions, sources, NUM_SAMPLES, gossip.degree, draw_links, bits)

    # --- payloads

    def draw_transfer(self, source: int, target: int, num_bytes: int, now_ms: Millis) -> int | None:
        """How long a payload takes from one host to another [ms], behind all that their links have yet to carry; None:
        it does not arrive.

        Each link carries what was asked of it in that order, never idle while there is something left: a payload is
        there when the sender's uplink and the receiver's downlink are both done with it, and no link carries more than
        its bandwidth. Beside links that are shared fairly (max-min) at every moment, the last payload of all comes at
        the same time (within 5 %), a host's own last one at 0.8 to 1.0 of the time where requests mix, and at 0.5 to
        0.6 on average where all hosts ask for all at one moment, for then the first to ask is served first; a single
        payload of a queue at 0.5 of it, as queues go. `tests/sim/test_network_model.py` holds the difference.
        """
        latency_ms = self._draw_latency(source, target, now_ms)
        if latency_ms is None or not self._model.links:
            return None if latency_ms is None else latency_ms + num_bytes // self._model.bytes_per_ms
        now_us, size = now_ms * US_PER_MS, num_bytes * US_PER_MS
        up_us = max(now_us, int(self._up_free_us[source])) - (-size // int(self._up[source]))
        down_us = max(now_us, int(self._down_free_us[target])) - (-size // int(self._down[target]))
        self._up_free_us[source], self._down_free_us[target] = up_us, down_us
        return latency_ms - (-(max(up_us, down_us) - now_us) // US_PER_MS)

    def draw_transfers(
        self, sources: Sequence[int] | Ints, target: int, sizes: Sequence[int] | Ints, now_ms: Millis
    ) -> list[int | None]:
        """`draw_transfer` of many payloads that one host asks for at once, `sizes` [bytes] of each source in turn."""
        # Where one uplink carries several, they are booked one after the other.
        if len(sources) < FEW or (self._model.links and len(set(map(int, sources))) < len(sources)):
            pairs = zip(map(int, sources), map(int, sizes), strict=True)
            return [self.draw_transfer(source, target, size, now_ms) for source, size in pairs]
        at, num_bytes = np.asarray(sources, np.int64), np.asarray(sizes, np.int64)  # (num_sources,)
        bits = self._bits.random_raw(len(at)).view(np.int64)
        link, region = self._link_of[target], self._region_of[target]
        fractions = (bits >> 32) & LOW_BITS
        origins = self._region_of[at]
        delays = self._low_ms[:, region][origins] + (fractions * self._span_ms[:, region][origins] >> 32)
        is_lost = np.zeros(len(at), bool)
        if self._is_lossy:
            is_lost |= (bits & LOW_BITS) < self._loss[:, link][self._link_of[at]]
        if self._has_nats:
            is_punched, is_barred = self._punch(target, at)
            delays *= 1 + is_punched
            is_lost |= is_barred
        for side in self._get_cuts(now_ms):
            is_lost |= np.equal(side[at] & side[target], 0)
        if self._model.links:
            delays += self._book(at, target, np.where(is_lost, 0, num_bytes), now_ms)
        else:
            delays += num_bytes // self._model.bytes_per_ms
        delays[is_lost] = -1
        return [delay if delay >= 0 else None for delay in delays.tolist()]

    def _book(self, sources: Ints, target: int, num_bytes: Ints, now_ms: Millis) -> Ints:
        """Put payloads of different sources behind what the links have yet to carry; how long each takes [ms]."""
        now_us = now_ms * US_PER_MS
        sizes = num_bytes * US_PER_MS
        up_us = np.maximum(self._up_free_us[sources], now_us) - (-sizes // self._up[sources])
        down_us = max(now_us, int(self._down_free_us[target])) + np.cumsum(-(-sizes // self._down[target]))
        self._up_free_us[sources] = up_us
        if len(down_us):
            self._down_free_us[target] = down_us[-1]
        delays: Ints = -(-(np.maximum(up_us, down_us) - now_us) // US_PER_MS)
        return delays


def gather(hosts: Ints, delays: Ints, quantum_ms: int) -> list[tuple[int, list[int]]]:
    """Who is reached when [ms], delays rounded to whole quanta, one at least, in order of time and then as given.

    Rounded up, broadcasts within a region would take half as long again as their links.
    """
    if len(hosts) == 0:
        return []
    steps = np.maximum((delays + quantum_ms // 2) // quantum_ms, 1)
    if steps.max() < 1 << 16:
        steps = steps.astype(np.uint16)  # numpy sorts these by radix, five times as fast
    order = np.argsort(steps, kind="stable")
    steps, reached = steps[order], hosts[order].tolist()
    starts = [0, *(np.flatnonzero(steps[1:] != steps[:-1]) + 1).tolist()]
    whens = (steps[starts].astype(np.int64) * quantum_ms).tolist()
    return [
        (when_ms, reached[start:end])
        for when_ms, start, end in zip(whens, starts, [*starts[1:], len(reached)], strict=True)
    ]
