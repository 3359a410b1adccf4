"""What gaps prove: honest noise never makes a cheat, small constant lies do, and no single stranger's word does."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfm.errors import Reject
from p2pfm.messages import LIST_MAX, MICRO, CheckReply, GenerateRequest, TokenLogprobs
from p2pfm.serving.recheck import (
    CHEAT_MICRO,
    PEERS_MAX,
    WRONG_MICRO,
    Answer,
    Judgement,
    Suspects,
    decide,
    judge,
    make_check,
    validate_reply,
)
from p2pfm.types import Digest, PeerId

A, B = PeerId("a"), PeerId("b")
REQUEST = GenerateRequest(Digest(bytes(32)), (1, 2), (), 64, 0, 1000, 7, 0)
WRONG = Judgement(32, 4 * MICRO)
RIGHT = Judgement(32, -32 * 30_000)


def answer_of(*parts: tuple[PeerId, int], request: GenerateRequest = REQUEST) -> Answer:
    answer = Answer(request)
    for maker, num_tokens in parts:
        answer.add(range(num_tokens), maker, ())
    return answer


def reply_of(gaps: list[int]) -> CheckReply:
    return CheckReply(tuple(gaps), (0,) * len(gaps))


def test_each_maker_is_judged_by_its_own_tokens() -> None:
    judged = judge(answer_of((A, 3), (B, 2)), reply_of([0, 0, 0, 5 * MICRO, 5 * MICRO]))
    assert not judged[A].is_wrong
    assert judged[B].is_wrong
    assert (judged[A].num_tokens, judged[B].num_tokens) == (3, 2)


def test_tokens_that_the_client_brought_are_nobodys() -> None:
    resumed = GenerateRequest(Digest(bytes(32)), (1, 2), (9, 9), 64, 0, 1000, 7, 0)
    judged = judge(answer_of((A, 2), request=resumed), reply_of([9 * MICRO, 9 * MICRO, 0, 0]))
    assert not judged[A].is_wrong


def test_a_single_impossible_token_is_no_cheat() -> None:
    """A broken memory cell, once."""
    suspects = Suspects()
    assert suspects.on_judged(A, judge(answer_of((A, 8)), reply_of([60 * MICRO] + [0] * 7))[A]) == "suspect"
    assert suspects.on_judged(A, RIGHT) == "suspect"
    assert [suspects.on_judged(A, RIGHT) for _ in range(3)][-1] == "clear"


def test_two_wrong_answers_make_a_cheat_and_it_begins_anew() -> None:
    suspects = Suspects()
    assert suspects.on_judged(A, Judgement(64, 60 * MICRO)) == "suspect"  # however wrong
    assert suspects.suspects() == (A,)
    assert suspects.on_judged(A, WRONG) == "cheat"
    assert suspects.get_standing(A) == "clear"


def test_every_tenth_token_altered_is_found_within_100_tokens() -> None:
    suspects = Suspects()
    standings = [
        suspects.on_judged(A, judge(answer_of((A, 20)), reply_of([1_500_000 * (i % 10 == 4) for i in range(20)]))[A])
        for _ in range(5)
    ]
    assert "cheat" in standings


def test_a_model_that_is_a_little_off_everywhere_is_found() -> None:
    suspects = Suspects()
    rng = np.random.default_rng(1)
    standings = []
    for _ in range(5):
        gaps = [int(gap) for gap in rng.exponential(80_000, 48)]
        standings.append(suspects.on_judged(A, judge(answer_of((A, 48)), reply_of(gaps))[A]))
    assert "cheat" in standings


@given(st.integers(0, 2**32))
def test_honest_noise_is_never_wrong(seed: int) -> None:
    """Gaps as measured between bf16 and one-pass prefill on SmolLM2: 3% of tokens, up to .25 nats."""
    rng = np.random.default_rng(seed)
    suspects = Suspects()
    for _ in range(40):
        gaps = [int(gap) for gap in rng.integers(0, 250_000, 48) * (rng.random(48) < 0.06)]
        assert suspects.on_judged(A, judge(answer_of((A, 48)), reply_of(gaps))[A]) == "clear"


def test_told_logprobs_are_checked() -> None:
    answer = Answer(REQUEST)
    answer.add((1, 2), A, [TokenLogprobs(3 * MICRO, ()), TokenLogprobs(50, ())])
    assert judge(answer, reply_of([0, 0]))[A].is_wrong
    answer = Answer(REQUEST)
    answer.add((1, 2), A, [TokenLogprobs(MICRO // 2, ()), TokenLogprobs(50, ())])
    assert not judge(answer, reply_of([0, 0]))[A].is_wrong


def test_no_single_liar_is_believed() -> None:
    for words in product((True, False), repeat=3):
        asked = next((n for n in range(1, 4) if decide(words[:n]) is not None), None)
        assert asked is not None
        assert decide(words[:asked]) is (sum(words[:asked]) >= 2)
    assert decide(()) is None
    assert decide((True,)) is None


def test_suspects_are_all_checked() -> None:
    suspects = Suspects()
    assert suspects.compute_share([A, B], 0.05) == 0.05
    suspects.on_judged(B, WRONG)
    assert suspects.compute_share([A, B], 0.05) == 1.0
    assert suspects.compute_share([A], 0.05) == 0.05


def test_no_more_than_so_many_replicas_are_remembered() -> None:
    suspects = Suspects()
    for number in range(PEERS_MAX + 1):
        suspects.on_judged(PeerId(f"p{number:04}"), WRONG)
    assert len(suspects.suspects()) == PEERS_MAX
    assert suspects.get_standing(PeerId("p0000")) == "clear"


def test_a_check_asks_for_the_whole_answer_and_no_more_than_fits() -> None:
    assert make_check(answer_of()) is None
    check = make_check(answer_of((A, 5)))
    assert check is not None
    assert check.claimed.emitted == (0, 1, 2, 3, 4)
    long = make_check(answer_of((A, LIST_MAX + 5)))
    assert long is not None
    assert len(long.claimed.emitted) == LIST_MAX


def test_a_reply_tells_of_each_token_or_refuses() -> None:
    check = make_check(answer_of((A, 2)))
    assert check is not None
    validate_reply(check, reply_of([0, 0]))
    validate_reply(check, CheckReply((), (), "busy"))
    for bad in (reply_of([0]), CheckReply((0, 0), (0,)), CheckReply((0, 0), (0, 0), "busy")):
        with pytest.raises(Reject, match="expected a check"):
            validate_reply(check, bad)


def test_the_thresholds_need_several_tokens() -> None:
    assert judge(answer_of((A, 1)), reply_of([60 * MICRO]))[A].excess_micro < CHEAT_MICRO / 2
    assert WRONG_MICRO < CHEAT_MICRO
