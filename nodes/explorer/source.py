"""Where the page's content comes from: a network's chain, and the nodes that serve its blobs. Calls block."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import msgspec

from nodes.explorer.evidence import MISSING, Evidence, judge
from nodes.explorer.view import ROUNDS_MAX, Facts, NetworkView, build_unknown, build_view, read_facts
from nodes.rewards.reading import Book, Fetch, Reading, list_rosters
from p2pfm.config import NetworkConfig
from p2pfm.errors import ChainError, OperatorError
from p2pfm.messages import Proposal
from p2pfm.settlement.ledger import Accepted, Ledger, Roster, SettledRound
from p2pfm.types import Digest, Round

RETRY_S = 10
"""What nobody served is asked for again after so long [s]; of a chain that changed what is new is asked for at once."""

REST_MAX_S = 600
"""What nobody serves is asked for after twice as long each time, at most so long [s]."""

ABSENT_MAX = 10_000
"""So many digests that nobody serves are remembered, the newest."""

NO_NODE = "This explorer knows no node to ask: start it with --config of a node, or with --node-url."


@dataclass(frozen=True)
class Place:
    """Where to look for one network."""

    network: NetworkConfig
    ledgers: Sequence[Ledger]
    """The first that answers is asked."""
    open_blobs: Callable[[], Fetch] | None
    """A new way to fetch, which raises OperatorError if no node answers; None: no node is known."""


class Source:
    """One network, read again and again. Not for two threads at once."""

    def __init__(self, place: Place, now_s: Callable[[], float]) -> None:
        """`now_s`: the wall clock [s since 1970]."""
        self._place, self._now_s = place, now_s
        self._view: NetworkView | None = None
        self._read_s = 0
        self._judged: dict[tuple[Round, int, Digest], Evidence] = {}
        """Believed or refuted: by round, nonce and data hash. Of rounds that are shown only."""
        self._entries: object = None
        self._asked_s = -float(RETRY_S)
        self._absent: dict[Digest, tuple[float, float]] = {}
        """What nobody served: when it may be asked for again, and how long it rested [s]."""
        self._problem = ""

    @property
    def network(self) -> NetworkConfig:
        """Which."""
        return self._place.network

    def read(self) -> NetworkView:
        """The network as of now; if the chain does not answer, as of the last time it did, and says so."""
        try:
            facts = self._read_chain()
        except ChainError as error:
            if self._view is None:
                return build_unknown(self.network, str(error))
            return msgspec.structs.replace(self._view, problem=str(error), stale_since_s=self._read_s)
        self._read_s = int(self._now_s())
        self._view = build_view(self.network, facts, self._find_evidence(facts), self._problem)
        return self._view

    def _read_chain(self) -> Facts:
        for ledger in self._place.ledgers[:-1]:
            with suppress(ChainError):
                return read_facts(ledger)
        return read_facts(self._place.ledgers[-1])

    def _find_evidence(self, facts: Facts) -> dict[Digest, Evidence]:
        """Of the newest rounds, void ones too. Rounds are judged in order, since each builds on the one before."""
        is_changed = facts.entries != self._entries
        is_asking = is_changed or self._now_s() >= self._asked_s + RETRY_S
        self._entries = facts.entries
        shown = [entry.what.settled for entry in facts.entries if isinstance(entry.what, Accepted)][-ROUNDS_MAX:]
        judged: dict[tuple[Round, int, Digest], Evidence] = {}
        by_root: dict[Digest, Proposal] = {}
        if is_asking:
            self._asked_s, self._problem = self._now_s(), "" if self._place.open_blobs else NO_NODE
        fetch = self._place.open_blobs() if self._place.open_blobs and is_asking else None
        for settled in shown:
            key = (settled.round, settled.nonce, settled.data_digest)
            previous = by_root.get(settled.prev_root)
            known = self._judged.get(key, MISSING)
            is_open = known.state == "missing" or (known.state == "matched" and previous is not None)
            if is_open and is_asking:
                rosters = _list_rosters(facts, settled)
                known = judge(settled, partial(self._get, fetch), rosters, previous, self.network)
            judged[key] = known
            if known.proposal is not None:
                by_root[settled.root] = known.proposal
        self._judged = judged
        return {data_digest: known for (_, _, data_digest), known in judged.items()}

    def _get(self, fetch: Fetch | None, digest: Digest) -> bytes | None:
        again_s, rested_s = self._absent.get(digest, (0.0, 0.0))
        if fetch is None or self._problem or self._now_s() < again_s:
            return None
        try:
            data = fetch(digest)
        except OperatorError as error:
            self._problem = str(error)  # the others are not asked for: each would wait as long
            return None
        self._absent.pop(digest, None)
        if data is None:
            rest_s = min(max(RETRY_S, 2 * rested_s), REST_MAX_S)
            self._absent[digest] = (self._now_s() + rest_s, rest_s)
            if len(self._absent) > ABSENT_MAX:
                del self._absent[next(iter(self._absent))]
        return data


def _list_rosters(facts: Facts, settled: SettledRound) -> tuple[Roster, ...]:
    """The registry of then; also for a round that was voided since."""
    readings = (Reading(settled, None),) * (settled.position + 1)  # nothing but its own place is looked at
    book = Book(facts.params, facts.roster, (), facts.pool, facts.demands, facts.entries, readings)
    return list_rosters(book, settled.position)
