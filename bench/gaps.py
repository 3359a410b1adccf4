"""How far honest machines' tokens are from one another's logits, and how far cheats': what a re-check tolerates.

    [MODEL=FOLDER] python bench/gaps.py [--json FILE] [--check] [--quick]

Answers are made by one way to compute (our engine; transformers' own decoding in bf16 and fp32, as another back end
would) or by a cheat (weights rounded to 8 or 4 bits, changed by 1% of their spread, a higher temperature, every tenth
token another one), and checked by another: our engine, or transformers' prefill of the whole answer in one pass, with
one and two threads and in a batch of eight. Gaps are in nats (`p2pfm.serving.recheck.compute_gap`); "answers" counts
how many of them make a cheat of their maker (0: none). MODEL: a Hugging Face folder, else the tests' tiny model.
"""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import harness
import msgspec
import numpy as np
import torch
from transformers import DynamicCache

from p2pfm.config import AdapterConfig
from p2pfm.lora.kinds import compute_initial
from p2pfm.lora.layers import load_backbone
from p2pfm.messages import MICRO, CheckReply, GenerateRequest
from p2pfm.runtime.canaries import make_question
from p2pfm.runtime.engine import Engine
from p2pfm.runtime.text import TextCodec
from p2pfm.serving.recheck import HONEST_MICRO, WRONG_MICRO, Answer, Suspects, compute_gap, judge
from p2pfm.serving.sampling import choose_token, compute_logprobs
from p2pfm.types import Array, Digest, PeerId

TINY = Path(__file__).parent.parent / "tests" / "fixtures" / "tiny-llama"
BARE = Digest(bytes(32))
MAKER = PeerId("maker")
SAMPLINGS = ((0, 1000), (700, 950), (1000, 1000))
"""Temperature and top_p [thousandths]."""


class Size(NamedTuple):
    """How much is run."""

    num_questions: int = 4
    num_tokens: int = 48


Logits = Callable[[GenerateRequest], Sequence[Array]]
Make = Callable[[GenerateRequest], Iterator[tuple[int, Array]]]


def main() -> None:
    """Every maker by every checker, their table, the targets."""
    options = harness.parse_options(__doc__)
    size = Size(num_questions=2, num_tokens=32) if options.quick else Size()
    folder = os.environ.get("MODEL", str(TINY))
    seconds: dict[str, float] = {}
    with harness.cpu_seconds(seconds, "all"):
        rows = measure(folder, size)
    columns = (
        "tokens of",
        "checked by",
        "tokens",
        "mean gap",
        "largest",
        "> 0",
        "> .25",
        "> 1",
        "logprob off",
        "answers",
    )
    harness.print_table(f"Gaps on {Path(folder).name}", columns, [[*row.values()][1:] for row in rows])
    print(f"\nCPU seconds: {seconds['all']:.0f}")
    honest = [row for row in rows if row["is_honest"]]
    same = next(row for row in honest if row["maker"] == row["checker"] == "engine")
    cheats = [row for row in rows if row["maker"] in ("every tenth token", "temperature")]
    targets = [
        harness.Target("largest gap, same engine [nats]", same["largest"], 0.0, "less"),
        harness.Target(
            "largest honest gap over that of a suspect",
            max(r["largest"] for r in honest) * MICRO / WRONG_MICRO,
            0.5,
            "less",
        ),
        harness.Target(
            "largest mean honest gap over what is forgiven",
            max(r["mean"] for r in honest) * MICRO / HONEST_MICRO,
            0.5,
            "less",
        ),
        harness.Target("honest makers taken for cheats", sum(r["answers"] > 0 for r in honest), 0, "less"),
        harness.Target("cheats not found", sum(r["answers"] == 0 for r in cheats), 0, "less"),
    ]
    harness.finish(options, {"size": size._asdict(), "model": folder, "seconds": seconds, "rows": rows}, targets)


def measure(folder: str, size: Size) -> list[dict[str, Any]]:
    """A row for each pair that is of interest."""
    engine = Engine(folder, AdapterConfig(), versions_max=1)
    engine.add_version(BARE, compute_initial(engine.shapes, 1))
    torch.set_num_threads(1)
    models = {dtype: load_backbone(folder, dtype)[0] for dtype in (torch.bfloat16, torch.float32)}
    bf16, fp32 = models[torch.bfloat16], models[torch.float32]
    ends = engine.vocabulary.ends

    def by_engine(request: GenerateRequest) -> Sequence[Array]:
        return list(engine.compute_logits(request))

    def from_engine(request: GenerateRequest) -> Iterator[tuple[int, Array]]:
        tokens = tuple(token for chunk in engine.generate(request) for token in chunk.tokens)
        yield from zip(tokens, by_engine(msgspec.structs.replace(request, emitted=tokens)), strict=True)

    makers: dict[str, tuple[bool, Make]] = {
        "engine": (True, from_engine),
        "transformers bf16": (True, lambda request: decode(bf16, request, ends)),
        "transformers fp32": (True, lambda request: decode(fp32, request, ends)),
        "8-bit weights": (False, lambda request: decode(rounded[8], request, ends)),
        "4-bit weights": (False, lambda request: decode(rounded[4], request, ends)),
        "weights off by 1%": (False, lambda request: decode(noisy, request, ends)),
        "temperature": (False, lambda request: decode(bf16, request, ends, hotter_milli=600)),
        "every tenth token": (False, lambda request: decode(bf16, request, ends, altered_every=10)),
    }
    rounded = {bits: change(bf16, partial(round_weight, bits=bits)) for bits in (8, 4)}
    generator = torch.Generator().manual_seed(0)
    noisy = change(bf16, lambda w: w + 0.01 * w.std() * torch.randn(w.shape, generator=generator))
    checkers: dict[str, Logits] = {
        "engine": by_engine,
        "prefill bf16": lambda request: prefill(bf16, request),
        "prefill bf16, 2 threads": lambda request: prefill(bf16, request, num_threads=2),
        "prefill bf16, batch of 8": lambda request: prefill(bf16, request, batch=8),
        "prefill fp32": lambda request: prefill(fp32, request),
    }
    requests = make_requests(engine, size)
    return [
        measure_pair(is_honest, name, make, checker, checkers[checker], requests)
        for name, (is_honest, make) in makers.items()
        for checker in (checkers if name == "engine" else ("engine",))
    ]


def make_requests(engine: Engine, size: Size) -> list[GenerateRequest]:
    """The same questions at every sampling."""
    codec = TextCodec(engine.tokenizer, engine.vocabulary)
    words = Random(1)
    prompts = [
        codec.encode_chat([{"role": "user", "content": make_question(words)}]) for _ in range(size.num_questions)
    ]
    return [
        GenerateRequest(BARE, prompt, (), size.num_tokens, temperature, top_p, seed, 0)
        for seed, prompt in enumerate(prompts)
        for temperature, top_p in SAMPLINGS
    ]


def measure_pair(
    is_honest: bool, maker: str, make: Make, checker: str, check: Logits, requests: Sequence[GenerateRequest]
) -> dict[str, Any]:
    """One row: the gaps of all requests' answers, and when the maker is found to cheat."""
    gaps: list[float] = []
    off: list[float] = []
    suspects, found = Suspects(), 0
    for number, request in enumerate(requests, 1):
        made = list(make(request))
        tokens = tuple(token for token, _ in made)
        claimed = msgspec.structs.replace(request, emitted=tokens)
        answer = Answer(request)
        answer.add(tokens, MAKER, ())
        own = []
        for position, ((token, theirs), ours) in enumerate(zip(made, check(claimed), strict=True)):
            own.append(compute_gap(ours, claimed, token, position))
            logprobs = [compute_logprobs(logits, token, 0).micro_nats for logits in (theirs, ours)]
            off.append(abs(logprobs[0] - logprobs[1]) / MICRO)
        gaps += [gap / MICRO for gap in own]
        judgement = judge(answer, CheckReply(tuple(own), (0,) * len(own)))[MAKER]
        if suspects.on_judged(MAKER, judgement) == "cheat" and not found:
            found = number
    array = np.array(gaps)
    return {
        "is_honest": is_honest,
        "maker": maker,
        "checker": checker,
        "tokens": len(gaps),
        "mean": float(array.mean()),
        "largest": float(array.max()),
        **{f"over {bound:g}": f"{100 * float((array > bound).mean()):.1f}%" for bound in (0.0, 0.25, 1.0)},
        "logprob": float(max(off)),
        "answers": found,
    }


# --- other ways to compute, honest and not ---------------------------------------------------------------------------


@torch.inference_mode()
def decode(
    model: Any, request: GenerateRequest, ends: frozenset[int], hotter_milli: int = 0, altered_every: int = 0
) -> Iterator[tuple[int, Array]]:
    """Tokens with the logits before them, one pass of transformers a token."""
    cache, tokens = DynamicCache(), request.prompt
    temperature_milli = request.temperature_milli + hotter_milli
    for position in range(request.tokens_max):
        output = model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[0, -1].float().numpy()  # (vocab_size,)
        token = choose_token(logits, temperature_milli, request.top_p_milli, request.seed, position)
        if altered_every and position % altered_every == altered_every - 1:
            token = 100 + token * 7 % (len(logits) - 200)
        yield token, logits
        if token in ends:
            return
        tokens = (token,)


@torch.inference_mode()
def prefill(model: Any, claimed: GenerateRequest, num_threads: int = 1, batch: int = 1) -> Sequence[Array]:
    """Logits before each emitted token, prompt and answer in one pass."""
    torch.set_num_threads(num_threads)
    rows = torch.tensor([[*claimed.prompt, *claimed.emitted[:-1]]] * batch)  # (batch, num_tokens)
    logits = model(input_ids=rows, logits_to_keep=len(claimed.emitted)).logits[-1]
    torch.set_num_threads(1)
    return list(logits.float().numpy())


def change(model: Any, to: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy whose matrices but the embedding are changed."""
    changed = copy.deepcopy(model)
    for name, weight in changed.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            weight.data = to(weight.data.float()).to(weight.dtype)
    return changed


def round_weight(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric rounding with a scale a row."""
    scale = weight.abs().amax(dim=1, keepdim=True) / ((1 << bits - 1) - 1)
    return torch.round(weight / scale) * scale


if __name__ == "__main__":
    main()
