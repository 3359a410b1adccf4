"""Whether the server behind a node serves the network's model: asked once, when the node starts.

Its words are not enough: weights cut to four bits have the same name and tokens, other peers would find such answers
wrong, and ban this node (docs/decisions/why-answers-are-rechecked-by-gaps.md). So it is judged as they would judge it.
"""

from collections.abc import Callable, Iterator
from contextlib import aclosing
from typing import Literal

import msgspec

from p2pfm.config import ServingConfig
from p2pfm.errors import OperatorError, Reject
from p2pfm.lora.user_adapter import BACKBONE_VERSION
from p2pfm.messages import MICRO, CheckReply, GenerateRequest
from p2pfm.runtime.backend import BackendFailed
from p2pfm.runtime.text import TextCodec
from p2pfm.runtime.upstream import Server, Upstream, validate_likeliest
from p2pfm.runtime.upstream_adapters import VllmAdapters
from p2pfm.runtime.upstream_wire import Dialect, LlamaCpp, Vllm, decode_answer
from p2pfm.serving.recheck import Answer, compute_gap, judge
from p2pfm.serving.sampling import compute_logprobs
from p2pfm.types import Array, PeerId

PROBE = (
    "The 3 ships' crews paid \u20ac 1,250 for caf\u00e9s in Z\u00fcrich;\n\tnobody_knew why: \u4f60\u597d, \U0001f600!"
)
"""Tokenizers that differ, differ in digits, spaces, capitals or bytes."""

PROBE_TOKENS = 48
"""Generated and judged."""

ComputeLogits = Callable[[GenerateRequest], Iterator[Array]]
"""`Engine.compute_logits` of the network's backbone."""


async def connect_upstream(
    config: ServingConfig,
    codec: TextCodec,
    load: Callable[[], ComputeLogits],
    adapters: VllmAdapters,
) -> Upstream:
    """The back end that `config` names, found there and of the same model.

    Args:
        load: blocking; its backbone may go afterwards.
        adapters: for a server that takes them.

    Raises:
        OperatorError: nobody listens there, or another kind of server, or one with another model.
    """
    server = Server(config.backend_url, config.backend_s)
    kind: Literal["vllm", "llama.cpp"] = "vllm" if config.backend == "vllm" else "llama.cpp"
    try:
        found = await _find(server, kind, codec)
    except BackendFailed as error:
        message = f"serving.backend_url: expected a {kind} server there, but {error}. {START[kind]}"
        raise OperatorError(message) from error
    if found.num_slots is not None and found.num_slots < config.sessions_max:
        raise OperatorError(
            f"serving.sessions_max is {config.sessions_max}, and {server.url} takes {found.num_slots} streams at once: "
            f"set it to {found.num_slots}, or start the server with --parallel {config.sessions_max}"
        )
    upstream = Upstream(
        server,
        found.dialect,
        codec.vocabulary,
        found.context_max,
        config.sessions_max,
        adapters if kind == "vllm" else None,
    )
    await _judge(upstream, kind, codec, load)
    return upstream


START = {
    "llama.cpp": "Start it: llama-server -m MODEL.gguf --host 127.0.0.1 --port 8080 --parallel 16",
    "vllm": "Start it: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve MODEL --enable-lora --max-logprobs -1",
}


class _Found(msgspec.Struct):
    dialect: Dialect
    context_max: int
    num_slots: int | None


async def _find(server: Server, kind: Literal["vllm", "llama.cpp"], codec: TextCodec) -> _Found:
    """Raises: BackendFailed, OperatorError."""
    async with server.connect() as client:
        if kind == "llama.cpp":
            props = decode_answer(await server.get(client, "/props"), _Props)
            context_max = props.default_generation_settings.n_ctx
            found = _Found(LlamaCpp(_find_plain(codec)), context_max, props.total_slots)
        else:
            models = decode_answer(await server.get(client, "/v1/models"), _Models).data
            names = [model for model in models if model.parent is None]
            if not names:
                raise BackendFailed("it lists no model")
            found = _Found(Vllm(names[0].id, BACKBONE_VERSION), names[0].max_model_len, None)
        read = found.dialect.read_text(await server.post(client, found.dialect.ask_text(PROBE)))
    if read != codec.encode_plain(PROBE):
        raise OperatorError(
            f"{server.url} makes other tokens of a text than this network's backbone does: it serves another model. "
            f"{START[kind]}"
        )
    return found


def _find_plain(codec: TextCodec) -> int:
    """A token of whole characters that ends no text."""
    return codec.encode_plain("the")[0]


async def _judge(upstream: Upstream, kind: str, codec: TextCodec, load: Callable[[], ComputeLogits]) -> None:
    """Raises: OperatorError, unless its answers pass for this network's model."""
    where = upstream.server.url
    prompt = codec.encode_chat([{"role": "user", "content": "Tell me about the sea."}])
    request = GenerateRequest(BACKBONE_VERSION, prompt, (), PROBE_TOKENS, 1000, 1000, 1, 1)
    answer, server = Answer(request), PeerId("the server")
    size = codec.vocabulary.size
    try:
        async with upstream.server.connect() as client:
            ask = upstream.dialect.ask_likeliest(BACKBONE_VERSION, prompt, size, 0)
            validate_likeliest(upstream.dialect.read_likeliest(await upstream.server.post(client, ask)), size, size)
        async with aclosing(upstream.generate(request, is_local=True)) as chunks:
            async for chunk in chunks:
                answer.add(chunk.tokens, server, chunk.logprobs)
    except (BackendFailed, Reject) as error:
        raise OperatorError(
            f"expected {where} to tell the probabilities of all {size} tokens, but {error}. {START[kind]}"
        ) from error
    claimed = msgspec.structs.replace(request, emitted=tuple(answer.tokens))
    gaps, micro_nats = [], []
    for position, (token, logits) in enumerate(zip(claimed.emitted, load()(claimed), strict=True)):
        gaps.append(compute_gap(logits, request, token, position))
        micro_nats.append(compute_logprobs(logits, token, 0).micro_nats)
    excess = judge(answer, CheckReply(tuple(gaps), tuple(micro_nats)))[server].excess_micro
    if excess > 0:  # an honest machine's tends downwards (`serving.recheck.Suspects`)
        raise OperatorError(
            f"{where} serves another model than this network's backbone, or its weights in fewer bits: its answers are "
            f"off by {sum(gaps) / len(gaps) / MICRO:.3f} nats a token, and others would ban this node for them. Serve "
            "the weights as they are (a GGUF of type F16, BF16 or F32)"
        )


class _Settings(msgspec.Struct):
    n_ctx: int


class _Props(msgspec.Struct):
    default_generation_settings: _Settings
    total_slots: int


class _Model(msgspec.Struct):
    id: str
    max_model_len: int
    parent: str | None = None


class _Models(msgspec.Struct):
    data: list[_Model]
