import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfm.errors import Reject
from p2pfm.messages import GenerateRequest, TokenChunk
from p2pfm.serving.sampling import choose_from_likeliest, choose_token, compute_uniform
from p2pfm.serving.session import Detokenizer, Session, StopStrings, Vocabulary
from p2pfm.types import Digest

END = 9
VOCABULARY = Vocabulary(size=10, ends=frozenset({END}), context_max=64)


def ask(tokens_max: int = 20, emitted: tuple[int, ...] = (), prompt: tuple[int, ...] = (1, 2)) -> GenerateRequest:
    return GenerateRequest(Digest(b"v" * 32), prompt, emitted, tokens_max, 0, 1000, 0, 0)


def feed(session: Session, chunk: TokenChunk) -> tuple[int, ...]:
    return session.on_chunk(chunk)


texts = st.lists(st.integers(0, 8), min_size=0, max_size=18).map(lambda tokens: (*tokens, END))


@st.composite
def truths_and_chunks(draw) -> tuple[tuple[int, ...], list[TokenChunk]]:
    """A text, and pieces of it in any order, some twice, some false."""
    truth = draw(texts)
    chunks = []
    for _ in range(draw(st.integers(0, 60))):
        start = draw(st.integers(0, len(truth)))
        stop = draw(st.integers(start, min(len(truth), start + 4)))
        finish = "stop" if stop == len(truth) and draw(st.booleans()) else ""
        chunks.append(TokenChunk(start, truth[start:stop], finish))
    return truth, chunks


@given(truths_and_chunks())
def test_any_interleaving_gives_a_prefix_of_the_undisturbed_text_or_reject(case) -> None:
    truth, chunks = case
    session = Session(ask(), VOCABULARY)
    seen: list[int] = []
    for chunk in chunks:
        try:
            seen.extend(session.on_chunk(chunk))
        except Reject:
            assert chunk.position > len(seen)  # only a gap can be wrong with a true piece
        assert tuple(seen) == session.emitted == truth[: len(seen)]
    for chunk in (TokenChunk(position, truth[position : position + 1], "") for position in range(len(truth))):
        seen.extend(session.on_chunk(chunk))
    assert tuple(seen) == truth
    assert session.finish == "stop"


@given(texts, st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), max_size=8))
def test_replicas_that_fail_anywhere_and_continue_from_the_resume_request_give_the_undisturbed_text(
    truth, cuts
) -> None:
    session = Session(ask(), VOCABULARY)
    for num_tokens, num_repeated in [*cuts, (len(truth), 0)]:
        request = session.resume_request()
        start = max(0, len(request.emitted) - num_repeated)
        for position in range(start, min(len(truth), len(request.emitted) + num_tokens)):
            session.on_chunk(TokenChunk(position, truth[position : position + 1], ""))
    assert session.emitted == truth
    assert session.resume_request() == msgspec.structs.replace(ask(), emitted=truth)


@given(st.lists(st.builds(TokenChunk, st.integers(0, 6), st.lists(st.integers(-2, 12), max_size=4).map(tuple),
                          st.sampled_from(["", "stop", "length", "x"]))))  # fmt: skip
def test_whatever_a_replica_says_the_session_stays_lawful(chunks: list[TokenChunk]) -> None:
    session = Session(ask(tokens_max=5), VOCABULARY)
    for chunk in chunks:
        before = session.emitted
        try:
            new = session.on_chunk(chunk)
        except Reject:
            assert session.emitted == before
        else:
            assert session.emitted == before + new
        assert len(session.emitted) <= 5
        assert END not in session.emitted[:-1]
        assert all(0 <= token < VOCABULARY.size for token in session.emitted)


@pytest.mark.parametrize(
    "chunk",
    [
        TokenChunk(3, (4,), ""),  # gap
        TokenChunk(0, (5, 2), ""),  # contradicts position 0
        TokenChunk(2, (10,), ""),  # not a token
        TokenChunk(2, (-1,), ""),
        TokenChunk(2, (END, 3), ""),  # goes on after the end
        TokenChunk(2, (3, 3, 3), ""),  # over the limit
        TokenChunk(2, (3,), "stop"),  # ends without an end
        TokenChunk(2, (), "length"),
    ],
)
def test_a_chunk_rejects_what_cannot_follow(chunk: TokenChunk) -> None:
    session = Session(ask(tokens_max=4), VOCABULARY)
    session.on_chunk(TokenChunk(0, (1, 2), ""))
    with pytest.raises(Reject):
        session.on_chunk(chunk)
    assert session.emitted == (1, 2)


def test_finish_is_known_from_the_tokens_alone() -> None:
    session = Session(ask(tokens_max=2), VOCABULARY)
    session.on_chunk(TokenChunk(0, (1, 2), ""))
    assert session.finish == "length"
    ended = Session(ask(tokens_max=2), VOCABULARY)
    ended.on_chunk(TokenChunk(0, (1, END), ""))
    assert ended.finish == "stop"


@pytest.mark.parametrize(
    "request_",
    [
        ask(prompt=()),
        ask(tokens_max=63),
        ask(prompt=(10,)),
        ask(emitted=(END, 1)),
        ask(1, emitted=(1, 1)),
        ask(emitted=(-1,)),
    ],
)
def test_a_session_rejects_what_no_replica_could_continue(request_: GenerateRequest) -> None:
    with pytest.raises(Reject):
        Session(request_, VOCABULARY)


# --- text ----------------------------------------------------------------------------------------------------------


def decode_bytes(tokens) -> str:
    """A byte-level tokenizer: token 256 is special, the others are bytes."""
    return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


@given(st.text(max_size=60), st.data())
def test_pieces_of_text_join_to_the_whole_and_never_split_a_character(text: str, data) -> None:
    tokens = [*text.encode("utf-8", errors="surrogatepass"), 256] if "\ufffd" not in text else []
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    detokenizer, pieces = Detokenizer(decode_bytes), []
    while tokens:
        size = data.draw(st.integers(1, 5))
        pieces.append(detokenizer.push(tokens[:size]))
        tokens = tokens[size:]
    assert all("\ufffd" not in piece for piece in pieces)
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == (text if "\ufffd" not in text else "")


@given(st.lists(st.integers(0, 256), max_size=100))
def test_pieces_of_any_bytes_join_to_the_whole(tokens: list[int]) -> None:
    detokenizer = Detokenizer(decode_bytes)
    assert detokenizer.push(tokens) + detokenizer.flush() == decode_bytes(tokens)


def test_a_long_run_of_broken_bytes_keeps_the_window_bounded() -> None:
    longest = 0

    def decode(tokens) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode_bytes(tokens)

    detokenizer = Detokenizer(decode)
    shown = detokenizer.push([0x80] * 2_000 + list(b"good")) + detokenizer.flush()
    assert shown.endswith("good")
    assert longest <= 300


@given(
    st.text(alphabet="ab", max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 4), min_size=1),
)
@settings(max_examples=300)
def test_text_is_cut_at_the_first_stop_string_wherever_pieces_end(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    filter_, shown, rest, index = StopStrings(stops), "", text, 0
    while rest:
        size = sizes[index % len(sizes)]
        shown, rest, index = shown + filter_.push(rest[:size]), rest[size:], index + 1
        if filter_.is_stopped:
            break
    shown += filter_.flush()
    # the stream stops where the first stop string is complete; of those complete there, the earliest start counts
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert filter_.is_stopped == bool(ends)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if not ends:
        assert shown == text


# --- sampling ------------------------------------------------------------------------------------------------------

logits = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40).map(
    lambda values: np.array(values, np.float32)
)


@given(logits, st.integers(0, 2**63 - 1), st.integers(0, 10_000))
def test_greedy_takes_the_first_maximum(values, seed: int, position: int) -> None:
    assert choose_token(values, 0, 1000, seed, position) == int(np.argmax(values))
    assert choose_token(values, 700, 1, seed, position) == int(np.argmax(values))  # the smallest nucleus


@given(logits, st.integers(1, 5_000), st.integers(1, 1000), st.integers(0, 2**63 - 1), st.integers(0, 10_000))
def test_a_draw_is_inside_the_nucleus_and_depends_on_nothing_but_seed_and_position(
    values, temperature: int, top_p: int, seed: int, position: int
) -> None:
    token = choose_token(values, temperature, top_p, seed, position)
    assert token == choose_token(values.copy(), temperature, top_p, seed, position)
    weights = np.exp((values.astype(np.float64) - values.max()) / (temperature / 1000))
    above = weights[weights > weights[token]].sum() / weights.sum()
    assert above < top_p / 1000 + 1e-9


def test_draws_follow_the_softmax() -> None:
    values = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    draws = np.bincount([choose_token(values, 1000, 1000, 3, position) for position in range(4_000)], minlength=3)
    assert np.abs(draws / 4_000 - [0.5, 0.3, 0.2]).max() < 0.03


def test_uniforms_differ_by_seed_and_position() -> None:
    assert len({compute_uniform(seed, position) for seed in range(20) for position in range(20)}) == 400
    assert all(0 <= compute_uniform(seed, 0) < 1 for seed in range(100))


@given(
    logits,
    st.integers(1, 40),
    st.integers(0, 5_000),
    st.integers(1, 1000),
    st.integers(0, 2**63 - 1),
    st.integers(0, 10_000),
)
def test_the_likeliest_tokens_give_the_same_draw_or_say_that_it_takes_more(
    values, num_known: int, temperature: int, top_p: int, seed: int, position: int
) -> None:
    values = np.round(values * 256) / 256  # what log-probabilities tell apart: of 0 and 1e-39 they are equal
    shifted = values.astype(np.float64) - values.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    order = sorted(range(len(values)), key=lambda token: (-logprobs[token], token))
    known = [(token, float(logprobs[token])) for token in order[:num_known]]
    drawn = choose_from_likeliest(known, len(values), temperature, top_p, seed, position)
    assert drawn in (None, choose_token(values, temperature, top_p, seed, position))
    assert drawn is not None or num_known < len(values)
