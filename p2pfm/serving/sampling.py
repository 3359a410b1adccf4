"""Logits to a token, so that the draw at a position depends on nothing but (logits, seed, position).

Knows no model. No generator state is carried from token to token: a replica that takes over in mid-stream draws what
the first one would have drawn.
"""

from hashlib import sha256

import numpy as np

from p2pfm.types import Array


def compute_uniform(seed: int, position: int) -> float:
    """A number in [0, 1): 53 bits of SHA-256 over (seed, position)."""
    data = b"p2pfm/1 draw" + seed.to_bytes(8, "big") + position.to_bytes(8, "big")
    return (int.from_bytes(sha256(data).digest()[:8], "big") >> 11) * 2.0**-53


def choose_token(logits: Array, temperature_milli: int, top_p_milli: int, seed: int, position: int) -> int:
    """The token at `position`: the first maximum at temperature 0, else a nucleus draw (Holtzman et al. 2020).

    `logits` is (vocab_size,), finite. Probabilities are float64, ordered by (falling probability, token id).
    """
    if temperature_milli == 0:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / (temperature_milli / 1000)  # (vocab_size,)
    order = np.argsort(-scaled, kind="stable")
    weights = np.exp(scaled[order] - scaled[order[0]])
    cumulative = np.cumsum(weights)
    # the smallest set that holds top_p of the mass; never empty
    kept = int(np.searchsorted(cumulative, cumulative[-1] * (top_p_milli / 1000), side="left")) + 1
    kept = min(kept, len(order))
    drawn = int(
        np.searchsorted(cumulative[:kept], compute_uniform(seed, position) * cumulative[kept - 1], side="right")
    )
    return int(order[min(drawn, kept - 1)])
