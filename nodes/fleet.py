"""What became of a local network's rounds, read afterwards from its nodes' stores and logs.

For experiments that judge a whole run. Knows no protocol beyond what a node writes down.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nodes.localnet import LocalNode
from p2pfm.messages import Proposal, encode
from p2pfm.runtime.store import Store
from p2pfm.types import Round

LOG_LEVEL = re.compile(rb"^\S+ (WARNING|ERROR|CRITICAL) +(\S+: .*)$", re.MULTILINE)
VOID = re.compile(rb"round (\d+): (?:round is void here: |the chain )(.*)$", re.MULTILINE)
NUMBER = re.compile(r"\b[0-9a-f]*\d[0-9a-f]*\b")


@dataclass(frozen=True, slots=True)
class Rounds:
    """Of all nodes together: what was certified, by round, and why a round was void where it ended without."""

    proposals: Mapping[Round, tuple[Proposal, ...]]
    """What the certificates certify; more than one of a round is a fork."""
    voids: Mapping[Round, frozenset[str]]

    @property
    def forked(self) -> tuple[Round, ...]:
        """Rounds of which two nodes hold different certificates."""
        return tuple(round for round, certified in sorted(self.proposals.items()) if len(certified) > 1)

    def get_undecided(self, rounds: Iterable[Round]) -> tuple[Round, ...]:
        """Of these, those that nobody holds a certificate of and nobody called void."""
        return tuple(round for round in rounds if round not in self.proposals and round not in self.voids)

    def get_breaks(self, settled: Iterable[Round]) -> tuple[Round, ...]:
        """Of the rounds that the chain took, those that do not go on from the base and root of the one it took before:
        a round that is void, or voided by the chain, changes neither."""
        lineage = [certified for round in sorted(settled) for certified in self.proposals.get(round, ())]
        return tuple(
            later.round
            for earlier, later in itertools.pairwise(lineage)
            if (later.base, later.prev_root) != (earlier.new_base, earlier.root)
        )


def read_rounds(nodes: Iterable[LocalNode]) -> Rounds:
    """Read the stores and logs of nodes that have ended."""
    proposals: dict[Round, dict[bytes, Proposal]] = {}
    voids: dict[Round, set[str]] = {}
    for node in nodes:
        with Store(node.home) as store:
            for certificate in store.get_certificates(-1):
                proposal = certificate.proposal
                proposals.setdefault(proposal.round, {})[encode(proposal)] = proposal
        for number, reason in VOID.findall((node.home / "node.log").read_bytes()):
            voids.setdefault(Round(int(number)), set()).add(reason.decode(errors="replace"))
    return Rounds(
        {round: tuple(told.values()) for round, told in proposals.items()},
        {round: frozenset(told) for round, told in voids.items()},
    )


def count_complaints(nodes: Iterable[LocalNode]) -> Counter[str]:
    """Lines of level WARNING and above in the nodes' logs, those that differ in numbers only counted as one."""
    found: Counter[str] = Counter()
    for node in nodes:
        for level, text in LOG_LEVEL.findall((node.home / "node.log").read_bytes()):
            found[f"{level.decode()} {NUMBER.sub('#', text.decode(errors='replace'))}"] += 1
    return found
