"""`p2pfm explorer`: what the chain tells becomes a view; the app serves it to this machine; a real browser shows it."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from browser import Browser, chromium, needs_chromium
from explorer_world import PARAMS, Federation, eventful, explored, make_peer
from ledger_worlds import chain_world
from selenium.webdriver.common.keys import Keys

from nodes.explorer.app import STREAMS_MAX
from nodes.explorer.evidence import judge
from nodes.explorer.serve import find_networks, make_place
from nodes.explorer.source import Place, Source
from nodes.homes import write_config, write_network
from nodes.ports import get_free_port
from nodes.testnet import run_testnet
from p2pfm.config import HttpConfig, NodeConfig
from p2pfm.errors import ChainError, OperatorError
from p2pfm.messages import Proposal, encode
from p2pfm.runtime.page import HEADERS
from p2pfm.settlement.ledger import Ledger
from p2pfm.settlement.rewards import from_wire
from p2pfm.types import Digest, MemberIndex, PeerId, Round, compute_digest

WAIT_S = 20.0
HOSTILE = (
    "<img src=x onerror=window.owned=1>",
    '"><svg onload=window.owned=1>',
    "</code><script>window.owned=1</script>",
    "javascript:window.owned=1",
    "\u202egnp.exe\u200b\x07{{window.owned=1}}",
)


class Chain:
    """A ledger whose endpoint can go down."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self.is_down = ledger, False

    def __getattr__(self, name: str) -> Any:
        if self.is_down:
            raise ChainError("127.0.0.1:8545 does not answer")
        return getattr(self._ledger, name)


def place(world: Federation) -> Place:
    return Place(world.network, [world.any], lambda: world.blobs.get)


def view_of(world: Federation) -> Any:
    return Source(place(world), lambda: 0.0).read()


@pytest.fixture(scope="module")
def told() -> Federation:
    """Not to be changed."""
    return eventful()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("screenshots")) as running:
        yield running


# --- the view -------------------------------------------------------------------------------------------------------


def test_a_view_tells_what_the_ledger_tells(told: Federation) -> None:
    view, ledger = view_of(told), told.any
    assert view.is_known
    assert (view.problem, view.stale_since_s, view.evidence_problem) == ("", None, "")
    assert int(view.pool_wei) == ledger.get_pool()
    for member, peer in zip(ledger.get_roster().members, view.members, strict=True):
        assert int(peer.claimed_wei) == ledger.get_claimed(member.index)
        assert (peer.peer, peer.account, int(peer.stake_wei)) == (member.peer, member.account, member.stake)
        assert int(peer.allotted_wei) >= int(peer.claimed_wei)
    standing = [round for round in view.rounds if round.standing != "void"]
    settled = ledger.get_rounds(Round(0))
    assert [(round.round, round.root) for round in standing] == [(one.round, one.root.hex()) for one in settled]
    assert [round.standing == "final" for round in standing] == [one.is_final for one in settled]
    assert sum(int(peer.allotted_wei) for peer in view.members) == settled[-1].sums.cumulative_wei
    assert all(sum(int(share.reward_wei) for share in one.shares) == int(one.reward_wei) for one in view.rounds)


def test_a_view_keeps_a_voided_round_and_its_contest(told: Federation) -> None:
    view = view_of(told)
    (void,) = (round for round in view.rounds if round.standing == "void")
    assert (void.round, void.nonce, void.key, void.evidence) == (5, 0, "5-0", "wrong")
    assert any("leaf of member" in finding for finding in void.findings)
    assert [round.key for round in view.rounds if round.round == 5] == ["5-0", "5-1"]
    slashed = [peer.index for peer in view.members if peer.state == "slashed"]
    assert sorted(slashed) == sorted(set(void.committee) - set(void.absent))
    steps = [(step.kind, step.round) for step in reversed(view.contests)]
    assert steps == [("demand", 3), ("shown", 3), *[("slashed", None)] * 4, ("void", 5), ("fault", 5)]
    assert view.contests[0].fault == "reward"
    assert not view.contests[-1].is_open


def test_all_else_is_recomputed_and_signers_are_the_committee_but_the_absent(told: Federation) -> None:
    view = view_of(told)
    assert {round.evidence for round in view.rounds if round.standing != "void"} == {"verified"}
    for round in view.rounds:
        assert round.committee == told.ledger.get_committee(round.epoch)
        assert set(round.absent) < set(round.committee)
        assert len(round.absent) == (1 if round.standing == "void" else round.round % 2)


def test_a_round_is_final_exactly_when_the_view_says(told: Federation) -> None:
    world = eventful(num_rounds=5, start_s=1_790_000_000)
    checked = set()
    while True:
        view = view_of(world)
        due = [(one.contestable_until_s, one.key) for one in view.rounds if one.contestable_until_s is not None]
        if not due:
            break
        until_s, key = min(due)
        world.now[0] = until_s - 1
        assert key in {one.key for one in view_of(world).rounds if one.standing == "contestable"}
        world.now[0] = until_s
        assert key in {one.key for one in view_of(world).rounds if one.standing == "final"}
        checked.add(next(one.is_held for one in view.rounds if one.key == key))
    assert checked == {False, True}  # a demand holds round 3 and what comes soon after it


def test_inequality_is_over_all_registered_peers_so_also_who_joined_late() -> None:
    world = Federation([make_peer(index) for index in range(3)]).found()
    world.settle(0)
    world.settle(1)
    before = view_of(world).distribution
    world.join(make_peer(3))
    after = view_of(world).distribution
    assert (len(before.lorenz), len(after.lorenz)) == (4, 5)
    assert after.lorenz[1:] == before.lorenz
    assert after.gini == pytest.approx((3 * before.gini + 1) / 4, abs=1e-5)  # a fourth who has nothing


def test_missing_data_leaves_what_the_chain_tells_and_stops_the_recomputing() -> None:
    world = Federation([make_peer(index) for index in range(4)]).found()
    for round in range(4):
        world.settle(round, is_served=round != 1)
    view = view_of(world)
    assert [round.evidence for round in view.rounds] == ["verified", "missing", "matched", "verified"]
    assert [bool(round.shares) for round in view.rounds] == [True, False, True, True]
    assert view.rounds[1].reward_wei == str(world.any.get_rounds(Round(1))[0].sums.reward_wei) != "0"


def test_data_is_not_believed_that_is_not_of_the_hash_or_not_of_the_root(told: Federation) -> None:
    settled, rosters = told.any.get_rounds(Round(11))[0], [told.ledger.get_roster()]
    previous, data = told.history[-2], told.blobs[settled.data_digest]

    def say(given: bytes, **changes: Any) -> Any:
        return judge(msgspec.structs.replace(settled, **changes), lambda _: given, rosters, previous, told.network)

    assert say(data).state == "verified"
    assert say(data + b"\0").state == "missing"  # a node lied, not the committee: another may have it
    for changes in ({"root": Digest(b"r" * 32)}, {"num_leaves": settled.num_leaves - 1}):
        refused = say(data, **changes)
        assert (refused.state, refused.proposal) == ("wrong", None)
        assert "leaves" in refused.findings[0]
    other = encode(told.history[0].reveals[0])
    assert "no proposal" in say(other, data_digest=compute_digest(other)).findings[0]


def test_a_round_is_judged_by_the_stakes_of_its_time(told: Federation) -> None:
    settled, today = told.any.get_rounds(Round(0))[0], told.ledger.get_roster()
    assert (
        judge(settled, told.blobs.get, [today], None, told.network).state == "wrong"
    )  # its signers were slashed since
    assert view_of(told).rounds[0].evidence == "verified"


def test_nonsense_that_a_committee_signed_is_a_finding() -> None:
    def nonsense(proposal: Proposal) -> Proposal:
        first = msgspec.structs.replace(proposal.updates[0], member=MemberIndex(4000))
        return msgspec.structs.replace(proposal, updates=(first, *proposal.updates[1:]))

    world = Federation([make_peer(index) for index in range(4)]).found()
    world.settle(0, tamper=nonsense)
    (round,) = view_of(world).rounds
    assert round.evidence == "wrong"
    assert round.findings
    assert len(round.shares) == 4


def test_a_chain_that_went_down_leaves_what_was_known_and_says_since_when() -> None:
    world = Federation([make_peer(index) for index in range(4)]).found()
    chain, now = Chain(world.any), [1000.0]
    chain.is_down = True
    source = Source(Place(world.network, [chain], lambda: world.blobs.get), lambda: now[0])  # type: ignore[list-item]
    unknown = source.read()
    assert (unknown.is_known, unknown.stale_since_s) == (False, None)
    assert "does not answer" in unknown.problem
    chain.is_down = False
    world.settle(0)
    assert len(source.read().rounds) == 1
    chain.is_down, now[0] = True, 2000.0
    stale = source.read()
    assert (len(stale.rounds), stale.stale_since_s) == (1, 1000)
    chain.is_down = False
    assert source.read().problem == ""


def test_of_two_endpoints_the_one_that_answers_is_asked() -> None:
    world = Federation([make_peer(index) for index in range(4)]).found()
    down = Chain(world.any)
    down.is_down = True
    source = Source(Place(world.network, [down, world.any], lambda: world.blobs.get), lambda: 0.0)  # type: ignore[list-item]
    assert source.read().is_known


@contextmanager
def blob_server(blobs: dict[Digest, bytes]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = blobs.get(Digest(bytes.fromhex(self.path.removeprefix("/blobs/"))))
            self.send_response(200 if data is not None else 404)
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_data_come_from_any_node_that_has_them_and_a_liar_is_passed_over(tmp_path: Path) -> None:
    world = Federation([make_peer(index) for index in range(4)]).found()
    world.settle(0)
    write_network(tmp_path / "network.toml", world.network)
    nobody = f"http://127.0.0.1:{get_free_port()}"
    lies = dict.fromkeys(world.blobs, b"lie")

    def read(*urls: str) -> Any:
        (found,) = find_networks([], "http://127.0.0.1:1", tmp_path / "network.toml", urls)
        place = make_place(found)
        return Source(Place(place.network, [world.any], place.open_blobs), lambda: 0.0).read()

    with blob_server({}) as empty, blob_server(lies) as liar, blob_server(world.blobs) as honest:
        assert read(nobody, empty, liar, honest).rounds[0].evidence == "verified"
        assert read(nobody, empty, liar).rounds[0].evidence == "missing"
    assert "p2pfm node run" in read(nobody).evidence_problem
    assert "--node-url" in read().evidence_problem


def test_data_that_comes_late_is_taken_up() -> None:
    world, now = Federation([make_peer(index) for index in range(4)]).found(), [0.0]
    proposal = world.settle(0, is_served=False)
    source = Source(place(world), lambda: now[0])
    assert source.read().rounds[0].evidence == "missing"
    world.blobs[world.any.get_head().data_digest] = encode(proposal)
    assert source.read().rounds[0].evidence == "missing"  # asked a moment ago
    now[0] += 60
    assert source.read().rounds[0].evidence == "verified"


def test_what_nobody_serves_is_asked_for_less_and_less_often() -> None:
    world, now = Federation([make_peer(index) for index in range(4)]).found(), [0.0]
    world.settle(0, is_served=False)
    asked: list[float] = []

    def fetch(digest: Digest) -> bytes | None:
        asked.append(now[0])
        return world.blobs.get(digest)

    source = Source(Place(world.network, [world.any], lambda: fetch), lambda: now[0])
    while now[0] < 3600:
        source.read()
        now[0] += 2
    assert 8 <= len(asked) <= 13
    gaps = [later - sooner for sooner, later in itertools.pairwise(asked)]
    assert gaps == sorted(gaps)
    assert gaps[-1] <= 620
    world.settle(1)
    source.read()
    assert asked[-1] == now[0], "what is new is asked for at once"


# --- options --------------------------------------------------------------------------------------------------------


def test_one_network_of_two_nodes_is_shown_once(tmp_path: Path) -> None:
    network = Federation([]).network
    other = msgspec.structs.replace(network, name="another")
    files = []
    for name, of, port in (("alice", network, 8001), ("bob", network, 8002), ("carol", other, 8003)):
        config = NodeConfig(
            home=".", data="d", rpc=f"http://127.0.0.1:{port + 500}", network=of, http=HttpConfig("0.0.0.0", port)
        )
        write_config(tmp_path / f"{name}.toml", config)
        files.append(tmp_path / f"{name}.toml")
    first, second = find_networks(files, "", None, [])
    assert first.nodes == ["http://127.0.0.1:8001", "http://127.0.0.1:8002"]
    assert first.rpcs == [("http://127.0.0.1:8501", ""), ("http://127.0.0.1:8502", "")]
    assert first.folder == (tmp_path / "blobs").resolve()
    assert second.network.name == "another"
    write_network(tmp_path / "network.toml", network)
    (only,) = find_networks([], "http://127.0.0.1:1", tmp_path / "network.toml", ["http://127.0.0.1:2/"])
    assert (only.rpcs, only.nodes, only.folder) == ([("http://127.0.0.1:1", "")], ["http://127.0.0.1:2"], None)


@pytest.mark.parametrize(
    ("rpc", "has_network", "nodes", "says"),
    [
        ("", False, [], "nothing to show"),
        ("http://127.0.0.1:1", False, [], "go together"),
        ("", True, [], "go together"),
        ("", False, ["http://127.0.0.1:2"], "nothing to show"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, rpc: str, has_network: bool, nodes: list[str], says: str
) -> None:
    with pytest.raises(OperatorError, match=says):
        find_networks([], rpc, tmp_path / "network.toml" if has_network else None, nodes)


# --- HTTP -----------------------------------------------------------------------------------------------------------


def test_the_api_serves_the_view_and_what_is_unchanged_is_not_sent_again(told: Federation) -> None:
    with explored(place(told)) as url, httpx.Client(base_url=url) as client:
        (summary,) = client.get("/api/networks").json()["networks"]
        assert summary["id"] == told.network.network_id().hex()
        answer = client.get(f"/api/networks/{summary['id']}")
        assert answer.json() == json.loads(msgspec.json.encode(view_of(told)))
        again = client.get(f"/api/networks/{summary['id']}", headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert client.get("/api/networks/00").status_code == 404
        assert client.get("/api/networks/00/events").status_code == 404


def test_every_answer_forbids_what_is_not_ours(told: Federation) -> None:
    with explored(place(told)) as url, httpx.Client(base_url=url) as client:
        for path in (
            "/",
            "/app.js",
            "/style.css",
            "/icon.svg",
            "/api/networks",
            "/nowhere",
            "/..%2fapp.py",
            "/api/networks/x",
        ):
            answer = client.get(path)
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS, path
            assert "access-control-allow-origin" not in answer.headers
        assert client.get("/nowhere").status_code == 404
        assert client.get("/..%2fapp.py").status_code == 404
        policy = HEADERS["content-security-policy"]
        assert "unsafe" not in policy
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")


def test_nothing_but_reading_is_allowed(told: Federation) -> None:
    with explored(place(told)) as url, httpx.Client(base_url=url) as client:
        for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
            for path in ("/", "/api/networks", "/app.js"):
                assert client.request(method, path).status_code == 405
        assert client.head("/").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8600", 200), ("localhost:8600", 200), ("LOCALHOST", 200), ("[::1]:8600", 200), ("::1", 421),
        ("192.168.0.7:8600", 200), ("tower.example:8600", 200), ("evil.example:8600", 421), ("evil.example", 421),
        ("localhost.evil.example", 421), ("127.0.0.1.evil.example", 421), ("", 421), ("localhost:x:y", 421),
        ("[::1]:8600@evil.example", 421),
    ],
)  # fmt: skip
def test_a_name_of_somebody_else_that_leads_here_is_refused(told: Federation, host: str, status: int) -> None:
    with explored(place(told), host_names=["tower.example"]) as url:
        assert httpx.get(f"{url}/api/networks", headers={"host": host}).status_code == status


def read_events(response: httpx.Response) -> Iterator[str]:
    """Blocks of a stream of events."""
    block: list[str] = []
    for line in response.iter_lines():
        if line:
            block.append(line)
        else:
            yield "\n".join(block)
            block = []


def test_events_tell_each_new_view_once_and_a_silent_stream_beats() -> None:
    world = Federation([make_peer(index) for index in range(4)]).found()
    with explored(place(world), heartbeat_s=0.3) as url:
        name = world.network.network_id().hex()
        with httpx.stream("GET", f"{url}/api/networks/{name}/events", timeout=WAIT_S) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            events = read_events(response)
            assert next(events).startswith("retry: ")
            first = next(events)
            assert first.startswith("event: view\ndata: ")
            assert next(events) == ": still here"
            world.settle(0)
            second = next(event for event in events if event != ": still here")
            assert second.startswith("event: view\ndata: ")
            assert second != first
        etag = httpx.get(f"{url}/api/networks/{name}").headers["etag"]
        assert second.endswith(etag.strip('"'))


def test_streams_have_a_bound_and_a_closed_one_makes_room() -> None:
    world = Federation([make_peer(index) for index in range(4)]).found()
    with (
        explored(place(world), heartbeat_s=0.1) as url,
        httpx.Client(limits=httpx.Limits(max_connections=None)) as client,
    ):
        path = f"{url}/api/networks/{world.network.network_id().hex()}/events"
        held = [client.send(client.build_request("GET", path), stream=True) for _ in range(STREAMS_MAX)]
        assert {response.status_code for response in held} == {200}
        running = [response.iter_bytes() for response in held]
        assert all(next(pieces).startswith(b"retry: ") for pieces in running)

        def is_full() -> bool:
            with client.stream("GET", path) as response:
                return response.status_code == 503

        assert is_full()
        for response in held:
            response.close()
        wait_for(lambda: not is_full())


def wait_for(check: Callable[[], bool]) -> None:
    """Until it is so, at most WAIT_S."""
    paused = threading.Event()
    for _ in range(int(WAIT_S / 0.05)):
        if check():
            return
        paused.wait(0.05)
    raise AssertionError(f"not within {WAIT_S} s")


# --- the page in a browser ------------------------------------------------------------------------------------------

RENDERED = "return document.querySelector('#round h4') && document.querySelectorAll('figure svg').length === 2"


@needs_chromium
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 768, 360])
def test_the_page_is_for_everybody_in_both_themes_on_any_screen(
    told: Federation, browser: Browser, theme: str, width: int
) -> None:
    with explored(place(told)) as url:
        browser.open(url, theme, width)
        browser.until(RENDERED)
        browser.shoot(f"explorer-{theme}-{width}", width)
        assert browser.barriers() == []
        assert browser.text("h1") == "chatterbot-demo"
        assert browser.text("#round-title").startswith("Round 11")
        dark = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert (dark == "rgb(20, 21, 24)") is (theme == "dark")
        assert browser.complaints() == []
        asked = browser.asked()
        assert {f"{url}/", f"{url}/app.js", f"{url}/api/networks"} <= asked
        assert all(address.startswith(f"{url}/") for address in asked), asked
        assert browser.run(
            "return performance.getEntriesByType('resource').every((e) => e.name.startsWith(location.origin))"
        )


@needs_chromium
def test_the_checks_of_the_page_find_what_is_wrong(told: Federation, browser: Browser) -> None:
    with explored(place(told)) as url:
        browser.open(url)
        browser.until(RENDERED)
        browser.run(
            "document.querySelector('#round-title').style.color = '#c8c8c8';"
            "document.querySelector('#copy-root').removeAttribute('aria-label');"
            "document.querySelector('#copy-root').textContent = '';"
            "document.querySelector('main').style.width = '3000px';"
            "document.querySelector('main').style.maxWidth = 'none'"
        )
        found = " ".join(browser.barriers())
        assert "contrast" in found
        assert "no name" in found
        assert "px wide" in found


@needs_chromium
def test_a_round_is_chosen_by_keyboard_alone(told: Federation, browser: Browser) -> None:
    with explored(place(told)) as url:
        browser.open(url)
        browser.until(RENDERED)
        browser.press(Keys.TAB)
        assert browser.run("return document.activeElement.className") == "skip"
        browser.press(Keys.ENTER)
        for _ in range(12):
            browser.press(Keys.TAB)
            if browser.run("return document.activeElement.className") == "choose":
                break
        assert browser.run("return document.activeElement.getAttribute('aria-label')") == "Round 11"
        assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
        for keys, title, label in (
            ([Keys.ARROW_DOWN], "Round 10", "Round 10"),
            ([Keys.ARROW_DOWN] * 6, "Round 5", "Round 5, void"),
            ([Keys.END], "Round 0", "Round 0"),
            ([Keys.ARROW_DOWN], "Round 0", "Round 0"),
            ([Keys.HOME], "Round 11", "Round 11"),
            ([Keys.ARROW_DOWN, Keys.ARROW_UP], "Round 11", "Round 11"),
        ):
            browser.press(*keys)
            assert browser.text("#round-title").startswith(title)
            assert browser.run("return document.activeElement.getAttribute('aria-label')") == label
            assert browser.run("return document.querySelectorAll('.choose[tabindex=\"0\"]').length") == 1
        browser.press(Keys.ARROW_DOWN)
        browser.driver.refresh()
        browser.until(RENDERED)
        assert browser.text("#round-title").startswith("Round 10")


@needs_chromium
def test_a_voided_round_says_what_was_wrong_with_it(told: Federation, browser: Browser) -> None:
    with explored(place(told)) as url:
        browser.open(f"{url}/?round=5-0")
        browser.until("return document.querySelector('.wrong li')")
        assert "voided by a contest" in browser.text("#round .under")
        assert "leaf of member" in browser.text(".wrong")
        assert browser.barriers() == []
        browser.shoot("explorer-void-round")


@needs_chromium
def test_peers_are_sorted_by_any_column(told: Federation, browser: Browser) -> None:
    with explored(place(told)) as url:
        browser.open(url)
        browser.until(RENDERED)
        for column, key in (("stake", "stake_wei"), ("claimed", "claimed_wei"), ("index", "index")):
            for is_down in (column != "index", column == "index"):
                browser.run(f"document.getElementById('sort-{column}').focus()")
                browser.press(Keys.ENTER)
                shown = browser.run(
                    "return [...document.querySelectorAll('#peers .index')].map((e) => +e.innerText.slice(1))"
                )
                values = [int(getattr(view_of(told).members[index], key)) for index in shown]
                assert values == sorted(values, reverse=is_down)
                assert browser.run("return document.activeElement.id") == f"sort-{column}"
                sorted_by = browser.run("return document.activeElement.closest('th').getAttribute('aria-sort')")
                assert sorted_by == ("descending" if is_down else "ascending")


@needs_chromium
def test_what_is_shown_is_what_was_paid(told: Federation, browser: Browser) -> None:
    view = view_of(told)
    with explored(place(told)) as url:
        browser.open(url)
        browser.until(RENDERED)
        rows = browser.run(
            "return [...document.querySelectorAll('#share-rows tbody tr')].map((row) => "
            "[row.querySelector('.index').innerText, row.cells[1].innerText, row.cells[5].querySelector('span').title])"
        )
        shares = {f"#{share.member}": share for share in view.rounds[-1].shares}
        assert len(rows) == len(shares)
        for index, contribution, reward in rows:
            assert reward.endswith(f"= {shares[index].reward_wei} wei")
            if shares[index].contribution is not None:
                shown = float(contribution.replace("\u2212", "-"))
                assert shown == pytest.approx(shares[index].contribution / 1e6, abs=0.006)
        bars = browser.run(
            "return [...document.querySelectorAll('#share-rows .reward rect')]"
            ".map((e) => parseFloat(e.getAttribute('width')))"
        )
        most = max(int(share.reward_wei) for share in shares.values())
        assert bars == pytest.approx([int(shares[row[0]].reward_wei) / most * 100 for row in rows])
        root = browser.text("#text-root")
        assert root == view.rounds[-1].root
        browser.driver.execute_cdp_cmd(
            "Browser.grantPermissions",
            {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": url},
        )
        browser.run("document.getElementById('copy-root').focus()")
        browser.press(Keys.ENTER)
        browser.until("return document.getElementById('copy-root').innerText === 'Copied'")
        script = "const [done] = arguments; navigator.clipboard.readText().then(done, (error) => done(String(error)))"
        assert browser.driver.execute_async_script(script) == root


@needs_chromium
def test_rounds_come_live_and_the_chosen_one_stays(browser: Browser) -> None:
    world = Federation([make_peer(index) for index in range(6)]).found()
    with explored(place(world)) as url:
        browser.open(url)
        browser.until("return document.querySelector('#round .empty')")
        assert "No round yet" in browser.text("#round")
        assert browser.barriers() == []
        browser.shoot("explorer-no-round")
        browser.run("window.isSamePage = true")
        world.settle(0)
        browser.until("return document.querySelector('#round-title').innerText.startsWith('Round 0')")
        assert browser.text("#said") == "Round 0 was accepted."
        world.settle(1, absent=1)
        browser.until("return document.querySelector('#round-title').innerText.startsWith('Round 1')")
        browser.until(RENDERED)
        assert "4 of 5 signed" in browser.text("#round")
        browser.run("document.getElementById('round-1-0').focus()")
        browser.press(Keys.ARROW_DOWN)
        world.settle(2)
        browser.until("return document.getElementById('round-2-0')")
        assert browser.text("#round-title").startswith("Round 0")
        assert browser.run("return document.activeElement.id") == "round-0-0"
        world.advance(PARAMS.challenge_window_s)
        browser.until("return document.querySelector('#round-title').innerText.includes('final')")
        world.any.claim(Round(1), MemberIndex(0), from_wire(world.history[1].leaves))
        browser.until("return document.querySelectorAll('#claim-rows tbody tr').length === 1")
        assert browser.run("return window.isSamePage")
        assert browser.complaints() == []


@needs_chromium
def test_a_page_in_the_background_asks_for_nothing_and_catches_up_when_it_is_seen(browser: Browser) -> None:
    world = Federation([make_peer(index) for index in range(4)]).found()
    with explored(place(world)) as url:
        browser.open(url)
        browser.until("return document.querySelector('#round .empty')")
        first = browser.driver.current_window_handle
        browser.run(
            "window.turns = []; addEventListener('visibilitychange', () => turns.push(performance.now()), true)"
        )
        browser.driver.switch_to.new_window("tab")
        world.settle(0)
        name = world.network.network_id().hex()
        wait_for(lambda: len(httpx.get(f"{url}/api/networks/{name}").json()["rounds"]) == 1)
        browser.driver.close()
        browser.driver.switch_to.window(first)
        browser.until("return document.querySelector('#round-title').innerText.startsWith('Round 0')")
        assert browser.run("return turns.length") == 2
        asked = "return performance.getEntriesByType('resource').map((one) => [one.name, one.startTime])"
        hidden, seen = browser.run("return turns")
        times = [time for address, time in browser.run(asked) if "/api/" in address]
        assert not [time for time in times if hidden < time < seen]
        assert [time for time in times if time >= seen]
        assert browser.complaints() == []


@needs_chromium
def test_what_peers_call_themselves_stays_text(browser: Browser) -> None:
    world = Federation([PeerId(name) for name in HOSTILE])
    world.network = msgspec.structs.replace(world.network, name=HOSTILE[0], backbone=HOSTILE[1])
    world.found()
    world.settle(0, is_served=False)
    world.settle(1)
    with explored(place(world)) as url:
        browser.open(url)
        browser.until("return document.querySelectorAll('#peers tbody tr').length === 5")
        browser.until("return document.querySelector('#round-1-0')")
        assert browser.run("return window.owned === undefined")
        assert browser.text("h1") == HOSTILE[0]
        assert (
            browser.run(
                "return document.querySelectorAll('img, main script, [onerror], [onload], a[href^=javascript]').length"
            )
            == 0
        )
        titles = browser.run("return [...document.querySelectorAll('#peers .peer')].map((e) => e.title)")
        assert sorted(titles)[:4] == sorted(HOSTILE[:4])
        assert not {"\u202e", "\u200b", "\x07"} & set(
            browser.run("return document.body.innerText + document.body.outerHTML")
        )
        # and were a program of this page to try: the browser refuses
        assert (
            browser.run("try { document.body.innerHTML = '<b>x</b>'; return 'done' } catch (e) { return e.name }")
            == "TypeError"
        )
        assert browser.run("document.body.append(document.createElement('b')); return 1") == 1
        assert browser.barriers() == []
        browser.shoot("explorer-hostile-names")


@needs_chromium
def test_data_that_nobody_serves_and_a_network_without_members_say_what_to_do(browser: Browser) -> None:
    world = Federation([make_peer(index) for index in range(4)]).found()
    world.settle(0)
    empty = Federation([])
    empty.network = msgspec.structs.replace(empty.network, name="nobody-yet")
    with explored(Place(world.network, [world.any], None), place(empty)) as url:
        browser.open(url)
        browser.until("return document.querySelector('#round .empty')")
        told = browser.text("#round")
        for hint in (
            "Nobody serves this round",
            "--node-url",
            "p2pfm rewards challenge",
            "5 needed" if False else "signed",
        ):
            assert hint in told
        browser.shoot("explorer-no-data")
        assert browser.barriers() == []
        browser.run("document.getElementById('networks').focus()")
        browser.press("n")
        browser.until("return document.querySelector('h1').innerText === 'nobody-yet'")
        assert "p2pfm node run" in browser.text("#round")
        assert browser.barriers() == []
        browser.driver.refresh()
        browser.until("return document.querySelector('h1').innerText === 'nobody-yet'")
        browser.shoot("explorer-no-members")


@needs_chromium
def test_a_chain_or_an_explorer_that_goes_down_leaves_the_page_with_a_banner(browser: Browser) -> None:
    world = eventful(num_rounds=4)
    chain = Chain(world.any)
    with explored(Place(world.network, [chain], lambda: world.blobs.get)) as url:  # type: ignore[list-item]
        browser.open(url)
        browser.until(RENDERED)
        chain.is_down = True
        browser.until("return document.querySelector('#banner').innerText.includes('The chain does not answer')")
        assert "127.0.0.1:8545 does not answer" in browser.text("#banner")
        assert browser.text("#live") == "\u2715 stale"
        assert browser.text("#round-title").startswith("Round 3")
        assert browser.barriers() == []
        browser.shoot("explorer-stale")
        chain.is_down = False
        browser.until("return document.querySelector('#banner').innerText === ''")
        assert browser.text("#live") == "\u2713 live"
    browser.until("return document.querySelector('#banner').innerText.includes('explorer does not answer')")
    assert browser.text("#round-title").startswith("Round 3")


# --- the whole command ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_chromium
def test_the_command_shows_a_real_chain_live(tmp_path: Path, browser: Browser) -> None:
    with run_testnet(get_free_port(), log=tmp_path / "chain.log") as testnet:
        world = chain_world(testnet.rpc_url).found()
        network = msgspec.structs.replace(Federation([]).network, name="on-chain", chain=world.chain)
        write_network(tmp_path / "network.toml", network)
        with run_explorer("--rpc", testnet.rpc_url, "--network", str(tmp_path / "network.toml")) as (url, process):
            browser.open(url)
            browser.until("return document.querySelector('#round .empty')")
            world.settle(0, absent=[1])
            browser.until("return document.querySelector('#round-title').innerText.startsWith('Round 0')")
            world.settle(1, (1, 2, 3, 4))
            browser.until("return document.querySelector('#round-title').innerText.startsWith('Round 1')")
            assert "1 of" not in browser.text("#round h4")
            settled = world.any.get_head()
            assert browser.text("#text-root") == settled.root.hex()
            assert len(browser.text("#text-transaction")) == 66
            assert browser.text("#live") == "\u2713 live"
            assert browser.barriers() == []
            browser.shoot("explorer-on-chain")
            assert browser.complaints() == []
            assert all(address.startswith(f"{url}/") for address in browser.asked())
            process.send_signal(signal.SIGTERM)
            assert process.wait(WAIT_S) == 0


@pytest.mark.slow
def test_the_command_refuses_a_port_in_use_in_one_line(tmp_path: Path) -> None:
    write_network(tmp_path / "network.toml", Federation([]).network)
    options = ("--rpc", "http://127.0.0.1:1", "--network", str(tmp_path / "network.toml"))
    with run_explorer(*options) as (url, _):
        port = url.rpartition(":")[2].strip("/")
        done = subprocess.run(
            [sys.executable, "-m", "nodes.cli", "explorer", *options, "--port", port],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.startswith("error: cannot listen on 127.0.0.1")
        assert "Traceback" not in done.stderr
        view = httpx.get(f"{url}/api/networks/{Federation([]).network.network_id().hex()}", timeout=60).json()
        assert (view["is_known"], view["rounds"]) == (False, [])
        assert view["problem"]


@contextmanager
def run_explorer(*options: str) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """The command as a process; its URL, as it tells it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nodes.cli", "explorer", *options, "--port", "0", "--tied"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        line = process.stdout.readline().split()
        assert line[0] == "explorer"
        yield line[1].rstrip("/"), process
    finally:
        process.stdin.close()
        process.wait(WAIT_S)
        process.stdout.close()
