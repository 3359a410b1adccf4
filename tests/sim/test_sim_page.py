"""The report in a real browser: it asks nobody for anything, complains of nothing, and everybody can read it."""

from collections.abc import Iterator

import pytest
from msgspec.structs import replace
from net.browser import Browser, chromium, needs_chromium

from sim.churn import ChurnModel
from sim.page import make_plots, render_page
from sim.report import SimReport, run_scenario, set_beside
from sim.scenarios import Scenario

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("screenshots")) as running:
        yield running


@pytest.fixture(scope="module")
def report() -> SimReport:
    """With every figure that a page can have: gas, a backdoor's success and a run beside it are put in here."""
    plain = run_scenario(
        Scenario(
            title="Crashes, <b>idlers</b> & liars",
            seed=3,
            num_peers=10,
            num_rounds=6,
            churn=ChurnModel(crash=0.2),
            adversaries=("zero", "liar", "silent"),
        )
    )
    rounds = [replace(item, gas=2_000_000 + 1_000 * item.round, backdoor=0.1) for item in plain.rounds]
    return set_beside(replace(plain, rounds=tuple(rounds), gas={"register": 900, "submitRound": 7_000}), plain)


@pytest.fixture(scope="module")
def page(report: SimReport, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(report), encoding="utf-8")
    return path.as_uri()


def show(browser: Browser, url: str, theme: str = "light", width: int = 1280) -> None:
    browser.driver.get("about:blank")
    browser.complaints()
    browser.asked()
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.resize(width, 900)
    browser.driver.get(url)


@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 1280), ("light", 360)])
def test_everybody_can_read_the_page_and_it_asks_nobody(browser: Browser, page: str, theme: str, width: int) -> None:
    show(browser, page, theme, width)
    assert browser.barriers() == []
    assert browser.complaints() == []
    assert browser.asked() == {page}
    browser.shoot(f"simulation-{theme}-{width}", width)


def test_every_plot_draws_its_figures(browser: Browser, page: str, report: SimReport) -> None:
    show(browser, page)
    keys = [plot.key for plot in make_plots(report)]
    assert keys == [*("loss", "certified", "bytes", "rewards", "gini", "availability", "work", "backdoor", "gas")]
    for plot in make_plots(report):
        drawn = browser.run("return document.querySelectorAll(`#${arguments[0]} .plot .line path`).length", plot.key)
        bars = browser.run("return document.querySelectorAll(`#${arguments[0]} .plot .bars`).length", plot.key)
        assert drawn + bars == len(plot.series), plot.key
        height = browser.run("return document.querySelector(`#${arguments[0]} .plot`).clientHeight", plot.key)
        assert height > 150
    dots = browser.run("return document.querySelectorAll('#loss .plot circle').length")
    assert dots == sum(item.loss_nats is not None for item in report.rounds) > 0


def test_lines_lie_within_their_plot(browser: Browser, page: str) -> None:
    show(browser, page)
    outside = browser.run(
        "return [...document.querySelectorAll('.plot')].flatMap((plot) => [...plot.querySelectorAll('path, circle')]"
        ".filter((e) => { const b = e.getBBox(), v = plot.viewBox.baseVal;"
        " return b.x < 0 || b.y < 0 || b.x + b.width > v.width || b.y + b.height > v.height; }))"
        ".map((e) => e.outerHTML)"
    )
    assert outside == []


def test_a_table_stands_behind_every_plot(browser: Browser, page: str, report: SimReport) -> None:
    show(browser, page)
    for plot in make_plots(report):
        rows = browser.run(
            "const card = document.getElementById(arguments[0]); card.querySelector('details').open = true;"
            "return [...card.querySelectorAll('tbody tr')].map((row) => row.innerText)",
            plot.key,
        )
        assert len(rows) == len(report.rounds), plot.key


def test_a_title_is_text_and_never_markup(browser: Browser, page: str, report: SimReport) -> None:
    show(browser, page)
    assert browser.text("h1") == report.scenario.title
    assert browser.run("return document.title") == f"{report.scenario.title} – p2pfm simulation"
