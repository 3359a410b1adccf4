"""The gateway's side of re-checks: has a share of the answers checked, bans who gave wrong ones, proves it to others.

Knows trio, and engine and peers through protocols; what gaps prove is in `serving.recheck`. Users' prompts are shown to
at most CHECKERS_MAX more replicas, to none where the own engine can check, and never published: evidence is made with
synthetic ones. Nor is the digest of a user's LoRA, since whoever knows it may fetch the LoRA: who cheats with one loses
this gateway's routing, and others are told only if it cheats with what all serve.
"""

import logging
import random
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import trio
from prometheus_client import CollectorRegistry
from prometheus_client import Counter as CounterMetric

from p2pfm.errors import PeerUnreachable, Reject
from p2pfm.messages import (
    CheatReport,
    CheckReply,
    CheckRequest,
    GenerateRequest,
    TokenChunk,
    Vouch,
    VouchReply,
    encode,
)
from p2pfm.runtime.checker import CHECK_S, Checker
from p2pfm.runtime.envelopes import verify_vouch
from p2pfm.runtime.gateway import Gateway
from p2pfm.runtime.network.limits import TokenBucket
from p2pfm.serving.recheck import (
    EVIDENCE_MICRO,
    Answer,
    Judgement,
    Suspects,
    decide,
    judge,
    make_check,
    validate_reply,
)
from p2pfm.serving.session import (
    REFUSALS,
    Session,
)
from p2pfm.types import Digest, Millis, PeerId, compute_digest, short

JOBS_MAX = 16
"""Answers and reports that wait to be checked; more are let go unchecked."""

CHECKERS_MAX = 6
"""Other replicas asked about one answer, those included that are busy."""

DISSENTS_MAX = 3
"""A checker that was outvoted so often is asked no more."""

CANARIES_MAX = 4
"""Synthetic requests to a suspect after each wrong answer."""

CANARY_TOKENS = 64
CANARY_S = 60.0

CONFIRMATIONS = 3
"""Registered peers that are believed where nothing can be recomputed; more need not say the same."""

REPORTS_MAX = 256
"""Reports remembered."""

REPORT_TOKENS_MAX = 2048
"""Tokens of one report, prompt included: a check of it costs seconds."""

REPORTS_BURST, REPORTS_PER_S = 4, 4 / 3600
"""Reports of one author that are looked at."""

FALSE_REPORTS_MAX = 2
"""An author of so many reports that proved nothing is heard no more."""

AUTHORS_MAX = 1024

log = logging.getLogger(__name__)


class CheckTransport(Protocol):
    """What is asked of other peers' replicas."""

    def generate(self, peer: PeerId, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """As `ReplicaTransport.generate`."""
        ...

    async def check(self, peer: PeerId, request: CheckRequest) -> CheckReply:
        """`peer`'s word on an answer. Raises: PeerUnreachable, Reject."""
        ...

    async def vouch(self, peer: PeerId, vouch: Vouch) -> VouchReply:
        """`peer`'s signature under its own answer. Raises: PeerUnreachable, Reject."""
        ...


@dataclass(slots=True)
class _Heard:
    """A report: who says so, and what came of recomputing it here."""

    report: CheatReport
    authors: list[PeerId] = field(default_factory=list)
    is_true: bool | None = None


class Rechecker:
    """The gateway's side. `run` works through what waits, one answer or report at a time."""

    def __init__(
        self,
        gateway: Gateway,
        share: float,
        checker: Checker,
        transport: CheckTransport,
        network_id: Digest,
        make_prompt: Callable[[], tuple[int, ...]],
        publish: Callable[[CheatReport], Awaitable[None]],
        registry: CollectorRegistry,
        now_ms: Callable[[], Millis],
    ) -> None:
        """`share`: of answers by others that are checked; `make_prompt`: a synthetic one, like those of users."""
        self.suspects = Suspects()
        self._gateway, self._table, self._local = gateway, gateway.table, gateway.local
        self._share = share
        self._checker = checker
        self._transport = transport
        self._network_id = network_id
        self._make_prompt = make_prompt
        self._publish = publish
        self._now_ms = now_ms
        self._random = random.SystemRandom()  # nobody may know which answers are checked
        self._jobs_in, self._jobs = trio.open_memory_channel[Answer | _Heard](JOBS_MAX)
        self._num_put = self._num_done = 0
        self._dissents: Counter[PeerId] = Counter()
        self._heard: OrderedDict[Digest, _Heard] = OrderedDict()
        self._buckets: OrderedDict[PeerId, TokenBucket] = OrderedDict()
        self._false_reports: Counter[PeerId] = Counter()
        self._metrics = _Metrics(registry)
        gateway.on_answer.append(self.on_answer)

    # --- what comes in ------------------------------------------------------------------------------------------------

    def on_answer(self, answer: Answer) -> None:
        """This gateway gave an answer: a share of those by other peers waits to be checked, of suspects all."""
        makers = set(answer.makers) - {self._local}
        if makers and self._random.random() < self.suspects.compute_share(makers, self._share):
            self._put(answer)

    def on_report(self, author: PeerId, report: CheatReport) -> None:
        """A registered peer says that another's replica gives wrong answers: it waits to be recomputed."""
        num_tokens = len(report.vouch.claimed.prompt) + len(report.vouch.claimed.emitted)
        if report.replica == self._local:
            log.warning("%s says that this node's replica gives wrong answers: is its model whole?", short(author))
        if report.replica in (self._local, author) or self._table.is_banned(report.replica, self._now_ms()):
            return
        if (
            self._false_reports[author] >= FALSE_REPORTS_MAX
            or num_tokens > REPORT_TOKENS_MAX
            or not self._admit(author)
        ):
            return
        heard = self._heard.setdefault(compute_digest(encode(report)), _Heard(report))
        while len(self._heard) > REPORTS_MAX:
            self._heard.popitem(last=False)
        if author not in heard.authors and heard.is_true is None:
            heard.authors.append(author)
            self._put(heard)

    def _admit(self, author: PeerId) -> bool:
        bucket = self._buckets.setdefault(author, TokenBucket(REPORTS_BURST, REPORTS_PER_S))
        self._buckets.move_to_end(author)
        if len(self._buckets) > AUTHORS_MAX:
            self._buckets.popitem(last=False)
        return not bucket.take(self._now_ms() / 1000)

    def _put(self, job: Answer | _Heard) -> None:
        try:
            self._jobs_in.send_nowait(job)
            self._num_put += 1
        except trio.WouldBlock:
            self._metrics.skipped.inc()

    async def run(self) -> None:
        """Check what waits, until cancelled."""
        async for job in self._jobs:
            if isinstance(job, Answer):
                await self._recheck(job)
            else:
                await self._recompute(job)
            self._num_done += 1

    @property
    def num_jobs(self) -> int:
        """Answers and reports that wait, or are in work."""
        return self._num_put - self._num_done

    def to_status(self) -> dict[str, Any]:
        """For people; JSON-able."""
        now_ms = self._now_ms()
        banned = {ban.peer: ban.until_ms for ban in self._table.bans() if ban.until_ms > now_ms}
        return {"suspects": list(self.suspects.suspects()), "banned_until_ms": banned}

    # --- an answer of this gateway ------------------------------------------------------------------------------------

    async def _recheck(self, answer: Answer) -> None:
        await self._ask_vouch(answer)  # not needed: but so nobody can tell a canary from a user's request
        for peer, judgement in (await self._judge(answer)).items():
            if self._note(peer, judgement) or judgement.is_wrong:
                await self._probe(peer, answer.request.version)

    def _note(self, peer: PeerId, judgement: Judgement) -> bool:
        """Remember it; returns whether it makes `peer` a cheat, who is then banned."""
        self._metrics.checked.inc(judgement.num_tokens)
        if judgement.is_wrong:
            self._metrics.wrong.inc()
            log.warning(
                "an answer of %s is not the model's: %d tokens, off by %.1f nats more than a machine may be",
                short(peer),
                judgement.num_tokens,
                judgement.excess_micro / 1e6,
            )
        if self.suspects.on_judged(peer, judgement) != "cheat":
            return False
        self._ban(peer, "its answers were re-checked")
        return True

    def _ban(self, peer: PeerId, why: str) -> None:
        now_ms = self._now_ms()
        if self._table.is_banned(peer, now_ms):
            return
        self._table.on_cheat(peer, now_ms)
        self._metrics.cheats.inc()
        hours = next((ban.until_ms - now_ms) / 3_600_000 for ban in self._table.bans() if ban.peer == peer)
        log.warning(
            "the replica of %s gives wrong answers (%s): it is asked no more for %.0f h", short(peer), why, hours
        )

    async def _probe(self, peer: PeerId, version: Digest) -> None:
        """Synthetic requests to who gave a wrong answer: they convict it or clear it, and others may see them."""
        evidence: CheatReport | None = None
        is_secret = self._gateway.is_users(version)
        for _ in range(CANARIES_MAX):
            answer = await self._ask_canary(peer, version)
            if answer is None:
                return
            report = await self._ask_vouch(answer)
            judgement = (await self._judge(answer)).get(peer)
            if judgement is None:
                continue
            self._note(peer, judgement)
            if report is not None and judgement.excess_micro >= EVIDENCE_MICRO:
                evidence = report
            if self._table.is_banned(peer, self._now_ms()) and (evidence is not None or is_secret):
                if evidence is not None and not is_secret:
                    await self._report(evidence)
                break

    async def _ask_canary(self, peer: PeerId, version: Digest) -> Answer | None:
        """`peer`'s answer to a synthetic request; None: it gave none."""
        pick = self._random.choice
        request = GenerateRequest(
            version, self._make_prompt(), (), CANARY_TOKENS, pick((0, 700, 1000)), 1000, self._random.getrandbits(31), 0
        )
        answer = Answer(request)
        with trio.move_on_after(CANARY_S):
            try:
                session = Session(request, self._gateway.vocabulary)
                async with aclosing(self._transport.generate(peer, request)) as chunks:
                    async for chunk in chunks:
                        if chunk.finish in REFUSALS:
                            return None
                        answer.add(session.on_chunk(chunk), peer, ())
                        if session.finish:
                            return answer
            except (PeerUnreachable, Reject) as error:
                log.info("canary: %s: %s", short(peer), error)
        return None

    async def _ask_vouch(self, answer: Answer) -> CheatReport | None:
        """The only maker's signature under its answer, as evidence; None: there is none."""
        makers = set(answer.makers)
        if len(makers) != 1 or self._local in makers:
            return None
        peer, start = answer.makers[0], len(answer.request.emitted)
        vouch = Vouch(msgspec.structs.replace(answer.request, emitted=(*answer.request.emitted, *answer.tokens)), start)
        with trio.move_on_after(CANARY_S):
            try:
                signature = (await self._transport.vouch(peer, vouch)).signature
                verify_vouch(self._network_id, peer, vouch, signature)
                return CheatReport(peer, vouch, signature)
            except (PeerUnreachable, Reject) as error:
                log.debug("%s does not stand by its answer: %s", short(peer), error)
        return None

    # --- who says so --------------------------------------------------------------------------------------------------

    async def _judge(self, answer: Answer) -> dict[PeerId, Judgement]:
        """What is proven of each maker but this node: by the own engine, else by replicas that had no part in it."""
        request = make_check(answer)
        if request is None:
            return {}
        if self._checker.has(self._gateway.to_announced(request.claimed.version)):
            reply = await self._checker.check(request, is_own=True)
            judged = {} if reply.refusal else judge(answer, reply)
        else:
            judged = await self._judge_remotely(answer, request)
        judged.pop(self._local, None)
        return judged

    async def _judge_remotely(self, answer: Answer, request: CheckRequest) -> dict[PeerId, Judgement]:
        words: dict[PeerId, dict[PeerId, Judgement]] = {maker: {} for maker in dict.fromkeys(answer.makers)}
        for checker in self._choose_checkers(answer):
            reply = await self._ask_checker(checker, request)
            if reply is None:
                continue
            for maker, judgement in judge(answer, reply).items():
                words[maker][checker] = judgement
            if all(_decide(said) is not None for said in words.values()):
                break
        return {maker: verdict for maker, said in words.items() if (verdict := self._settle(said)) is not None}

    def _choose_checkers(self, answer: Answer) -> list[PeerId]:
        """In the order of asking: at random, so that no cheat can place a friend."""
        version, makers = self._gateway.to_announced(answer.request.version), set(answer.makers)
        able = [
            state.record.peer
            for state in self._table.live(self._now_ms())
            if version in state.record.versions and state.record.peer not in makers | {self._local}
        ]
        trusted = [peer for peer in able if self._dissents[peer] < DISSENTS_MAX]
        return self._random.sample(trusted, min(len(trusted), CHECKERS_MAX))

    async def _ask_checker(self, peer: PeerId, request: CheckRequest) -> CheckReply | None:
        with trio.move_on_after(CHECK_S):
            try:
                reply = await self._transport.check(peer, request)
                validate_reply(request, reply)
                return None if reply.refusal else reply
            except (PeerUnreachable, Reject) as error:
                log.info("check: %s: %s", short(peer), error)
        return None

    def _settle(self, said: dict[PeerId, Judgement]) -> Judgement | None:
        """The mildest word of those who agree; who was outvoted is remembered."""
        is_wrong = _decide(said)
        if is_wrong is None:
            return None
        for checker, judgement in said.items():
            if judgement.is_wrong != is_wrong:
                self._dissents[checker] += 1
        return min((one for one in said.values() if one.is_wrong == is_wrong), key=lambda one: one.excess_micro)

    # --- what others report -------------------------------------------------------------------------------------------

    async def _report(self, report: CheatReport) -> None:
        heard = self._heard.setdefault(compute_digest(encode(report)), _Heard(report))
        heard.is_true = True
        heard.authors.append(self._local)
        self._metrics.reports.inc()
        await self._publish(report)

    async def _recompute(self, heard: _Heard) -> None:
        """Believe a report that this node's own engine confirms; without one, what three registered peers say."""
        report = heard.report
        claimed, start = report.vouch.claimed, report.vouch.start
        if heard.is_true is not None:
            return
        try:
            verify_vouch(self._network_id, report.replica, report.vouch, report.signature)
        except Reject as error:
            self._on_false_report(heard, str(error))
            return
        if not self._checker.has(claimed.version):
            if len(heard.authors) >= CONFIRMATIONS:
                heard.is_true = True
                self._ban(report.replica, f"{len(heard.authors)} members have recomputed one")
            return
        answer = Answer(msgspec.structs.replace(claimed, emitted=claimed.emitted[:start]))
        answer.add(claimed.emitted[start:], report.replica, ())
        judgement = (await self._judge(answer)).get(report.replica)
        if judgement is None:
            return
        # as strict as half of what reporters need: their machines and ours differ
        if judgement.excess_micro < EVIDENCE_MICRO // 2:
            self._on_false_report(heard, "the model gives these very tokens")
            return
        self._ban(report.replica, f"{short(heard.authors[0])} reported one, recomputed here")
        if len(heard.authors) < CONFIRMATIONS:
            await self._report(report)
        heard.is_true = True

    def _on_false_report(self, heard: _Heard, why: str) -> None:
        heard.is_true = False
        for author in heard.authors:
            log.warning("%s reported %s without reason: %s", short(author), short(heard.report.replica), why)
            self._false_reports[author] += 1


def _decide(said: dict[PeerId, Judgement]) -> bool | None:
    return decide([judgement.is_wrong for judgement in said.values()])


class _Metrics:
    """What /metrics tells about re-checks."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.checked = CounterMetric("p2pfm_rechecked_tokens", "Tokens of other replicas re-checked", registry=registry)
        self.wrong = CounterMetric("p2pfm_wrong_answers", "Re-checked answers that were wrong", registry=registry)
        self.cheats = CounterMetric("p2pfm_cheats", "Replicas banned for wrong answers", registry=registry)
        self.skipped = CounterMetric("p2pfm_rechecks_skipped", "Re-checks let go: too many wait", registry=registry)
        self.reports = CounterMetric("p2pfm_cheat_reports", "Reports of cheats published here", registry=registry)
