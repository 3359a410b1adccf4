"""What became of a local network's rounds, read afterwards from its nodes' stores and logs.

For experiments that judge a whole run. Knows no protocol beyond what a node writes down.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nodes.localnet import LocalNode
from p2pfm.runtime.store import Store
from p2pfm.types import Digest, Round

LOG_LEVEL = re.compile(rb"^\S+ (WARNING|ERROR|CRITICAL) +(\S+: .*)$", re.MULTILINE)
VOID = re.compile(rb"round (\d+): round is void here: (.*)$", re.MULTILINE)
NUMBER = re.compile(r"[0-9a-f]*\d[0-9a-f]*")


@dataclass(frozen=True, slots=True)
class Rounds:
    """Of all nodes together: what was certified, by round, and why a round was void where it ended without."""

    bases: Mapping[Round, frozenset[Digest]]
    """New bases of the certificates held; more than one of a round is a fork."""
    voids: Mapping[Round, frozenset[str]]

    @property
    def forked(self) -> tuple[Round, ...]:
        """Rounds of which two nodes hold different bases."""
        return tuple(round for round, bases in sorted(self.bases.items()) if len(bases) > 1)

    def undecided(self, rounds: Iterable[Round]) -> tuple[Round, ...]:
        """Of these, those that nobody holds a certificate of and nobody called void."""
        return tuple(round for round in rounds if round not in self.bases and round not in self.voids)


def read_rounds(nodes: Iterable[LocalNode]) -> Rounds:
    """Read the stores and logs of nodes that have ended."""
    bases: dict[Round, set[Digest]] = {}
    voids: dict[Round, set[str]] = {}
    for node in nodes:
        with Store(node.home) as store:
            for certificate in store.get_certificates(-1):
                bases.setdefault(certificate.proposal.round, set()).add(certificate.proposal.new_base)
        for number, reason in VOID.findall((node.home / "node.log").read_bytes()):
            voids.setdefault(Round(int(number)), set()).add(reason.decode(errors="replace"))
    return Rounds(
        {round: frozenset(found) for round, found in bases.items()},
        {round: frozenset(found) for round, found in voids.items()},
    )


def count_complaints(nodes: Iterable[LocalNode]) -> Counter[str]:
    """Lines of level WARNING and above in the nodes' logs, those that differ in numbers only counted as one."""
    found: Counter[str] = Counter()
    for node in nodes:
        for level, text in LOG_LEVEL.findall((node.home / "node.log").read_bytes()):
            found[f"{level.decode()} {NUMBER.sub('#', text.decode(errors='replace'))}"] += 1
    return found
