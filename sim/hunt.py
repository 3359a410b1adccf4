"""A hunt for bugs: random scenarios, each run to its end with all invariants checked; what fails is made small.

Knows scenarios and worlds, and no rule of the protocol. A hunt is a list of scenarios drawn from its seed: only how
many of them are run depends on the clock, so what one found is found again.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence, Set
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Literal, TypeVar, get_args

import msgspec

from p2pfm.config import PhaseConfig
from p2pfm.errors import ConfigError
from p2pfm.types import Millis
from sim.breakdowns import Breakdown, telling_breakdowns
from sim.checks import Violation, quote_scenario
from sim.churn import DAY_HOURS, ChurnModel, Diurnal, UpTime
from sim.clocks import ClockModel
from sim.network import WORLD, Gossip, LinkClass, NetworkModel, Partition
from sim.replay import replay
from sim.scenarios import (
    COMMITTEE_SIZE,
    AdversaryKind,
    LearnerModel,
    Outage,
    Scenario,
    WorkTimes,
    validate_scenario,
)
from sim.world import World

MINUTE_S = 60

SHRINK_RUNS_MAX = 400
"""Runs that making one finding small may take; most take 30 to 80."""

PEERS_MAX = 40
ROUNDS_MAX = 5

SIGNER_KINDS: frozenset[AdversaryKind] = frozenset({"split_votes", "overpayer"})
"""Who signs what no honest member would: a third of a committee of these may break what a certificate promises."""

STEPS_MAX = 10_000
"""For each peer and round; most take 40 to 200: more is a run that does not end."""

TROUBLE = 0.4
"""The chance of each kind of trouble (loss, crashes, partitions ...): half of all scenarios have two or three."""

RARE = 0.2
"""The chance of what few scenarios need: regions, links, gossip, days, traces, shares of adversaries, other stakes."""

SHARDED = 0.25
"""Share of the scenarios whose peers are dealt into shards, of a few peers each."""

REPLAYED = 0.2
"""Share of the scenarios whose event logs are kept and replayed into fresh cores."""

REPEATED = 0.1
"""Share of the scenarios that are run twice, to the same trace."""

PLAIN = Scenario(clocks=ClockModel(skew_ms=0))
"""Where shrinking leads."""

NEEDS_LABELS: frozenset[AdversaryKind] = frozenset({"backdoor"})

Struct = TypeVar("Struct", bound=msgspec.Struct)


class Failure(msgspec.Struct, frozen=True):
    """What went wrong in a run."""

    kind: str
    """Which rule was violated, or which exception came from where: without numbers, the same for one bug."""
    text: str
    """All of it: seed, step, peers."""


class Finding(msgspec.Struct, frozen=True):
    """A bug, found and made small."""

    failure: Failure
    """Of the shrunk scenario."""
    scenario: Scenario
    """The smallest that fails the same way."""
    drawn: Scenario
    """What the hunt had drawn."""
    command: str
    """Runs the shrunk scenario again."""
    num_runs: int
    """Until it was small."""
    path: str = ""
    """The file that it was saved to."""


class Seed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A scenario that failed once: a file that tests/sim/seeds takes."""

    kind: str
    """How it failed."""
    found: str
    """When and by what, and what was wrong, for people."""
    scenario: Scenario


OnRun = Callable[[int, Scenario, Failure | None], None]
"""Told after each drawn scenario: how many there were, the last one, and how it failed if it did."""


def hunt(
    minutes: float,
    seed: int,
    on_run: OnRun | None = None,
    *,
    folder: Path | None = Path("found"),
    runs_max: int | None = None,
    findings_max: int | None = None,
    draw: Callable[[Random], Scenario] | None = None,
) -> list[Finding]:
    """Run random scenarios until time is up; every bug once, made small.

    Args:
        folder: each finding is saved there; None: nowhere.
        runs_max: stop after so many drawn scenarios; findings_max: after so many bugs.
        draw: what to run; None: `draw_scenario`.
    """
    ends_s = time.monotonic() + minutes * MINUTE_S
    rng = Random(f"{seed} hunt")
    found: dict[str, Finding] = {}
    number = 0
    while time.monotonic() < ends_s and number != runs_max and len(found) != findings_max:
        scenario = (draw or draw_scenario)(rng)
        is_repeated = rng.random() < REPEATED
        number += 1
        failure = find_failure(scenario, is_repeated=is_repeated)
        if on_run:
            on_run(number, scenario, failure)
        if failure is not None and failure.kind not in found:
            finding = shrink(scenario, failure, is_repeated=is_repeated)
            found[failure.kind] = finding if folder is None else save(finding, folder)
    return list(found.values())


# --- one run ---------------------------------------------------------------------------------------------------------


def find_failure(scenario: Scenario, *, is_repeated: bool = False) -> Failure | None:
    """Run a scenario to its end: whichever invariant does not hold, and any exception; None: all is well.

    Args:
        is_repeated: run it twice; the traces have to be the same.

    Raises:
        ConfigError: a scenario that cannot run.
    """
    world = World(scenario)
    world.checks.steps_max = STEPS_MAX * scenario.num_peers * scenario.num_rounds
    try:
        with telling_breakdowns(scenario, world.tell_moment):
            world.run()
            check_end(world)
            for host in world.hosts:
                for log in host.logs:
                    difference = replay(bytes(log)).difference
                    _require(difference is None, "a log replays to the same actions", world, (host.me, difference))
            if is_repeated:
                again = World(scenario)
                again.run()
                _require(again.trace_digest() == world.trace_digest(), "one seed gives one trace", world, ())
    except Breakdown as error:
        return Failure(error.kind, str(error))
    except Violation as error:
        rule = str(error).partition("violated: ")[2].partition(". Replay: ")[0]
        return Failure(_strip_numbers(rule), str(error))
    return None


def again_command(scenario: Scenario) -> str:
    """What a person types to see what a hunt found: what it asserts beyond each step is asserted again."""
    return f"p2pfm sim hunt --again {quote_scenario(scenario)}"


def check_end(world: World) -> None:
    """What must hold when a run is over, where nothing stood in the way: rounds are certified, nobody is left behind.

    Raises:
        Violation: it does not hold.
    """
    scenario, newest = world.scenario, max(world.checks.certificates, default=-1)
    if _is_quiet(scenario):
        missing = set(range(scenario.num_rounds)) - world.checks.certificates.keys()
        _require(not missing, "a quiet network certifies every round", world, sorted(missing))
    if scenario.network == NetworkModel() and scenario.churn == ChurnModel():
        heads = {host.me: host.durable.head for host in world.hosts if host.kind is None}
        behind = [peer for peer, head in heads.items() if (head.proposal.round if head else -1) < newest]
        _require(not behind, "on a good network nobody is left behind", world, behind)
        if not scenario.outages:
            head = world.chain.get_head()
            settled = head.round if head else -1
            waiting = [peer for peer, held in heads.items() if held and held.proposal.round > settled + 1]
            _require(not waiting, "what is certified reaches the chain within a round", world, waiting)


def _is_quiet(scenario: Scenario) -> bool:
    """Whether there is no trouble at all, whatever the network's size and rules."""
    dials = ("seed", "title", "num_peers", "num_rounds", "committee_size", "shard_size", "rounds_per_epoch")
    usual = {name: getattr(PLAIN, name) for name in (*dials, "keep_logs", "work_steps")}
    is_close = scenario.clocks.skew_ms <= Scenario().clocks.skew_ms and not scenario.clocks.drift_ppm
    return is_close and msgspec.structs.replace(scenario, clocks=PLAIN.clocks, **usual) == PLAIN


def _require(is_true: bool, rule: str, world: World, who: Sequence[object]) -> None:
    if not is_true:
        raise Violation(
            f"seed {world.scenario.seed}, step {world.checks.num_steps}, at the end, {', '.join(map(str, who))}: "
            f"violated: {rule}. Replay: {again_command(world.scenario)}"
        )


def _strip_numbers(rule: str) -> str:
    return re.sub(r"\d+", "#", rule)


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw_scenario(rng: Random, peers_max: int = PEERS_MAX) -> Scenario:
    """A scenario that can run, with some of all troubles that there are."""
    while True:
        scenario = _draw(rng, peers_max)
        try:
            validate_scenario(scenario)
        except ConfigError:
            continue
        return scenario


def _draw(rng: Random, peers_max: int) -> Scenario:
    # Most bugs need few peers, and small worlds are quick: 2 to 12 as often as all others.
    num_peers = rng.randint(2, min(12, peers_max) if rng.random() < 0.5 else peers_max)
    num_rounds = rng.randint(1, ROUNDS_MAX)
    shard_size = rng.randint(2, 10) if rng.random() < SHARDED else Scenario().shard_size
    committee_size = rng.randint(1, min(num_peers, shard_size)) if _has(rng) else 0
    phases = _draw_phases(rng) if _has(rng) else Scenario().phases
    length_ms = num_rounds * sum(msgspec.structs.astuple(phases))
    learner = _draw_learner(rng)
    known = [kind for kind in get_args(AdversaryKind) if kind not in NEEDS_LABELS or learner.kind != "convex"]
    adversaries = _draw_adversaries(rng, known, num_peers, committee_size or COMMITTEE_SIZE) if _has(rng) else ()
    shares = _draw_shares(rng, known) if rng.random() < RARE else {}
    return Scenario(
        seed=rng.randrange(1 << 32),
        num_peers=num_peers,
        num_rounds=num_rounds,
        learner=learner,
        churn=_draw_churn(rng, num_peers, length_ms) if _has(rng) else ChurnModel(),
        network=_draw_network(rng, num_peers, length_ms),
        clocks=ClockModel(rng.choice((0, 100, 500, 2_000)), rng.choice((0.0, 0.0, 100.0))),
        adversaries=adversaries,
        adversary_shares=shares,
        stakes=_draw_stakes(rng, {*adversaries, *shares}) if rng.random() < RARE else {},
        outages=(_draw_outage(rng, length_ms),) if _has(rng) else (),
        work=_draw_work(rng) if _has(rng) else WorkTimes(),
        phases=phases,
        committee_size=committee_size or (shard_size if shard_size < COMMITTEE_SIZE else 0),
        shard_size=shard_size,
        work_steps=4 if rng.random() < 0.1 else 0,
        rounds_per_epoch=rng.randint(1, 4),
        keep_logs=tuple(range(num_peers)) if rng.random() < REPLAYED else (),
    )


def _has(rng: Random) -> bool:
    return rng.random() < TROUBLE


def _draw_learner(rng: Random) -> LearnerModel:
    """Mostly the quick one whose loss is known; perceptrons where they can be trained here."""
    kind: Literal["digests", "mlp", "convex"] = rng.choices(("digests", "mlp", "convex"), (0.15, 0.05, 0.8))[0]
    if kind == "mlp" and find_spec("sklearn") is None:
        kind = "convex"
    return LearnerModel(kind, codec="modelled" if kind == "mlp" and rng.random() < 0.5 else "real")


def _draw_churn(rng: Random, num_peers: int, length_ms: int) -> ChurnModel:
    return ChurnModel(
        crash=rng.choice((0.05, 0.2, 0.5, 0.9)),
        down_ms=_draw_span(rng, 0, 60_000),
        lost_disk=rng.choice((0.0, 0.0, 0.5)),
        leave=rng.choice((0.0, 0.2)),
        away_ms=_draw_span(rng, 1, length_ms),
        late=rng.choice((0.0, 0.3)),
        late_ms=_draw_span(rng, 0, length_ms),
        diurnal=_draw_diurnal(rng, length_ms) if rng.random() < RARE else None,
        trace=tuple(_draw_sessions(rng, num_peers, length_ms)) if rng.random() < RARE else (),
        trace_repeats=rng.random() < 0.5,
        trace_share=rng.choice((1.0, 0.3)),
        trace_speedup=rng.choice((1, 2)),
    )


def _draw_diurnal(rng: Random, length_ms: int) -> Diurnal:
    return Diurnal(
        share=rng.choice((0.2, 0.5, 1.0)),
        day_ms=max(1_000, int(length_ms * rng.uniform(0.2, 2))),
        from_hour=rng.uniform(0, DAY_HOURS),
        num_hours=rng.uniform(1, DAY_HOURS - 1),
        spread_hours=rng.choice((0.0, 2.0)),
    )


def _draw_sessions(rng: Random, num_peers: int, length_ms: int) -> Iterator[UpTime]:
    """Up to three sessions of each of some peers."""
    for peer in range(rng.randint(1, num_peers)):
        moments = sorted(rng.sample(range(2 * length_ms), 2 * rng.randint(1, 3)))
        yield from (UpTime(peer, begin, end) for begin, end in zip(moments[::2], moments[1::2], strict=True))


def _draw_network(rng: Random, num_peers: int, length_ms: int) -> NetworkModel:
    regions: Literal["none", "world"] = "world" if rng.random() < RARE else "none"
    num_cuts = rng.randint(1, 2) if _has(rng) else 0
    cuts = [_draw_cut(rng, num_peers, length_ms, is_world=regions == "world") for _ in range(num_cuts)]
    slow, fast = LinkClass(0.5, 100, 500, loss=0.02), LinkClass(0.5, 5_000, 5_000)
    return NetworkModel(
        latency_ms=rng.choice(((20, 200), (0, 0), (1, 3_000))),
        loss=rng.choice((0.02, 0.2, 0.5)) if _has(rng) else 0.0,
        partitions=tuple(cuts),
        regions=regions,
        links=(slow, fast) if rng.random() < RARE else (),
        behind_nat=rng.choice((0.0, 0.3)),
        symmetric_nat=rng.choice((0.0, 0.2)),
        gossip=Gossip() if rng.random() < RARE else None,
    )


def _draw_cut(rng: Random, num_peers: int, length_ms: int, *, is_world: bool) -> Partition:
    """Of the first so many, of a share, of named hosts, or of a region; with hosts that reach both sides or without."""
    start_ms = rng.randrange(length_ms)
    end_ms = start_ms + rng.randrange(length_ms)
    bridges = tuple(rng.sample(range(num_peers), 1)) if rng.random() < RARE else ()
    match rng.choice(("first", "share", "hosts", "region" if is_world else "first")):
        case "share":
            return Partition(start_ms, end_ms, share=rng.uniform(0.05, 0.95), bridges=bridges)
        case "hosts":
            hosts = tuple(sorted(rng.sample(range(num_peers), rng.randint(1, num_peers))))
            return Partition(start_ms, end_ms, hosts=hosts, bridges=bridges)
        case "region":
            return Partition(start_ms, end_ms, regions=(rng.choice(WORLD.names),), bridges=bridges)
        case _:
            return Partition(start_ms, end_ms, num_hosts=rng.randint(1, num_peers), bridges=bridges)


def _draw_shares(rng: Random, known: Sequence[AdversaryKind]) -> dict[AdversaryKind, float]:
    """Of kinds that cannot break a certificate, however many of them a committee has."""
    harmless = [kind for kind in known if kind not in SIGNER_KINDS]
    return {kind: rng.choice((0.05, 0.1, 0.15)) for kind in rng.sample(harmless, rng.randint(1, 2))}


def _draw_stakes(rng: Random, kinds: Set[AdversaryKind]) -> dict[Literal["honest"] | AdversaryKind, float]:
    staking: list[Literal["honest"] | AdversaryKind] = ["honest", *sorted(kinds)]
    return {kind: rng.choice((1.0, 1.5, 4.0)) for kind in staking}


def _draw_adversaries(
    rng: Random, known: Sequence[AdversaryKind], num_peers: int, committee_size: int
) -> tuple[AdversaryKind, ...]:
    drawn = rng.choices(known, k=rng.randint(1, max(1, num_peers // 3)))
    signers_max = (min(committee_size, num_peers) - 1) // 3
    signers = [kind for kind in drawn if kind in SIGNER_KINDS]
    return (*(kind for kind in drawn if kind not in SIGNER_KINDS), *signers[:signers_max])


def _draw_outage(rng: Random, length_ms: int) -> Outage:
    start_ms = rng.randrange(length_ms)
    return Outage(start_ms, start_ms + rng.randint(1, length_ms))


def _draw_work(rng: Random) -> WorkTimes:
    """From no time at all to more than a phase has."""
    drawn = {name: _draw_span(rng, 0, 2 * high) for name, (_, high) in msgspec.structs.asdict(WorkTimes()).items()}
    return WorkTimes(**drawn)


def _draw_phases(rng: Random) -> PhaseConfig:
    usual = msgspec.structs.asdict(Scenario().phases)
    return PhaseConfig(**{name: Millis(int(ms * rng.uniform(0.3, 1.5))) for name, ms in usual.items()})


def _draw_span(rng: Random, low: int, high: int) -> tuple[int, int]:
    first, second = sorted((rng.randint(low, high), rng.randint(low, high)))
    return first, second


# --- shrinking -------------------------------------------------------------------------------------------------------


def shrink(scenario: Scenario, failure: Failure, *, is_repeated: bool = False) -> Finding:
    """The smallest scenario that fails the same way: greedy, until no simpler one does; the same every time."""
    smallest, num_runs = scenario, 0
    candidates = _simplify(smallest)
    while num_runs < SHRINK_RUNS_MAX:
        simpler = next(candidates, None)
        if simpler is None:
            break
        try:
            validate_scenario(simpler)
        except ConfigError:
            continue
        num_runs += 1
        same = find_failure(simpler, is_repeated=is_repeated)
        if same is not None and same.kind == failure.kind:
            smallest, failure, candidates = simpler, same, _simplify(simpler)
    return Finding(failure, smallest, scenario, again_command(smallest), num_runs)


def _simplify(scenario: Scenario) -> Iterator[Scenario]:
    """Scenarios that are one step simpler, what saves most first."""
    replace = msgspec.structs.replace
    for num_rounds in _smaller(scenario.num_rounds, 1):
        yield replace(scenario, num_rounds=num_rounds)
    for num_peers in _smaller(scenario.num_peers, 1):
        yield _with_peers(scenario, num_peers)
    for name in ("adversaries", "outages"):
        held = getattr(scenario, name)
        for part in _shorter(held):
            yield replace(scenario, **{name: part})
    for cuts in _shorter(scenario.network.partitions):
        yield replace(scenario, network=replace(scenario.network, partitions=cuts))
    for name in scenario.__struct_fields__:
        held, plain = getattr(scenario, name), getattr(PLAIN, name)
        if name in ("seed", "title", "num_rounds", "num_peers", "adversaries", "outages"):
            continue
        if held != plain:
            yield replace(scenario, **{name: plain})
        if isinstance(held, msgspec.Struct):
            for simpler in _reset_fields(held, plain):
                yield replace(scenario, **{name: simpler})
    # A kind that only changes what is announced is simpler than one that speaks with two tongues.
    for number, kind in enumerate(scenario.adversaries):
        if kind != "zero":
            held = scenario.adversaries
            yield replace(scenario, adversaries=(*held[:number], "zero", *held[number + 1 :]))


def _with_peers(scenario: Scenario, num_peers: int) -> Scenario:
    """The same with fewer peers: what names more of them than there are is cut."""
    replace = msgspec.structs.replace
    cuts = tuple(
        replace(
            cut,
            num_hosts=min(cut.num_hosts, num_peers),
            hosts=tuple(host for host in cut.hosts if host < num_peers),
            bridges=tuple(host for host in cut.bridges if host < num_peers),
        )
        for cut in scenario.network.partitions
    )
    return replace(
        scenario,
        num_peers=num_peers,
        committee_size=min(scenario.committee_size, num_peers),
        adversaries=scenario.adversaries[:num_peers],
        keep_logs=tuple(index for index in scenario.keep_logs if index < num_peers),
        network=replace(scenario.network, partitions=cuts),
    )


def _smaller(value: int, least: int) -> Iterator[int]:
    """From the least to one less: by halves of what is between."""
    step = value - least
    while step > 0:
        yield value - step
        step //= 2


def _shorter(held: tuple[object, ...]) -> Iterator[tuple[object, ...]]:
    """Without all, without each half, without each one."""
    if held:
        yield ()
    if len(held) > 3:
        yield held[: len(held) // 2]
        yield held[len(held) // 2 :]
    if len(held) > 1:
        for number in range(len(held)):
            yield (*held[:number], *held[number + 1 :])


def _reset_fields(held: Struct, usual: Struct) -> Iterator[Struct]:
    """One field after the other as it usually is."""
    for name in held.__struct_fields__:
        if getattr(held, name) != getattr(usual, name):
            yield msgspec.structs.replace(held, **{name: getattr(usual, name)})


# --- files -----------------------------------------------------------------------------------------------------------


def save(finding: Finding, folder: Path) -> Finding:
    """Write a finding as a Seed, named after how it failed; returns it with its path.

    What is as usual is left out, so that a file outlives changes of what a scenario can say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = re.findall(r"[a-z]+", finding.failure.kind.lower())
    path = folder / f"{'_'.join(words[:8])}-{finding.scenario.seed}.json"
    seed = _tell_unusual(Seed(finding.failure.kind, "p2pfm sim hunt", finding.scenario))
    path.write_bytes(msgspec.json.format(msgspec.json.encode(seed), indent=2) + b"\n")
    return msgspec.structs.replace(finding, path=str(path))


def _tell_unusual(held: msgspec.Struct) -> dict[str, object]:
    """What differs from each struct's own defaults."""
    told: dict[str, object] = {}
    for field in msgspec.structs.fields(held):
        value = getattr(held, field.name)
        usual = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        if value != usual:
            told[field.name] = _tell_unusual(value) if isinstance(value, msgspec.Struct) else msgspec.to_builtins(value)
    return told


def load(path: Path) -> Seed:
    """Read what `save` wrote. Raises: ConfigError: not such a file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Seed)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
