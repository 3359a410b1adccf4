"""A node's dealings with the chain: follow it, bring certificates to it, claim. The chain may be down for as long as it
likes: certificates wait on disk, training and serving go on.

Knows the Ledger and the store; no libp2p, no model.
"""

import logging
from collections.abc import Awaitable, Callable

import trio

from p2pfm.config import WEI_PER_PFM, NetworkConfig
from p2pfm.errors import ChainError, Reverted
from p2pfm.messages import Certificate
from p2pfm.protocol.events import AnyEvent, RosterChanged, SettledChanged
from p2pfm.protocol.membership import get_member, is_outdated_for
from p2pfm.protocol.phases import compute_position, is_first_half
from p2pfm.runtime.auditor import read_leaves, read_proposal
from p2pfm.runtime.clock import now_ms
from p2pfm.runtime.store import Store
from p2pfm.settlement.ledger import Ledger, Roster, SettledRound
from p2pfm.settlement.proofs import claim_owed
from p2pfm.settlement.rewards import make_submission
from p2pfm.settlement.rotation import Rotation, is_turn
from p2pfm.types import Digest, MemberIndex, Millis, PeerId, Round, Wei

POLL_S = 2.0
"""How often the chain is read: a block or two."""

RANK_DELAY_S = 8.0
"""The k-th ranked waits k times this before it submits what the others have not: one transaction, not one a peer."""

ROTATE_AFTER_S = 4.0
"""A registry that still grows is left alone for so long: newcomers come in groups."""

SUBMIT_TRIES_MAX = 8
"""A certificate that the contract refuses this often (a fork the chain did not take) is given up."""

PASSING = frozenset({"OverBudget"})
"""Refusals that end by themselves, when a sponsor funds the pool: dropping the round would break the line of roots."""

log = logging.getLogger(__name__)


class Settler:
    """Runs until cancelled. `emit` delivers events to the core."""

    def __init__(
        self,
        me: PeerId,
        config: NetworkConfig,
        ledger: Ledger,
        store: Store,
        emit: Callable[[AnyEvent], Awaitable[None]],
        auto_claim: bool,
        now_ms: Callable[[], Millis] = now_ms,
    ) -> None:
        self.roster: Roster | None = None
        self.head: SettledRound | None = None
        self.data_digests: set[Digest] = set()
        """Data hashes of the rounds on chain, and of the shards that they are made of: these proposals are public."""
        self.bases: set[Digest] = set()
        """Bases that a void could lead back to."""
        self.chain_error = ""
        """Why the chain cannot be used right now; empty: it can."""
        self._me = me
        self._config = config
        self._ledger = ledger
        self._store = store
        self._emit = emit
        self._auto_claim = auto_claim
        self.claimed: Wei | None = None
        """What this peer has drawn in all, as the chain told it last; None: not yet."""
        self.claimed_served: Wei | None = None
        """The same for serving."""
        self._claimed = Round(-1)
        self._data_round = Round(-1)
        self._now_ms = now_ms
        self._rotation = Rotation(config.scoring.committee_size, config.settlement.rounds_per_epoch)
        self._due_since: float | None = None
        """Since when a draw is seen to be due."""
        self._due: dict[Round, tuple[float, int]] = {}

    async def run(self) -> None:
        """Poll, settle, claim, for ever."""
        while True:
            try:
                await self._follow()
                await self._rotate()
                await self._settle()
                if self._auto_claim:
                    await self._claim()
                self.chain_error = ""
            except ChainError as error:
                if str(error) != self.chain_error:
                    log.warning("chain: %s; settlement waits, training and serving go on", error)
                self.chain_error = str(error)
            await trio.sleep(POLL_S)

    async def refresh(self) -> None:
        """Read the chain once. Raises: ChainError."""
        await self._follow()

    async def queue(self, certificate: Certificate, rank: int) -> None:
        """Bring this certificate on chain unless somebody else does first."""
        await trio.to_thread.run_sync(self._store.queue_settlement, certificate)
        self._due[certificate.proposal.round] = (trio.current_time() + rank * RANK_DELAY_S, 0)

    async def _follow(self) -> None:
        # In this order: a head that is older than the roster could look void although it is not.
        roster = await trio.to_thread.run_sync(self._ledger.get_roster)
        head = await trio.to_thread.run_sync(self._ledger.get_head)
        self._rotation.on_chain(roster, head, self._get_round())
        if head is not None and head != self.head:
            rounds = await trio.to_thread.run_sync(self._ledger.get_rounds, Round(self._data_round + 1))
            self.data_digests |= {settled.data_digest for settled in rounds}
            for settled in rounds if self._config.has_shards else ():
                data = await trio.to_thread.run_sync(self._store.find, settled.data_digest)
                if data is not None:
                    self.learn_shards(data)
            self._data_round = head.round
            await self._remember_bases()
            member = get_member(roster, self._me)
            if member is not None:
                await self._read_claimed(member.index)
        if self.head is not None and (head is None or head.round < self.head.round):
            await self._queue_again(head)
        if head != self.head:  # before the roster: a peer that is behind, or whose round is void, must not train
            self.head = head
            await self._emit(SettledChanged(head))
        if roster != self.roster:
            if self.roster and get_member(self.roster, self._me) and not get_member(roster, self._me):
                log.warning("this node is no active member any more: it is leaving, or was slashed (p2pfm stake show)")
            self.roster, self._due_since = roster, None
            if roster.committee:  # before the first draw there is nothing that a peer could do
                await self._emit(RosterChanged(roster))

    def learn_shards(self, data: bytes) -> None:
        """`data` lie under a data hash on chain: what they name is public, too."""
        proposal = read_proposal(data)
        if proposal is not None:
            self.data_digests.update(proposal.shards)

    async def _read_claimed(self, index: MemberIndex) -> None:
        self.claimed = await trio.to_thread.run_sync(self._ledger.get_claimed, index)
        self.claimed_served = await trio.to_thread.run_sync(self._ledger.get_claimed_served, index)

    async def _queue_again(self, head: SettledRound | None) -> None:
        """Rounds are gone from the chain: what was not voided stood in blocks that were replaced, and is owed again."""
        after = head.round if head else -1
        member = get_member(self.roster, self._me) if self.roster else None
        for certificate in await trio.to_thread.run_sync(self._store.get_certificates, after):
            await self.queue(certificate, member.index if member else 0)

    async def _remember_bases(self) -> None:
        """Remember the bases of rounds that may still be voided, and the one that stands for sure."""
        rounds = await trio.to_thread.run_sync(self._ledger.get_rounds, Round(0))
        open_rounds = [settled for settled in rounds if not settled.is_final]
        final = rounds[: len(rounds) - len(open_rounds)]
        self.bases = {settled.base for settled in (*final[-1:], *open_rounds)}

    async def _rotate(self) -> None:
        """Draw the next committee, when that is due and this peer's turn (`settlement.rotation`)."""
        roster = self.roster
        member = get_member(roster, self._me) if roster else None
        if roster is None or member is None:
            return
        round = self._get_round()
        if not self._rotation.is_due(roster, round):
            self._due_since = None
            return
        if self._due_since is None:
            self._due_since = trio.current_time()
        waited_s = trio.current_time() - self._due_since - ROTATE_AFTER_S
        turn = round + int(waited_s // RANK_DELAY_S)  # half a round may be too short for more than one turn
        has_unsettled = bool(await trio.to_thread.run_sync(self._store.get_settlements))
        is_early = is_first_half(self._config, self._now_ms())
        is_time = self._rotation.may_draw(roster, round, is_early=is_early, has_unsettled=has_unsettled)
        if waited_s < 0 or not is_time or not is_turn(roster, member.index, turn):
            return
        self._rotation.on_tried(round)
        self._due_since = None
        try:
            await trio.to_thread.run_sync(self._ledger.rotate)
        except Reverted as error:  # too early, or somebody was faster: settlement does not wait for it
            log.debug("rotation: %s", error)
            return
        log.info("drew the next committee")
        await self._follow()

    def _get_round(self) -> Round:
        """By the clock."""
        return compute_position(self._config, self._now_ms()).round

    async def _settle(self) -> None:
        """Submit what is due, in the order of rounds: each root links to the one before."""
        for certificate in await trio.to_thread.run_sync(self._store.get_settlements):
            round = certificate.proposal.round
            is_outdated = self.roster is not None and is_outdated_for(self.roster, certificate.proposal)
            if is_outdated or (self.head is not None and self.head.round >= round):
                await trio.to_thread.run_sync(self._store.drop_settlement, round)
                continue
            due, tries = self._due.setdefault(round, (trio.current_time(), 0))
            if trio.current_time() < due:
                return
            try:
                submission = await trio.to_thread.run_sync(make_submission, certificate)
            except ValueError as error:  # what a committee signed may be any nonsense
                log.warning("round %d: dropped, nobody could claim against it: %s", round, error)
                await trio.to_thread.run_sync(self._store.drop_settlement, round)
                continue
            try:
                await trio.to_thread.run_sync(self._ledger.submit_round, submission)
                log.info("round %d is on chain", round)
            except Reverted as error:
                tries += 1
                log.warning("round %d: %s", round, error)
                if tries >= SUBMIT_TRIES_MAX and error.reason not in PASSING:
                    log.warning("round %d: given up, the chain follows another history", round)
                    await trio.to_thread.run_sync(self._store.drop_settlement, round)
                self._due[round] = (trio.current_time() + RANK_DELAY_S, tries)
                return
            await self._follow()

    async def _claim(self) -> None:
        """Draw what the newest final round owes this peer."""
        if self.roster is None or self.head is None or self.head.round <= self._claimed:
            return
        rounds = await trio.to_thread.run_sync(self._ledger.get_rounds, Round(self._claimed + 1))
        final = [settled for settled in rounds if settled.is_final]
        member = get_member(self.roster, self._me)
        if not final or member is None:
            return
        data = await trio.to_thread.run_sync(self._store.find, final[-1].data_digest)
        if data is None:
            return
        leaves = await trio.to_thread.run_sync(read_leaves, final[-1], data)
        if leaves is None:
            log.warning("round %d: its data hash is not of its root's leaves: no claim by it", final[-1].round)
            self._claimed = final[-1].round
            return
        learned, served = await trio.to_thread.run_sync(claim_owed, self._ledger, final[-1].round, member.index, leaves)
        if learned or served:
            log.info("claimed %.4f PFM for learning, %.4f for serving", learned / WEI_PER_PFM, served / WEI_PER_PFM)
            await self._read_claimed(member.index)
        self._claimed = final[-1].round
