"""The report as one self-contained page: no script, no asset, nothing to build. Knows a SimReport and no run."""

from html import escape
from pathlib import Path
from statistics import fmean
from string import Template

from sim.checks import replay_command
from sim.library import dump_toml
from sim.page.plots import Plot, Series, format_value, render_plot
from sim.recorder import HONEST
from sim.report import (
    KindReport,
    SimReport,
    compute_end_ginis,
    compute_harm,
    compute_kinds_report,
    describe_gain,
    describe_harm,
)

KINDS_MAX = 6
"""Kinds with a line of their own in the plot of rewards: as many as there are colours."""

VOIDS_MAX = 50
"""Void rounds that are listed."""

FOLDER = Path(__file__).parent


def render_page(report: SimReport) -> str:
    """HTML of the whole page."""
    page = Template((FOLDER / "template.html").read_text(encoding="utf-8"))
    return page.substitute(
        name=escape(get_name(report)),
        style=(FOLDER / "style.css").read_text(encoding="utf-8"),
        banner=_render_banner(report),
        facts="".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in _make_facts(report)
        ),
        plots="".join(render_plot(plot) for plot in make_plots(report)),
        economy=_render_economy(report),
        voids=_render_voids(report),
        again=_render_again(report),
    )


def get_name(report: SimReport) -> str:
    """What the run is called."""
    scenario = report.scenario
    return scenario.title or f"{scenario.num_peers} peers, {scenario.num_rounds} rounds, seed {scenario.seed}"


def make_plots(report: SimReport) -> tuple[Plot, ...]:
    """The figures, in the page's order."""
    items = report.rounds
    rounds = [int(item.round) for item in items]
    num_peers = max(1, len(report.peers))
    loss = [Series("held-out loss", [item.loss_nats for item in items])]
    if report.optimum_loss_nats is not None:
        loss.append(Series("least possible", [report.optimum_loss_nats] * len(items), is_reference=True))
    if report.beside is not None:
        loss.append(Series("attackers made honest", report.beside.losses_nats[: len(items)], is_reference=True))
    has_losses = any(item.loss_nats is not None for item in items)
    traffic: dict[str, list[float]] = {
        "sent, mean": [item.sent.mean_bytes for item in items],
        "sent, 95th percentile": [item.sent.p95_bytes for item in items],
        "sent, most": [item.sent.max_bytes for item in items],
        "received, mean": [item.received.mean_bytes for item in items],
    }
    cut = f"; top {KINDS_MAX} kinds" if rounds and len(items[-1].rewards_pfm) > KINDS_MAX else ""
    plots = [
        Plot(
            "loss", "Held-out loss", "nats", rounds, loss if has_losses else [],
            from_zero=False, empty="No round was certified, so no base was measured.",
        ),
        Plot(
            "certified", "Rounds certified", "share of peers that hold it", rounds,
            [Series("holders", [item.num_holders / num_peers if item.is_certified else 0.0 for item in items])],
            note="A cross: a round is void, the base stays.", is_share=True, is_bars=True,
        ),
        Plot(
            "bytes", "Traffic", "kB a peer and round", rounds,
            [Series(name, [value / 1000 for value in values]) for name, values in traffic.items()], may_be_log=True,
        ),
        Plot("rewards", "Rewards", f"PFM so far, mean a peer{cut}", rounds, _make_rewards(report)),
        Plot(
            "gini", "Gini coefficient of rewards", "0 all alike, 1 one has all", rounds,
            [
                Series("all peers", [item.gini for item in items]),
                Series("honest peers only", [item.gini_honest for item in items]),
            ],
        ),
        Plot(
            "availability", "Availability", "share of peers that were up", rounds,
            [Series("up", [item.availability for item in items])], is_share=True,
        ),
        Plot("work", "Cost of simulating", "CPU seconds a round", rounds, [Series("CPU", [i.cpu_s for i in items])]),
    ]  # fmt: skip
    if any(item.backdoor is not None for item in items):
        plots.append(
            Plot(
                "backdoor",
                "Backdoor",
                "share of triggered inputs answered as planted",
                rounds,
                [Series("it works", [item.backdoor for item in items])],
                is_share=True,
                note="An honest model answers some of them so, too: look at whether it grows.",
            )
        )
    if any(item.gas is not None for item in items):
        plots.append(Plot("gas", "Gas spent", "a round", rounds, [Series("gas", [item.gas for item in items])]))
    return tuple(plots)


def _make_rewards(report: SimReport) -> list[Series]:
    """Honest peers first, then the kinds that drew most."""
    last = report.rounds[-1].rewards_pfm if report.rounds else {}
    kinds = sorted(last, key=lambda kind: (kind != HONEST, -last[kind], kind))[:KINDS_MAX]
    return [Series(kind, [item.rewards_pfm[kind] for item in report.rounds]) for kind in kinds]


def _make_facts(report: SimReport) -> list[tuple[str, str]]:
    scenario, rounds = report.scenario, report.rounds
    num_adversaries = sum(peer.kind != HONEST for peer in report.peers)
    num_peers = len(report.peers)
    facts = [
        (
            "Peers",
            f"{num_peers:,} · {num_adversaries:,} adversaries" if num_adversaries else f"{num_peers:,}, all honest",
        ),
        (
            "Rounds certified",
            f"{sum(item.is_certified for item in rounds)} of {len(rounds)} · "
            f"{sum(item.is_settled for item in rounds)} on chain",
        ),
        ("Learner", scenario.learner.kind),
    ]
    losses = [item.loss_nats for item in rounds if item.loss_nats is not None]
    if losses:
        least = report.optimum_loss_nats
        above = "" if least is None else f" · {losses[-1] - least:.4f} above the least possible"
        facts.append(("Loss at the end", f"{losses[-1]:.4f} nats{above}"))
    if rounds:
        all_gini, honest_gini = compute_end_ginis(report)
        facts += [
            (
                "Availability",
                f"{fmean(item.availability for item in rounds):.1%} · {report.num_departures:,} departures",
            ),
            ("Sent by a peer", f"{format_value(fmean(item.sent.mean_bytes for item in rounds) / 1000)} kB a round"),
            ("Gini at the end", f"{_format_gini(all_gini)} · honest only {_format_gini(honest_gini)}"),
        ]
    harm = compute_harm(report)
    if harm is not None:
        facts.append(("Harm, beside all honest", describe_harm(harm)))
    if report.gas:
        facts.append(("Gas, set-up and claims included", f"{sum(report.gas.values()):,}"))
    return [
        *facts,
        ("Stakes slashed", f"{sum(peer.slashed_pfm > 0 for peer in report.peers)}"),
        ("Bases at the end", f"{report.num_bases}" if report.num_bases != 1 else "1: all that are up hold the same"),
        ("Simulated in", f"{report.cpu_s:.1f} CPU s · {report.num_steps:,} steps"),
        ("Seed", f"{scenario.seed}"),
        ("Trace", report.trace[:16]),
    ]


def _format_gini(gini: float | None) -> str:
    """For people."""
    return "nobody was paid" if gini is None else f"{gini:.3f}"


def _render_banner(report: SimReport) -> str:
    if report.is_complete:
        return ""
    rounds = f"{len(report.rounds)} of {report.scenario.num_rounds} rounds"
    return f'<p class="banner">Interrupted after {rounds}: the figures are of these.</p>'


def _render_economy(report: SimReport) -> str:
    kinds = compute_kinds_report(report)
    if not kinds:
        return '<p class="empty">No round has ended.</p>'
    names = (
        "kind",
        "peers",
        "reward",
        "all together",
        "slashed",
        "gain over honest work",
        "does it pay?",
        "stake locked",
        "kB sent a round",
        "gas of its own",
        "blamed",
    )
    heads = "".join(f'<th scope="col"{"" if i in (0, 6) else _NUM}>{name}</th>' for i, name in enumerate(names))
    rows = "".join(_render_kind(kind) for kind in kinds)
    note = "PFM, means a peer. Gain: reward less what an honest peer drew and what was slashed, ± its standard error."
    return (
        f'<p class="note">{note}</p><div class="scroll all" tabindex="0" role="region" aria-label="Rewards by kind">'
        f'<table><caption class="unseen">Rewards by kind</caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


_NUM = ' class="num"'


def _render_kind(kind: KindReport) -> str:
    is_honest = kind.kind == HONEST
    verdict = _NONE if is_honest else _judge(kind)
    cells = (
        f"{kind.num_peers:,}",
        format_value(kind.reward_pfm),
        format_value(kind.together_pfm),
        format_value(kind.slashed_pfm),
        "–" if is_honest else describe_gain(kind).replace("-", "−"),
        verdict,
        format_value(kind.stake_pfm),
        format_value(kind.sent_bytes / 1000),
        format_value(kind.gas),
        f"{kind.num_blamed:,}",
    )
    rest = "".join(f"<td{'' if index == 5 else _NUM}>{cell}</td>" for index, cell in enumerate(cells))
    return f'<tr><th scope="row">{escape(kind.kind)}</th>{rest}</tr>'


def _judge(kind: KindReport) -> str:
    """What is told apart from chance: honest peers' rewards differ, too."""
    if kind.gain_pfm is None or kind.gain_error_pfm is None:
        return _NONE
    if abs(kind.gain_pfm) <= 2 * kind.gain_error_pfm:
        return _CHANCE
    return _PAYS if kind.gain_pfm > 0 else _LOSES


_NONE = "–"
_CHANCE = '<span class="quiet">as honest work: within chance</span>'
_PAYS = '<span class="bad">✕ it pays</span>'
_LOSES = '<span class="good">✓ honest work pays more</span>'


def _render_voids(report: SimReport) -> str:
    voids = [item for item in report.rounds if not item.is_certified]
    if not voids:
        return (
            '<p class="empty">None: every round was certified.</p>' if report.rounds else '<p class="empty">None.</p>'
        )
    rows = "".join(
        f'<tr><th scope="row">{item.round}</th><td class="num">{item.availability:.0%}</td>'
        f'<td class="wide">{escape("; ".join(item.void_reasons) or "nobody said why")}</td></tr>'
        for item in voids[:VOIDS_MAX]
    )
    more = f"the first {VOIDS_MAX} of {len(voids)}" if len(voids) > VOIDS_MAX else f"{len(voids)} in all"
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Void rounds and why"><table>'
        f"<caption>What peers said of each, the most frequent first; {more}</caption>"
        '<thead><tr><th scope="col">round</th><th scope="col" class="num">up</th><th scope="col">why</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _render_again(report: SimReport) -> str:
    command, file = escape(replay_command(report.scenario)), escape(dump_toml(report.scenario))
    return f"<pre>{command}</pre><details><summary>The whole scenario as a file</summary><pre>{file}</pre></details>"
