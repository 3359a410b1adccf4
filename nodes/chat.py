"""`p2pfm chat`: a conversation with the network in the terminal, through any node's HTTP API.

Knows that API and nothing behind it. Shows which replica answered with which adapter version, and when one was
replaced.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from p2pfm.errors import OperatorError, WorldError
from p2pfm.types import short

CONNECT_S = 5.0
READ_S = 90.0
"""Longer than a gateway's patience with its replicas, so that its own error arrives."""

HISTORY_MESSAGES_MAX = 64
"""Older turns are left out of the next question."""

QUIT_WORDS = ("/quit", "/exit", "/q")


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How answers are generated. `model` "": the newest base that the node serves."""

    url: str = "http://127.0.0.1:8000"
    model: str = ""
    tokens_max: int = 256
    temperature: float = 0.7
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class ChatPiece:
    """Some text of an answer, and who made it."""

    text: str
    replica: str
    version: str
    num_replaced: int


def run_chat(options: ChatOptions, console: Console, prompt: str | None = None) -> None:
    """Ask `prompt` and return; or, without one, talk until the end of input or /quit.

    Raises:
        OperatorError: no node at `options.url`, an unknown model, or a request that it refuses.
        WorldError: the answer broke off, or no replica is free.
    """
    with httpx.Client(base_url=options.url, timeout=httpx.Timeout(READ_S, connect=CONNECT_S)) as client:
        model = options.model or get_newest_model(client)
        if prompt is not None:
            show_answer(client, options, model, [{"role": "user", "content": prompt}], console)
            return
        console.print(f"[dim]{escape(model)} at {escape(options.url)}; /quit or Ctrl-D ends[/dim]")
        _talk(client, options, model, console)


def _talk(client: httpx.Client, options: ChatOptions, model: str, console: Console) -> None:
    messages: list[dict[str, str]] = []
    while True:
        try:
            question = console.input("[bold cyan]you>[/bold cyan] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if question in QUIT_WORDS:
            return
        if not question:
            continue
        asked = [*messages, {"role": "user", "content": question}][-HISTORY_MESSAGES_MAX:]
        try:
            answer = show_answer(client, options, model, asked, console)
        except (OperatorError, WorldError) as error:  # one bad answer does not end the conversation
            console.print(f"\n[red]{escape(str(error))}[/red]")
        except KeyboardInterrupt:
            console.print("\n[dim](stopped)[/dim]")
        else:
            messages = [*asked, {"role": "assistant", "content": answer}]


def show_answer(
    client: httpx.Client, options: ChatOptions, model: str, messages: Sequence[dict[str, str]], console: Console
) -> str:
    """Stream an answer to the console; returns its whole text. Raises as `run_chat`."""
    text, last = "", None
    for piece in stream_answer(client, options, model, messages):
        if last is not None and piece.replica != last.replica:
            note = f"[replica {short(last.replica)} failed; {short(piece.replica)} goes on from here]"
            console.print(Text(note, style="yellow"), end="")
        console.print(Text(piece.text), end="", soft_wrap=True)
        text, last = text + piece.text, piece
    console.print()
    if last is not None:
        replaced = f", {last.num_replaced} replaced" if last.num_replaced else ""
        console.print(Text(f"(replica {short(last.replica)}, version {last.version[:10]}{replaced})", style="dim"))
    return text


def stream_answer(
    client: httpx.Client, options: ChatOptions, model: str, messages: Sequence[dict[str, str]]
) -> Iterator[ChatPiece]:
    """Pieces of an answer as they come. Raises as `run_chat`."""
    body: dict[str, Any] = {
        "model": model,
        "messages": list(messages),
        "max_tokens": options.tokens_max,
        "temperature": options.temperature,
        "stream": True,
    }
    if options.seed is not None:
        body["seed"] = options.seed
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise _read_error(response.status_code, response.read())
            yield from _read_pieces(response)
    except httpx.HTTPError as error:
        raise _describe_failure(client, error) from error


def _read_pieces(response: httpx.Response) -> Iterator[ChatPiece]:
    for line in response.iter_lines():
        data = line.removeprefix("data: ")
        if data == line:  # the blank line between two events
            continue
        if data == "[DONE]":
            return
        event = msgspec.json.decode(data)
        if "error" in event:
            raise WorldError(event["error"]["message"])
        origin = event["p2pfm"]
        text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
        yield ChatPiece(text, origin["replica"], origin["version"], origin["replaced"])
    raise WorldError("the node closed the connection before the answer's end; ask again")


def get_newest_model(client: httpx.Client) -> str:
    """The first model that the node lists: its newest base. Raises as `run_chat`."""
    try:
        response = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise _describe_failure(client, error) from error
    if response.status_code != 200:
        raise _read_error(response.status_code, response.content)
    names = [model["id"] for model in response.json()["data"]]
    if not names:
        raise WorldError("the node serves no model yet; wait until it has joined the network (`p2pfm node status`)")
    return str(names[0])


def _describe_failure(client: httpx.Client, error: httpx.HTTPError) -> OperatorError | WorldError:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.UnsupportedProtocol):
        return OperatorError(f"no node answers at {client.base_url}. Start one with `p2pfm node run`, or give --url")
    return WorldError(f"the node at {client.base_url} broke off: {error or type(error).__name__}; ask again")


def _read_error(status: int, data: bytes) -> OperatorError | WorldError:
    try:
        message = str(msgspec.json.decode(data)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        message = f"expected an OpenAI-compatible API, got HTTP {status}. Is --url a p2pfm node?"
    return WorldError(message) if status in (429, 503) else OperatorError(message)
