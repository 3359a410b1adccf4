"""What OpenAI's API says on the wire: request bodies and their rules, answers, chunks and errors.

Knows no gateway, server or model: bytes and prompt tokens in, a `Completion` or JSON out.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec

from p2pfm.messages import GenerateRequest
from p2pfm.serving.session import Vocabulary
from p2pfm.types import Digest

TOKENS_DEFAULT = 256
"""`max_tokens` of a request that names none."""

SEED_BITS = 63
"""Seeds drawn for a client that gives none fit the wire's integers."""

STOPS_MAX = 16
STOP_CHARACTERS_MAX = 256
"""Bounds what is searched for in every piece of text."""

RETRY_AFTER_S = 1
"""What a 429 advises: a session ends about that often on a busy node."""


class StreamOptions(msgspec.Struct, frozen=True):
    """`stream_options` of a request."""

    include_usage: bool = False


class TextPart(msgspec.Struct, frozen=True):
    """A part of a message's content; only text is served."""

    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[TextPart, ...] | None = None

    def plain(self) -> dict[str, str]:
        """What a chat template takes."""
        parts = self.content if isinstance(self.content, tuple) else ()
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class CompletionParameters(msgspec.Struct, frozen=True, kw_only=True):
    """What both completion endpoints take. Unknown fields that change nothing are let through, as OpenAI does."""

    model: str
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | tuple[str, ...] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None


class ChatBody(CompletionParameters, frozen=True, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: tuple[ChatMessage, ...]


class TextBody(CompletionParameters, frozen=True, kw_only=True):
    """Body of /v1/completions; `prompt` is a text, one text in a list, or token ids."""

    prompt: str | tuple[str | int, ...]

    def one_prompt(self) -> str | tuple[int, ...]:
        """The text, or its tokens.

        Raises:
            ApiError: 400; several prompts, or texts and tokens mixed.
        """
        if isinstance(self.prompt, str):
            return self.prompt
        texts = [item for item in self.prompt if isinstance(item, str)]
        tokens = tuple(item for item in self.prompt if isinstance(item, int))
        if texts and (tokens or len(texts) > 1):
            raise ApiError(400, "prompt: expected one text or one list of token ids.", "invalid_value", "prompt")
        return texts[0] if texts else tokens


UNSUPPORTED = (
    "tools", "functions", "logprobs", "top_logprobs", "echo", "suffix", "logit_bias", "presence_penalty",
    "frequency_penalty", "response_format", "audio",
)  # fmt: skip
"""Parameters that would change the answer and are not served: refused when set, never silently ignored."""

HARMLESS: tuple[object, ...] = (None, False, 0, 0.0, [], {}, {"type": "text"})
"""Values of them that ask for nothing."""


class ApiError(Exception):
    """An answer in OpenAI's error form."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        """`code`: OpenAI's word for it; `param`: the field at fault."""
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> bytes:
        """{"error": ...}."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


@dataclass(frozen=True, slots=True)
class Completion:
    """A validated request of a client."""

    request: GenerateRequest
    model: str
    stops: tuple[str, ...]
    is_chat: bool
    is_stream: bool
    wants_usage: bool


Body = TypeVar("Body", ChatBody, TextBody)


def decode_body(data: bytes, kind: type[Body]) -> Body:
    """The validated body of a request.

    Raises:
        ApiError: 400; not JSON, a wrong type, or a parameter that is not served.
    """
    try:
        fields = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", "invalid_json") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "The body must be a JSON object.", "invalid_json")
    for name in UNSUPPORTED:
        if fields.get(name) not in HARMLESS:
            raise ApiError(400, f"{name}: not served here; leave it out.", "unsupported_parameter", name)
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        # msgspec ends with the place: "Expected `str`, got `int` - at `$.messages[0].content`"
        place = str(error).rpartition("`$.")[2].rstrip("`") if "`$." in str(error) else None
        raise ApiError(400, f"{error}.", "invalid_type", place) from error


def build_completion(
    body: CompletionParameters, prompt: tuple[int, ...], version: Digest, vocabulary: Vocabulary
) -> Completion:
    """What `body` asks for, of adapter `version`. Without a seed one is drawn, so that a resume can repeat the draws.

    Raises:
        ApiError: 400; a value out of its range, or more tokens than the context holds.
    """
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    stops = (body.stop,) if isinstance(body.stop, str) else body.stop or ()
    prompt_field = "messages" if isinstance(body, ChatBody) else "prompt"
    checks = (
        ("n", body.n in (None, 1), "only 1 is served; send several requests"),
        ("max_tokens", asked is None or asked >= 1, "expected at least 1"),
        ("temperature", 0 <= temperature <= 2, "expected 0 to 2"),
        ("top_p", 0 < top_p <= 1, "expected more than 0, at most 1"),
        ("seed", body.seed is None or 0 <= body.seed < 2**SEED_BITS, f"expected 0 to 2**{SEED_BITS} - 1"),
        ("stop", len(stops) <= STOPS_MAX, f"expected at most {STOPS_MAX} strings"),
        ("stop", all(len(stop) <= STOP_CHARACTERS_MAX for stop in stops), f"at most {STOP_CHARACTERS_MAX} characters"),
        (prompt_field, bool(prompt), "expected at least one token, got none"),
        (prompt_field, all(0 <= t < vocabulary.size for t in prompt), f"expected token ids below {vocabulary.size}"),
    )
    for name, is_good, rule in checks:
        if not is_good:
            raise ApiError(400, f"{name}: {rule}.", "invalid_value", name)
    room = vocabulary.context_max - len(prompt)
    tokens_max = min(TOKENS_DEFAULT, max(room, 1)) if asked is None else asked
    if tokens_max > room:
        message = (
            f"This model's maximum context length is {vocabulary.context_max} tokens; the prompt has {len(prompt)} and "
            f"{tokens_max} were asked for. Shorten the prompt or lower max_tokens."
        )
        raise ApiError(400, message, "context_length_exceeded", prompt_field)
    request = GenerateRequest(
        version=version,
        prompt=prompt,
        emitted=(),
        tokens_max=tokens_max,
        temperature_milli=round(temperature * 1000),
        top_p_milli=max(1, round(top_p * 1000)),
        seed=secrets.randbits(SEED_BITS) if body.seed is None else body.seed,
    )
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    return Completion(request, body.model, stops, isinstance(body, ChatBody), bool(body.stream), wants_usage)


class Writer:
    """The JSON of one answer, whole or in chunks."""

    def __init__(self, completion: Completion, created_s: int) -> None:
        """`created_s`: seconds since the Unix epoch."""
        self._completion = completion
        is_chat = completion.is_chat
        self._common = {
            "id": ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12),
            "created": created_s,
            "model": completion.model,
        }

    def whole(self, text: str, finish: str, num_tokens: int, extra: Mapping[str, Any]) -> bytes:
        """The answer of a request that does not stream."""
        if self._completion.is_chat:
            part: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
            kind = "chat.completion"
        else:
            part, kind = {"text": text}, "text_completion"
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": finish}
        body = {**self._common, "object": kind, "choices": [choice], "usage": self._usage(num_tokens), "p2pfm": extra}
        return msgspec.json.encode(body)

    def chunk(self, text: str, finish: str, extra: Mapping[str, Any], *, is_first: bool) -> bytes:
        """A server-sent event with a piece of text."""
        if self._completion.is_chat:
            role = {"role": "assistant"} if is_first else {}
            part: dict[str, Any] = {"delta": {**role, **({"content": text} if text or is_first else {})}}
        else:
            part = {"text": text}
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": finish or None}
        return self._event([choice], extra, {"usage": None} if self._completion.wants_usage else {})

    def usage_chunk(self, num_tokens: int, extra: Mapping[str, Any]) -> bytes:
        """The event that `stream_options.include_usage` asks for, before the end."""
        return self._event([], extra, {"usage": self._usage(num_tokens)})

    def _event(self, choices: list[Any], extra: Mapping[str, Any], rest: Mapping[str, Any]) -> bytes:
        kind = "chat.completion.chunk" if self._completion.is_chat else "text_completion"
        return write_event(
            msgspec.json.encode({**self._common, "object": kind, "choices": choices, **rest, "p2pfm": extra})
        )

    def _usage(self, num_tokens: int) -> dict[str, int]:
        num_prompt = len(self._completion.request.prompt)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt + num_tokens,
        }


LAST_EVENT = b"data: [DONE]\n\n"


def write_event(data: bytes) -> bytes:
    """A server-sent event."""
    return b"data: " + data + b"\n\n"
