"""A node's receipts: it gives one for every answer by another's replica, takes those that its own replica earned, and
shows at an epoch's end what that was.

Knows envelopes and the book; the rules are in `serving.receipts`. A receipt that does not arrive costs nobody anything:
the next one holds the same sum.
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import trio
from prometheus_client import CollectorRegistry
from prometheus_client import Counter as Count

from p2pfm.errors import PeerUnreachable, Reject
from p2pfm.messages import Envelope, Receipt, ReceiptReply, ServiceReport, decode_receipt, encode
from p2pfm.runtime.envelopes import seal, verify_envelope
from p2pfm.runtime.keys import Keys
from p2pfm.serving.receipts import EPOCHS_MAX, ReceiptBook, compute_shares, validate_report
from p2pfm.serving.recheck import Answer, make_claim
from p2pfm.types import Digest, PeerId, compute_digest, short

ANSWERS_MAX = 256
"""Answers that wait for their receipts; of more the tokens stand in the next receipt."""

OFFER_S = 10.0
"""A replica may take so long to take its receipt."""

REPORT_AFTER_S = 20.0
"""After an epoch's end a replica waits at most so long for the last receipts before it shows them."""

NO_CLIENT = Digest(bytes(32))

log = logging.getLogger(__name__)


class OfferTransport(Protocol):
    """How a receipt reaches a replica."""

    async def offer(self, peer: PeerId, sealed: Envelope) -> ReceiptReply:
        """Raises: PeerUnreachable, Reject."""
        ...


class ReceiptDesk:
    """Both sides of a node's receipts. `run` gives them out and shows them."""

    def __init__(
        self,
        keys: Keys,
        network_id: Digest,
        transport: OfferTransport,
        publish: Callable[[ServiceReport], Awaitable[None]],
        save: Callable[[Receipt, Envelope, int], None],
        held: Sequence[Envelope],
        compute_epoch: Callable[[], int],
        get_stakes: Callable[[], Mapping[PeerId, int]],
        registry: CollectorRegistry,
        report_after_s: float = REPORT_AFTER_S,
    ) -> None:
        """`save`: keeps a receipt with its seal, and none of epochs before the one given; `held`: what it kept."""
        self._keys, self._network_id, self._transport = keys, network_id, transport
        self._publish, self._save = publish, save
        self._compute_epoch, self._get_stakes = compute_epoch, get_stakes
        self._report_after_s = report_after_s
        self._book = ReceiptBook()
        self._sealed: dict[Receipt, Envelope] = {}
        for sealed in held:
            self._take(decode_receipt(sealed.body), sealed)
        self._owed: Counter[PeerId] = Counter()
        """Tokens of answers for whose receipts there was no room."""
        self._answers_in, self._answers = trio.open_memory_channel[Answer](ANSWERS_MAX)
        self._metrics = Count("p2pfm_receipts", "Receipts by what became of them", ["outcome"], registry=registry)

    # --- the gateway's side -------------------------------------------------------------------------------------------

    def on_answer(self, answer: Answer) -> None:
        """This gateway gave an answer."""
        try:
            self._answers_in.send_nowait(answer)
        except trio.WouldBlock:
            self._owed.update(answer.makers)

    async def run(self) -> None:
        """Give receipts, and show what was earned; until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._report_loop)
            async for answer in self._answers:
                for replica, num_tokens in sorted(Counter(answer.makers).items()):
                    if replica != self._keys.peer:
                        await self._give(replica, num_tokens, answer)

    async def _give(self, replica: PeerId, num_tokens: int, answer: Answer) -> None:
        epoch = self._compute_epoch()
        before = self._book.get(epoch, self._keys.peer, replica)
        num_tokens += self._owed.pop(replica, 0)
        receipt = Receipt(
            self._keys.peer,
            replica,
            epoch,
            before.number + 1 if before else 1,
            compute_digest(encode(make_claim(answer))),
            answer.request.version,
            num_tokens,
            num_tokens + (before.total_tokens if before else 0),
            self._hide(answer.client),
        )
        sealed = seal(self._keys, self._network_id, receipt)
        self._take(receipt, sealed)
        await trio.to_thread.run_sync(self._save, receipt, sealed, epoch - EPOCHS_MAX)
        outcome = "late"
        with trio.move_on_after(OFFER_S):
            outcome = await self._offer(replica, sealed)
        self._metrics.labels(outcome).inc()

    async def _offer(self, replica: PeerId, sealed: Envelope) -> str:
        try:
            reply = await self._transport.offer(replica, sealed)
            verify_envelope(self._network_id, Envelope(replica, sealed.body, reply.signature))
        except (PeerUnreachable, Reject) as error:
            log.debug("receipt for %s: %s", short(replica), error)
            return "not taken"
        return "given"

    def _hide(self, client: str) -> Digest:
        """An operator can tell his clients apart; others cannot tell who they are."""
        return compute_digest(f"p2pfm/1 client {self._keys.peer} {client}".encode()) if client else NO_CLIENT

    # --- the replica's side -------------------------------------------------------------------------------------------

    def on_offer(self, sealed: Envelope) -> ReceiptReply:
        """A gateway's receipt for this replica: kept, and signed. An old one is signed again, it changes nothing.

        Raises:
            Reject: not for this replica or this time, not signed by its gateway, or less than it said before.
        """
        verify_envelope(self._network_id, sealed)
        receipt = decode_receipt(sealed.body)
        if receipt.gateway != sealed.author or receipt.replica != self._keys.peer:
            raise Reject(f"expected a receipt by {short(sealed.author)} for this replica")
        epoch = self._compute_epoch()
        if abs(receipt.epoch - epoch) > 1:
            raise Reject(f"expected a receipt of epoch {epoch}, got one of {receipt.epoch}")
        if receipt.gateway not in self._get_stakes():
            raise Reject("expected a receipt of a registered peer")
        if self._take(receipt, sealed):
            self._save(receipt, sealed, epoch - EPOCHS_MAX)
            self._metrics.labels("earned").inc()
        return ReceiptReply(seal(self._keys, self._network_id, receipt).signature)

    async def _report_loop(self) -> None:
        epoch = self._compute_epoch()
        while True:
            await trio.sleep(1)
            if self._compute_epoch() == epoch:
                continue
            ended, epoch = epoch, self._compute_epoch()
            await trio.sleep(self._report_after_s)
            earned = self._book.earned(ended, self._keys.peer)
            if earned:
                await self._publish(ServiceReport(ended, tuple(self._sealed[receipt] for receipt in earned)))

    # --- everybody's --------------------------------------------------------------------------------------------------

    def on_report(self, author: PeerId, report: ServiceReport) -> None:
        """What another replica shows of an epoch. Blocking for as long as its signatures take.

        Raises:
            Reject: a receipt that is not its gateway's, or not of this replica and epoch.
        """
        epoch = self._compute_epoch()
        if not epoch - EPOCHS_MAX < report.epoch <= epoch + 1:
            return
        receipts = [decode_receipt(sealed.body) for sealed in report.receipts]
        validate_report(author, report.epoch, receipts)
        for receipt, sealed in zip(receipts, report.receipts, strict=True):
            verify_envelope(self._network_id, sealed)
            if receipt.gateway != sealed.author:
                raise Reject(f"expected {short(receipt.gateway)}'s own receipt, got one by {short(sealed.author)}")
        for receipt, sealed in zip(receipts, report.receipts, strict=True):
            self._take(receipt, sealed)

    def compute_shares(self, epoch: int) -> dict[PeerId, int]:
        """What each replica is due of an epoch, by the receipts that were shown here [parts of a billion]."""
        return compute_shares(self._book.served(epoch), self._get_stakes())

    def to_status(self) -> dict[str, Any]:
        """For /status: this epoch's tokens, and what each replica was due of the last one [parts of a billion]."""
        epoch, me = self._compute_epoch(), self._keys.peer
        served = self._book.served(epoch)
        return {
            "epoch": epoch,
            "earned_tokens": sum(tokens for (_, replica), tokens in served.items() if replica == me),
            "given_tokens": sum(tokens for (gateway, _), tokens in served.items() if gateway == me),
            "shares": {str(past): self.compute_shares(past) for past in self._book.epochs if past < epoch},
        }

    def _take(self, receipt: Receipt, sealed: Envelope) -> bool:
        before = self._book.get(receipt.epoch, receipt.gateway, receipt.replica)
        if not self._book.add(receipt):
            return False
        if before is not None:
            del self._sealed[before]
        self._sealed[receipt] = sealed
        for held in [held for held in self._sealed if held.epoch not in self._book.epochs]:
            del self._sealed[held]
        return True
