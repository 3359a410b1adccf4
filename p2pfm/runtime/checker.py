"""The replica's side of re-checks: what this node's model makes of claimed tokens, and its signature under its own.

Knows trio and the engine through a protocol; nothing of other peers, and nothing of what gaps prove.
"""

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator
from typing import Protocol

import msgspec
import numpy as np
import trio

from p2pfm.errors import Reject
from p2pfm.messages import LIST_MAX, CheckReply, CheckRequest, GenerateRequest, Vouch, VouchReply, encode
from p2pfm.serving.recheck import compute_gap
from p2pfm.serving.sampling import compute_logprobs
from p2pfm.serving.session import BUSY, FAILED, INVALID, UNKNOWN_VERSION, BrokenLogits, UnknownVersion
from p2pfm.types import Array, Digest, PeerId, compute_digest

CHECK_DUTY = 0.2
"""Part of the time that a check may compute while streams are served."""

CHECK_S = 120.0
"""How long a check for another peer may take."""

GIVEN_MAX = 256
"""Answers of the local replica that it can still vouch for."""

GIVEN_TOKENS_MAX = 1 << 18
"""Tokens of all of them: 8 MB."""


class LogitsSource(Protocol):
    """The local engine, as far as checks need it."""

    def versions(self) -> tuple[Digest, ...]:
        """What it serves."""
        ...

    def compute_logits(self, request: GenerateRequest) -> Iterator[Array]:
        """Logits (vocab_size,) that stood before each token of `request.emitted`; blocking, a pass at a time.

        Raises:
            UnknownVersion: the adapter version is not held.
            Reject: tokens that this backbone cannot have made.
        """
        ...


Prepare = Callable[[Digest, PeerId | None], Awaitable[str]]
"""`Gateway.prepare`: has a user's adapter in the engine; a refusal, or ""."""


async def prepare_nothing(version: Digest, asker: PeerId | None) -> str:
    """Of a node without users' adapters: what its engine has not, it has not."""
    return ""


class Checker:
    """The replica's side: one check at a time, in the pauses of serving."""

    def __init__(
        self,
        engine: LogitsSource | None,
        sign: Callable[[Vouch], bytes],
        is_idle: Callable[[], bool],
        prepare: Prepare = prepare_nothing,
    ) -> None:
        """`sign`: this peer's signature of a vouch; `is_idle`: nobody is served now."""
        self._engine = engine
        self._sign = sign
        self._is_idle = is_idle
        self._prepare = prepare
        self._turn = trio.Lock()
        self._given: OrderedDict[Digest, tuple[int, ...]] = OrderedDict()
        self._num_given_tokens = 0

    def has(self, version: Digest) -> bool:
        """Whether answers of the announced `version` can be checked here, as those of a user's adapter wherever
        BACKBONE_VERSION can.
        """
        return self._engine is not None and version in self._engine.versions()

    async def check(self, request: CheckRequest, asker: PeerId | None = None, *, is_own: bool = False) -> CheckReply:
        """What this node's model makes of the claimed tokens, or a refusal. Only `is_own` waits for another's check.

        A user's adapter that is not here is fetched first, from `asker` before others.
        """
        if len(request.claimed.emitted) > LIST_MAX:
            return _refuse(INVALID)
        if self._turn.locked() and not is_own:
            return _refuse(BUSY)
        async with self._turn:
            with trio.move_on_after(float("inf") if is_own else CHECK_S):
                return await self._check(request.claimed, asker)
        return _refuse(BUSY)

    async def _check(self, claimed: GenerateRequest, asker: PeerId | None) -> CheckReply:
        if self._engine is None:
            return _refuse(UNKNOWN_VERSION)
        if refusal := await self._prepare(claimed.version, asker):
            return _refuse(refusal)
        try:
            return await self._measure(self._engine.compute_logits(claimed), claimed)
        except UnknownVersion:
            return _refuse(UNKNOWN_VERSION)
        except Reject:
            return _refuse(INVALID)
        except BrokenLogits:
            return _refuse(FAILED)

    async def _measure(self, passes: Iterator[Array], claimed: GenerateRequest) -> CheckReply:
        pairs = []
        for position in range(len(claimed.emitted)):
            started = trio.current_time()
            pairs.append(await trio.to_thread.run_sync(_measure_token, passes, claimed, position))
            if not self._is_idle():
                await trio.sleep((trio.current_time() - started) * (1 / CHECK_DUTY - 1))
        return CheckReply(tuple(gap for gap, _ in pairs), tuple(micro_nats for _, micro_nats in pairs))

    def on_given(self, request: GenerateRequest, tokens: tuple[int, ...]) -> None:
        """The local replica gave these tokens to another peer's request."""
        key = compute_digest(encode(request))
        self._num_given_tokens += len(tokens) - len(self._given.pop(key, ()))
        self._given[key] = tokens
        while len(self._given) > GIVEN_MAX or self._num_given_tokens > GIVEN_TOKENS_MAX:
            self._num_given_tokens -= len(self._given.popitem(last=False)[1])

    def vouch(self, vouch: Vouch) -> VouchReply:
        """This replica's signature under what it gave; none under anything else.

        Raises:
            Reject: a vouch for nothing.
        """
        prefix, own = vouch.claimed.emitted[: vouch.start], vouch.claimed.emitted[vouch.start :]
        if not own:
            raise Reject(f"expected tokens from position {vouch.start} on, got none")
        request = msgspec.structs.replace(vouch.claimed, emitted=prefix)
        given = self._given.get(compute_digest(encode(request)), ())
        return VouchReply(self._sign(vouch) if given[: len(own)] == own else b"")


def _refuse(reason: str) -> CheckReply:
    return CheckReply((), (), reason)


def _measure_token(passes: Iterator[Array], claimed: GenerateRequest, position: int) -> tuple[int, int]:
    logits = next(passes)
    if not np.isfinite(logits).all():
        raise BrokenLogits(f"expected finite logits at position {position}")
    token = claimed.emitted[position]
    gap = compute_gap(logits, claimed, token, position)
    return gap, compute_logprobs(logits, token, 0).micro_nats
