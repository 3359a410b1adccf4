"""Takes a world's figures round by round while it runs: traffic, who is up, rewards, inequality, slashes, void rounds.

Reads a World and changes nothing in it: a recorded run has the trace of one that is not.
"""

import time
from collections import Counter
from collections.abc import Callable

import msgspec
import numpy as np

from p2pfm.config import WEI_PER_PFM
from p2pfm.protocol.phases import compute_round_start
from p2pfm.settlement.ledger import Slashed
from p2pfm.settlement.rewards import from_wire
from p2pfm.types import Round
from sim.world import World

HONEST = "honest"
"""What a peer is that is no adversary."""

SAMPLES_A_ROUND = 6
"""How often a round it is looked who is up."""

NO_CERTIFICATE = "no certificate in time"
"""Why a round is void for a peer that saw nothing else go wrong."""

REASONS_MAX = 3
"""Reasons of a void round that are kept, the most frequent ones."""


class Traffic(msgspec.Struct, frozen=True):
    """Bytes of one round over all peers."""

    mean_bytes: float
    p95_bytes: float
    max_bytes: int


class Record(msgspec.Struct, frozen=True):
    """What one round was like, as seen at its end."""

    round: Round
    availability: float
    """Share of the peers that were up, a mean over the round."""
    sent: Traffic
    received: Traffic
    rewards_pfm: dict[str, float]
    """Allotted so far by the newest root on chain, a mean a peer of each kind."""
    gini: float
    """Of those rewards over all peers: 0 all alike, 1 one has everything."""
    gini_honest: float
    """The same over the honest ones."""
    num_slashed: int
    """Members that lost their stake in this round."""
    num_steps: int
    cpu_s: float
    gas: int | None
    """Spent in this round; None: the ledger is in memory, which has none."""


class Recorder:
    """Looks at one world at the end of each round (`on_round`), and several times in between."""

    def __init__(self, world: World) -> None:
        """To be made before the world runs."""
        self.records: list[Record] = []
        self.slashed_wei: dict[int, int] = {}
        """Stake that a peer has lost, by its number; up to the last `count_slashed`."""
        self._world = world
        self._kinds = np.array([host.kind or HONEST for host in world.hosts])
        self.sent = self.received = np.zeros(len(world.hosts), np.int64)
        """(num_peers,) bytes up to the end of the last round."""
        self.num_steps = 0
        """The same of steps."""
        self._num_entries = 0
        self._gas = self._get_gas() or 0  # set-up is of no round
        self._cpu_s = time.process_time()
        self._up_shares: list[float] = []
        self._reasons: dict[Round, Counter[str]] = {}
        self._plan_look(0)

    def on_round(self, round: Round) -> None:
        """A round is over: for `World.run`."""
        world = self._world
        sent = np.array([host.num_bytes_sent for host in world.hosts], np.int64)
        received = np.array([host.num_bytes_received for host in world.hosts], np.int64)
        steps, cpu_s, gas = world.num_steps, time.process_time(), self._get_gas()
        rewards = self.compute_rewards()
        self.records.append(
            Record(
                round,
                float(np.mean(self._up_shares)),
                _summarize(sent - self.sent),
                _summarize(received - self.received),
                {str(kind): float(rewards[self._kinds == kind].mean()) for kind in np.unique(self._kinds)},
                compute_gini(rewards),
                compute_gini(rewards[self._kinds == HONEST]),
                self.count_slashed(),
                steps - self.num_steps,
                cpu_s - self._cpu_s,
                None if gas is None else gas - self._gas,
            )
        )
        self.sent, self.received, self.num_steps, self._cpu_s, self._gas = sent, received, steps, cpu_s, gas or 0
        self._up_shares.clear()
        if round not in world.checks.certificates:
            self._reasons[round] = self._ask_why(round)

    def get_reasons(self, round: Round) -> tuple[str, ...]:
        """Why peers held a round void, the most frequent reason first."""
        return tuple(reason for reason, _ in self._reasons.get(round, Counter()).most_common(REASONS_MAX))

    def compute_rewards(self) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        """What the newest root on chain allots to each peer by its number, (num_peers,) [PFM]."""
        rewards = np.zeros(len(self._world.hosts))
        head = self._world.chain.get_head()
        certificate = None if head is None else self._world.checks.certificates.get(head.round)
        if certificate is not None:
            for index, leaf in enumerate(from_wire(certificate.proposal.leaves)):
                rewards[index] = leaf.cumulative_wei / WEI_PER_PFM
        return rewards

    def _ask_why(self, round: Round) -> Counter[str]:
        """What peers would note of the void round that is about to end; whose clock is ahead has left it already."""
        peers = [host.peer for host in self._world.hosts if host.peer is not None and host.peer.round == round]
        return Counter(peer.top.state.failure or peer.leaf.state.failure or NO_CERTIFICATE for peer in peers)

    def _plan_look(self, number: int) -> None:
        """Look who is up at a moment of its own, and then plan the next."""
        round, sample = divmod(number, SAMPLES_A_ROUND)
        if round < self._world.scenario.num_rounds:
            start = compute_round_start(self._world.config, Round(round))
            length = compute_round_start(self._world.config, Round(round + 1)) - start
            self._world.schedule.at(start + length * sample // SAMPLES_A_ROUND, lambda: self._look(number))

    def _look(self, number: int) -> None:
        hosts = self._world.hosts
        self._up_shares.append(sum(host.peer is not None for host in hosts) / len(hosts))
        self._plan_look(number + 1)

    def count_slashed(self) -> int:
        """Read what the ledger slashed since the last call into `slashed_wei`; returns how many members."""
        entries = self._world.chain.ledger.get_entries()
        slashed = [entry.what for entry in entries[self._num_entries :] if isinstance(entry.what, Slashed)]
        self._num_entries = len(entries)
        for what in slashed:
            self.slashed_wei[what.index] = self.slashed_wei.get(what.index, 0) + what.amount
        return len(slashed)

    def _get_gas(self) -> int | None:
        """A chain that is an EVM counts its gas."""
        get_gas: Callable[[], int] | None = getattr(self._world.chain, "get_gas", None)
        return None if get_gas is None else get_gas()


def compute_gini(amounts: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> float:
    """Mean absolute difference of two peers' amounts, by twice the mean: 0 for equal ones, and where there is none."""
    total = float(amounts.sum())
    if not total:
        return 0.0
    num = len(amounts)
    ranks = 2 * np.arange(1, num + 1) - num - 1
    return float(ranks @ np.sort(amounts)) / (num * total)


def _summarize(num_bytes: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> Traffic:
    return Traffic(float(num_bytes.mean()), float(np.percentile(num_bytes, 95)), int(num_bytes.max()))
