"""Logits to a token, so that the draw at a position depends on nothing but (logits, seed, position).

Knows no model. No generator state is carried from token to token: a replica that takes over in mid-stream draws what
the first one would have drawn.
"""

from collections.abc import Sequence
from hashlib import sha256
from math import exp, inf, log

import numpy as np
from numpy.typing import NDArray

from p2pfm.messages import MICRO, TokenLogprobs
from p2pfm.types import Array

LIKELIEST = 256
"""Tokens put in order at first: they nearly always hold the draw, and ordering a whole vocabulary takes 4 ms."""


MASS_SLACK = 1e-5
"""Rounding of a few hundred probabilities that come as float32 logarithms, summed."""


def compute_uniform(seed: int, position: int) -> float:
    """A number in [0, 1): 53 bits of SHA-256 over (seed, position)."""
    data = b"p2pfm/1 draw" + seed.to_bytes(8, "big") + position.to_bytes(8, "big")
    return (int.from_bytes(sha256(data).digest()[:8], "big") >> 11) * 2.0**-53


def choose_token(logits: Array, temperature_milli: int, top_p_milli: int, seed: int, position: int) -> int:
    """The token at `position`: the first maximum at temperature 0, else a nucleus draw (Holtzman et al. 2020).

    `logits` is (vocab_size,), finite. Probabilities are float64, ordered by (falling probability, token id). The draw
    nearly always falls among the likeliest: the others are put in order only when it does not.
    """
    if temperature_milli == 0:
        return int(np.argmax(logits))
    temperature = temperature_milli / 1000
    weights = np.exp((logits.astype(np.float64) - float(logits.max())) / temperature)  # (vocab_size,)
    total = float(weights.sum())
    draw = compute_uniform(seed, position)
    for num_likeliest in (LIKELIEST, len(logits)):
        order = _order_likeliest(logits, num_likeliest)
        cumulative = np.cumsum(weights[order])
        is_whole = len(order) == len(logits)
        # the smallest set that holds top_p of the mass; never empty
        num_kept = int(np.searchsorted(cumulative, total * (top_p_milli / 1000), side="left")) + 1
        if top_p_milli == 1000:
            mass = total
        elif num_kept <= len(order) or is_whole:
            mass = float(cumulative[min(num_kept, len(order)) - 1])
        else:
            continue  # the nucleus is larger than what was put in order
        drawn = int(np.searchsorted(cumulative, draw * mass, side="right"))
        if drawn < len(order) or is_whole:
            return int(order[min(drawn, num_kept - 1, len(order) - 1)])
    raise AssertionError("the whole vocabulary holds every draw")


def _order_likeliest(logits: Array, num_likeliest: int) -> NDArray[np.intp]:
    """Token ids by (falling logit, id): so many of the likeliest, and those as likely as the last of them."""
    if num_likeliest >= len(logits):
        return np.argsort(-logits, kind="stable")
    least = np.partition(logits, len(logits) - num_likeliest)[len(logits) - num_likeliest]
    candidates = np.flatnonzero(logits >= least)
    return candidates[np.argsort(-logits[candidates], kind="stable")]


def choose_from_likeliest(
    likeliest: Sequence[tuple[int, float]],
    vocab_size: int,
    temperature_milli: int,
    top_p_milli: int,
    seed: int,
    position: int,
) -> int | None:
    """The token that `choose_token` draws, from the likeliest ones alone; None: it takes more of them to know.

    What the others weigh together at this temperature is known within bounds only, so both are drawn with: a token
    that comes of both comes of all between.

    Args:
        likeliest: (token, log-probability) by (falling log-probability, token), of all `vocab_size` tokens; not empty.
    """
    if temperature_milli == 0:
        return likeliest[0][0]
    logprobs = np.array([logprob for _, logprob in likeliest], np.float64)  # (num_likeliest,)
    least, most = _bound_rest(logprobs, vocab_size - len(likeliest), 1000 / temperature_milli)
    cumulative = np.cumsum(np.exp((logprobs - logprobs[0]) * (1000 / temperature_milli)))
    draw, drawn = compute_uniform(seed, position), set()
    for rest in (least, most):
        total = float(cumulative[-1]) + rest
        num_kept = int(np.searchsorted(cumulative, total * (top_p_milli / 1000), side="left")) + 1
        if top_p_milli < 1000 and num_kept > len(likeliest) < vocab_size:
            return None
        mass = total if top_p_milli == 1000 else float(cumulative[min(num_kept, len(likeliest)) - 1])
        index = int(np.searchsorted(cumulative, draw * mass, side="right"))
        drawn.add(min(index, num_kept - 1, vocab_size - 1))
    (index,) = drawn if len(drawn) == 1 else (vocab_size,)
    return likeliest[index][0] if index < len(likeliest) else None


def _bound_rest(logprobs: NDArray[np.float64], num_rest: int, power: float) -> tuple[float, float]:
    """Least and most of sum p^power over tokens that are not listed, in units of the likeliest's p^power.

    They share what the listed leave of 1, and none has more than the last listed: the sum is extreme where all are
    equal, and where as few as can be have all (convex or concave in p, by the power).
    """
    if num_rest == 0:
        return 0.0, 0.0
    top, last = float(logprobs[0]), float(logprobs[-1])
    left = 1.0 - float(np.exp(logprobs).sum())
    sums = []
    for mass in (max(left - MASS_SLACK, 0.0), max(left + MASS_SLACK, 0.0)):
        few = mass * exp((last - top) * (power - 1) - top)
        mean = min(log(mass / num_rest), last) if mass else -inf
        sums += [min(few, num_rest * exp((last - top) * power)), num_rest * exp((mean - top) * power)]
    return min(sums), max(sums)


def compute_logprobs(logits: Array, token: int, num_likeliest: int) -> TokenLogprobs:
    """Log-probabilities of `token` and of the likeliest ones; `logits` is (vocab_size,), finite."""
    shifted = logits.astype(np.float64) - float(logits.max())
    micro_nats = np.rint((np.log(np.exp(shifted).sum()) - shifted) * MICRO)  # (vocab_size,), >= 0
    likeliest = _order_likeliest(logits, num_likeliest)[:num_likeliest] if num_likeliest else ()
    return TokenLogprobs(int(micro_nats[token]), tuple((int(one), int(micro_nats[one])) for one in likeliest))
