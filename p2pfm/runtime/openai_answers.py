"""OpenAI's answers as structs, from which the OpenAPI document is made too, and what writes them from choices.

Knows no gateway, server or model: text and tokens in, JSON out.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from p2pfm.messages import TokenLogprobs
from p2pfm.runtime.openai_wire import Completion, write_event
from p2pfm.types import Digest, PeerId

MICRO_NATS_PER_NAT = 10**6
"""The wire counts in these."""

Finish = Literal["stop", "length"]


class Origin(msgspec.Struct, frozen=True):
    """Which replica answered with which adapter version [hex], and how many failed before it."""

    replica: str
    version: str
    replaced: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens; those of all choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(msgspec.Struct, frozen=True):
    """A token that could stand at a place: its text, its UTF-8 bytes, and its log-probability [nats]."""

    token: str
    logprob: float
    bytes: tuple[int, ...]


class TokenLogprob(TopLogprob, frozen=True):
    """The token that does stand there, and the likeliest."""

    top_logprobs: tuple[TopLogprob, ...]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Of each token of a message."""

    content: tuple[TokenLogprob, ...]
    refusal: None = None


class TextLogprobs(msgspec.Struct, frozen=True):
    """The same in the form of /v1/completions; `text_offset` [characters] counts from the text's beginning."""

    tokens: tuple[str, ...]
    token_logprobs: tuple[float, ...]
    top_logprobs: tuple[dict[str, float], ...]
    text_offset: tuple[int, ...]


class Message(msgspec.Struct, frozen=True):
    """The assistant's turn."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer to a conversation."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    p2pfm: Origin


class TextChoice(msgspec.Struct, frozen=True):
    """One continuation of a text."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish
    p2pfm: Origin


class ChatAnswer(msgspec.Struct, frozen=True):
    """/v1/chat/completions; `p2pfm` is of the first choice."""

    id: str
    created: int
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage
    p2pfm: Origin
    object: Literal["chat.completion"] = "chat.completion"


class TextAnswer(msgspec.Struct, frozen=True):
    """/v1/completions; `p2pfm` is of the first choice."""

    id: str
    created: int
    model: str
    choices: tuple[TextChoice, ...]
    usage: Usage
    p2pfm: Origin
    object: Literal["text_completion"] = "text_completion"


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """The next piece of one choice."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class TextChunkChoice(msgspec.Struct, frozen=True):
    """The next piece of one choice."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish | None


class ChatChunk(msgspec.Struct, frozen=True):
    """An event of a streamed chat; `p2pfm` is of its choice. `usage` only where asked for, null but in the last."""

    id: str
    created: int
    model: str
    choices: tuple[ChatChunkChoice, ...]
    p2pfm: Origin
    usage: Usage | UnsetType | None = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class TextChunk(msgspec.Struct, frozen=True):
    """An event of a streamed text, likewise."""

    id: str
    created: int
    model: str
    choices: tuple[TextChunkChoice, ...]
    p2pfm: Origin
    usage: Usage | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"


# --- from tokens to choices -------------------------------------------------------------------------------------------

TokenBytes = Callable[[int], bytes]
"""The UTF-8 bytes that a token stands for; a character may need several tokens."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's, and where its text begins [characters] in the answer."""

    token: int
    told: TokenLogprobs
    offset: int


class LogprobQueue:
    """Holds log-probabilities back until their tokens' text is shown, as a stop string may yet cut it off."""

    def __init__(self, get_bytes: TokenBytes, ends: frozenset[int]) -> None:
        """`ends`: tokens that end a stream; they are no part of its text."""
        self._get_bytes, self._ends = get_bytes, ends
        self._waiting: list[tuple[int, Logprob]] = []
        """With the byte where each begins."""
        self._num_bytes = 0
        self._num_bytes_shown = 0
        self._num_characters_shown = 0

    def push(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        """New tokens of the stream."""
        for token, told in zip(tokens, logprobs, strict=False):
            if token not in self._ends:
                self._waiting.append((self._num_bytes, Logprob(token, told, 0)))
                self._num_bytes += len(self._get_bytes(token))

    def pop(self, text: str, *, is_end: bool) -> tuple[Logprob, ...]:
        """Of the tokens that begin in `text`, shown now; at the end of the stream all that are left (`is_end`)."""
        data = text.encode()
        begin, self._num_bytes_shown = self._num_bytes_shown, self._num_bytes_shown + len(data)
        num = sum(1 for start, _ in self._waiting if is_end or start < self._num_bytes_shown)
        shown, self._waiting = self._waiting[:num], self._waiting[num:]
        characters = self._num_characters_shown
        self._num_characters_shown += len(text)
        return tuple(
            Logprob(logprob.token, logprob.told, characters + len(data[: start - begin].decode(errors="ignore")))
            for start, logprob in shown
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of one choice's text and where it came from."""

    index: int
    text: str
    finish: Literal["", "stop", "length"]
    num_tokens: int
    """Generated for this choice so far."""
    origin: Origin
    logprobs: tuple[Logprob, ...] = ()


def make_origin(replica: PeerId, version: Digest, num_replaced: int) -> Origin:
    """As JSON has it."""
    return Origin(replica, version.hex(), num_replaced)


@dataclass(slots=True)
class Choice:
    """A choice as it grows."""

    text: str = ""
    finish: Literal["", "stop", "length"] = ""
    num_tokens: int = 0
    origin: Origin | None = None
    logprobs: list[Logprob] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """The next piece of this choice."""
        self.text += piece.text
        self.finish, self.num_tokens, self.origin = piece.finish, piece.num_tokens, piece.origin
        self.logprobs.extend(piece.logprobs)


class Writer:
    """The JSON of one answer, whole or in chunks."""

    def __init__(self, completion: Completion, created_s: int, get_bytes: TokenBytes) -> None:
        """`created_s`: seconds since the Unix epoch."""
        self._completion, self._get_bytes = completion, get_bytes
        name = secrets.token_hex(16) if completion.stream is None else completion.stream.hex()
        self._id = ("chatcmpl-" if completion.is_chat else "cmpl-") + name
        self._created_s = created_s
        self._began: set[int] = {0} if completion.num_received else set()
        """Choices of which a chunk was written."""

    def whole(self, choices: Sequence[Choice]) -> bytes:
        """The answer of a request that does not stream."""
        head = (self._id, self._created_s, self._completion.model)
        usage = self._usage(sum(choice.num_tokens for choice in choices))
        origins = [choice.origin for choice in choices if choice.origin is not None]
        finishes = [choice.finish for choice in choices if choice.finish != ""]
        assert len(origins) == len(finishes) == len(choices), "a choice has no end"
        written = tuple(zip(choices, finishes, origins, strict=True))
        if self._completion.is_chat:
            chats = tuple(
                ChatChoice(index, Message(choice.text), self._chat_logprobs(choice.logprobs), finish, origin)
                for index, (choice, finish, origin) in enumerate(written)
            )
            return msgspec.json.encode(ChatAnswer(*head, chats, usage, origins[0]))
        texts = tuple(
            TextChoice(index, choice.text, self._text_logprobs(choice.logprobs), finish, origin)
            for index, (choice, finish, origin) in enumerate(written)
        )
        return msgspec.json.encode(TextAnswer(*head, texts, usage, origins[0]))

    def chunk(self, piece: Piece) -> bytes:
        """A server-sent event with a piece of text; of a kept stream its `id` says how many tokens there are by now."""
        is_first = piece.index not in self._began
        self._began.add(piece.index)
        finish = None if piece.finish == "" else piece.finish
        usage = None if self._completion.wants_usage else UNSET
        mark = b"" if self._completion.stream is None else b"id: %d\n" % piece.num_tokens
        if self._completion.is_chat:
            delta = Delta("assistant" if is_first else UNSET, piece.text if piece.text or is_first else UNSET)
            chat = ChatChunkChoice(piece.index, delta, self._chat_logprobs(piece.logprobs), finish)
            return mark + self._event((chat,), (), piece.origin, usage)
        text = TextChunkChoice(piece.index, piece.text, self._text_logprobs(piece.logprobs), finish)
        return mark + self._event((), (text,), piece.origin, usage)

    def usage_chunk(self, num_tokens: int, origin: Origin) -> bytes:
        """The event that `stream_options.include_usage` asks for, before the end."""
        return self._event((), (), origin, self._usage(num_tokens))

    def _event(
        self,
        chats: tuple[ChatChunkChoice, ...],
        texts: tuple[TextChunkChoice, ...],
        origin: Origin,
        usage: Usage | UnsetType | None,
    ) -> bytes:
        head = (self._id, self._created_s, self._completion.model)
        chunk = (
            ChatChunk(*head, chats, origin, usage)
            if self._completion.is_chat
            else TextChunk(*head, texts, origin, usage)
        )
        return write_event(msgspec.json.encode(chunk))

    def _usage(self, num_tokens: int) -> Usage:
        num_prompt = len(self._completion.request.prompt)
        return Usage(num_prompt, num_tokens, num_prompt + num_tokens)

    def _chat_logprobs(self, logprobs: Sequence[Logprob]) -> ChatLogprobs | None:
        if not self._completion.request.num_logprobs:
            return None
        return ChatLogprobs(
            tuple(
                TokenLogprob(
                    *self._describe(logprob.token, logprob.told.micro_nats),
                    tuple(TopLogprob(*self._describe(*likely)) for likely in logprob.told.likeliest),
                )
                for logprob in logprobs
            )
        )

    def _text_logprobs(self, logprobs: Sequence[Logprob]) -> TextLogprobs | None:
        if not self._completion.request.num_logprobs:
            return None
        described = [self._describe(logprob.token, logprob.told.micro_nats) for logprob in logprobs]
        likeliest = [[self._describe(*likely) for likely in logprob.told.likeliest] for logprob in logprobs]
        return TextLogprobs(
            tuple(text for text, _, _ in described),
            tuple(nats for _, nats, _ in described),
            tuple(_by_text(row) for row in likeliest),
            tuple(logprob.offset for logprob in logprobs),
        )

    def _describe(self, token: int, micro_nats: int) -> tuple[str, float, tuple[int, ...]]:
        data = self._get_bytes(token)
        return data.decode(errors="replace"), -micro_nats / MICRO_NATS_PER_NAT, tuple(data)


def _by_text(row: Sequence[tuple[str, float, tuple[int, ...]]]) -> dict[str, float]:
    """Tokens that look alike (halves of a character) share a name: the likeliest, which comes first, keeps it."""
    told: dict[str, float] = {}
    for text, nats, _ in row:
        told.setdefault(text, nats)
    return told
