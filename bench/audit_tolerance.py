"""How far an honest committee's median is from an auditor's measurement: what `p2pfm rewards verify --deep` tolerates.

    [AUDITED=FOLDER] python bench/audit_tolerance.py

FOLDER is what `p2pfm demo --out FOLDER` or `p2pfm localnet up --out FOLDER` left: real nodes' certified rounds. Without
one a local network of the tiny model runs first. In units of the spread that an auditor computes: (1) the distance of
every certified median from the auditor's draws, (2) how often honest committees, resampled from all draws, would be
further away than what is tolerated.
"""

import os
import random
import sys
import tempfile
import time
from pathlib import Path

from harness import Target, finish, parse_options, print_table

from nodes.homes import read_config
from nodes.localnet import PRESETS, Role, localnet
from nodes.rewards.blobs import Blobs
from nodes.rewards.games import make_action, validate_held
from nodes.rewards.measuring import (
    DRAWS,
    NO_SALT,
    TOLERANCE_SPREADS,
    compute_expected_median,
    draw_audit_seed,
    open_meter,
)
from nodes.rewards.reading import Book, Reading, decode_proposal
from p2pfm import work
from p2pfm.errors import Reject, WorldError
from p2pfm.messages import Proposal, proposal_digest
from p2pfm.settlement.ledger import FederationParams, Member, Roster, SettledRound
from p2pfm.settlement.rewards import compute_median, compute_sums, from_wire
from p2pfm.types import Contribution, MemberIndex, PeerId, Round, Wei

TRIALS = 20_000
NUM_DRAWS, NUM_DRAWS_QUICK = 48, DRAWS + 9
NUM_ROUNDS, NUM_ROUNDS_QUICK = 5, 1
NUM_PEERS, NUM_PEERS_QUICK = 3, 2
FALSE_ALARMS_MAX = 0.001
"""Of honest committees: one in a thousand updates may be looked at twice."""


def run_network(folder: Path, num_peers: int, num_rounds: int) -> None:
    """Certified rounds of real nodes, in `folder`."""
    honest: Role = "honest"
    with localnet(folder, (honest,) * num_peers, PRESETS["tiny"], lambda text: print(text, file=sys.stderr)) as net:
        net.wait_until(
            "rounds settle", lambda: len(net.ledger.get_rounds(Round(0))) >= num_rounds, 60 + 25 * num_rounds
        )


def main() -> None:
    options = parse_options(__doc__ or "")
    num_draws = NUM_DRAWS_QUICK if options.quick else NUM_DRAWS
    with tempfile.TemporaryDirectory(prefix="p2pfm-audit-") as scratch:
        folder = Path(os.environ.get("AUDITED") or scratch)
        if folder == Path(scratch):
            folder = folder / "net"
            sizes = (NUM_PEERS_QUICK, NUM_ROUNDS_QUICK) if options.quick else (NUM_PEERS, NUM_ROUNDS)
            run_network(folder, *sizes)
        told, samples = measure(folder, num_draws)
    ratios = sorted(off / max(1.0, spread) for off, spread in told)
    rng = random.Random(0)
    limits = (2, 3, 4, 5, TOLERANCE_SPREADS, 8)
    shares = {size: compute_shares(samples, size, limits, rng) for size in (1, 3, 5, 9)}
    print_table(
        f"Honest committees beyond so many spreads ({TRIALS} resampled trials each)",
        ["committee of", *(f"{limit:g}" for limit in limits)],
        [[size, *row.values()] for size, row in shares.items()],
    )
    print(
        f"\n{len(ratios)} certified medians: furthest {ratios[-1]:.2f} spreads, median {ratios[len(ratios) // 2]:.2f}"
    )
    targets = [
        Target("furthest certified median [spreads]", ratios[-1], TOLERANCE_SPREADS, "less"),
        Target("honest committees beyond the tolerance", shares[9][TOLERANCE_SPREADS], FALSE_ALARMS_MAX, "less"),
    ]
    finish(
        options, {"ratios": ratios, "shares": {str(size): list(row.values()) for size, row in shares.items()}}, targets
    )


def compute_shares(
    samples: list[list[Contribution]], size: int, limits: tuple[float, ...], rng: random.Random
) -> dict[float, float]:
    """By limit [spreads]: how often a committee of this size, drawn from honest readings, is further off."""
    beyond = []
    for _ in range(TRIALS):
        picked = rng.sample(rng.choice(samples), DRAWS + size)
        measured, spread = compute_expected_median(picked[:DRAWS], size)
        off = abs(compute_median(picked[DRAWS:]) - measured)
        beyond.append(off / max(1.0, spread))
    return {limit: sum(value > limit for value in beyond) / TRIALS for limit in limits}


def measure(folder: Path, num_draws: int) -> tuple[list[tuple[float, float]], list[list[Contribution]]]:
    """Of every certified update: (its median's distance from ours, our spread), and all our draws."""
    homes = sorted(folder.glob("peer-*"))
    config = read_config(homes[0] / "node.toml")
    blobs = Blobs(None, ())
    proposals: dict[int, Proposal] = {}
    for path in sorted(path for home in homes for path in home.glob("blobs/??/*")):
        digest = blobs.put(path.read_bytes())
        try:
            decoded = decode_proposal(blobs.get(digest))
        except Reject:
            continue
        proposals[decoded.round] = decoded
    book = make_book([proposals[round] for round in sorted(proposals)])
    meter = open_meter(config, blobs)
    told: list[tuple[float, float]] = []
    samples: list[list[Contribution]] = []
    for reading in book.readings:
        proposal = reading.proposal
        assert proposal is not None
        try:
            validate_held(blobs, proposal)
            meter.find_base(book, reading)
        except WorldError as error:
            print(f"round {proposal.round}: {error}")
            continue
        action, notes = make_action(config.network, blobs, book, reading, book.roster)
        began = time.perf_counter()
        draws = []
        for number in range(num_draws):
            seed = draw_audit_seed(reading.settled.data_digest, number)
            draws.append(work.score_updates(meter.learner, blobs, config.network, action, seed, NO_SALT).contributions)
        took = (time.perf_counter() - began) / num_draws
        print(f"round {proposal.round}: {took:.2f} s a draw; {'; '.join(notes)}")
        for place, item in enumerate(action.updates):
            update = next(update for update in proposal.updates if update.payload == item.payload)
            column = [draw[place] for draw in draws]
            samples.append(column)
            num = sum(score.payload == item.payload for reveal in proposal.reveals for score in reveal.scores)
            readings = [s.contribution for r in proposal.reveals for s in r.scores if s.payload == item.payload]
            measured, spread = compute_expected_median(column[:DRAWS], num)
            told.append((abs(update.contribution - measured), spread))
            off = abs(update.contribution - measured)
            print(
                f"  member {update.member}: certified {update.contribution:>12,} (read {sorted(readings)}), measured "
                f"{measured:>14,.0f} ± {spread:>10,.0f}: {off / max(1, spread):.2f} spreads"
            )
        sys.stdout.flush()
    return told, samples


def make_book(proposals: list[Proposal]) -> Book:
    """The rounds without their chain: everybody's stake is the same on a local network."""
    num_members = max(len(proposal.leaves) for proposal in proposals)
    peers = {update.member: update.peer for proposal in proposals for update in proposal.updates}
    members = tuple(
        Member(MemberIndex(index), "", peers.get(MemberIndex(index), PeerId(str(index))), b"", Wei(10**20), active=True)
        for index in range(num_members)
    )
    readings = []
    for position, proposal in enumerate(proposals):
        leaves = from_wire(proposal.leaves)
        settled = SettledRound(
            proposal.round, proposal.epoch, proposal.nonce, proposal.prev_root, proposal.root, len(leaves),
            compute_sums(leaves), proposal_digest(proposal), proposal.new_base, (), position, 0, True,
        )  # fmt: skip
        readings.append(Reading(settled, proposal))
    params = FederationParams(1, Wei(1), 1, Wei(1), 1)
    roster = Roster(1, 0, members, ())
    return Book(params, roster, (), Wei(0), (), (), tuple(readings))


if __name__ == "__main__":
    main()
