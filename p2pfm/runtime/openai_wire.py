"""What OpenAI's API says on the wire: request bodies and their rules, and errors (`openai_answers` has the answers).

Knows no gateway, server or model: bytes and prompt tokens in, a `Completion` out.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import msgspec

from p2pfm.messages import LOGPROBS_MAX, GenerateRequest
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


CHOICES_MAX = 8
"""Answers to one prompt, `n`: each takes a session of a replica."""

TEXT_LOGPROBS_MAX = 5
"""Alternatives a token that /v1/completions gives, as OpenAI's does."""


Text = Annotated[str, msgspec.Meta(min_length=1)]

Token = Annotated[int, msgspec.Meta(ge=0)]
Stop = Annotated[str, msgspec.Meta(max_length=STOP_CHARACTERS_MAX)]


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
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**SEED_BITS - 1)] | None = None
    stop: Stop | Annotated[tuple[Stop, ...], msgspec.Meta(max_length=STOPS_MAX)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=CHOICES_MAX)] | None = None


class ChatBody(CompletionParameters, frozen=True, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: Annotated[tuple[ChatMessage, ...], msgspec.Meta(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=LOGPROBS_MAX)] | None = None

    @property
    def num_logprobs(self) -> int:
        """`GenerateRequest.num_logprobs`. Raises: ApiError, 400; alternatives to what is not asked for."""
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs: expected logprobs to be true with it.", "invalid_value", "top_logprobs")
        return 1 + (self.top_logprobs or 0) if self.logprobs else 0


class TextBody(CompletionParameters, frozen=True, kw_only=True):
    """Body of /v1/completions; `prompt` is a text, one text in a list, or token ids."""

    prompt: Text | Annotated[tuple[Text | Token, ...], msgspec.Meta(min_length=1)]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=TEXT_LOGPROBS_MAX)] | None = None

    @property
    def num_logprobs(self) -> int:
        """`GenerateRequest.num_logprobs`."""
        return 0 if self.logprobs is None else 1 + self.logprobs

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


HARMLESS: tuple[object, ...] = (None, False, 0, 0.0, [], {})
"""Values of parameters that are not served that ask for nothing."""

UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "tools": (), "functions": (), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "echo": (),
    "suffix": ("",), "logit_bias": (), "presence_penalty": (), "frequency_penalty": (), "repetition_penalty": (1, 1.0),
    "response_format": ({"type": "text"},), "audio": (), "modalities": (["text"],), "best_of": (1,),
    "web_search_options": (), "top_k": (-1,), "min_p": (), "ignore_eos": (), "min_tokens": (), "use_beam_search": (),
}  # fmt: skip
"""Parameters that would change the answer and are not served: refused when set, never silently ignored. Beside each,
what else asks for nothing."""


class ApiError(Exception):
    """An answer in OpenAI's error form."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        """`code`: OpenAI's word for it; `param`: the field at fault."""
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> bytes:
        """An `ErrorAnswer`."""
        kind = ERROR_KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return msgspec.json.encode(ErrorAnswer(ErrorDetail(self.message, kind, self.param, self.code)))


ERROR_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
"""OpenAI's names for what else than the request itself may be wrong."""


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong: in words, for programs (`code`), and which field is at fault."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(msgspec.Struct, frozen=True):
    """Every error of every route."""

    error: ErrorDetail


@dataclass(frozen=True, slots=True)
class Completion:
    """A validated request of a client."""

    request: GenerateRequest
    """Of the first choice."""
    model: str
    stops: tuple[str, ...]
    is_chat: bool
    is_stream: bool
    wants_usage: bool
    num_choices: int = 1
    client: str = ""
    """Name of the API key that the client showed; "" where none is asked for."""
    stream: Digest | None = None
    """Its name where it is kept. `request.emitted` is what was generated before."""
    created_s: int = 0
    """When it began [s since 1970], where it is kept."""
    num_received: int = 0
    """Tokens whose text the client has from an earlier connection."""

    def choice_request(self, index: int) -> GenerateRequest:
        """The request of choice `index`: the same, but for a seed of its own."""
        return msgspec.structs.replace(self.request, seed=(self.request.seed + index) % 2**SEED_BITS)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one request may ask of a node, beyond what the API's own types allow."""

    prompt_tokens_max: int = 0
    """0: what the context holds."""
    choices_max: int = CHOICES_MAX


Body = TypeVar("Body", bound=msgspec.Struct)


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
    for name, besides in UNSUPPORTED.items():
        if fields.get(name) not in HARMLESS + besides:
            raise ApiError(400, f"{name}: not served here; leave it out.", "unsupported_parameter", name)
    # JSON knows no integers: 16.0 is 16, and some languages write it so.
    whole = {name: int(value) for name, value in fields.items() if isinstance(value, float) and value.is_integer()}
    try:
        return msgspec.convert({**fields, **whole}, kind)
    except msgspec.ValidationError as error:
        # msgspec ends with the place: "Expected `str`, got `int` - at `$.messages[0].content`"
        rule, _, place = str(error).replace("`", "").partition(" - at $.")
        got = f", got {_shorten(fields[place])}" if place in fields and ", got " not in rule else ""
        message = f"{place}: {rule[:1].lower()}{rule[1:]}{got}." if place else f"{rule}."
        raise ApiError(400, message, "invalid_type", place or None) from error


SHOWN_CHARACTERS_MAX = 80
"""Of a value in an error's message."""


def _shorten(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= SHOWN_CHARACTERS_MAX else f"{text[:SHOWN_CHARACTERS_MAX]}..."


def build_completion(
    body: ChatBody | TextBody,
    prompt: tuple[int, ...],
    version: Digest,
    vocabulary: Vocabulary,
    bounds: Bounds,
    client: str = "",
) -> Completion:
    """What `body` asks for, of adapter `version`. Without a seed one is drawn, so that a resume can repeat the draws.

    Raises:
        ApiError: 400; a value out of its range, or more tokens than the context holds.
    """
    asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    stops = (body.stop,) if isinstance(body.stop, str) else body.stop or ()
    num_choices = 1 if body.n is None else body.n
    prompt_field = "messages" if isinstance(body, ChatBody) else "prompt"
    checks = (
        ("n", num_choices <= bounds.choices_max, f"expected at most {bounds.choices_max} here, got {num_choices}"),
        (prompt_field, bool(prompt), "expected at least one token, got none"),
        (prompt_field, all(0 <= t < vocabulary.size for t in prompt), f"expected token ids below {vocabulary.size}"),
    )
    for name, is_good, rule in checks:
        if not is_good:
            raise ApiError(400, f"{name}: {rule}.", "invalid_value", name)
    if 0 < bounds.prompt_tokens_max < len(prompt):
        message = (
            f"This node takes prompts of at most {bounds.prompt_tokens_max} tokens; this one has {len(prompt)}. "
            "Shorten it, or ask another node."
        )
        raise ApiError(400, message, "context_length_exceeded", prompt_field)
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
        num_logprobs=body.num_logprobs,
    )
    wants_usage = body.stream_options is not None and body.stream_options.include_usage
    is_chat, is_stream = isinstance(body, ChatBody), bool(body.stream)
    return Completion(request, body.model, stops, is_chat, is_stream, wants_usage, num_choices, client)


LAST_EVENT = b"data: [DONE]\n\n"


def write_event(data: bytes) -> bytes:
    """A server-sent event."""
    return b"data: " + data + b"\n\n"
