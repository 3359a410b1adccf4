"""`p2pfm chat`: a conversation with the network in the terminal.

Knows the screen and the keyboard; answers come through `Gateways`. Shows which replica answered with which adapter
version, and when a replica or a gateway was replaced. What replicas write cannot steer the terminal.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from rich.console import Console
from rich.text import Text

from nodes.gateways import Anew, Gateways, Moved, Piece, Question, Refused
from nodes.printable import make_printable
from p2pfm.errors import OperatorError, WorldError
from p2pfm.types import short

with suppress(ImportError):  # absent on Windows; where it is, `input` edits lines and remembers them
    import readline  # noqa: F401

HISTORY_MESSAGES_MAX = 64
"""Older turns are left out of the next question."""

PROMPT = "\001\033[1;36m\002you>\001\033[0m\002 "
"""The numbers tell readline what takes no room."""

HELP = """\
/model         which models there are, and which one is asked
/model NAME    ask that one from now on
/new           forget the conversation
/status        how the node is, and its round
/help          this
/quit          end (so does Ctrl-D)
Ctrl-C stops an answer; what has come of it stays part of the conversation."""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """Whom to ask (the first of `urls` that answers) and how. `model` "": the newest base that the node serves."""

    urls: Sequence[str] = ("http://127.0.0.1:8000",)
    model: str = ""
    tokens_max: int = 256
    temperature: float = 0.7
    seed: int | None = None
    api_key: str = field(default="", repr=False)


@dataclass(slots=True)
class Answer:
    """What has come of one answer."""

    text: str = ""
    last: Piece | None = None
    num_moves: int = 0
    """How often its gateway failed."""


def run_chat(options: ChatOptions, console: Console, prompt: str | None = None, *, is_json: bool = False) -> None:
    """Ask `prompt` and return; or, without one, talk until the end of input or /quit.

    `is_json`: nothing but one JSON object with the whole answer; needs `prompt`.

    Raises:
        OperatorError: no node at any of the URLs, an unknown model, or a request that it refuses.
        WorldError: the answer broke off, or no replica is free.
    """
    if is_json and prompt is None:
        raise OperatorError("expected a question with --json: p2pfm chat --json -m 'What is a computer?'")
    if prompt is None and sys.stdin is None:  # closed by who started us
        raise OperatorError("standard input is closed, so nothing can be typed; ask once with -m 'What is a computer?'")
    with Gateways(options.urls, options.api_key) as gateways:
        chat = Conversation(gateways, options, options.model or gateways.get_models()[0], console)
        if prompt is None:
            chat.talk()
        elif is_json:
            question = chat.make_question([{"role": "user", "content": prompt}])
            answer = read_answer(gateways, question, Console(quiet=True))
            console.print(Text(describe_answer(answer, gateways.url, question.model)), soft_wrap=True)
        else:
            chat.answer([{"role": "user", "content": prompt}], Answer())


def read_api_key(file: Path | None) -> str:
    """The key in `file`, which may be the node's own list of them (NAME KEY in a line: the first one); None: "".

    Raises:
        OperatorError: unreadable or empty.
    """
    if file is None:
        return ""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OperatorError(f"cannot read the API key in {file}: {error}. Give the file with --api-key-file") from error
    keys = [line.split()[-1] for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise OperatorError(f"expected an API key in {file}, got no line with one; ask the node's operator")
    return keys[0]


class Conversation:
    """Turns so far, and what the next question goes with."""

    def __init__(self, gateways: Gateways, options: ChatOptions, model: str, console: Console) -> None:
        self._gateways, self._options, self._model, self._console = gateways, options, model, console
        self._messages: list[dict[str, str]] = []
        self._commands = {
            "/help": self._help,
            "/model": self._choose_model,
            "/new": self._forget,
            "/status": self._show_status,
        }

    def make_question(self, messages: Sequence[dict[str, str]]) -> Question:
        """These turns, asked as the options say."""
        options = self._options
        return Question(self._model, messages, options.tokens_max, options.temperature, options.seed)

    def talk(self) -> None:
        """Ask what is typed, until /quit, the end of input, or Ctrl-C twice with nothing to stop."""
        self._note(f"{self._model} at {self._gateways.url}; /help lists commands, /quit or Ctrl-D ends")
        was_interrupted = False
        while True:
            try:
                typed = self._read().strip()
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:
                self._console.print()
                if was_interrupted:
                    return
                was_interrupted = True
                self._note("Ctrl-C again, or Ctrl-D, ends")
                continue
            was_interrupted = False
            word, _, rest = typed.partition(" ")
            if word in ("/quit", "/exit", "/q"):
                return
            if typed:
                self._take(typed, word, rest.strip())

    def answer(self, messages: Sequence[dict[str, str]], answer: Answer) -> None:
        """Stream an answer to the screen, and into `answer`. Raises as `run_chat`."""
        read_answer(self._gateways, self.make_question(messages), self._console, answer)
        self._console.print()
        if (last := answer.last) is not None:
            parts = [f"replica {short(last.replica)}", f"version {last.version[:10]}"]
            parts += [f"{last.num_replaced} replaced"] if last.num_replaced else []
            parts += [f"through {self._gateways.url}"] if answer.num_moves else []
            parts += ["cut at --max-tokens"] if last.finish == "length" else []
            self._note(f"({', '.join(parts)})")

    def _take(self, typed: str, word: str, rest: str) -> None:
        """A question or a command; a bad one does not end the conversation."""
        try:
            if word in self._commands:
                self._commands[word](rest)
            elif word.startswith("/"):
                self._note(f"{word} is no command; /help lists them")
            else:
                self._ask(typed)
        except (OperatorError, WorldError) as error:
            self._console.print(Text(f"\n{make_printable(str(error))}", style="red"))

    def _ask(self, question: str) -> None:
        asked = [*self._messages, {"role": "user", "content": question}][-HISTORY_MESSAGES_MAX:]
        answer = Answer()
        while True:
            try:
                self.answer(asked, answer)
            except KeyboardInterrupt:
                self._note("\n(stopped)")
            except Refused as error:
                if error.code != "context_length_exceeded" or len(asked) < 3:
                    raise
                self._note("(the oldest turns no longer fit into the model's context and are left out)")
                asked = asked[2:]
                continue
            finally:
                if answer.text:
                    self._messages = [*asked, {"role": "assistant", "content": answer.text}]
            return

    def _help(self, _: str) -> None:
        self._console.print(Text(HELP))

    def _choose_model(self, name: str) -> None:
        names = self._gateways.get_models()
        if name in names:
            self._model = name
        elif name:
            self._note(f"{name} is not served now")
        for one in names:
            self._console.print(Text(f"{'*' if one == self._model else ' '} {make_printable(one)}"), soft_wrap=True)

    def _forget(self, _: str) -> None:
        self._messages = []
        self._note("(a new conversation)")

    def _show_status(self, _: str) -> None:
        from nodes.screens import make_status_table  # draws with matplotlib: half a second that only this needs

        self._console.print(make_status_table(self._gateways.get("/status")))

    def _note(self, text: str) -> None:
        self._console.print(Text(make_printable(text), style="dim"), soft_wrap=True)

    def _read(self) -> str:
        """Raises: EOFError; OperatorError, if what is typed is no text."""
        try:
            is_typed = self._console.is_terminal and sys.stdin.isatty()
            typed = input(PROMPT) if is_typed else self._console.input("you> ")
            typed.encode()  # in a plain locale Python hides other bytes in the text
        except UnicodeError as error:
            raise OperatorError("expected text in UTF-8 from standard input, got other bytes") from error
        return typed


def read_answer(gateways: Gateways, question: Question, console: Console, answer: Answer | None = None) -> Answer:
    """Print an answer as it comes, with notes where somebody failed; into `answer` if one is given."""
    answer = answer or Answer()
    previous: Piece | None = None  # through the same gateway
    for part in gateways.ask(question):
        match part:
            case Moved():
                answer.num_moves += 1
                previous = None
                _print_note(console, f"[gateway {part.left} failed: {part.reason}; asking {part.to}]")
            case Anew():
                answer.text = ""
                _print_note(console, "[this gateway answers otherwise; from the beginning:]\n")
            case Piece():
                if previous is not None and part.replica != previous.replica:
                    left, to = short(previous.replica), short(part.replica)
                    _print_note(console, f"[replica {left} failed; {to} goes on from here]")
                console.print(Text(make_printable(part.text)), end="", soft_wrap=True)
                answer.text, answer.last, previous = answer.text + part.text, part, part
    return answer


def describe_answer(answer: Answer, url: str, model: str) -> str:
    """One JSON object for machines."""
    assert answer.last is not None, "an answer ends with a piece"
    told = {
        "text": answer.text,
        "model": model,
        "replica": answer.last.replica,
        "version": answer.last.version,
        "num_replaced": answer.last.num_replaced,
        "finish": answer.last.finish,
        "gateway": url,
        "num_gateways_failed": answer.num_moves,
    }
    return msgspec.json.encode(told).decode()


def _print_note(console: Console, text: str) -> None:
    console.print(Text(make_printable(text), style="yellow"), end="", soft_wrap=True)
