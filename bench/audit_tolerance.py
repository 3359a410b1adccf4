"""How far an honest committee's median is from an auditor's measurement: what `p2pfm rewards verify --deep` tolerates.

    python bench/audit_tolerance.py FOLDER [--draws 48]

FOLDER is what `p2pfm demo --out FOLDER` or `p2pfm localnet up --out FOLDER` left: real nodes' certified rounds. Prints,
in units of the spread that an auditor computes, (1) the distance of every certified median from the auditor's 8 draws,
(2) how often honest committees resampled from all draws would be further away than a number of spreads.
"""

import argparse
import random
import sys
import time
from pathlib import Path

from nodes.homes import read_config
from nodes.rewards.blobs import Blobs
from nodes.rewards.measuring import DRAWS, NO_SALT, compute_expected_median, draw_audit_seed, open_meter
from nodes.rewards.reading import Book, Reading, decode_proposal
from p2pfm import work
from p2pfm.errors import Reject, WorldError
from p2pfm.messages import Proposal, proposal_digest
from p2pfm.settlement.ledger import FederationParams, Member, Roster, SettledRound
from p2pfm.settlement.rewards import compute_median, compute_sums, from_wire
from p2pfm.types import MemberIndex, PeerId, Wei

TRIALS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--draws", type=int, default=48)
    options = parser.parse_args()
    homes = sorted(options.folder.glob("peer-*"))
    config = read_config(homes[0] / "node.toml")
    blobs = Blobs(None, ())
    proposals: dict[int, Proposal] = {}
    for path in sorted(path for home in homes for path in home.glob("blobs/??/*")):
        digest = blobs.put(path.read_bytes())
        try:
            proposal = decode_proposal(blobs.get(digest))
        except Reject:
            continue
        proposals[proposal.round] = proposal
    book = make_book([proposals[round] for round in sorted(proposals)])
    meter = open_meter(config, blobs)
    random.seed(0)
    told: list[tuple[float, float]] = []
    samples: list[list[int]] = []
    for reading in book.readings:
        proposal = reading.proposal
        assert proposal is not None
        try:
            meter.validate_held(proposal)
            meter.find_base(book, reading)
        except WorldError as error:
            print(f"round {proposal.round}: {error}")
            continue
        action, notes = meter.make_action(book, reading, proposal, book.roster)
        began = time.perf_counter()
        draws = []
        for number in range(options.draws):
            seed = draw_audit_seed(reading.settled.data_digest, number)
            draws.append(work.score_updates(meter.learner, blobs, config.network, action, seed, NO_SALT).contributions)
        took = (time.perf_counter() - began) / options.draws
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
    ratios = sorted(off / max(1.0, spread) for off, spread in told)
    middle = ratios[len(ratios) // 2]
    print(f"{len(ratios)} certified medians: largest distance {ratios[-1]:.2f} spreads, median {middle:.2f}")
    for size in (1, 3, 5, 9):
        beyond = []
        for _ in range(TRIALS):
            column = random.choice(samples)
            picked = random.sample(column, DRAWS + size)
            measured, spread = compute_expected_median(picked[:DRAWS], size)
            off = abs(compute_median(picked[DRAWS:]) - measured)  # type: ignore[arg-type]
            beyond.append(off / max(1.0, spread))
        beyond.sort()
        shares = {limit: sum(value > limit for value in beyond) / TRIALS for limit in (2, 3, 4, 5, 6, 8, 10)}
        print(
            f"committee of {size}: {TRIALS} honest trials, beyond "
            + ", ".join(f"{k}: {v:.5f}" for k, v in shares.items())
        )


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
