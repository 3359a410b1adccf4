"""A replica whose tokens a foreign server makes: `runtime.backend.Backend` over a llama.cpp or vLLM server's HTTP.

Holds no state of a stream but while it runs: each request has the whole prompt and what was emitted, as token ids, and
asks for a few tokens more, so a resume is nothing special. The server keeps keys and values of what it read last.
Greedy streams take the server's tokens; of any other the server tells probabilities, and the draw is
`serving.sampling`'s, as everywhere in the network.
"""

import logging
import math
from collections.abc import AsyncGenerator
from ssl import SSLContext

import httpx
import trio

from p2pfm.errors import Reject
from p2pfm.lora.user_adapter import BACKBONE_VERSION
from p2pfm.messages import MICRO, GenerateRequest, TokenChunk, TokenLogprobs
from p2pfm.runtime.backend import BackendFailed
from p2pfm.runtime.upstream_adapters import VllmAdapters
from p2pfm.runtime.upstream_wire import Ask, Dialect, Likeliest
from p2pfm.serving.sampling import choose_from_likeliest
from p2pfm.serving.session import BUSY, Session, UnknownVersion, Vocabulary, validate_request
from p2pfm.types import Digest, Tensors

BLOCK_TOKENS_MAX = 8
"""Tokens of one answer at most, after 1, 2 and 4: so much a cancelled stream may have been ahead of its reader."""

LIKELIEST = 256
"""Of a place, asked at first: they nearly always hold the draw. Else all are asked."""

BODY_BYTES_MAX = 64 << 20
"""Probabilities of 260,000 tokens, with their texts."""

CONNECT_S = 5.0

SUM_SLACK = 1e-3
"""Probabilities that sum to more than 1 by this are none."""

log = logging.getLogger(__name__)


class Server:
    """Where it is, and how long it may take."""

    def __init__(self, url: str, answer_s: float) -> None:
        """`answer_s`: for one answer, to its last byte."""
        self.url = url.rstrip("/")
        self._answer_s = answer_s
        self._tls: SSLContext | bool = httpx.create_ssl_context() if url.startswith("https:") else False

    def connect(self) -> httpx.AsyncClient:
        """For one stream: closing it closes its connection, which is how the server hears of a cancelled stream."""
        timeout = httpx.Timeout(self._answer_s, connect=CONNECT_S)
        return httpx.AsyncClient(base_url=self.url, verify=self._tls, timeout=timeout, trust_env=False)

    async def get(self, client: httpx.AsyncClient, path: str) -> bytes:
        """The body of a GET. Raises: BackendFailed."""
        return await self._send(client.build_request("GET", path), client)

    async def post(self, client: httpx.AsyncClient, ask: Ask) -> bytes:
        """The body of its answer. Raises: BackendFailed."""
        return await self._send(client.build_request("POST", ask.path, json=ask.body), client)

    async def _send(self, request: httpx.Request, client: httpx.AsyncClient) -> bytes:
        request.headers["accept-encoding"] = "identity"
        body = bytearray()
        try:
            with trio.fail_after(self._answer_s):
                response = await client.send(request, stream=True)
                try:
                    async for part in response.aiter_raw():
                        body += part
                        if len(body) > BODY_BYTES_MAX:
                            raise BackendFailed(f"{request.url} gave more than {BODY_BYTES_MAX} bytes")
                finally:
                    await response.aclose()
        except (httpx.HTTPError, httpx.InvalidURL, trio.TooSlowError) as error:
            raise BackendFailed(f"{request.url}: {str(error) or type(error).__name__}") from error
        if response.status_code != 200:
            raise BackendFailed(f"{request.url} answered {response.status_code}: {bytes(body[:200])!r}")
        return bytes(body)


class Upstream:
    """The server as this node's back end. One that breaks off, or talks nonsense, ends the stream here only."""

    own = None
    """Neither private nor users' adapters, and no logits for re-checks."""

    def __init__(
        self,
        server: Server,
        dialect: Dialect,
        vocabulary: Vocabulary,
        context_max: int,
        sessions_max: int,
        adapters: VllmAdapters | None = None,
    ) -> None:
        """`context_max`: tokens that the server holds of one stream; `sessions_max`: streams that it takes at once;
        `adapters`: the bases that it holds beside the backbone.
        """
        self.server, self.dialect = server, dialect
        self._vocabulary = vocabulary
        self._context_max = context_max
        self._free = list(range(sessions_max))
        self._num_slots = sessions_max
        self._adapters = adapters

    def is_busy(self) -> bool:
        """Whether streams are open; may be asked from any thread."""
        return len(self._free) < self._num_slots

    def versions(self) -> tuple[Digest, ...]:
        """Bases, newest first, then the bare backbone."""
        return (*(self._adapters.versions() if self._adapters is not None else ()), BACKBONE_VERSION)

    async def add_version(self, version: Digest, tensors: Tensors) -> None:
        """Where the server takes adapters while it runs, it is given this one; else nothing is offered."""
        if self._adapters is None:
            return
        try:
            async with self.server.connect() as client:
                await self._adapters.add(version, tensors, lambda ask: self.server.post(client, ask))
        except BackendFailed as error:
            log.warning("the base %s is not served here: %s", version.hex()[:16], error)

    async def generate(self, request: GenerateRequest, *, is_local: bool) -> AsyncGenerator[TokenChunk, None]:
        """Chunks after `request.emitted`: one without tokens at once, then a few tokens each. Close it to stop.

        Raises:
            UnknownVersion: the server does not hold the version, or no text as long as this one may become.
            Reject: a request that this backbone cannot continue.
            BackendFailed: the server did not answer, or with nonsense.
        """
        validate_request(request, self._vocabulary)
        if request.version not in self.versions():
            raise UnknownVersion(f"the server behind this node does not hold {request.version.hex()[:16]}")
        if len(request.prompt) + request.tokens_max > self._context_max:
            raise UnknownVersion(f"the server behind this node holds {self._context_max} tokens of a stream at most")
        position = len(request.emitted)
        if not self._free:
            yield TokenChunk(position, (), BUSY)
            return
        slot = self._free.pop()
        release = self._adapters.hold(request.version) if self._adapters is not None else _do_nothing
        try:
            yield TokenChunk(position, (), "")
            session = Session(request, self._vocabulary)
            async with self.server.connect() as client:
                num_tokens = 1
                while not session.finish:
                    chunk = await self._next(client, request, session, num_tokens, slot)
                    num_tokens = min(2 * num_tokens, BLOCK_TOKENS_MAX)
                    yield chunk
        except BackendFailed as error:
            log.warning("serving.backend: %s", error)
            raise
        finally:
            self._free.append(slot)
            release()

    async def _next(
        self, client: httpx.AsyncClient, request: GenerateRequest, session: Session, num_tokens: int, slot: int
    ) -> TokenChunk:
        position, prompt = len(session.emitted), request.prompt + session.emitted
        if request.temperature_milli == 0 and not request.num_logprobs:
            num_tokens = min(num_tokens, request.tokens_max - position)
            ask = self.dialect.ask_tokens(request.version, prompt, num_tokens, slot)
            tokens = self.dialect.read_tokens(await self.server.post(client, ask))
            if not 1 <= len(tokens) <= num_tokens:
                raise BackendFailed(f"expected 1 to {num_tokens} tokens, got {len(tokens)}")
            chunk = TokenChunk(position, self._cut(tokens), "")
        else:
            token, likeliest = await self._draw(client, request, prompt, position, slot)
            told = (_make_logprobs(token, likeliest, request.num_logprobs - 1),) if request.num_logprobs else ()
            chunk = TokenChunk(position, (token,), "", told)
        try:
            session.on_chunk(chunk)
        except Reject as error:
            raise BackendFailed(f"the server's tokens are none of this model: {error}") from error
        return TokenChunk(position, chunk.tokens, session.finish, chunk.logprobs)

    async def _draw(
        self, client: httpx.AsyncClient, request: GenerateRequest, prompt: tuple[int, ...], position: int, slot: int
    ) -> tuple[int, Likeliest]:
        size = self._vocabulary.size
        for num_likeliest in (min(LIKELIEST, size), size):
            ask = self.dialect.ask_likeliest(request.version, prompt, num_likeliest, slot)
            likeliest = self.dialect.read_likeliest(await self.server.post(client, ask))
            likeliest = validate_likeliest(likeliest, num_likeliest, size)
            token = choose_from_likeliest(
                likeliest, size, request.temperature_milli, request.top_p_milli, request.seed, position
            )
            if token is not None:
                return token, likeliest
        raise AssertionError("the whole vocabulary holds every draw")

    def _cut(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Up to the first end of text."""
        ends = (index + 1 for index, token in enumerate(tokens) if token in self._vocabulary.ends)
        return tokens[: next(ends, len(tokens))]


def _do_nothing() -> None:
    """No adapter is held."""


def validate_likeliest(likeliest: Likeliest, num_likeliest: int, size: int) -> Likeliest:
    """So many of them. Raises: BackendFailed, for what no model gives."""
    if len(likeliest) < num_likeliest:
        raise BackendFailed(f"expected the {num_likeliest} likeliest tokens, got {len(likeliest)}")
    kept = likeliest[:num_likeliest]
    tokens = {token for token, _ in kept}
    if len(tokens) < num_likeliest or min(tokens) < 0 or max(tokens) >= size:
        raise BackendFailed(f"expected {num_likeliest} different tokens below {size}")
    logprobs = [logprob for _, logprob in kept]
    if not -math.log(size) - SUM_SLACK <= logprobs[0] <= SUM_SLACK or sum(map(math.exp, logprobs)) > 1 + SUM_SLACK:
        raise BackendFailed("expected log-probabilities of one distribution")
    return kept


def _make_logprobs(token: int, likeliest: Likeliest, num_told: int) -> TokenLogprobs:
    micro_nats = {one: max(0, round(-logprob * MICRO)) for one, logprob in likeliest}
    return TokenLogprobs(micro_nats[token], tuple((one, micro_nats[one]) for one, _ in likeliest[:num_told]))
