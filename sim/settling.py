"""What all simulated hosts do with the chain: bring certificates and evidence, draw committees and rewards, read it.

The counterpart of `runtime.settler`, on the same rules. Knows the chain, hosts and time; no network and no core.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from p2pfm.config import NetworkConfig
from p2pfm.errors import ChainError, Reverted
from p2pfm.messages import Certificate
from p2pfm.protocol.events import Accuse, AnyEvent, RosterChanged, SettledChanged
from p2pfm.protocol.membership import is_outdated_for
from p2pfm.protocol.phases import compute_position, is_first_half
from p2pfm.settlement.rotation import Rotation
from p2pfm.types import Round
from sim.chain import Chain
from sim.checks import Checks
from sim.host import Host
from sim.schedule import Schedule

BLOCK_MS = 1_000
"""A transaction is seen by everybody after at most this [ms]."""

RANK_DELAY_MS = 2_000
"""The k-th ranked waits k times this before it brings a round on chain [ms]."""

SUBMIT_TRIES_MAX = 8
"""A certificate that the contract refuses this often is given up."""

RETRY_MS = 2_000
"""How long a host waits before it tries the chain again [ms]."""

ROTATES_AT = 4
"""The next committee is drawn when this part of TRAIN is over: a quarter."""

FILLS_AFTER_MS = 6_000
"""A slashed committee is dead, and another one is drawn so much later: what a node's settler takes [ms]."""


class Settling:
    """All settlers of one world."""

    def __init__(
        self,
        config: NetworkConfig,
        schedule: Schedule,
        chain: Chain,
        checks: Checks,
        hosts: Sequence[Host],
        deliver: Callable[[Iterable[int], AnyEvent], None],
        draw_block_ms: Callable[[], int],
    ) -> None:
        """Args: deliver: lets an event reach several hosts now; draw_block_ms: when a host reads a new block [ms]."""
        self._config = config
        self._schedule = schedule
        self._chain = chain
        self._checks = checks
        self._hosts = hosts
        self._deliver = deliver
        self._draw_block_ms = draw_block_ms
        self._rotation = Rotation(config.scoring.committee_size, config.settlement.rounds_per_epoch)

    def settle(self, host: Host, certificate: Certificate, rank: int = 0) -> None:
        """Bring a host's certificate on chain when its turn comes, unless another one did."""
        self._try_later(host, certificate, rank * RANK_DELAY_MS)

    def _try_later(self, host: Host, certificate: Certificate, delay_ms: int, tries: int = 0) -> None:
        self._schedule.after(delay_ms, partial(self._submit, host, host.life, certificate, tries))

    def _submit(self, host: Host, life: int, certificate: Certificate, tries: int) -> None:
        """In the order of rounds, each root linking to the one before; what the chain refuses is tried again."""
        if host.life != life or host.peer is None:
            return
        round = certificate.proposal.round
        if round not in host.unsettled:
            return
        if is_outdated_for(self._chain.roster, certificate.proposal):
            del host.unsettled[round]
            return
        if min(host.unsettled) < round:
            self._try_later(host, certificate, RETRY_MS, tries)
            return
        try:
            is_new = self._chain.submit(certificate)
        except Reverted:
            if tries + 1 < SUBMIT_TRIES_MAX:
                self._try_later(host, certificate, RETRY_MS, tries + 1)
            else:
                del host.unsettled[round]
            return
        except ChainError:
            self._try_later(host, certificate, RETRY_MS, tries)
            return
        del host.unsettled[round]
        if is_new:
            self._checks.after_settlement(self._chain, certificate, self._schedule.now_ms)
            self.tell()

    def accuse(self, host: Host, evidence: Accuse) -> None:
        """Bring evidence on chain with the next block: all who saw it do, and the first is heard."""
        self._schedule.after(BLOCK_MS, partial(self._prove, host, host.life, evidence))

    def _prove(self, host: Host, life: int, evidence: Accuse) -> None:
        if host.life != life or host.peer is None:
            return
        try:
            is_slashed = self._chain.accuse(host.index, evidence)
        except ChainError:
            self._schedule.after(RETRY_MS, partial(self._prove, host, life, evidence))
            return
        if is_slashed:
            self.tell()
            self._schedule.after(FILLS_AFTER_MS, self.rotate)

    def rotate(self) -> None:
        """One of those who are up draws the next committee, where that is due; nobody waits for a turn here."""
        now_ms = self._schedule.now_ms
        now, is_early = compute_position(self._config, now_ms).round, is_first_half(self._config, now_ms)
        up = [host for host in self._hosts if host.peer is not None]
        self._rotation.on_chain(self._chain.roster, self._chain.get_head(), now)
        if not up or self._chain.is_down() or not self._rotation.is_due(self._chain.roster, now):
            return
        head = self._chain.get_head()
        settled = head.round if head else -1  # who comes later in the order of ranks still holds what others brought
        has_unsettled = any(round > settled for host in up for round in host.unsettled)
        if self._rotation.may_draw(self._chain.roster, now, is_early=is_early, has_unsettled=has_unsettled):
            self._chain.ledger.rotate()
            self.tell()
            self._rotation.on_chain(self._chain.roster, self._chain.get_head(), now)

    def tell(self) -> None:
        """Everybody reads the chain: its newest round, and registry and committee where they have changed."""
        before = self._chain.roster
        has_changed = self._chain.read_roster() is not before
        told: dict[int, list[int]] = {}
        for host in self._hosts:
            told.setdefault(self._draw_block_ms(), []).append(host.index)
        for delay_ms, targets in told.items():
            self._schedule.after(delay_ms, partial(self._read, targets, has_changed))

    def _read(self, targets: list[int], has_changed: bool) -> None:
        """These hosts learn what the chain says at this moment."""
        self._deliver(targets, SettledChanged(self._chain.get_head()))
        if has_changed:
            self._deliver(targets, RosterChanged(self._chain.roster))

    def claim(self) -> None:
        """All draw what the newest final round owes them: one that was settled late is still open to challenge."""
        final = [settled for settled in self._chain.ledger.get_rounds(Round(0)) if settled.is_final]
        if final:
            self._chain.claim(self._checks.certificates[final[-1].round])
        self._checks.after_claims(self._chain, final[-1] if final else None, self._schedule.now_ms)
