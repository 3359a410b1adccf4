"""What a llama.cpp or a vLLM server is asked and answers, as bytes: their own HTTP interfaces, with token ids in them.

Knows no socket and no stream. Neither server is asked to sample: a greedy request gives the argmax, any other asks for
a place's likeliest tokens, and `serving.sampling` draws. Answers come whole, a few tokens at a time: llama.cpp leaves
the ids of split UTF-8 characters out of its event streams.
"""

from typing import Any, Protocol, TypeVar

import msgspec

from p2pfm.runtime.backend import BackendFailed
from p2pfm.types import Digest

Answer = TypeVar("Answer")

Likeliest = tuple[tuple[int, float], ...]
"""(token, log-probability) before temperature and top_p, by (falling log-probability, token)."""

LOGPROB_MIN = -1000.0
"""Servers write a probability of 0 in several ways, all below this."""


class Ask(msgspec.Struct, frozen=True):
    """One POST: where, and its JSON."""

    path: str
    body: dict[str, Any]


class Dialect(Protocol):
    """How one kind of server is spoken with."""

    def ask_text(self, text: str) -> Ask:
        """What tokens does it make of `text`?"""
        ...

    def read_text(self, data: bytes) -> tuple[int, ...]:
        """They. Raises: BackendFailed, as all that read."""
        ...

    def ask_tokens(self, version: Digest, prompt: tuple[int, ...], num_tokens: int, slot: int) -> Ask:
        """The next `num_tokens` after `prompt`, each the likeliest."""
        ...

    def read_tokens(self, data: bytes) -> tuple[int, ...]:
        """They: fewer where the server ends a text, and perhaps more than one end."""
        ...

    def ask_likeliest(self, version: Digest, prompt: tuple[int, ...], num_likeliest: int, slot: int) -> Ask:
        """So many of the likeliest tokens after `prompt`."""
        ...

    def read_likeliest(self, data: bytes) -> Likeliest:
        """They."""
        ...


class LlamaCpp:
    """llama.cpp's server (`llama-server`). It holds one model, the backbone; a slot keeps one stream's keys."""

    def __init__(self, plain: int) -> None:
        """`plain`: a token of whole characters that ends no text."""
        self._plain = plain

    def ask_text(self, text: str) -> Ask:
        """Special tokens are read as such, and none is added."""
        return Ask("/tokenize", {"content": text, "add_special": False, "parse_special": True})

    def read_text(self, data: bytes) -> tuple[int, ...]:
        """Its ids."""
        return tuple(decode_answer(data, _LlamaText).tokens)

    def ask_tokens(self, version: Digest, prompt: tuple[int, ...], num_tokens: int, slot: int) -> Ask:
        """Greedy, whatever the operator's defaults are."""
        return self._ask(prompt, num_tokens, slot)

    def read_tokens(self, data: bytes) -> tuple[int, ...]:
        """The end of text, if it came to one, is among them."""
        return tuple(decode_answer(data, _LlamaAnswer).tokens)

    def ask_likeliest(self, version: Digest, prompt: tuple[int, ...], num_likeliest: int, slot: int) -> Ask:
        """The probabilities are those before any bias; but none are told where its own token is half a character, so it
        is made to choose another.
        """
        return self._ask(prompt, 1, slot, n_probs=num_likeliest, logit_bias=[[self._plain, 10_000.0]])

    def read_likeliest(self, data: bytes) -> Likeliest:
        """Of the one place."""
        places = decode_answer(data, _LlamaAnswer).completion_probabilities
        if len(places) != 1:
            raise BackendFailed(f"expected probabilities of one place, got {len(places)}")
        return _sort([(one.id, one.logprob) for one in places[0].top_logprobs])

    def _ask(self, prompt: tuple[int, ...], num_tokens: int, slot: int, **more: Any) -> Ask:
        body = {
            "prompt": prompt,
            "n_predict": num_tokens,
            "temperature": 0,
            "samplers": ["temperature"],
            "logit_bias": [],
            "stop": [],
            "return_tokens": True,
            "cache_prompt": True,
            "id_slot": slot,
            "response_fields": ["tokens", "completion_probabilities"],
        }
        return Ask("/completion", body | more)


class _LlamaText(msgspec.Struct):
    tokens: list[int]


class _LlamaOne(msgspec.Struct):
    id: int
    logprob: float


class _LlamaPlace(msgspec.Struct):
    top_logprobs: list[_LlamaOne]


class _LlamaAnswer(msgspec.Struct):
    tokens: list[int]
    completion_probabilities: list[_LlamaPlace] = []


class Vllm:
    """vLLM's OpenAI server: the backbone by the name that it is served as, bases by their digests."""

    def __init__(self, model: str, backbone: Digest) -> None:
        """`model`: of `/v1/models`; `backbone`: the version that means it."""
        self._model, self._backbone = model, backbone

    def ask_text(self, text: str) -> Ask:
        """As `LlamaCpp.ask_text`."""
        return Ask("/tokenize", {"model": self._model, "prompt": text, "add_special_tokens": False})

    def read_text(self, data: bytes) -> tuple[int, ...]:
        """Its ids."""
        return tuple(decode_answer(data, _LlamaText).tokens)

    def ask_tokens(self, version: Digest, prompt: tuple[int, ...], num_tokens: int, slot: int) -> Ask:
        """Greedy. It goes on after an end of text: where a text ends is for us to see."""
        return self._ask(version, prompt, num_tokens)

    def read_tokens(self, data: bytes) -> tuple[int, ...]:
        """`token_ids` of its only choice."""
        return tuple(self._choice(data).token_ids)

    def ask_likeliest(self, version: Digest, prompt: tuple[int, ...], num_likeliest: int, slot: int) -> Ask:
        """Before temperature and penalties, as vLLM does unless its `--logprobs-mode` says otherwise."""
        return self._ask(version, prompt, 1, logprobs=num_likeliest, return_tokens_as_token_ids=True)

    def read_likeliest(self, data: bytes) -> Likeliest:
        """Tokens are keys like token_id:5."""
        told = self._choice(data).logprobs
        if told is None or len(told.top_logprobs) != 1:
            raise BackendFailed("expected log-probabilities of one place")
        try:
            return _sort([(int(key.removeprefix("token_id:")), one) for key, one in told.top_logprobs[0].items()])
        except ValueError as error:
            raise BackendFailed(f"expected tokens as token_id:N: {error}") from error

    def get_name(self, version: Digest) -> str:
        """What the server calls it."""
        return self._model if version == self._backbone else version.hex()

    def _ask(self, version: Digest, prompt: tuple[int, ...], num_tokens: int, **more: Any) -> Ask:
        body = {
            "model": self.get_name(version),
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        return Ask("/v1/completions", body | more)

    @staticmethod
    def _choice(data: bytes) -> "_VllmChoice":
        choices = decode_answer(data, _VllmAnswer).choices
        if len(choices) != 1:
            raise BackendFailed(f"expected one choice, got {len(choices)}")
        return choices[0]


class _VllmLogprobs(msgspec.Struct):
    top_logprobs: list[dict[str, float]]


class _VllmChoice(msgspec.Struct):
    token_ids: list[int]
    logprobs: _VllmLogprobs | None = None


class _VllmAnswer(msgspec.Struct):
    choices: list[_VllmChoice]


def _sort(pairs: list[tuple[int, float]]) -> Likeliest:
    floored = [(token, max(logprob, LOGPROB_MIN)) for token, logprob in pairs]
    return tuple(sorted(floored, key=lambda pair: (-pair[1], pair[0])))


def decode_answer(data: bytes, kind: type[Answer]) -> Answer:
    """The struct `kind` in its JSON. Raises: BackendFailed."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BackendFailed(f"expected its documented answer, got {data[:80]!r}: {error}") from error
