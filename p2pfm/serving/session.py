"""One client's token stream, as the gateway holds it: the only durable state of a generation.

Prompt ids, emitted ids and sampler parameters are all that another replica needs to go on at the very position (Petals'
client-side state, without its mistake: a replacement starts at the replayed length, not at 0). Knows no replica, socket
or model; turns tokens to text with a function that it is given.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from p2pfm.errors import Reject
from p2pfm.messages import GenerateRequest, TokenChunk
from p2pfm.types import Digest

Finish = Literal["", "stop", "length"]
"""Why a stream ended: its end-of-text token (or a stop string), or its token limit; "": it has not."""

BUSY = "busy"
"""`TokenChunk.finish` of a replica whose sessions are all taken."""

UNKNOWN_VERSION = "unknown_version"
"""`TokenChunk.finish` of a replica that does not hold the adapter version (any more)."""

INVALID = "invalid"
"""`TokenChunk.finish` of a replica that finds the request itself impossible: the asker's fault, never the replica's."""

FAILED = "error"
"""`TokenChunk.finish` of a replica that broke while it generated."""

REFUSALS = (BUSY, UNKNOWN_VERSION, INVALID, FAILED)

REPLACEMENT = "\ufffd"
"""What decoders give for bytes that are not (yet) a whole UTF-8 character."""

UNSETTLED_CHARACTERS_MAX = 4
"""A UTF-8 character has at most 4 bytes, so more replacement characters than that at the end are final."""

WINDOW_TOKENS_MAX = 256
"""Tokens decoded again for each new one, at most: only a long run of broken UTF-8 reaches it."""


class UnknownVersion(Reject):
    """The request names an adapter version that this replica does not hold."""


class BrokenLogits(ArithmeticError):
    """The model gave something that is not a number: this replica cannot answer."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a token may be: ids are in [0, size); a token of `ends` closes the stream; a context holds `context_max`."""

    size: int
    ends: frozenset[int]
    context_max: int


class Session:
    """A stream's state. It accepts only the next position, so no token is ever lost or doubled."""

    def __init__(self, request: GenerateRequest, vocabulary: Vocabulary) -> None:
        """Start from `request` (its `emitted` is kept: a client may resume its own stream).

        Raises:
            Reject: tokens outside of the vocabulary, or more than the context or the request's own limit holds.
        """
        validate_request(request, vocabulary)
        self._request = request
        self._vocabulary = vocabulary
        self._emitted: list[int] = list(request.emitted)

    @property
    def version(self) -> Digest:
        """The one adapter version of this stream, from its first to its last token."""
        return self._request.version

    @property
    def emitted(self) -> tuple[int, ...]:
        """Tokens generated so far, the end-of-text token included."""
        return tuple(self._emitted)

    @property
    def finish(self) -> Finish:
        """Known from the tokens alone, so a replica that dies after the last token leaves nothing open."""
        if self._emitted and self._emitted[-1] in self._vocabulary.ends:
            return "stop"
        return "length" if len(self._emitted) >= self._request.tokens_max else ""

    def on_chunk(self, chunk: TokenChunk) -> tuple[int, ...]:
        """The tokens of `chunk` that are new; duplicates give nothing. An empty chunk only says "still working".

        Raises:
            Reject: a gap, a token other than the one already held, one outside of the vocabulary or after the end,
                or a finish that the tokens do not bear out.
        """
        position = len(self._emitted)
        if chunk.position > position:
            raise Reject(f"expected tokens from position {position} at most, got {chunk.position}: some are lost")
        overlap = position - chunk.position
        held = self._emitted[chunk.position : chunk.position + len(chunk.tokens)]
        if list(chunk.tokens[:overlap]) != held:
            raise Reject(f"expected tokens from position {chunk.position} to repeat what came before; they differ")
        num_logprobs = len(chunk.tokens) if self._request.num_logprobs else 0
        if len(chunk.logprobs) != num_logprobs:
            raise Reject(f"expected {num_logprobs} tokens' log-probabilities, got {len(chunk.logprobs)}")
        new = chunk.tokens[overlap:]
        total = position + len(new)
        if new and self.finish:
            raise Reject(f"expected nothing after a stream that ended ({self.finish}), got {len(new)} more tokens")
        if total > self._request.tokens_max:
            raise Reject(f"expected at most {self._request.tokens_max} tokens, got {total}")
        if any(not 0 <= token < self._vocabulary.size for token in new):
            raise Reject(f"expected token ids from 0 to {self._vocabulary.size - 1}, got one outside")
        if self._vocabulary.ends.intersection(new[:-1]):
            raise Reject("expected nothing after the end-of-text token, got more tokens")
        last = new[-1] if new else self._emitted[-1] if self._emitted else -1
        end = "stop" if last in self._vocabulary.ends else "length" if total == self._request.tokens_max else ""
        is_latest = chunk.position + len(chunk.tokens) >= position
        if is_latest and chunk.finish not in ("", end):
            raise Reject(f"expected finish {end!r} or none after {total} tokens, got {chunk.finish!r}")
        self._emitted.extend(new)
        return new

    def resume_request(self) -> GenerateRequest:
        """What to ask of the next replica: the same stream, from the position after the last token held."""
        request = self._request
        return GenerateRequest(
            version=request.version,
            prompt=request.prompt,
            emitted=tuple(self._emitted),
            tokens_max=request.tokens_max,
            temperature_milli=request.temperature_milli,
            top_p_milli=request.top_p_milli,
            seed=request.seed,
            num_logprobs=request.num_logprobs,
        )


def validate_request(request: GenerateRequest, vocabulary: Vocabulary) -> None:
    """Refuse a stream that no replica could continue: checked by the gateway, and again by the replica.

    Raises:
        Reject: says the limit, and what came.
    """
    if not request.prompt:
        raise Reject("expected a prompt of at least one token, got none")
    total = len(request.prompt) + request.tokens_max
    if total > vocabulary.context_max:
        raise Reject(
            f"expected at most {vocabulary.context_max} tokens of context, got {len(request.prompt)} in the prompt "
            f"and up to {request.tokens_max} to generate"
        )
    if any(not 0 <= token < vocabulary.size for token in (*request.prompt, *request.emitted)):
        raise Reject(f"expected token ids from 0 to {vocabulary.size - 1}, got one outside")
    if len(request.emitted) > request.tokens_max:
        raise Reject(f"expected at most {request.tokens_max} emitted tokens, got {len(request.emitted)}")
    if vocabulary.ends.intersection(request.emitted[:-1]):
        raise Reject("expected nothing after the end-of-text token in what was emitted, got more tokens")


class Detokenizer:
    """Text of a growing token sequence, never cut inside a UTF-8 character.

    The joined pieces (with `flush`) equal `decode` of all tokens. Only a short window is decoded for each new token.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """`decode` is the tokenizer's own: tokens in, text out, special tokens left out."""
        self._decode = decode
        self._window: list[int] = []
        self._num_context = 0
        """Tokens at the window's start that are there only because the next ones' text depends on them."""
        self._num_given = 0
        """Characters of the window's text that were already given out."""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that `tokens` settle; a character's first bytes wait for its last."""
        return "".join(self._push_one(token) for token in tokens)

    def flush(self) -> str:
        """The rest, when no more tokens come."""
        text = self._decode(self._window)[self._num_given :]
        self._window, self._num_context, self._num_given = [], 0, 0
        return text

    def _push_one(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        settled = _settled(text)
        new = settled[self._num_given :]
        self._num_given = max(self._num_given, len(settled))
        if len(settled) == len(text) or len(self._window) > WINDOW_TOKENS_MAX:
            # what was new becomes the context of what comes
            self._window = self._window[self._num_context :][-WINDOW_TOKENS_MAX // 2 :]
            self._num_context = len(self._window)
            self._num_given = len(_settled(self._decode(self._window)))
        return new


class StopStrings:
    """Cuts a text at the first stop string, wherever chunk borders fall."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Empty strings never stop anything."""
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """The part of the text that can be shown: before a stop string, and not possibly its beginning."""
        if self.is_stopped:
            return ""
        self._held += text
        found = [index for stop in self._stops if (index := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((_num_shared(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back because it might have become a stop string."""
        shown, self._held = self._held, ""
        return shown


def _settled(text: str) -> str:
    """`text` without the replacement characters at its end that further bytes may still turn into a character."""
    num_open = len(text) - len(text.rstrip(REPLACEMENT))
    return text[: len(text) - min(num_open, UNSETTLED_CHARACTERS_MAX)]


def _num_shared(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
