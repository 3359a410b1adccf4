"""Where the page's content comes from: a network's chain, and the nodes that serve its blobs. Calls block."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import httpx
import msgspec

from nodes.explorer.evidence import MISSING, Evidence, judge
from nodes.explorer.view import ROUNDS_MAX, Facts, NetworkView, build_unknown, build_view, read_facts
from nodes.rewards import PROPOSAL_BYTES_MAX
from p2pfm.config import NetworkConfig
from p2pfm.errors import ChainError
from p2pfm.messages import Proposal
from p2pfm.settlement.ledger import Accepted, Ledger, SettledRound
from p2pfm.types import Digest, Round

FETCH_S = 5.0
"""How long a node may take to begin with a blob, or to go on with it [s]."""

RETRY_S = 10
"""What nobody served is asked for again after so long [s]; a chain that changed asks at once."""

NO_NODE = "This explorer knows no node to ask: start it with --config of a node, or with --node-url."

FetchBlob = Callable[[Digest], bytes | None]
"""Raises OSError if no node answers at all."""


@dataclass(frozen=True)
class Place:
    """Where to look for one network: several of each, the first that answers is believed as far as it can be checked.

    `fetch` is None where no node is known.
    """

    network: NetworkConfig
    ledgers: Sequence[Ledger]
    fetch: FetchBlob | None


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
            self._asked_s, self._problem = self._now_s(), "" if self._place.fetch else NO_NODE
        for settled in shown:
            key = (settled.round, settled.nonce, settled.data_digest)
            previous = by_root.get(settled.prev_root)
            known = self._judged.get(key, MISSING)
            is_open = known.state == "missing" or (known.state == "matched" and previous is not None)
            if is_open and is_asking:
                known = judge(settled, self._fetch(settled), facts.roster, previous, self.network)
            judged[key] = known
            if known.proposal is not None:
                by_root[settled.root] = known.proposal
        self._judged = judged
        return {data_digest: known for (_, _, data_digest), known in judged.items()}

    def _fetch(self, settled: SettledRound) -> bytes | None:
        if self._place.fetch is None or self._problem:
            return None
        try:
            return self._place.fetch(settled.data_digest)
        except OSError as error:
            self._problem = str(error)  # the others are not asked for: each would wait as long
            return None


def fetch_from(urls: Sequence[str], client: httpx.Client) -> FetchBlob:
    """Blobs from the first of these nodes that serves them."""

    def fetch(digest: Digest) -> bytes | None:
        problems = []
        for url in urls:
            try:
                data = _get(client, f"{url}/blobs/{digest.hex()}")
            except httpx.HTTPError as error:
                problems.append(f"No node answers at {url} ({error}); start it: p2pfm node run --config FILE")
                continue
            if data is not None:
                return data
        if len(problems) == len(urls):
            raise OSError("; ".join(problems))
        return None

    return fetch


def _get(client: httpx.Client, url: str) -> bytes | None:
    """None: not served there, or larger than any proposal."""
    data = bytearray()
    with client.stream("GET", url, timeout=FETCH_S) as response:
        if response.status_code != 200:
            return None
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) > PROPOSAL_BYTES_MAX:
                return None
    return bytes(data)
