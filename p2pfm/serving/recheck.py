"""Whether a replica's tokens are those that the model would have given: a gap a token, and what gaps prove.

Knows no clock, socket or model: logits and other peers' words come from outside. A replica's numbers differ a little
from another's (kernels, batch shapes, number formats), so a token is not compared with the one that we would have
drawn; it is asked how far the logits would have to be moved until the same sampler draws it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from p2pfm.errors import Reject
from p2pfm.messages import LIST_MAX, MICRO, CheckReply, CheckRequest, GenerateRequest, TokenLogprobs
from p2pfm.serving.sampling import compute_uniform
from p2pfm.types import Array, PeerId

GAP_NATS_MAX = 64.0
"""A larger gap says nothing more."""

GAP_MICRO_MAX = int(GAP_NATS_MAX * MICRO)

TOKEN_MICRO_MAX = 2 * MICRO
"""A single token counts no more: it may be a broken memory cell."""

HONEST_MICRO = 30_000
"""Mean gap a token that is forgiven: at least four times that of two honest machines (docs/LOG.md, "Gaps")."""

LOGPROB_MICRO = MICRO // 2
"""Difference of told log-probabilities that is forgiven: about the largest between two honest machines."""

WRONG_MICRO = 1 * MICRO
"""Excess of an answer that makes its maker suspect: three times the largest gap of a single honest token."""

EVIDENCE_MICRO = 3 * MICRO
"""Excess of one signed answer that others believe without having seen more."""

CHEAT_MICRO = 6 * MICRO
"""Excess that makes a cheat, summed over its answers: at least three impossible tokens."""

WRONG_ANSWERS_MIN = 2
"""Wrong answers that make a cheat."""

PEERS_MAX = 512
"""Replicas remembered, as many as a `ReplicaTable` knows."""

SHIFT_MAX = 700.0
"""exp of more overflows; at a shift like this every probability can be anything."""

Floats = NDArray[np.float64]

SLACK = 1e-12
"""For the rounding of cumulative sums in float64."""

Standing = Literal["clear", "suspect", "cheat"]


# --- the gap of a token -----------------------------------------------------------------------------------------------


def compute_gap(logits: Array, request: GenerateRequest, token: int, position: int) -> int:
    """Twice the least change of the logits (each by at most so much) with which `token` is drawn [millionths of a nat].

    At temperature 0 that is the distance to the largest logit. Else the draw's number u(seed, position) is fixed, and
    the token's interval of the nucleus is grown by what the change could do to it: to the order of tokens, to their
    mass, and to the nucleus's edge.

    Law: if some logits that differ from `logits` by at most e each make the sampler draw `token`, the gap is at most
    2 e (and a millionth). So an honest replica's gap is bounded by the noise between two machines, at any temperature.

    Args:
        logits: (vocab_size,), finite.
    """
    own = float(logits[token])
    if request.temperature_milli == 0:
        return round(min(float(logits.max()) - own, GAP_NATS_MAX) * MICRO)
    falling = np.sort(logits.astype(np.float64))[::-1]  # (vocab_size,)
    nucleus = _Nucleus(falling, own, request, compute_uniform(request.seed, position))
    low, high = -1, GAP_MICRO_MAX
    while high - low > 1:  # the least gap with which the token is possible: it is from there on
        middle = (low + high) // 2 if low >= 0 else 0
        if nucleus.is_drawn(middle / MICRO):
            high = middle
        else:
            low = middle
    return high


class _Nucleus:
    """A position's probabilities, and whether a token can be drawn there if the logits are a little off.

    A change of e in each logit multiplies the odds of any set of tokens by at most exp(2 e / temperature): its shift.
    """

    def __init__(self, falling: Floats, own: float, request: GenerateRequest, draw: float) -> None:
        """`falling`: all logits, the largest first; `own`: the token's; `draw`: in [0, 1)."""
        self._rising = -falling
        self._own = own
        self._temperature = request.temperature_milli / 1000
        self._top_p = request.top_p_milli / 1000
        self._draw = draw
        weights = np.exp((falling - falling[0]) / self._temperature)
        self._head = np.concatenate(([0.0], np.cumsum(weights)))  # (vocab_size + 1,): mass of the first k
        self._tail = np.concatenate((np.cumsum(weights[::-1])[::-1], [0.0]))  # of the others

    def is_drawn(self, gap: float) -> bool:
        """Whether the token's interval, at its widest, holds the draw [nats]."""
        factor = exp(min(gap / self._temperature, SHIFT_MAX))
        num_before = int(np.searchsorted(self._rising, -(self._own + gap), side="left"))
        num_until = int(np.searchsorted(self._rising, -(self._own - gap), side="right"))
        least, most = self._kept(factor)
        is_before_end = self._draw * least <= self._share(num_until, factor) + SLACK
        return is_before_end and self._draw * most >= self._share(num_before, 1 / factor) - SLACK

    def _kept(self, factor: float) -> tuple[float, float]:
        """The least and the most mass that the nucleus may hold."""
        if self._top_p == 1.0:
            return 1.0, 1.0
        fewest = self._count(self._top_p - SLACK, factor)
        fullest = self._count(self._top_p + SLACK, 1 / factor)
        return max(self._top_p, self._share(fewest, 1 / factor)), self._share(fullest, factor)

    def _count(self, mass: float, factor: float) -> int:
        """How many of the first tokens hold `mass` if their odds are multiplied by `factor`."""
        plain = mass / (mass + (1 - mass) * factor)
        found = int(np.searchsorted(self._head, plain * self._head[-1], side="left"))
        return min(found, len(self._rising))

    def _share(self, num_first: int, factor: float) -> float:
        """Probability of the first tokens, their odds multiplied by `factor`."""
        head, tail = float(self._head[num_first]), float(self._tail[num_first])
        return head / (head + tail / factor)


# --- what is checked --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Answer:
    """One completion as its gateway gave it out: who made which token."""

    request: GenerateRequest
    tokens: list[int] = field(default_factory=list)
    makers: list[PeerId] = field(default_factory=list)
    """One a token."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One a token where they were asked for, else none."""
    client: str = ""
    """The API key's name; "": none."""

    def add(self, tokens: Sequence[int], maker: PeerId, logprobs: Sequence[TokenLogprobs]) -> None:
        """The next tokens, by `maker`."""
        self.tokens.extend(tokens)
        self.makers.extend([maker] * len(tokens))
        self.logprobs.extend(logprobs)


def make_claim(answer: Answer) -> GenerateRequest:
    """The request with all tokens that were given."""
    return msgspec.structs.replace(answer.request, emitted=(*answer.request.emitted, *answer.tokens))


def make_check(answer: Answer) -> CheckRequest | None:
    """What to ask of a checker; None: nothing in it that a check could judge."""
    emitted = (*answer.request.emitted, *answer.tokens)[:LIST_MAX]
    if len(emitted) <= len(answer.request.emitted):
        return None
    return CheckRequest(msgspec.structs.replace(answer.request, emitted=emitted, num_logprobs=0))


def validate_reply(request: CheckRequest, reply: CheckReply) -> None:
    """Raises: Reject, unless it tells of each token, or refuses."""
    expected = 0 if reply.refusal else len(request.claimed.emitted)
    if not len(reply.gaps_micro) == len(reply.micro_nats) == expected:
        raise Reject(f"expected a check of {expected} tokens, got {len(reply.gaps_micro)} and {len(reply.micro_nats)}")


# --- what it proves ---------------------------------------------------------------------------------------------------


class Judgement(NamedTuple):
    """Of one replica's part of an answer."""

    num_tokens: int
    excess_micro: int
    """Sum of its tokens' gaps (each up to TOKEN_MICRO_MAX), less what an honest replica's may be."""

    @property
    def is_wrong(self) -> bool:
        """Whether an honest replica would not have given it."""
        return self.excess_micro > WRONG_MICRO


def judge(answer: Answer, reply: CheckReply) -> dict[PeerId, Judgement]:
    """Each maker's part of `answer`, by a checker's valid reply without refusal; in the order of their tokens."""
    start = len(answer.request.emitted)
    judged: dict[PeerId, Judgement] = {}
    for index, (gap, micro_nats) in enumerate(zip(reply.gaps_micro[start:], reply.micro_nats[start:], strict=True)):
        if answer.logprobs:
            gap = max(gap, abs(answer.logprobs[index].micro_nats - micro_nats) - LOGPROB_MICRO)
        num_tokens, excess_micro = judged.get(answer.makers[index], (0, 0))
        excess_micro += min(gap, TOKEN_MICRO_MAX) - HONEST_MICRO
        judged[answer.makers[index]] = Judgement(num_tokens + 1, excess_micro)
    return judged


def decide(words: Sequence[bool]) -> bool | None:
    """What strangers' words on "is it wrong?", in the order of asking, come to; None: ask one more.

    One says that it is right: it is believed. Else two have to agree, so that no single liar gets anybody banned.
    """
    num_wrong = sum(words)
    num_right = len(words) - num_wrong
    if num_wrong >= 2:
        return True
    return False if words and (num_right >= 2 or not words[0]) else None


@dataclass(slots=True)
class _Record:
    num_tokens: int = 0
    num_wrong: int = 0
    excess_micro: int = 0


class Suspects:
    """What was judged of each replica so far: a cumulative sum (Page 1954) that honest answers take back to 0.

    A replica whose tokens are off by more than HONEST_MICRO in the mean is found, however small each is, and honest
    ones never: their sum tends downwards. Bounded.
    """

    def __init__(self) -> None:
        self._records: dict[PeerId, _Record] = {}  # who was judged last stands last

    def on_judged(self, peer: PeerId, judgement: Judgement) -> Standing:
        """Note it; returns what `peer` is now. A cheat begins anew: its ban is the answer to what was known."""
        record = self._records[peer] = self._records.pop(peer, _Record())
        while len(self._records) > PEERS_MAX:
            del self._records[next(iter(self._records))]
        record.num_tokens += judgement.num_tokens
        record.num_wrong += judgement.is_wrong
        record.excess_micro += judgement.excess_micro
        if record.excess_micro <= 0:
            record.excess_micro = record.num_wrong = 0
        standing = self.get_standing(peer)
        if standing == "cheat":
            del self._records[peer]
        return standing

    def get_standing(self, peer: PeerId) -> Standing:
        """Clear; suspect: an answer was wrong, and the next ones are all checked; or a cheat."""
        record = self._records.get(peer, _Record())
        if record.num_wrong >= WRONG_ANSWERS_MIN and record.excess_micro >= CHEAT_MICRO:
            return "cheat"
        return "suspect" if record.num_wrong else "clear"

    def compute_share(self, peers: Collection[PeerId], share: float) -> float:
        """Part of the answers by `peers` that is checked: all where one of them is suspect."""
        return 1.0 if any(self.get_standing(peer) == "suspect" for peer in peers) else share

    def suspects(self) -> tuple[PeerId, ...]:
        """Who is suspect now, sorted."""
        return tuple(peer for peer in sorted(self._records) if self.get_standing(peer) == "suspect")
