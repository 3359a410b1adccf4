"""Answers of the network through one of several gateways: when that one dies in mid-answer, another goes on.

Knows the nodes' HTTP API and no screen. An answer has a name, by which any gateway goes on with it where it broke off.
Where nobody keeps it any more it is asked for anew, with its version and seed: that gives the same text, of which what
has come already is passed over.
"""

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx
import msgspec

from p2pfm.errors import OperatorError, WorldError

CONNECT_S = 5.0
READ_S = 90.0
"""Longer than a gateway's patience with its replicas, so that its own error arrives."""

ROUNDS_MAX = 4
"""How often all gateways are tried in turn to finish an answer that has begun: one may be restarting."""

PAUSE_S = 0.5
"""Before the second of those rounds; each further one waits so much longer."""

SEED_BITS = 48

UNKNOWN_MODEL = "model_not_found"
"""OpenAI's word; another gateway may know the model."""


class Refused(OperatorError):
    """A gateway will not answer this question as it is; `code` is OpenAI's word for why."""

    def __init__(self, message: str, code: str) -> None:
        """`message`: says what to do."""
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked. `seed` None: one is drawn."""

    model: str
    messages: Sequence[dict[str, str]]
    tokens_max: int
    temperature: float
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of an answer, and who made it, as its gateway tells."""

    text: str
    replica: str
    version: str
    num_replaced: int
    finish: str


@dataclass(frozen=True, slots=True)
class Moved:
    """The gateway at `left` failed; the answer goes on through the one at `to`, which may be the same."""

    left: str
    to: str
    reason: str


@dataclass(frozen=True, slots=True)
class Anew:
    """Another gateway tells another text, so what has been told so far is void: the answer begins again."""


@dataclass(slots=True)
class _Progress:
    """What has come of an answer."""

    text: str = ""
    version: str = ""
    stream: str = ""
    """Its name; "": none, or nobody keeps it."""
    num_tokens: int = 0
    """The number of the last event."""

    def take(self, number: int, event: "_Event", text: str) -> Piece:
        """The next event, of which `text` is new; `number` 0: it has none."""
        origin = event.p2pfm
        self.text += text
        self.version = origin.version
        if number:
            self.stream, self.num_tokens = event.id, number
        finish = next((choice.finish_reason for choice in event.choices if choice.finish_reason), "")
        return Piece(text, origin.replica, origin.version, origin.replaced, finish or "")


class _Error(msgspec.Struct, frozen=True):
    message: str = ""
    code: str | None = None


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta
    finish_reason: str | None = None


class _Origin(msgspec.Struct, frozen=True):
    replica: str = ""
    version: str = ""
    replaced: int = 0


class _Event(msgspec.Struct, frozen=True):
    id: str = ""
    choices: tuple[_Choice, ...] = ()
    p2pfm: _Origin = _Origin()
    error: _Error | None = None


class _Problem(msgspec.Struct, frozen=True):
    error: _Error


class Gateways:
    """Nodes whose HTTP API may be asked, best first; whoever fails goes to the end. Use as a context manager."""

    def __init__(self, urls: Sequence[str], api_key: str = "") -> None:
        """`urls`: at least one. `api_key`: sent to each of them; "": none."""
        self.urls = [url.rstrip("/") for url in urls]
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(headers=headers, timeout=httpx.Timeout(READ_S, connect=CONNECT_S))

    def __enter__(self) -> "Gateways":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    @property
    def url(self) -> str:
        """The one that is asked now."""
        return self.urls[0]

    def get(self, path: str) -> Any:
        """The JSON at `path`, of the first gateway that answers.

        Raises:
            OperatorError: nobody answers at any of the URLs, or the node refuses.
            WorldError: no node has it now.
        """
        for num_left in reversed(range(len(self.urls))):
            try:
                response = self._client.get(f"{self.url}{path}")
                if response.status_code != 200:
                    raise _read_error(response.status_code, response.content)
                return msgspec.json.decode(response.content)
            except (httpx.HTTPError, httpx.InvalidURL, WorldError, msgspec.DecodeError) as error:
                if not num_left:
                    raise self._describe(error) from error
                self._turn()
        raise AssertionError("the last one answers or raises")

    def get_models(self) -> list[str]:
        """The names of the models that can be asked, the newest base first. Raises as `get`; WorldError, if none."""
        models = self.get("/v1/models")
        try:
            names = [str(model["id"]) for model in models["data"]]
        except (KeyError, TypeError) as error:
            raise OperatorError(f"expected a list of models from {self.url}. Is --url a p2pfm node?") from error
        if not names:
            raise WorldError("the node serves no model yet; wait until it has joined the network (`p2pfm node status`)")
        return names

    def ask(self, question: Question) -> Iterator[Piece | Moved | Anew]:
        """The answer in pieces as they come, each character once. Close it to stop the work behind it.

        Raises:
            Refused: the question itself is at fault.
            OperatorError: nobody answers at any of the URLs.
            WorldError: the answer broke off, or no replica is free.
        """
        seed = secrets.randbits(SEED_BITS) if question.seed is None else question.seed
        progress = _Progress()
        num_failed = 0  # since the last new character
        while True:
            try:
                for piece in self._attempt(question, seed, progress):
                    num_failed = 0 if isinstance(piece, Piece) and piece.text else num_failed
                    yield piece
                return
            except (httpx.HTTPError, httpx.InvalidURL, WorldError, Refused) as error:
                if isinstance(error, Refused) and error.code != UNKNOWN_MODEL:
                    raise
                num_failed += 1
                rounds, nth = divmod(num_failed, len(self.urls))
                if rounds >= (ROUNDS_MAX if progress.text else 1):
                    raise self._describe(error) from error
                left = self.url
                self._turn()
                yield Moved(left, self.url, str(error) or type(error).__name__)
                if not nth:
                    time.sleep(PAUSE_S * rounds)

    def _attempt(self, question: Question, seed: int, progress: _Progress) -> Iterator[Piece | Anew]:
        """What is missing of the answer, from the gateway at hand."""
        if progress.stream:
            headers = {"last-event-id": str(progress.num_tokens)}
            with self._client.stream("GET", f"{self.url}/v1/streams/{progress.stream}", headers=headers) as response:
                if response.status_code == 200:
                    for number, event in _read_events(response):
                        yield progress.take(number, event, _get_text(event))
                    return
            progress.stream = ""
        yield from self._ask_anew(question, seed, progress)

    def _ask_anew(self, question: Question, seed: int, progress: _Progress) -> Iterator[Piece | Anew]:
        body = {
            "model": _pin(question.model, progress.version),
            "messages": list(question.messages),
            "max_tokens": question.tokens_max,
            "temperature": question.temperature,
            "seed": seed,
            "stream": True,
        }
        seen = ""
        with self._client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise _read_error(response.status_code, response.read())
            for number, event in _read_events(response):
                seen += _get_text(event)
                num_common = min(len(seen), len(progress.text))
                if seen[:num_common] != progress.text[:num_common]:
                    progress.text = ""
                    yield Anew()
                is_last = any(choice.finish_reason for choice in event.choices)
                if is_last or len(seen) >= len(progress.text):  # from here on it can go on by its name
                    yield progress.take(number, event, seen[len(progress.text) :])

    def _turn(self) -> None:
        self.urls = [*self.urls[1:], self.urls[0]]

    def _describe(self, error: Exception) -> OperatorError | WorldError:
        if isinstance(error, OperatorError | WorldError):
            return error
        where = ", ".join(self.urls)
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.UnsupportedProtocol | httpx.InvalidURL):
            return OperatorError(f"no node answers at {where}. Start one with `p2pfm node run`, or give --url")
        if isinstance(error, msgspec.DecodeError):
            return OperatorError(f"expected JSON from {where}. Is --url a p2pfm node?")
        return WorldError(f"the node at {where} broke off: {error or type(error).__name__}; ask again")


def _pin(model: str, version: str) -> str:
    """`model` in the version that began to answer; a private one has no name elsewhere."""
    return model if not version or model.endswith("+private") else f"{model.partition('@')[0]}@{version[:16]}"


def _get_text(event: _Event) -> str:
    return "".join(choice.delta.content or "" for choice in event.choices)


def _read_events(response: httpx.Response) -> Iterator[tuple[int, _Event]]:
    """Each with its number; 0: it has none."""
    number = 0
    for line in response.iter_lines():
        field, _, value = line.partition(": ")
        if field == "id" and value.isascii() and value.isdigit():
            number = int(value[:18])
        if field != "data":  # a comment, or the blank line between two events
            continue
        if value == "[DONE]":
            return
        try:
            event = msgspec.json.decode(value, type=_Event)
        except msgspec.DecodeError as error:
            raise WorldError(f"the node sent an event that is none: {error}; ask another (--url)") from error
        if event.error is not None:
            raise WorldError(event.error.message)
        yield number, event
    raise WorldError("the node closed the connection before the answer's end; ask again")


def _read_error(status: int, data: bytes) -> OperatorError | WorldError:
    try:
        told = msgspec.json.decode(data, type=_Problem).error
    except msgspec.DecodeError:
        told = _Error(f"expected an OpenAI-compatible API, got HTTP {status}. Is --url a p2pfm node?")
    if status == 401:
        return Refused(f"{told.message} Give it with --api-key-file", told.code or "")
    is_passing = status in (408, 429) or status >= 500
    return WorldError(told.message) if is_passing else Refused(told.message, told.code or "")
