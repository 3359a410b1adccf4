"""A node's watch over what the chain accepts: it recomputes every round that can still be contested and contests what
is provably false; it asks for leaves that nobody shows, and shows those that are asked for.

Knows the Ledger, and a way to the data of settled rounds; no libp2p, no model.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Sequence

import trio

from p2pfm.errors import ChainError, Reject, Reverted
from p2pfm.messages import Certificate, Proposal, decode_message
from p2pfm.protocol.events import Accuse
from p2pfm.protocol.membership import get_member
from p2pfm.settlement import merkle
from p2pfm.settlement.faults import Fault, FaultKind, find_faults
from p2pfm.settlement.ledger import Demand, LeafValue, Ledger, SettledRound
from p2pfm.settlement.rewards import from_wire, make_submission
from p2pfm.types import Digest, MemberIndex, PeerId, Round

POLL_S = 2.0

DEMAND_AFTER = 0.5
"""A round whose data nobody serves is contested when this part of its challenge window has passed."""

WAITING_MAX = 64
"""Pieces of evidence that wait for a chain, the newest."""

FINDINGS_MAX = 64
"""What an operator is shown: the newest."""

log = logging.getLogger(__name__)

Fetch = Callable[[Digest], Awaitable[bytes | None]]


def read_proposal(data: bytes) -> Proposal | None:
    """A proposal of any size; None: the bytes are something else."""
    try:
        proposal = decode_message(data, len(data))
    except Reject:
        return None
    return proposal if isinstance(proposal, Proposal) else None


def read_leaves(settled: SettledRound, data: bytes) -> tuple[LeafValue, ...] | None:
    """The leaves of a round's root, out of what lies under its data hash; None: it is not what the root was made of.

    A committee can sign a hash of anything.
    """
    proposal = read_proposal(data)
    if proposal is None or len(proposal.leaves) != settled.num_leaves:
        return None
    leaves = from_wire(proposal.leaves)
    try:
        tree = merkle.compute_root(leaves)
    except ValueError:
        return None
    return leaves if (tree.digest, tree.sums) == (settled.root, settled.sums) else None


class Auditor:
    """Runs until cancelled."""

    def __init__(self, me: PeerId, ledger: Ledger, fetch: Fetch, *, is_contesting: bool) -> None:
        """`fetch`: data of a settled round from disk or any peer; `is_contesting` False: only looks, and tells."""
        self.findings: tuple[str, ...] = ()
        """What was found wrong, and what was done about it, for people."""
        self._me = me
        self._ledger = ledger
        self._fetch = fetch
        self._is_contesting = is_contesting
        self._checked: set[tuple[int, Digest]] = set()
        self._waiting: list[Accuse] = []
        """Evidence that could not be brought to the chain."""
        self._missing_since: dict[Digest, float] = {}
        self._closed: set[int] = set()

    async def run(self) -> None:
        """Watch for ever. The chain may be away: what is not judged yet is judged later, while its window is open."""
        while True:
            try:
                await self.watch()
            except ChainError as error:
                log.debug("audit waits: %s", error)
            await trio.sleep(POLL_S)

    async def watch(self) -> None:
        """Judge every round that can still be contested, once, and bring what waited. Raises: ChainError."""
        for evidence in self._waiting:
            await self.accuse(evidence)
        rounds = await trio.to_thread.run_sync(self._ledger.get_rounds, Round(0))
        self._checked &= {(settled.position, settled.root) for settled in rounds}
        for settled in rounds:
            if settled.is_final or (settled.position, settled.root) in self._checked:
                continue
            before = rounds[settled.position - 1] if settled.position else None
            if not await self._judge(settled, before):
                break  # it is void, or cannot be judged yet: what follows stands or falls with it
        if self._is_contesting:
            await self._tend_demands(rounds)

    async def accuse(self, evidence: Accuse) -> None:
        """A member signed two proposals of one round: let the chain slash it, as soon as it can be reached."""
        text = f"member {evidence.member} signed two proposals of round {evidence.first.round}"
        is_new = evidence not in self._waiting
        if is_new:
            self._tell(text)
        if not self._is_contesting:
            return
        try:
            committee = await trio.to_thread.run_sync(self._ledger.get_committee, evidence.first.epoch)
            absent = tuple(sorted(index for index in committee if index != evidence.member))
            both = [
                make_submission(Certificate(proposal, absent, signature))
                for proposal, signature in (
                    (evidence.first, evidence.first_signature),
                    (evidence.second, evidence.second_signature),
                )
            ]
            await self._try(f"member {evidence.member} is slashed", self._ledger.prove_equivocation, *both)
        except (ValueError, Reverted) as error:
            self._tell(f"not so: {text} ({error})")
        except ChainError as error:
            if is_new:
                self._tell(f"not yet: {text} ({error})")
                self._waiting = [*self._waiting, evidence][-WAITING_MAX:]
            return
        self._waiting = [other for other in self._waiting if other != evidence]

    async def _judge(self, settled: SettledRound, before: SettledRound | None) -> bool:
        """Whether the round was found right; what is false is contested."""
        leaves = await self._get_leaves(settled)
        leaves_before = await self._get_leaves(before) if before else ()
        if leaves is None or leaves_before is None:
            await self._miss(settled if leaves is None or before is None else before)
            return False
        params = await trio.to_thread.run_sync(self._ledger.get_params)
        faults = find_faults(params, settled, before, leaves_before, leaves)
        if not faults:
            self._checked.add((settled.position, settled.root))
            return True
        fault = faults[0]
        self._tell(
            f"round {settled.round} is false: {fault.kind.value} of member {fault.index} is {fault.found_wei} wei, "
            f"the rule says {fault.expected_wei} ({len(faults)} faults)"
        )
        if self._is_contesting:
            await self._try(f"round {settled.round} is void", self._prove, settled.round, fault, leaves_before, leaves)
        return False

    def _prove(
        self, round: Round, fault: Fault, leaves_before: tuple[LeafValue, ...], leaves: tuple[LeafValue, ...]
    ) -> None:
        if fault.kind is FaultKind.REWARD:
            self._ledger.prove_reward(round, fault.index, leaves)
        else:
            self._ledger.prove_transition(round, fault.index, leaves_before, leaves)

    async def _get_leaves(self, settled: SettledRound) -> tuple[LeafValue, ...] | None:
        """The leaves of the round's root; None when nobody serves its data, or the data is not of the root."""
        data = await self._fetch(settled.data_digest)
        return None if data is None else await trio.to_thread.run_sync(read_leaves, settled, data)

    # --- demands

    async def _miss(self, settled: SettledRound) -> None:
        """Nobody shows what the root stands for: after a while the signers must, on chain."""
        since = self._missing_since.setdefault(settled.root, trio.current_time())
        params = await trio.to_thread.run_sync(self._ledger.get_params)
        if settled.is_final or trio.current_time() < since + DEMAND_AFTER * params.challenge_window_s:
            return
        demands = await trio.to_thread.run_sync(self._ledger.get_demands)
        if not self._is_contesting or any(demand.position == settled.position for demand in demands if demand.is_open):
            return
        self._missing_since[settled.root] = float("inf")
        roster = await trio.to_thread.run_sync(self._ledger.get_roster)
        member = get_member(roster, self._me)
        index = member.index if member and member.index < settled.num_leaves else MemberIndex(0)
        self._tell(f"round {settled.round}: nobody serves the data of its root")
        await self._try(
            f"leaf {index} of round {settled.round} is demanded", self._ledger.demand_leaf, settled.round, index
        )

    async def _tend_demands(self, rounds: Sequence[SettledRound]) -> None:
        """Show what is asked for and held here (the bond pays for it); end those that were not answered."""
        for demand in await trio.to_thread.run_sync(self._ledger.get_demands):
            if not demand.is_open or demand.number in self._closed:
                continue
            leaves = await self._get_leaves(rounds[demand.position]) if demand.position < len(rounds) else None
            if leaves is not None:
                self._closed.add(demand.number)
                await self._try(f"leaf {demand.index} was shown", self._ledger.show_leaf, demand.number, leaves)
            elif time.time() >= demand.deadline_s:
                await self._close(demand)

    async def _close(self, demand: Demand) -> None:
        try:
            await trio.to_thread.run_sync(self._ledger.close_demand, demand.number)
        except Reverted as error:
            log.debug("demand %d: %s", demand.number, error)  # the chain's clock is behind ours: later
            return
        self._tell(f"demand {demand.number} ended unanswered")

    async def _try(self, done: str, change: Callable[..., object], *arguments: object) -> None:
        """Make a change; that another was faster, or that the bond is missing, ends nothing."""
        try:
            await trio.to_thread.run_sync(change, *arguments)
        except Reverted as error:
            self._tell(f"not so: {done} ({error})")
            return
        self._tell(done)

    def _tell(self, text: str) -> None:
        log.warning("audit: %s", text)
        self.findings = (*self.findings, text)[-FINDINGS_MAX:]
