"""The page at `/` of a node, in a real browser before the real HTTP side: chat, failures, strangers' text, screens."""

from collections.abc import Iterator

import httpx
import pytest
from browser import Browser, chromium, needs_chromium
from doors_world import open_doors
from page_status import make_status
from selenium.webdriver.common.keys import Keys
from serving_world import V1, V2, make_engine

from p2pfm.runtime.api_keys import ApiKeys
from p2pfm.runtime.engine import Engine
from p2pfm.runtime.page import HEADERS
from p2pfm.types import PeerId

HOSTILE = "<img src=x onerror=window.owned=1>"
SECRET = "correct-horse-battery-staple"
ANSWERED = "return document.querySelector('.turn.them:last-child .by, .turn.them:last-child .failed')"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("screenshots")) as running:
        yield running


def ask(browser: Browser, text: str, num_tokens: int = 24) -> None:
    browser.until("return !document.getElementById('send').disabled && !document.getElementById('send').hidden")
    browser.run(
        "document.getElementById('tokens').value = arguments[0]; document.getElementById('temperature').value = 0;"
        "document.getElementById('message').focus()",
        num_tokens,
    )
    browser.press(text, Keys.ENTER)


def test_the_page_is_served_with_headers_that_forbid_what_is_not_ours(engine: Engine) -> None:
    with open_doors(engine, status=make_status, keys=ApiKeys({"x": SECRET})) as doors:
        for path in ("/", "/page/page.js", "/page/api.js", "/page/chat.js", "/page/dom.js", "/page/look.css"):
            answer = httpx.get(f"{doors.urls[0]}{path}")
            assert answer.status_code == 200, path
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS
            again = httpx.get(f"{doors.urls[0]}{path}", headers={"if-none-match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        assert httpx.get(f"{doors.urls[0]}/page/__init__.py").status_code == 404
        assert "unsafe" not in HEADERS["content-security-policy"]


@needs_chromium
def test_a_chat_streams_and_shows_who_answered_also_when_a_replica_fails(engine: Engine, browser: Browser) -> None:
    with open_doors(engine, status=make_status) as doors:
        browser.open(doors.urls[0])
        doors.links.pause_s = 0.05
        ask(browser, "What is a computer?", 40)
        browser.until("return document.querySelector('.turn.busy .text')?.innerText.length > 10")
        browser.driver.save_screenshot(str(browser._folder / "node-page-answering.png"))
        assert browser.text("#stop") == "Stop"
        browser.until(ANSWERED)
        assert browser.text(".turn.them .version") == V1.hex()[:10]
        assert browser.text(".turn.them .replica") in ("one", "two")
        browser.run(f"document.getElementById('model').value = 'tiny+base@{V2.hex()[:16]}'")
        doors.links.faults = dict.fromkeys((PeerId("one"), PeerId("two")), (5, "cut"))
        ask(browser, "And then?", 12)
        browser.until("return document.querySelectorAll('.turn.them .by').length === 2")
        assert "goes on from here" in browser.text(".turn.them:last-child .moved")
        assert "replaced" in browser.text(".turn.them:last-child .by")
        assert browser.text(".turn.them:last-child .version") == V2.hex()[:10]
        doors.links.faults = {}
        doors.links.pause_s = 0.3
        ask(browser, "Go on.", 100)
        browser.until("return document.querySelector('.turn.busy')")
        browser.press(Keys.ESCAPE)
        browser.until(ANSWERED)
        assert "Stopped" in browser.text(".turn.them:last-child")
        assert browser.barriers() == []
        assert browser.complaints() == []
        assert all(address.startswith(f"{doors.urls[0]}/") for address in browser.asked())


@needs_chromium
@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 360)])
def test_the_state_is_told_on_every_screen(engine: Engine, browser: Browser, theme: str, width: int) -> None:
    with open_doors(engine, status=make_status) as doors:
        browser.open(doors.urls[0], theme, width)
        browser.until("return document.querySelector('#peer-rows')")
        ask(browser, "What is a computer, and what is the state of the Union?", 40)
        browser.until(ANSWERED)
        assert browser.text("#round-title") == "Round 3"
        assert browser.text("#phase").startswith("Scoring, ")
        assert 44 <= int(browser.run("return document.getElementById('progress').getAttribute('aria-valuenow')")) <= 70
        assert "28 PFM" in browser.text("#reward-facts")
        assert "20 PFM" in browser.text("#reward-facts")
        assert "1 of 4" in browser.text("#serving-facts")
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        assert browser.barriers() == []
        browser.shoot(f"node-page-{theme}-{width}", width)


@needs_chromium
def test_text_of_strangers_stays_text(engine: Engine, browser: Browser) -> None:
    with open_doors(engine, status=lambda: make_status(HOSTILE)) as doors:
        browser.open(doors.urls[0])
        browser.until("return document.querySelector('#peer-rows')")
        ask(browser, HOSTILE)
        browser.until(ANSWERED)
        assert browser.text("h1") == HOSTILE
        assert HOSTILE in browser.text("#log")
        assert browser.run("return document.querySelectorAll('img, main script, [onerror]').length") == 0
        assert browser.run("return window.owned === undefined")
        script = "try { document.body.innerHTML = '<b>x</b>'; return 'done' } catch (e) { return e.name }"
        assert browser.run(script) == "TypeError"


@needs_chromium
def test_a_node_that_is_not_ready_asks_for_a_key_or_is_gone_says_so(engine: Engine, browser: Browser) -> None:
    with open_doors(engine, status=lambda: make_status(stage="loading"), keys=ApiKeys({"x": SECRET})) as doors:
        browser.open(doors.urls[0])
        browser.until("return document.getElementById('key-form').checkVisibility()")
        assert browser.run("return document.getElementById('send').disabled")
        assert browser.barriers() == []
        browser.shoot("node-page-needs-key")
        browser.run("document.getElementById('key').focus()")
        browser.press(SECRET, Keys.ENTER)
        browser.until("return !document.getElementById('send').disabled")
        ask(browser, "Hello?")
        browser.until(ANSWERED)
        assert browser.text(".turn.them .version") == V1.hex()[:10]
        doors.links.gateways.clear()  # they announce themselves no more
        doors.gateways[0].table._states.clear()
        browser.until("return document.getElementById('send').disabled")
        browser.run("document.getElementById('new').click()")
        assert "The node is loading" in browser.text("#hint")
        assert "serves nothing yet" in browser.text("#serving-facts")
        browser.shoot("node-page-unready")
    browser.until("return document.querySelector('#banner').innerText.includes('does not answer')")
    browser.run("sessionStorage.clear()")
