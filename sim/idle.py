"""What a scenario says that comes to nothing in a run: told to people before it starts. Refuses nothing."""

from collections import Counter
from operator import attrgetter
from random import Random

import msgspec

from sim import attacks
from sim.churn import compute_trace_end
from sim.network import PUNCHABLE, SYMMETRIC, deal_nats
from sim.scenarios import Scenario, compute_counts, compute_kinds


def find_idle(scenario: Scenario) -> list[str]:
    """What a scenario says that comes to nothing in a run of its size, or ends within it, for people."""
    counts = compute_counts(scenario)
    missing = [kind for kind, share in scenario.adversary_shares.items() if share > 0 and not counts[kind]]
    idle = [f"adversary_shares: of {scenario.num_peers} peers none is {', '.join(missing)}"] if missing else []
    length_ms = scenario.num_rounds * sum(msgspec.structs.astuple(scenario.phases))
    starts_ms = {f"network.partitions[{i}]": part.start_ms for i, part in enumerate(scenario.network.partitions)}
    starts_ms |= {f"outages[{i}]": outage.start_ms for i, outage in enumerate(scenario.outages)}
    idle += [
        f"{key}: begins at {start_ms} ms, and the last round ends at {length_ms} ms"
        for key, start_ms in starts_ms.items()
        if start_ms >= length_ms
    ]
    return idle + _find_idle_kinds(scenario) + _find_end_of_trace(scenario, length_ms) + _find_unread(scenario)


def _find_idle_kinds(scenario: Scenario) -> list[str]:
    """What peers of a kind cannot do, for want of others."""
    counts = Counter(compute_kinds(scenario))
    if scenario.learner.kind == "digests":  # what an update is worth is drawn there, whoever else there is
        return []
    idle = []
    if counts["copycat"] and not counts[None]:
        idle.append("copycat: nobody is honest, so there is nobody to copy, and it does its own work")
    idle += [
        f"{kind}: one alone knows of no spread to hide in: it announces its honest update"
        for kind in ("alie", "minmax")
        if counts[kind] == 1
    ]
    if counts["alie"] > 1 and not attacks.compute_alie_z(scenario.num_peers, counts["alie"]):
        idle.append(
            f"alie: with {counts['alie']} of {scenario.num_peers} peers z is 0: they announce the mean of their honest "
            "updates"
        )
    return idle


def _find_end_of_trace(scenario: Scenario, length_ms: int) -> list[str]:
    end_ms = compute_trace_end(scenario.churn)
    if scenario.churn.trace_repeats or not 0 < end_ms < length_ms:
        return []
    number = end_ms * scenario.num_rounds // length_ms
    return [
        f"churn.trace: ends at {end_ms} ms, in round {number}, and whoever follows it is gone from then on: "
        "trace_repeats = true begins it again"
    ]


def _find_unread(scenario: Scenario) -> list[str]:
    """Keys of churn and network that are not as they are by default, and that nothing reads."""
    churn, network = scenario.churn, scenario.network
    nats = deal_nats(network, scenario.num_peers, Random(0)).tolist()  # how many there are does not depend on the seed
    num_behind, num_symmetric = nats.count(PUNCHABLE), nats.count(SYMMETRIC)
    no_trace = "" if churn.trace else "there is no trace"
    no_crash = "" if churn.crash else "nobody crashes"
    no_nat = f"of {scenario.num_peers} peers none is behind one"
    is_punched = num_behind >= 1 and num_behind + num_symmetric >= 2
    unread = {
        "churn.down_ms": no_crash,
        "churn.lost_disk": no_crash,
        "churn.away_ms": "" if churn.leave else "nobody leaves",
        "churn.late": "" if churn.late_ms[1] else "late_ms is 0, so those who are late are there at genesis",
        "churn.late_ms": "" if churn.late else "nobody is late",
        "churn.trace_share": no_trace,
        "churn.trace_repeats": no_trace,
        "churn.trace_speedup": no_trace,
        "network.latency_ms": "" if network.regions == "none" else "regions say how far peers are apart",
        "network.bytes_per_ms": "links say how fast they are" if network.links else "",
        "network.behind_nat": "" if num_behind else no_nat,
        "network.symmetric_nat": "" if num_symmetric else no_nat,
        "network.punched": "" if is_punched else "no two peers are behind NATs that could be punched",
    }
    set_keys = [key for key in unread if attrgetter(key)(scenario) != attrgetter(key)(Scenario())]
    return [f"{key}: {unread[key]}" for key in set_keys if unread[key]]
