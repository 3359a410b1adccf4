"""Every error p2pfm raises, ordered by whose fault it is, because that decides what happens next.

    P2PFMError
    ├── OperatorError       a person can mend it: config, missing model, port in use
    │   └── ConfigError
    ├── Reject              a peer broke a rule: drop what it sent and blame it
    ├── WorldError          nobody's fault: retry later
    │   ├── ChainError      the chain is unreachable or refused a transaction
    │   │   └── Reverted    the contract said no (carries its custom error's name)
    │   ├── BudgetSpent     the privacy budget allows no more training here; all else goes on
    │   ├── Unjudged        whose keys count is not known here (yet)
    │   └── PeerUnreachable
    └── (a bug is an AssertionError: it is never caught)

A message says what was expected, what came, and what to do next.
"""


class P2PFMError(Exception):
    """Base of the tree."""


class OperatorError(P2PFMError):
    """Something the operator of this node can mend; shown as one clear line."""


class ConfigError(OperatorError):
    """A configuration value is missing, unknown or impossible."""


class Reject(P2PFMError):
    """Bytes or statements of a peer that break a rule. The driver drops them and blames their author."""


class WorldError(P2PFMError):
    """The world refused: network, disk, chain. The driver retries."""


class ChainError(WorldError):
    """The chain could not be reached, or did not take a transaction."""


class Reverted(ChainError):
    """The contract refused a call; `reason` is the name of its custom error (e.g. `BadQuorum`)."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"the contract refused: {reason}{': ' + detail if detail else ''}")
        self.reason = reason


class BudgetSpent(WorldError):
    """Training now would exceed this node's privacy budget: nothing is trained, nothing announced."""


class Unjudged(WorldError):
    """Bytes that cannot be judged by what is known here yet: drop them, blame nobody, ask again."""


class PeerUnreachable(WorldError):
    """No connection to a peer, or it did not answer in time."""
