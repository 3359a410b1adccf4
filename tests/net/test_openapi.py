"""Schemathesis makes requests from the node's own OpenAPI document, good and bad, and checks every answer by it."""

import json
from pathlib import Path

import httpx
import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, from_schema
from schemathesis.engine.events import FatalError, NonFatalError, ScenarioFinished
from serving_world import QUESTION, World, make_body, make_engine, with_world

from p2pfm.config import HttpConfig
from p2pfm.runtime.api_keys import ApiKeys
from p2pfm.runtime.engine import Engine
from p2pfm.runtime.openai_wire import UNSUPPORTED

SECRET = "0123456789abcdef-secret"
OPTIONS = """
base-url = "{url}"
seed = 7
headers = {{ Authorization = "Bearer {secret}" }}
[generation]
max-examples = 10
database = "none"
[phases]
examples.enabled = false
stateful.enabled = false
"""
TOKENS_MAX, CHOICES_MAX = 1, 2
"""What is valid is answered; a few tokens are enough."""
known_streams: list[str] = []
known_bodies: list[dict] = []
"""A stream that is kept and an adapter that can be served: nobody guesses such."""
NUM_TOKENS = 256
"""The model's vocabulary has so many and more."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


@schemathesis.hook
def before_call(context, case, kwargs) -> None:
    """Most bodies ask for the model that there is, and mind what no schema can say, so that they are answered."""
    if case.path == "/v1/streams/{name}" and len(str(case.path_parameters["name"])) % 2:
        case.path_parameters["name"] = known_streams[0]
    body = case.body
    if not isinstance(body, dict):
        return
    if case.path == "/v1/adapters":
        if case.meta.generation.mode.is_positive:  # what is a LoRA of this backbone, no schema can say
            body.update(known_bodies[0], name="mine" if len(body) % 2 else "")
            body.pop("path", None)
        return
    if isinstance(body.get("model"), str) and len(body["model"]) % 8 != 7:
        body["model"] = "tiny+base"
    for name, few in (("max_tokens", TOKENS_MAX), ("max_completion_tokens", TOKENS_MAX), ("n", CHOICES_MAX)):
        if body.get(name) is None or (isinstance(body[name], int | float) and body[name] > few):
            body[name] = few
    if body.get("top_logprobs") and (body.get("logprobs") is None or body["logprobs"] is False):
        body["logprobs"] = True
    prompt = body.get("prompt")
    if isinstance(prompt, list) and all(is_token(item) or isinstance(item, str) for item in prompt):
        texts = [item for item in prompt if isinstance(item, str)]
        body["prompt"] = texts[:1] or [int(item) % NUM_TOKENS for item in prompt]


def is_token(item) -> bool:
    return isinstance(item, int | float) and not isinstance(item, bool) and item >= 0 and item == int(item)


def test_every_answer_is_as_the_document_says(engine: Engine, tmp_path: Path) -> None:
    def check(world: World) -> None:
        document = httpx.get(f"{world.url}/openapi.json").json()
        assert document["openapi"].startswith("3.1")
        for name in ("ChatBody", "TextBody"):  # of what is never served a few are enough
            properties = document["components"]["schemas"][name]["properties"]
            for key in set(UNSUPPORTED) - {"tools", "suffix", "top_k"}:
                del properties[key]
        assert {"/v1/streams/{name}", "/v1/adapters", "/v1/adapters/{name}"} <= document["paths"].keys()
        begin(world)
        config = SchemathesisConfig.from_str(OPTIONS.format(url=world.url, secret=SECRET))
        schema = schemathesis.openapi.from_dict(document, config=config)
        tried, failures, answers = set(), [], set()
        for event in from_schema(schema).execute():
            assert not isinstance(event, FatalError | NonFatalError), event
            if isinstance(event, ScenarioFinished):
                tried.add(event.label)
                answers |= {
                    (event.label, response.status_code)
                    for case in event.recorder.cases
                    if (response := event.recorder.find_response(case_id=case)) is not None
                }
                if event.status in (Status.FAILURE, Status.ERROR):
                    failures += describe(event)
        assert not failures, "\n\n".join(failures)
        assert tried == {f"{method.upper()} {path}" for path, ways in document["paths"].items() for method in ways}
        answered = world.registry.get_sample_value("p2pfm_http_completions_total", {"outcome": "ok"})
        assert answered > 10  # not only refusals were checked
        assert {("GET /v1/streams/{name}", 200), ("POST /v1/adapters", 201), ("GET /v1/adapters", 200)} <= answers

    options = {"is_home_serving": True, "bounds": HttpConfig(body_bytes_max=65_536), "folder": tmp_path}
    known_bodies[:] = [make_body(engine, 1)]
    with_world(engine, check, **options, keys=ApiKeys({"tester": SECRET}))


def begin(world: World) -> None:
    """A stream that can be resumed."""
    body = {"model": "tiny+base", "messages": QUESTION, "max_tokens": 2, "stream": True}
    answer = httpx.post(
        f"{world.url}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {SECRET}"}, timeout=30
    )
    first = next(line for line in answer.text.splitlines() if line.startswith("data: {"))
    known_streams[:] = [json.loads(first[6:])["id"]]


def describe(event: ScenarioFinished) -> list[str]:
    return [
        f"{event.label}: {check.failure_info.failure}\n{check.failure_info.code_sample}\n"
        f"{getattr(event.recorder.find_response(case_id=case), 'content', b'')[:400]!r}"
        for case, checks in event.recorder.checks.items()
        for check in checks
        if check.failure_info is not None
    ]
