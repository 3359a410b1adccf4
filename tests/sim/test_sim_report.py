"""What a run's figures are: taken without changing the run, and right."""

import csv
import re
from functools import cache
from io import StringIO
from itertools import combinations
from math import sqrt
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console, RenderableType

from p2pfm.config import WEI_PER_PFM
from p2pfm.errors import ConfigError, OperatorError
from p2pfm.protocol.phases import compute_round_start
from p2pfm.settlement.ledger import Slashed
from p2pfm.types import NANO, Millis, Round
from sim.churn import ChurnModel, UpTime
from sim.compare import compare, compute_figures, compute_spreads, format_spread, render_comparison
from sim.network import NetworkModel
from sim.page import FOLDER, make_plots, render_page
from sim.page.plots import Plot, Series, compute_ticks, format_value, render_plot
from sim.recorder import Recorder, compute_gini
from sim.report import (
    SimReport,
    compute_harm,
    compute_kinds_report,
    describe_harm,
    make_honest,
    make_report,
    render,
    run_scenario,
    set_beside,
)
from sim.results import save_report
from sim.scenarios import (
    AdversaryKind,
    LearnerModel,
    Outage,
    PhaseConfig,
    Scenario,
    compute_kinds,
    compute_stakes,
    make_network,
)
from sim.sweeps import render_sweep
from sim.tables import make_round_rows, validate_format, write_table
from sim.world import World


@cache
def troubled() -> tuple[World, SimReport]:
    """Crashes, one who hands in nothing, and one whose updates go backwards."""
    scenario = Scenario(
        seed=4, num_peers=12, num_rounds=4, churn=ChurnModel(crash=0.2), adversaries=("zero", "sign_flip")
    )
    world = World(scenario)
    recorder = Recorder(world)
    world.run(recorder.on_round)
    return world, make_report(world, recorder, 1.0)


def show(report: SimReport, width: int = 80) -> str:
    return show_any(render(report), width)


def show_any(what: RenderableType, width: int = 200) -> str:
    screen = Console(file=StringIO(), width=width)
    screen.print(what)
    return screen.file.getvalue()  # type: ignore[attr-defined]


def test_a_recorded_run_is_the_run() -> None:
    _, report = troubled()
    plain = World(report.scenario)
    plain.run()
    assert plain.trace_digest() == report.trace


def test_rewards_are_what_was_claimed() -> None:
    world, report = troubled()
    claimed = [amount / WEI_PER_PFM for amount in world.chain.get_claimed()]
    assert [peer.reward_pfm for peer in report.peers] == pytest.approx(claimed)
    kinds = {kind.kind: kind for kind in compute_kinds_report(report)}
    assert kinds["zero"].reward_pfm == pytest.approx(claimed[0])
    assert kinds["honest"].reward_pfm == pytest.approx(sum(claimed[2:]) / 10)
    assert kinds["zero"].gain_pfm == pytest.approx(claimed[0] - sum(claimed[2:]) / 10)
    assert kinds["honest"].together_pfm == pytest.approx(sum(claimed[2:]))


def test_rounds_have_what_the_world_saw() -> None:
    world, report = troubled()
    for item in report.rounds:
        assert item.is_certified == (item.round in world.checks.certificates)
        assert item.loss_nats == (world.losses[item.round] / NANO if item.is_certified else None)
    assert report.num_steps < world.num_steps
    assert all(item.sent.mean_bytes <= item.sent.max_bytes for item in report.rounds)


def test_totals_are_of_the_rounds_that_have_ended() -> None:
    def stop(round: Round) -> None:
        recorder.on_round(round)
        if round == 1:
            world.schedule.at(Millis(world.schedule.now_ms + 50_000), interrupt)

    def interrupt() -> None:
        raise KeyboardInterrupt

    world = World(Scenario(num_peers=4, num_rounds=3))
    recorder = Recorder(world)
    with pytest.raises(KeyboardInterrupt):
        world.run(stop)
    interrupted = make_report(world, recorder, 1.0, is_complete=False)
    assert len(interrupted.rounds) == 2
    for report in (interrupted, troubled()[1]):
        num = len(report.peers)
        assert report.num_steps == sum(item.num_steps for item in report.rounds)
        sent, received = sum(p.bytes_sent for p in report.peers), sum(p.bytes_received for p in report.peers)
        assert sent == pytest.approx(num * sum(item.sent.mean_bytes for item in report.rounds))
        assert received == pytest.approx(num * sum(item.received.mean_bytes for item in report.rounds))


def test_crashes_are_seen_in_the_availability() -> None:
    _, report = troubled()
    assert report.num_departures > 0
    assert 0.5 < np.mean([item.availability for item in report.rounds]) < 1


def test_who_goes_by_its_schedule_is_not_told_to_have_crashed() -> None:
    scenario = Scenario(num_peers=4, num_rounds=2, churn=ChurnModel(trace=(UpTime(0, 0, 70_000),)))
    report = run_scenario(scenario)
    shown = show(report) + render_page(report)
    assert report.num_departures == 1
    assert "1 departures" in shown
    assert "crashes" not in shown


def test_a_void_round_has_its_reasons() -> None:
    scenario = Scenario(seed=2, num_peers=6, num_rounds=2, network=NetworkModel(loss=1.0))
    world = World(scenario)
    recorder = Recorder(world)
    world.run(recorder.on_round)
    report = make_report(world, recorder, 1.0)
    assert [item.is_certified for item in report.rounds] == [False, False]
    assert all(item.void_reasons for item in report.rounds)


def test_harm_is_what_the_same_seed_comes_to_without_the_attackers() -> None:
    _, report = troubled()
    assert compute_harm(report) is None
    scenario = make_honest(report.scenario)
    assert not any(compute_kinds(scenario))
    staked = msgspec.structs.replace(report.scenario, stakes={"zero": 7.0})
    assert compute_stakes(make_honest(staked)) == compute_stakes(staked)
    honest = run_scenario(scenario)
    beside = set_beside(report, honest)
    harm = compute_harm(beside)
    assert harm is not None
    ends = [[item.loss_nats for item in one.rounds if item.loss_nats is not None][-1] for one in (report, honest)]
    assert harm.loss_nats == pytest.approx(ends[0] - ends[1])
    assert harm.loss_nats != 0
    lost = [there.reward_pfm - here.reward_pfm for here, there in zip(report.peers, honest.peers, strict=True)]
    assert harm.pay_pfm == pytest.approx(np.mean(lost[2:]))
    assert compute_figures(beside)["harm: loss, nats"] == harm.loss_nats
    assert [row["loss_beside_honest_nats"] for row in make_round_rows(beside)] == [i.loss_nats for i in honest.rounds]
    page = render_page(beside)
    assert f"<dd>{describe_harm(harm)}</dd>" in page.replace("&#x27;", "'")
    assert "attackers made honest" in page
    assert "attackers made honest" not in render_page(report)
    with pytest.raises(ConfigError, match="no adversaries"):
        make_honest(scenario)


def test_slashes_after_the_last_round_are_in_the_report() -> None:
    phases = PhaseConfig(20_000, 10_000, 10_000, 5_000, 3_000, 900)  # no time is left to bring evidence
    kinds: tuple[AdversaryKind, ...] = ("split_votes", "split_votes", "split_votes", "equivocator")
    world = World(Scenario(num_peers=12, num_rounds=6, rounds_per_epoch=6, adversaries=kinds, phases=phases))
    recorder = Recorder(world)
    world.run(recorder.on_round)
    report = make_report(world, recorder, 1.0)
    lost = {e.what.index: e.what.amount for e in world.chain.ledger.get_entries() if isinstance(e.what, Slashed)}
    assert len(lost) > sum(item.num_slashed for item in report.rounds)
    assert {i: peer.slashed_pfm for i, peer in enumerate(report.peers) if peer.slashed_pfm} == {
        index: amount / WEI_PER_PFM for index, amount in lost.items()
    }
    assert compute_figures(report)["stakes slashed"] == len(lost)
    assert f"<dt>Stakes slashed</dt><dd>{len(lost)}</dd>" in render_page(report)


def test_what_an_attack_costs_stands_beside_what_it_brings() -> None:
    scenario = Scenario(
        seed=4,
        num_peers=6,
        num_rounds=2,
        learner=LearnerModel(kind="digests"),
        adversaries=("withholder", "sign_flip"),
        stakes={"sign_flip": 2.5},
    )
    report = run_scenario(scenario)
    kinds = {kind.kind: kind for kind in compute_kinds_report(report)}
    assert {name: kind.stake_pfm for name, kind in kinds.items()} == {
        "honest": 100,
        "withholder": 100,
        "sign_flip": 250,
    }
    assert kinds["withholder"].gas is None  # the ledger in memory has none
    assert kinds["withholder"].sent_bytes < kinds["honest"].sent_bytes / 10  # it serves no payload
    shown = Console(file=StringIO(), width=100)
    shown.print(render(report))
    assert "stake locked" in shown.file.getvalue()  # type: ignore[attr-defined]


def test_the_page_has_every_plot_that_was_promised() -> None:
    _, report = troubled()
    keys = ["loss", "certified", "bytes", "rewards", "gini", "availability", "work"]
    assert [plot.key for plot in make_plots(report)] == keys
    rounds = tuple(msgspec.structs.replace(item, gas=100 + item.round) for item in report.rounds)
    *_, gas = make_plots(msgspec.structs.replace(report, rounds=rounds))
    assert (gas.key, list(gas.series[0].values)) == ("gas", [100, 101, 102, 103])
    first, *others = (series.name for series in make_plots(report)[3].series)
    assert (first, set(others)) == ("honest", {"zero", "sign_flip"})
    page = render_page(report)
    assert re.findall(r'<div class="card" id="(\w+)"', page) == keys


def test_a_run_without_a_whole_round_is_told_in_a_sentence(tmp_path: Path) -> None:
    world = World(Scenario(num_peers=2, num_rounds=6))
    report = make_report(world, Recorder(world), 0.1, is_complete=False)
    assert show(report).strip() == "no round of 6 has ended"
    assert "No round has ended" in render_page(report)
    (tmp_path / "rounds.csv").write_text("of an earlier run")
    save_report(report, tmp_path)
    assert not (tmp_path / "rounds.csv").exists()


def test_no_number_is_cut_on_a_screen_of_80_columns() -> None:
    _, report = troubled()
    names = {"sign_flip": "noisy_replay", "zero": "split_votes", "honest": "honest"}
    peers = tuple(msgspec.structs.replace(peer, kind=names[peer.kind]) for peer in report.peers)
    shown = show(msgspec.structs.replace(report, peers=peers))
    assert "blamed" in shown
    assert "…" not in shown


def test_a_narrow_screen_shows_fewer_figures_and_cuts_none() -> None:
    _, report = troubled()
    for width in (30, 45, 60, 72):
        shown = show(report, width)
        assert all(kind.kind in shown for kind in compute_kinds_report(report))
        assert all(f"{item.loss_nats:.4f}" in shown for item in report.rounds if item.loss_nats and width > 40)
        assert "…" not in shown
        assert "no room here for" in shown
    assert "no room here for" not in show(report)


def test_bases_are_counted_of_those_that_are_up() -> None:
    """Who left keeps what it had: that is no fork."""
    report = run_scenario(Scenario(seed=4, num_peers=12, num_rounds=4, churn=ChurnModel(leave=0.1)))
    assert report.rounds[-1].num_holders < 12
    assert report.num_bases == 1
    assert "1: all that are up" in render_page(report)


def test_what_no_honest_peer_can_be_held_against_has_no_verdict() -> None:
    alone, pair, none = (
        run_scenario(Scenario(seed=4, num_peers=num, num_rounds=2, adversaries=("liar",) * liars))
        for num, liars in ((2, 1), (4, 1), (3, 3))
    )
    found = {
        name: next(kind for kind in compute_kinds_report(report) if kind.kind == "liar")
        for name, report in (("alone", alone), ("pair", pair), ("none", none))
    }
    assert found["alone"].gain_pfm is not None
    assert found["alone"].gain_error_pfm is None
    assert (found["none"].gain_pfm, found["none"].gain_error_pfm) == (None, None)
    assert found["pair"].gain_error_pfm
    assert "±" not in show(alone) + show(none)
    verdicts = ("it pays", "pays more", "within chance")
    assert not any(verdict in render_page(alone) + render_page(none) for verdict in verdicts)
    assert any(verdict in render_page(pair) for verdict in verdicts)
    assert "gain over honest, liar, PFM" not in compute_figures(none)


def test_ginis_at_the_end_are_of_the_newest_root_though_it_came_after_the_last_round() -> None:
    scenario = Scenario(seed=4, num_peers=8, num_rounds=3)
    round_ms = compute_round_start(make_network(scenario), Round(1)) - make_network(scenario).genesis_ms
    outage = Outage(start_ms=5 * round_ms // 2, end_ms=3 * round_ms + 3_000)
    report = run_scenario(msgspec.structs.replace(scenario, outages=(outage,)))
    honest = compute_gini(np.array([peer.reward_pfm for peer in report.peers]))
    assert honest != pytest.approx(report.rounds[-1].gini)
    assert compute_figures(report)["Gini"] == pytest.approx(honest)
    assert f"<dd>{honest:.3f} · honest only" in render_page(report)


def test_of_many_rounds_a_void_one_is_crossed_in_the_mean_of_its_neighbours() -> None:
    values = [0.0 if index == 7 else 1.0 for index in range(250)]
    drawn = render_plot(
        Plot("key", "Title", "unit", range(250), [Series("holders", values)], is_bars=True, is_share=True)
    )
    assert drawn.count('class="cross"') == 1
    assert "1 rounds at 0" in drawn
    assert "2th" not in drawn


def test_a_comparison_has_what_all_of_a_kind_draw_together() -> None:
    world, report = troubled()
    rewards = world.chain.get_claimed()
    assert compute_figures(report)["together, zero, PFM"] == pytest.approx(rewards[0] / WEI_PER_PFM)


def test_gini_of_known_amounts() -> None:
    assert compute_gini(np.zeros(4)) == 0
    assert compute_gini(np.full(5, 3.0)) == pytest.approx(0)
    assert compute_gini(np.array([0.0, 0, 0, 8])) == pytest.approx(3 / 4)
    assert compute_gini(np.array([1.0, 2, 3, 4])) == pytest.approx(1 / 4)


def test_the_standard_error_of_known_figures() -> None:
    spread = compute_spreads([{"a": 1.0}, {"a": 3.0, "b": 5.0}])
    assert (spread["a"].mean, spread["a"].num) == (2.0, 2)
    assert spread["a"].error == pytest.approx(sqrt(2) / sqrt(2))
    assert spread["b"].error is None
    assert (spread["b"].num, spread["b"].num_runs) == (1, 2)
    assert format_spread(spread["b"]) == "5 (1 of 2)"
    assert format_spread(spread["a"]) == "2 ± 1"


def test_figures_that_a_run_does_not_have_are_left_out_of_means_and_told() -> None:
    good = run_scenario(Scenario(num_peers=3, num_rounds=1))
    void = run_scenario(Scenario(num_peers=3, num_rounds=1, network=NetworkModel(loss=1.0)))
    names = ("loss at the end, nats", "updates a certified round", "Gini", "Gini, honest")
    assert not set(names) & set(compute_figures(void))
    assert set(names) <= set(compute_figures(good))
    runs, other = [("both", good), ("both", void), ("good", good)], [good]
    swept, compared = (
        show_any(shown) for shown in (render_sweep(runs), render_comparison(compare([good, void], other), "a", "b"))
    )
    for text in (swept, compared):
        for name in names:
            both, whole = re.split(r" *│ *", next(line for line in text.splitlines() if f"│ {name} " in line))[2:4]
            assert both == f"{whole} (1 of 2)"
        assert "(2 of" not in text
    assert "nobody was paid · honest only nobody was paid" in render_page(void)


def test_honest_pay_that_nobody_draws_is_no_harm_of_nought() -> None:
    liars = Scenario(num_peers=3, num_rounds=1, adversaries=("liar",) * 3)
    report = set_beside(run_scenario(liars), run_scenario(make_honest(liars)))
    harm = compute_harm(report)
    assert harm is not None
    assert harm.pay_pfm is None
    assert "harm: pay of an honest peer, PFM" not in compute_figures(report)
    assert describe_harm(harm).endswith("an honest peer's pay not measured")


def test_a_run_compared_with_itself_is_alike() -> None:
    _, report = troubled()
    lines = compare([report], [report])
    assert {line.figure for line in lines} == set(compute_figures(report))
    assert all(line.ratio in (1.0, None) for line in lines)


def test_parquet_holds_what_csv_holds(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install 'p2pfm[sim]'")
    _, report = troubled()
    rows = make_round_rows(report)
    read = parquet.read_table(write_table(rows, tmp_path / "rounds", "parquet")).to_pylist()
    assert read == [dict(row) for row in rows]
    with write_table(rows, tmp_path / "rounds", "csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(read)


def test_parquet_files_of_different_runs_go_together(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install 'p2pfm[sim]'")
    arrow = pytest.importorskip("pyarrow")
    void = run_scenario(Scenario(num_peers=3, num_rounds=1, network=NetworkModel(loss=1.0)))
    good = run_scenario(Scenario(num_peers=3, num_rounds=1))
    full = [msgspec.structs.replace(item, backdoor=0.5, gas=7) for item in good.rounds]
    full_report = set_beside(msgspec.structs.replace(good, rounds=tuple(full)), good)
    first, *others = [
        parquet.read_table(write_table(make_round_rows(report), tmp_path / f"{number}", "parquet"))
        for number, report in enumerate((void, good, full_report))
    ]
    assert not any(arrow.types.is_null(kind) for kind in first.schema.types)
    for other in others:
        assert arrow.concat_tables([first, other]).num_rows == 2


def test_parquet_without_pyarrow_is_refused_with_the_extra_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.tables.find_spec", lambda name: None)
    with pytest.raises(OperatorError, match=r"pip install 'p2pfm\[sim\]'"):
        validate_format("parquet")


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0, "0"), (1234567, "1,234,567"), (0.12345, "0.1235"), (-2.5, "−2.5")]
)
def test_numbers_are_written_with_four_digits(value: float | None, text: str) -> None:
    assert format_value(value) == text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.07, 0.98), (0, 0), (3, 3), (0, 123456), (-2, 5)])
def test_ticks_hold_the_values_between_them(low: float, high: float) -> None:
    ticks = compute_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 8


# --- colours ---------------------------------------------------------------------------------------------------------

VISION = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritan": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
"""What linear light becomes in eyes of each kind: Machado, Oliveira, Fernandes 2009, severity 1."""

XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def to_light(colour: str) -> np.ndarray:
    value = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def to_lab(light: np.ndarray) -> np.ndarray:
    xyz = XYZ @ np.clip(light, 0, 1) / [0.9505, 1, 1.0888]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_lines_differ_for_all_kinds_of_colour_vision(theme: int) -> None:
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    lines = [found[theme] for found in (re.findall(rf"--c{number}: (#\w+)", style) for number in range(6))]
    ground = (XYZ @ to_light(re.findall(r"--ground: (#\w+)", style)[theme]))[1]
    for colour in lines:
        low, high = sorted(((XYZ @ to_light(colour))[1], ground))
        assert (high + 0.05) / (low + 0.05) >= 3, f"{colour} on the ground"
    for kind, eyes in VISION.items():
        for one, other in combinations(lines, 2):
            distance = np.linalg.norm(to_lab(eyes @ to_light(one)) - to_lab(eyes @ to_light(other)))
            assert distance > 30, f"{one} and {other} to {kind} eyes"


def test_what_is_certified_and_does_not_reach_the_chain_is_told() -> None:
    """It pays nobody."""
    scenario = Scenario(seed=2, num_peers=8, num_rounds=3, committee_size=4)
    late_ms = compute_round_start(make_network(scenario), Round(2)) - make_network(scenario).genesis_ms
    report = run_scenario(msgspec.structs.replace(scenario, outages=(Outage(late_ms, 10**9),)))
    assert [item.is_certified for item in report.rounds] == [True, True, True]
    assert [item.is_settled for item in report.rounds] == [True, True, False]
    assert compute_figures(report)["rounds on chain, share"] == pytest.approx(2 / 3)
    assert [row["is_settled"] for row in make_round_rows(report)] == [True, True, False]
    console = Console(width=100, record=True, file=StringIO())
    console.print(render(report))
    told = console.export_text()
    assert "not on chain" in told
    assert "3 of 3 rounds certified, 0 void, 2 on chain" in " ".join(told.split())
