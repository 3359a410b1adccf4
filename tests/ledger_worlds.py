"""One federation on each implementation of the ledger: in memory, on the embedded EVM, on anvil.

A `World` is what a test of rules needs: accounts with tokens, time that passes on demand, and members who sign.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from eth.vm.forks.spurious_dragon import computation
from eth_account import Account

from nodes.ports import get_free_port
from nodes.testnet import account_keys, find_anvil, serve_embedded, start_anvil
from p2pfm.config import ChainConfig
from p2pfm.errors import Reverted
from p2pfm.runtime import chain_rpc
from p2pfm.runtime.web3_ledger import Web3Ledger, deploy
from p2pfm.settlement import bls, merkle
from p2pfm.settlement.ledger import FederationParams, LeafValue, Ledger, Submission
from p2pfm.settlement.memory_ledger import InMemoryLedger
from p2pfm.settlement.rewards import compute_leaves, submission_message
from p2pfm.types import Digest, MemberIndex, PeerId, Round, Wei

KEYS = account_keys(8)
ACCOUNTS = [Account.from_key(key).address for key in KEYS]
SECRETS = [bls.key_from_seed(bytes([i + 1]) * 32) for i in range(len(KEYS))]
BLS_KEYS = [bls.public_key(secret) for secret in SECRETS]
PEERS = [PeerId(f"12D3KooWpeer{i}") for i in range(len(KEYS))]
SPONSOR = 7
"""Account 0 deploys and holds all tokens at first; 7 sponsors; the others may join."""

PARAMS = FederationParams(
    committee_size=4,
    min_stake=Wei(10),
    challenge_window_s=600,
    pool_per_epoch=Wei(1000),
    rounds_per_epoch=2,
    rotation_s=300,
    restart_s=5000,
    members_max=5,
    response_s=200,
    unbonding_s=1500,
    leaf_bond=Wei(7),
    serving_per_epoch=Wei(300),
)
TOKENS = Wei(2000)
"""What each account gets [wei]."""
IMPLEMENTATIONS = ["memory", "embedded", *(["anvil"] if find_anvil() else [])]


@dataclass
class World:
    """A federation and all that may happen to it."""

    chain: ChainConfig
    ledgers: Sequence[Any]
    """By account; each implements Ledger."""
    advance: Callable[[int], None]
    """Let so many seconds pass."""
    leaves: tuple[LeafValue, ...] = ()
    """Of the last round that `submission` made."""
    secrets: Sequence[int] = field(default_factory=lambda: SECRETS)

    @property
    def any(self) -> Ledger:
        """Some account's ledger, for reads."""
        ledger: Ledger = self.ledgers[SPONSOR]
        return ledger

    def join(self, member: int, stake: int = 10) -> MemberIndex:
        """Register an account with its own keys."""
        proof = bls.prove_possession(SECRETS[member], self.chain, ACCOUNTS[member], PEERS[member])
        index: MemberIndex = self.ledgers[member].register(PEERS[member], BLS_KEYS[member], proof, Wei(stake))
        return index

    def found(self, num_members: int = 4, pool: int = 1500) -> "World":
        """Members 1 to n joined (registry index i is account i + 1), the pool filled, the first committee drawn."""
        for member in range(1, num_members + 1):
            self.join(member)
        self.any.fund(Wei(pool))
        self.any.rotate()
        return self

    def submission(
        self,
        round: int,
        contributions: Sequence[int] = (),
        absent: Sequence[int] = (),
        served: Sequence[int] = (),
        **changes: Any,
    ) -> Submission:
        """A certified round that builds on the head; `changes` replace its fields before it is signed. `served`: what
        each is given for serving.
        """
        roster, head = self.any.get_roster(), self.any.get_head()
        self.leaves = compute_leaves(
            self.leaves if head else (),
            {MemberIndex(index): value for index, value in enumerate(contributions)},
            len(roster.members),
            PARAMS.pool_per_epoch,
            is_payout=bool(contributions),
            is_epoch_start=True,
            served={MemberIndex(index): Wei(value) for index, value in enumerate(served)},
        )
        tree = merkle.compute_root(self.leaves)
        unsigned = Submission(
            round=Round(round),
            epoch=roster.epoch,
            nonce=roster.nonce,
            prev_root=head.root if head else merkle.EMPTY_ROOT,
            root=tree.digest,
            num_leaves=len(self.leaves),
            sums=tree.sums,
            data_digest=Digest(bytes([round]) * 32),
            base=Digest(bytes([round + 100]) * 32),
            absent=tuple(MemberIndex(index) for index in absent),
            signature=bytes(96),
        )
        return self.sign(msgspec.structs.replace(unsigned, **changes))

    def settle(self, round: int, contributions: Sequence[int] = (), **changes: Any) -> Submission:
        """Make and submit a round."""
        submission = self.submission(round, contributions, **changes)
        self.any.submit_round(submission)
        return submission

    def cheat(self, round: int, leaves: Sequence[LeafValue], absent: Sequence[int] = ()) -> Submission:
        """Settle a round whose tree has these leaves, whatever the rules say: the committee has signed it."""
        tree = merkle.compute_root(leaves)
        changes = {"root": tree.digest, "sums": tree.sums, "num_leaves": len(leaves)}
        submission = self.submission(round, absent=absent, **changes)
        self.leaves = tuple(leaves)
        self.any.submit_round(submission)
        return submission

    def check_books(self) -> None:
        """The law: what the federation holds is the pool, the stakes, the bonds, and what is allotted but not drawn."""
        ledger, params = self.any, self.any.get_params()
        members, head = ledger.get_roster().members, ledger.get_head()
        allotted = head.sums.cumulative_wei if head else 0
        drawn = sum(ledger.get_claimed(member.index) for member in members)
        bonds = sum(params.leaf_bond for demand in ledger.get_demands() if demand.is_open)
        owed = ledger.get_pool() + sum(member.stake for member in members) + bonds + allotted - drawn
        assert ledger.get_balance(self.chain.federation) == owed
        assert drawn <= allotted

    def sign(self, submission: Submission, signers: Sequence[int] | None = None) -> Submission:
        """Signed by the committee but its absent members, or by these registry indices."""
        roster = self.any.get_roster()
        chosen = [index for index in roster.committee if index not in submission.absent] if signers is None else signers
        message = submission_message(self.chain, submission)
        signature = bls.aggregate([bls.sign(SECRETS[index + 1], message) for index in chosen])
        return msgspec.structs.replace(submission, signature=signature)


if ARTIFACTS := os.environ.get("P2PFM_TEST_ARTIFACTS"):  # contracts/mutate.py: other contracts under the same tests
    chain_rpc.read_artifact = lambda name: json.loads(Path(ARTIFACTS, f"{name}.json").read_text())
    computation.EIP170_CODE_SIZE_LIMIT *= 2  # a rule less may make more code


def memory_world(params: FederationParams = PARAMS, tokens: Wei = TOKENS) -> World:
    """On the executable specification."""
    now = [1_000_000]
    chain = ChainConfig(1337, "0x" + "f0" * 20, "0x" + "70" * 20)
    balances = dict.fromkeys(ACCOUNTS, tokens)
    ledger = InMemoryLedger(chain, params, bls.BlsVerifier(), lambda: now[0], balances)

    def advance(seconds: int) -> None:
        now[0] += seconds

    return World(chain, [ledger.as_account(account) for account in ACCOUNTS], advance)


def chain_world(rpc_url: str, params: FederationParams = PARAMS) -> World:
    """Newly deployed on a running chain."""
    chain = deploy(rpc_url, KEYS[0], params)
    ledgers = [Web3Ledger(rpc_url, chain, key, fresh_s=0) for key in KEYS]
    for account in ACCOUNTS[1:]:
        ledgers[0].transfer(account, TOKENS)

    def advance(seconds: int) -> None:
        rpc(rpc_url, "evm_increaseTime", seconds)
        rpc(rpc_url, "evm_mine")

    return World(chain, ledgers, advance)


@contextmanager
def running_chain(implementation: str) -> Iterator[str]:
    """The JSON-RPC address of a chain of this kind."""
    if implementation == "embedded":
        server = serve_embedded("127.0.0.1", 0)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()
    else:
        testnet = start_anvil(free_port())
        try:
            yield testnet.rpc_url
        finally:
            testnet.stop()


def rpc(url: str, method: str, *params: Any) -> Any:
    """The result of one JSON-RPC request."""
    answer = httpx.post(url, json={"jsonrpc": "2.0", "id": next(_ids), "method": method, "params": params}).json()
    assert "error" not in answer, answer
    return answer["result"]


def refuses(reason: str) -> "pytest.RaisesExc[Reverted]":
    """The ledger refuses with this custom error."""
    return pytest.raises(Reverted, match=f"refused: {reason}(:|$)")


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    return get_free_port()


_ids = count(1)
