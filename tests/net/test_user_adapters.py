"""Users' own LoRA over the real HTTP side, and between real libp2p hosts: named, by digest, many at once, hostile."""

import base64
import json
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import trio
from net_hosts import make_transport, until
from prometheus_client import CollectorRegistry
from safetensors.numpy import save
from serving_world import QUESTION, V1, V2, make_adapter, make_body, make_engine, make_files

from p2pfm.config import HttpConfig, ServingConfig
from p2pfm.errors import PeerUnreachable
from p2pfm.lora.checkpoint import CONFIG_NAME, WEIGHTS_NAME, read_lora
from p2pfm.lora.personal import mix
from p2pfm.lora.user_adapter import BACKBONE_VERSION, encode_adapter
from p2pfm.messages import BlobReply, GenerateRequest, decode_request, encode
from p2pfm.runtime.adapter_api import OPERATIONS, AdapterApi
from p2pfm.runtime.adapter_folder import AdapterFolder
from p2pfm.runtime.batcher import Batcher
from p2pfm.runtime.checker import Checker
from p2pfm.runtime.engine import Engine
from p2pfm.runtime.gateway import Gateway
from p2pfm.runtime.http_api import HttpApi
from p2pfm.runtime.http_server import serve_http
from p2pfm.runtime.network.exchange import Downloads, answer_blob
from p2pfm.runtime.replica_streams import ReplicaStreams, answer_stream
from p2pfm.runtime.text import TextCodec
from p2pfm.runtime.user_adapters import FetchBlob, UserAdapters
from p2pfm.serving.session import INVALID, UNKNOWN_VERSION
from p2pfm.types import Digest, Millis, PeerId, compute_digest

PROMPT = "The state of the Union is strong, said the president"
NUM_TOKENS = 12
OPERATOR = 2
V3, V4 = Digest(b"\x33" * 32), Digest(b"\x44" * 32)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


class NoTransport:
    """A node that knows no peer."""

    async def generate(self, peer: PeerId, request: GenerateRequest):
        raise PeerUnreachable("alone")
        yield


async def fetch_from_nobody(digest: Digest, asker: PeerId | None, bytes_max: int) -> bytes:
    raise PeerUnreachable("no peer has it")


def clock() -> Millis:
    return Millis(int(trio.current_time() * 1000))


def make_folder(home: Path, bytes_max: int = 1 << 30) -> AdapterFolder:
    return AdapterFolder(home / "adapters", bytes_max)


@asynccontextmanager
async def node(
    engine: Engine,
    home: Path,
    serving: ServingConfig | None = None,
    fetch: FetchBlob = fetch_from_nobody,
    http: HttpConfig | None = None,
) -> AsyncIterator[tuple[Gateway, UserAdapters, httpx.AsyncClient]]:
    """A gateway with its engine, users' adapters and the HTTP side; no peers."""
    serving, http = serving or ServingConfig(), http or HttpConfig()
    batcher, registry = Batcher(engine), CollectorRegistry()
    adapters = UserAdapters("tiny", serving, make_folder(home), batcher, fetch, read_lora)
    gateway = Gateway(PeerId("home"), serving, batcher, engine.vocabulary, NoTransport(), registry, clock)
    gateway.adapters = adapters
    await gateway.adopt(V1, make_adapter(engine.shapes, 1))
    api = HttpApi(
        gateway,
        TextCodec(engine.tokenizer, engine.vocabulary),
        "tiny",
        registry,
        dict,
        clock,
        fetch_blob,
        http,
        extra_routes=AdapterApi(adapters, "tiny", serving, http).routes(),
        extra_operations=OPERATIONS,
    )
    async with trio.open_nursery() as nursery:
        port = await nursery.start(serve_http, api.app(), "127.0.0.1", 0, http)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield gateway, adapters, client
        nursery.cancel_scope.cancel()


async def fetch_blob(digest: Digest) -> bytes | None:
    return None


def make_blob(engine: Engine, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    return encode_adapter(
        "tiny",
        {
            name: (
                rng.normal(0, 0.2, (3, fan_in)).astype(np.float32),
                rng.normal(0, 0.2, (fan_out, 3)).astype(np.float32),
            )
            for name, (fan_out, fan_in) in engine.lora_sizes().items()
            if name.endswith("v_proj")
        },
    )


async def ask(client: httpx.AsyncClient, model: str, num_tokens: int = NUM_TOKENS) -> str:
    body = {"model": model, "prompt": PROMPT, "max_tokens": num_tokens, "temperature": 0.7, "seed": 5}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


async def read_lines(client: httpx.AsyncClient, model: str, started: trio.Event | None = None, go=None) -> str:
    """A streamed answer's text; with `go` the reader pauses after its first piece."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 40, "temperature": 0.7, "seed": 5, "stream": True}
    text = ""
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                text += chunk["choices"][0]["text"] if chunk["choices"] else ""
                if started is not None:
                    started.set()
                if go is not None:
                    await go.wait()
    return text


def test_adapters_base_private_and_backbone_at_once_give_each_what_it_gives_alone(engine, tmp_path):
    async def main() -> None:
        async with node(engine, tmp_path) as (gateway, _, client):
            await gateway.adopt_private(make_adapter(engine.shapes, 9), 0.5)
            for number in (1, 2, 3):
                answer = await client.post("/v1/adapters", json=make_body(engine, number, f"user{number}", rank=number))
                assert answer.status_code == 201, answer.text
                assert (answer.json()["rank"], answer.json()["model"]) == (number, f"tiny+user{number}")
            card = answer.json()
            listed = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
            models = ["tiny", "tiny+base", "tiny+private", "tiny+user1", "tiny+user2", "tiny+user3"]
            assert set(models) <= set(listed)
            alone = {model: await ask(client, model) for model in models}
            assert len(set(alone.values())) == len(models)
            together: dict[str, list[str]] = {model: [] for model in models}
            async with trio.open_nursery() as nursery:

                async def put(model: str) -> None:
                    together[model].append(await ask(client, model))

                for model in models * 2:
                    nursery.start_soon(put, model)
            assert together == {model: [text, text] for model, text in alone.items()}
            for name in (card["id"], card["id"][:-56], f"tiny+user3@{card['version'][:8]}"):
                assert await ask(client, name) == alone["tiny+user3"]
            base = mix(make_adapter(engine.shapes, 1), make_adapter(engine.shapes, 9), 0.5)
            assert base  # what private is made of
            assert engine.versions() == (V1, V2)  # no user's adapter is announced
            assert gateway.presence().versions == (V1, V2, BACKBONE_VERSION)

    trio.run(main)


def test_new_bases_swap_under_load_and_no_running_stream_changes(engine, tmp_path):
    async def main() -> None:
        async with node(engine, tmp_path, ServingConfig(versions_kept=3)) as (gateway, _, client):
            truth = {}
            for version, seed in ((V3, 3), (V4, 4), (V1, 1)):
                await gateway.adopt(version, make_adapter(engine.shapes, seed))
                truth[version] = await read_lines(client, "tiny+base")
            assert len(set(truth.values())) == 3
            started, texts = [trio.Event() for _ in range(3)], []

            async def read(event: trio.Event) -> None:
                texts.append(await read_lines(client, "tiny+base", event))

            async with trio.open_nursery() as nursery:
                for event in started:
                    nursery.start_soon(read, event)
                for event in started:
                    await event.wait()
                for version, seed in ((V3, 3), (V4, 4)):
                    await gateway.adopt(version, make_adapter(engine.shapes, seed))
                    assert await read_lines(client, "tiny+base") == truth[version]
                old = await read_lines(client, f"tiny+base@{V1.hex()[:8]}")
            assert texts == [truth[V1]] * 3
            assert old == truth[V1]
            # the newest and those of the two rounds before it
            assert engine.versions() == (V4, V3, V1)
            await gateway.adopt(V2, make_adapter(engine.shapes, 2))
            answer = await client.post(
                "/v1/completions", json={"model": f"tiny+base@{V1.hex()[:16]}", "prompt": PROMPT, "max_tokens": 1}
            )
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (404, "model_not_found")
            assert all(version.hex()[:16] in error["message"] for version in (V2, V3, V4))

    trio.run(main)


def test_a_stream_keeps_its_adapter_when_others_push_it_out_and_it_comes_back_from_disk(engine, tmp_path):
    async def main() -> None:
        async with node(engine, tmp_path, ServingConfig(adapters_max=1)) as (_, adapters, client):
            for number in (1, 2):
                answer = await client.post("/v1/adapters", json=make_body(engine, number, f"user{number}"))
                assert answer.status_code == 201
            truth = await read_lines(client, "tiny+user1")
            first, second = adapters.names()["user1"], adapters.names()["user2"]
            assert adapters.loaded() == (first,)
            started, go, texts = trio.Event(), trio.Event(), []

            async def read() -> None:
                texts.append(await read_lines(client, "tiny+user1", started, go))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await started.wait()
                await ask(client, "tiny+user2")
                assert adapters.loaded() == (second,)
                go.set()
            assert texts == [truth]
            assert await read_lines(client, "tiny+user1") == truth
            # cold, and more at once than are loaded at once: they wait for their turn
            for number in (3, 4):
                await client.post("/v1/adapters", json=make_body(engine, number, f"user{number}"))
            async with trio.open_nursery() as nursery:
                for number in (1, 2, 3, 4):
                    nursery.start_soon(ask, client, f"tiny+user{number}", 1)

    trio.run(main)


def test_names_and_adapters_outlive_the_node_and_a_dropped_name_means_nothing(engine, tmp_path):
    async def main() -> None:
        async with node(engine, tmp_path) as (_, _, client):
            await client.post("/v1/adapters", json=make_body(engine, 1, "french"))
            text = await ask(client, "tiny+french")
        async with node(engine, tmp_path) as (_, adapters, client):
            (card,) = (await client.get("/v1/adapters")).json()["data"]
            assert card["name"] == "french"
            assert await ask(client, "tiny+french") == text
            assert (await client.delete("/v1/adapters/french")).json()["deleted"]
            gone = await client.delete("/v1/adapters/french")
            assert gone.status_code == 404
            answer = await client.post("/v1/completions", json={"model": "tiny+french", "prompt": PROMPT})
            assert answer.status_code == 404
            assert "tiny+base" in answer.json()["error"]["message"]
            assert await ask(client, card["id"]) == text
            path = adapters.folder.path / card["version"]
            path.write_bytes(b"damaged" + path.read_bytes()[7:])
        assert make_folder(tmp_path).find(compute_digest(b"")) is None
        assert make_folder(tmp_path).find(Digest(bytes.fromhex(card["version"]))) is None
        assert not path.exists()

    trio.run(main)


def test_only_folders_below_the_operators_own_are_read(engine, tmp_path):
    shared, secret = tmp_path / "shared", tmp_path / "secret"
    for folder in (shared / "one", secret):
        folder.mkdir(parents=True)
        config, tensors = make_files(engine, 1)
        (folder / CONFIG_NAME).write_text(json.dumps(config))
        (folder / WEIGHTS_NAME).write_bytes(save(tensors))
    (shared / "link").symlink_to(secret)

    async def main() -> None:
        async with node(engine, tmp_path / "a", ServingConfig(adapters_dir=str(shared))) as (_, _, client):
            for path in ("one", str(shared / "one")):
                assert (await client.post("/v1/adapters", json={"path": path, "name": "one"})).status_code == 201
            for path in ("../secret", str(secret), "link", "/etc", "no\0", "missing", "."):
                answer = await client.post("/v1/adapters", json={"path": path})
                assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_adapter"), path
                assert str(secret) not in answer.text
        async with node(engine, tmp_path / "b") as (_, _, client):
            answer = await client.post("/v1/adapters", json={"path": "one"})
            assert "serving.adapters_dir" in answer.json()["error"]["message"]

    trio.run(main)


def test_an_adapter_with_which_the_model_gives_no_numbers_is_not_served(engine, tmp_path):
    rank = 256

    def grow(fan_out: int, fan_in: int) -> tuple[np.ndarray, np.ndarray]:
        signs = np.where(np.arange(fan_out) % 2, 1, -1)[:, None]  # so that half of the gates are open
        return np.full((rank, fan_in), 6e4, np.float32), (6e4 * np.ones((fan_out, rank)) * signs).astype(np.float32)

    factors = {
        name: grow(*size)
        for name, size in engine.lora_sizes().items()
        if name.endswith(("gate_proj", "up_proj", "down_proj"))
    }

    async def main() -> None:
        async with node(engine, tmp_path) as (_, adapters, client):
            version = adapters.folder.put(encode_adapter("tiny", factors))
            body = {"model": f"tiny+lora@{version.hex()}", "prompt": PROMPT}
            for _ in range(2):
                answer = await client.post("/v1/completions", json=body)
                assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_adapter")
                assert "no numbers" in answer.json()["error"]["message"]
            assert not adapters.loaded()
            assert await ask(client, "tiny+base")

    trio.run(main)


def hostile_bodies(engine: Engine) -> dict[str, tuple[dict, str]]:
    good = make_body(engine, 1, "bad")
    config, tensors = make_files(engine, 1)
    name = next(iter(tensors))

    def encoded(changed: dict) -> dict:
        return {**good, "weights": base64.b64encode(save(changed)).decode()}

    broken = {key: part.copy() for key, part in tensors.items()}
    broken[name][0, 0] = np.nan
    huge = {key: np.full_like(part, 6e4) for key, part in tensors.items()}
    return {
        "a pickle": ({**good, "weights": base64.b64encode(b"\x80\x04cos\nsystem\n").decode()}, "safetensors"),
        "no base64": ({**good, "weights": "%%%"}, "weights"),
        "a huge header": ({**good, "weights": base64.b64encode(b"\xff" * 64).decode()}, "safetensors"),
        "NaN": (encoded(broken), "not finite"),
        "overflow": (encoded(huge), "finite values"),
        "another shape": (encoded({**tensors, name: tensors[name][:, :5]}), "another backbone"),
        "another backbone": (encoded({key.replace("layers.0", "layers.77"): p for key, p in tensors.items()}), "77"),
        "half a pair": (encoded({key: part for key, part in tensors.items() if key != name}), "expected A"),
        "a rank too high": (make_body(engine, 1, targets=("0.self_attn.q_proj",), rank=40), "rank from 1 to 32"),
        "too large": (make_body(engine, 1, targets=("q_proj", "v_proj"), rank=32), "at most"),
        "DoRA": ({**good, "config": {**config, "use_dora": True}}, "use_dora"),
        "saved modules": ({**good, "config": {**config, "modules_to_save": ["lm_head"]}}, "modules_to_save"),
        "bias": ({**good, "config": {**config, "bias": "all"}}, "bias"),
        "a bad name": ({**good, "name": "../up"}, "expected a name"),
        "a taken name": ({**good, "name": "base"}, "other than base"),
        "nothing": ({"name": "x"}, "expected either"),
        "both": ({**good, "path": "x"}, "expected either"),
        "an unknown field": ({**good, "code": "x"}, "code"),
    }


def test_what_is_no_adapter_of_this_backbone_is_a_clear_400_and_the_node_goes_on(engine, tmp_path):
    serving = ServingConfig(adapter_rank_max=32, adapter_bytes_max=150_000)

    async def main() -> None:
        async with node(engine, tmp_path, serving) as (_, adapters, client):
            before = await ask(client, "tiny+base")
            for case, (body, reason) in hostile_bodies(engine).items():
                answer = await client.post("/v1/adapters", json=body)
                error = answer.json()["error"]
                assert answer.status_code == 400, (case, answer.text)
                assert reason in error["message"], (case, error)
                assert error["type"] == "invalid_request_error"
                assert str(tmp_path) not in answer.text
            body = b'{"weights": "' + b"A" * 1_300_000 + b'"}'
            async with httpx.AsyncClient(base_url=client.base_url) as other:  # its connection is closed
                assert (await other.post("/v1/adapters", content=body)).status_code == 413
            for model, code in (
                ("tiny+lora@" + "ab" * 32, "no peer gave"),
                ("tiny+lora@abcdef", "adapters held here"),
                ("tiny+lora@zz", "does not exist"),
                ("tiny+base@zz", "at least 8"),
                ("tiny+other", "tiny+base"),
                ("other", "tiny+base"),
            ):
                answer = await client.post("/v1/completions", json={"model": model, "prompt": PROMPT})
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
                assert code in answer.json()["error"]["message"]
            assert not adapters.names()
            assert not adapters.held()
            assert not list(adapters.folder.path.glob(".*"))
            assert await ask(client, "tiny+base") == before
            document = (await client.get("/openapi.json")).json()
            assert "/v1/adapters" in document["paths"]

    trio.run(main)


def test_what_peers_give_for_a_digest_and_is_no_adapter_is_a_400_and_is_not_kept(engine, tmp_path):
    junk = b"no adapter" * 1000

    async def fetch(digest: Digest, asker: PeerId | None, bytes_max: int) -> bytes:
        return junk

    async def main() -> None:
        async with node(engine, tmp_path, fetch=fetch) as (_, adapters, client):
            for path, more in (("completions", {"prompt": PROMPT}), ("chat/completions", {"messages": QUESTION})):
                for is_stream in (False, True):
                    body = {"model": f"tiny+lora@{compute_digest(junk).hex()}", "stream": is_stream, **more}
                    answer = await client.post(f"/v1/{path}", json=body)
                    error = answer.json()["error"]
                    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_adapter", "model")
                    assert error["type"] == "invalid_request_error"
            assert not adapters.held()
            assert await ask(client, "tiny+base")

    trio.run(main)


def test_fetching_an_adapter_counts_to_a_requests_time(engine, tmp_path):
    blob = make_blob(engine, 5)
    wait_s = [60.0]

    async def fetch(digest: Digest, asker: PeerId | None, bytes_max: int) -> bytes:
        await trio.sleep(wait_s[0])
        return blob

    async def main() -> None:
        async with node(engine, tmp_path, fetch=fetch, http=HttpConfig(request_s_max=1)) as (_, _, client):
            body = {"model": f"tiny+lora@{compute_digest(blob).hex()}", "prompt": PROMPT, "max_tokens": 1}
            started_s = trio.current_time()
            answer = await client.post("/v1/completions", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
            assert trio.current_time() - started_s < 5
            wait_s[0] = 0.0
            assert (await client.post("/v1/completions", json=body)).status_code == 200, "the next one tries anew"

    trio.run(main)


def test_the_command_line_has_a_running_node_serve_a_folder(engine, tmp_path):
    config, tensors = make_files(engine, 4)
    folder, bad, broken = tmp_path / "mine", tmp_path / "bad", tmp_path / "broken"
    for path in (folder, bad, broken):
        path.mkdir()
        (path / CONFIG_NAME).write_text(json.dumps(config))
        (path / WEIGHTS_NAME).write_bytes(save(tensors))
    (bad / WEIGHTS_NAME).write_bytes(save({key.replace("layers.0", "layers.77"): p for key, p in tensors.items()}))
    (broken / CONFIG_NAME).write_text("{")

    async def run_cli(*more: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "nodes.cli", "adapter", "serve", *more]
        done = await trio.run_process(
            command, cwd=Path(__file__).parents[2], capture_stdout=True, capture_stderr=True, check=False
        )
        assert b"Traceback" not in done.stderr
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    async def main() -> None:
        async with node(engine, tmp_path / "home") as (_, adapters, client):
            url = str(client.base_url).rstrip("/")
            code, told, _ = await run_cli(str(folder), "--name", "mine", "--url", url, "--json")
            assert code == 0
            card = json.loads(told)
            assert card["model"] == "tiny+mine"
            assert card["rank"] == 2
            assert await ask(client, "tiny+mine") == await ask(client, card["id"]) != await ask(client, "tiny+base")
            for path, reason in ((bad, "layers.77"), (broken, CONFIG_NAME), (tmp_path / "none", "no LoRA of peft")):
                code, _, error = await run_cli(str(path), "--url", url)
                assert code == OPERATOR, error
                assert reason in " ".join(error.split())
            assert adapters.names().keys() == {"mine"}
        code, _, error = await run_cli(str(folder), "--url", url)
        assert code == OPERATOR
        assert "no node answers" in error

    trio.run(main)


def test_the_folder_keeps_its_bound_and_what_has_a_name(tmp_path):
    folder = make_folder(tmp_path, 100)
    first, second = folder.put(b"a" * 40), folder.put(b"b" * 40)
    folder.set_name("mine", first)
    third = folder.put(b"c" * 40)
    assert set(folder.held()) == {first, third}
    assert folder.get_part(third, 38, 10) == (40, b"cc")
    assert folder.get_part(second, 0, 10) == (0, b"")
    folder.set_name("other", third)
    with pytest.raises(Exception, match="20 are missing"):
        folder.put(b"d" * 40)
    assert folder.drop_name("mine")
    folder.put(b"d" * 40)
    assert not folder.has(first)


# --- between hosts ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def host(engine: Engine, home: Path, number: int, bootstrap=(), *, is_serving: bool):
    """A libp2p host with a gateway and users' adapters, wired as a node wires them."""
    async with make_transport(number, tuple(bootstrap)) as transport:
        downloads = Downloads(transport)
        batcher = Batcher(engine) if is_serving else None

        async def fetch(digest: Digest, asker: PeerId | None, bytes_max: int) -> bytes:
            return await downloads.fetch(digest, [asker] if asker else transport.connected(), bytes_max)

        folder = make_folder(home)
        adapters = UserAdapters("tiny", ServingConfig(), folder, batcher, fetch, read_lora)
        gateway = Gateway(
            transport.peer_id,
            ServingConfig(),
            batcher,
            engine.vocabulary,
            ReplicaStreams(transport),
            CollectorRegistry(),
            clock,
        )
        gateway.adapters = adapters
        checker = Checker(None, lambda vouch: b"", lambda: True)

        async def on_request(peer: PeerId, data: bytes) -> bytes:
            request = decode_request(data)
            reply: BlobReply = answer_blob(folder, adapters.is_known, request)
            return encode(reply)

        async def on_stream(peer: PeerId, data: bytes, send) -> None:
            await answer_stream(gateway, checker, data, send, peer)

        transport.set_handler(on_request)
        transport.set_stream_handler(on_stream)
        yield transport, gateway, adapters


def test_a_replica_fetches_an_adapter_from_who_asks_and_another_gateway_from_the_replica(engine, tmp_path):
    blob = make_blob(engine, 5)

    async def generate(gateway: Gateway, request: GenerateRequest) -> tuple[int, ...]:
        async with aclosing(gateway.complete(request)) as pieces:
            return tuple([token async for piece in pieces for token in piece.tokens])

    async def main() -> None:
        async with (
            host(engine, tmp_path / "a", 1, is_serving=True) as (first, replica, there),
            host(engine, tmp_path / "b", 2, first.addresses(), is_serving=False) as (second, home, here),
            host(engine, tmp_path / "c", 3, first.addresses(), is_serving=False) as (third, other, elsewhere),
        ):
            await until(lambda: len(first.connected()) == 2, 20)
            for gateway in (home, other):
                gateway.on_presence(first.peer_id, replica.presence())
            version = here.folder.put(blob)
            await here.prepare(version)
            request = GenerateRequest(version, (1, 300, 301), (), 10, 0, 1000, 0, 0)
            tokens = await generate(home, request)
            assert len(tokens) in range(1, 11)
            assert there.loaded() == (version,)
            assert there.folder.get_part(version, 0, len(blob)) == (len(blob), blob)
            truth = tuple(token for chunk in engine.generate(request) for token in chunk.tokens)
            bare = GenerateRequest(BACKBONE_VERSION, *request_tail(request))
            assert tokens == truth != await generate(home, bare)
            # the gateway that brought it dies: the next one gets it from the replica
            assert second.peer_id not in third.connected()
            assert await generate(other, request) == truth
            assert elsewhere.folder.has(version)
            # what nobody has, and what is no adapter
            junk = here.folder.put(b"no adapter" * 1000)
            streams = ReplicaStreams(second)
            for unknown, refusal in ((Digest(b"\x77" * 32), UNKNOWN_VERSION), (junk, INVALID)):
                async with aclosing(streams.generate(first.peer_id, with_version(request, unknown))) as chunks:
                    assert [chunk.finish async for chunk in chunks] == [refusal]
            assert not there.folder.has(junk)
            assert await generate(home, request) == truth

    trio.run(main)


def test_a_lora_that_is_warm_here_is_served_here_and_one_that_is_not_where_it_is_quickest(engine, tmp_path):
    async def serve(gateway: Gateway, request: GenerateRequest) -> PeerId:
        async with aclosing(gateway.complete(request)) as pieces:
            return (await anext(pieces)).replica

    async def main() -> None:
        async with (
            host(engine, tmp_path / "a", 1, is_serving=True) as (first, replica, there),
            host(engine, tmp_path / "b", 2, first.addresses(), is_serving=True) as (second, home, here),
        ):
            await until(lambda: bool(second.connected()), 20)
            home.on_presence(first.peer_id, replica.presence())
            home.table.on_presence(home.local, home.presence(), clock())
            for peer, wait_ms in ((first.peer_id, 100.0), (second.peer_id, 110.0)):
                home.table.on_first_token(peer, wait_ms)
            version = here.folder.put(make_blob(engine, 6))
            request = GenerateRequest(version, (1, 300, 301), (), 1, 0, 1000, 0, 0)
            assert await serve(home, request) == first.peer_id
            assert there.is_loaded(version)
            assert not here.is_loaded(version)
            await here.prepare(version)
            for peer, wait_ms in ((first.peer_id, 100.0), (second.peer_id, 110.0)):
                for _ in range(20):
                    home.table.on_first_token(peer, wait_ms)
            assert await serve(home, request) == second.peer_id

    trio.run(main)


def request_tail(request: GenerateRequest) -> tuple:
    return (
        request.prompt,
        request.emitted,
        request.tokens_max,
        request.temperature_milli,
        request.top_p_milli,
        request.seed,
        request.num_logprobs,
    )


def with_version(request: GenerateRequest, version: Digest) -> GenerateRequest:
    return GenerateRequest(version, *request_tail(request))
