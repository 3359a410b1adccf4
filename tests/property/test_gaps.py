"""The gap of a token: what two honest machines differ by bounds it, and another draw's gap is what it says."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfm.messages import MICRO, GenerateRequest
from p2pfm.serving.recheck import GAP_MICRO_MAX, compute_gap
from p2pfm.serving.sampling import choose_token
from p2pfm.types import Digest


def make_request(temperature_milli: int, top_p_milli: int, seed: int) -> GenerateRequest:
    return GenerateRequest(Digest(bytes(32)), (1,), (), 8, temperature_milli, top_p_milli, seed, 0)


def draw(logits, request: GenerateRequest, position: int) -> int:
    return choose_token(logits, request.temperature_milli, request.top_p_milli, request.seed, position)


requests = st.builds(
    make_request,
    st.sampled_from((0, 1, 100, 700, 1000, 2000, 100_000)),
    st.sampled_from((1, 100, 500, 900, 999, 1000)),
    st.integers(0, 2**32),
)


@settings(max_examples=300, deadline=None)
@given(requests, st.integers(0, 2**32), st.sampled_from((0.0, 1e-4, 0.01, 0.3, 3.0)), st.sampled_from((0.1, 1.0, 8.0)))
def test_noise_of_e_in_each_logit_gives_gaps_of_at_most_2_e(
    request: GenerateRequest, seed: int, noise: float, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 5 if seed % 5 else 40))
    ours = rng.normal(0, spread, size).astype(np.float32)
    ours = np.round(ours * 8) / 8 if seed % 3 == 0 else ours  # ties, as bf16 has them
    by_rank = np.where(np.argsort(np.argsort(-ours)) < rng.integers(0, size + 1), 1.0, -1.0)  # moves most mass
    signs = (by_rank, -by_rank, rng.choice((-1.0, 1.0), size), rng.uniform(-1, 1, size))[seed % 4]
    theirs = (ours + noise * signs).astype(np.float32)
    exact = float(np.abs(theirs.astype(np.float64) - ours.astype(np.float64)).max())
    for position in range(16):
        gap = compute_gap(ours, request, draw(theirs, request, position), position)
        assert 0 <= gap <= min(2 * exact * MICRO + 1.5, GAP_MICRO_MAX)


@given(st.integers(0, 2**32))
def test_at_temperature_0_the_gap_is_the_distance_to_the_largest_logit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, 20).astype(np.float32)
    for token in range(20):
        expected = round((float(logits.max()) - float(logits[token])) * MICRO)
        assert compute_gap(logits, make_request(0, 1000, 5), token, 3) == expected


def test_a_token_that_another_draw_would_have_given_has_a_gap() -> None:
    """Eight tokens of one probability: the draw at a position belongs to one of them, the others' need a change."""
    logits = np.zeros(8, np.float32) - np.arange(8, dtype=np.float32) / 10
    request = make_request(1000, 1000, 7)
    honest = draw(logits, request, 2)
    gaps = [compute_gap(logits, request, token, 2) for token in range(8)]
    assert gaps[honest] == 0
    assert min(gap for token, gap in enumerate(gaps) if token != honest) > 10_000


def test_another_temperature_than_asked_for_shows() -> None:
    rng = np.random.default_rng(3)
    asked, hotter = make_request(700, 1000, 9), make_request(1400, 1000, 9)
    gaps = []
    for position in range(200):
        logits = rng.normal(0, 3, 50).astype(np.float32)
        gaps.append(compute_gap(logits, asked, draw(logits, hotter, position), position))
    assert sum(gap > 200_000 for gap in gaps) > 50


def test_a_hopeless_token_has_the_largest_gap_and_no_overflow() -> None:
    logits = np.array([0.0, -1e30, 50.0], np.float32)
    for temperature_milli in (0, 1, 1000):
        assert compute_gap(logits, make_request(temperature_milli, 900, 1), 1, 0) == GAP_MICRO_MAX
