"""Rewards for people and scripts: what the chain paid, to whom, why, and whether it was right.

blobs       data beside the chain, from disk and from any node that answers
reading     a Book: all rounds with their data, read once and checked against the roots
views       the Book by peer, round and epoch
tables      on a screen, as JSON, as CSV
inequality  Gini and Lorenz
plots       pictures (loads matplotlib)
checking    recompute every round
games       what a round's committees were asked to measure
measuring   measure contributions again, and what one update was good for (loads torch)
explain     one peer's reward in one round, step by step
contests    claim, challenge, demand, show, close
cli         the commands
"""

from nodes.rewards.checking import verify_rewards
from nodes.rewards.contests import claim_newest
from nodes.rewards.reading import PROPOSAL_BYTES_MAX, Fetch, Row, read_rewards
from nodes.rewards.tables import rows_to_json

__all__ = [
    "PROPOSAL_BYTES_MAX",
    "Fetch",
    "Row",
    "claim_newest",
    "read_rewards",
    "rows_to_json",
    "verify_rewards",
]
