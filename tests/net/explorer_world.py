"""A federation in memory with a history worth looking at: real rules, real proposals, real certificates.

And the explorer's app on it, on a real port, in a thread.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from typing import Any, cast

import msgspec
import numpy as np
import trio
from starlette.applications import Starlette

from nodes.explorer.app import Board, make_app
from nodes.explorer.source import Place, Source
from p2pfm.config import ChainConfig, NetworkConfig, SettlementConfig
from p2pfm.messages import Announcement, Proposal, Score, ScoreReveal, encode, proposal_digest, wei_to_wire
from p2pfm.protocol.committee import draft_proposal
from p2pfm.runtime.http_server import serve_http
from p2pfm.settlement import bls, merkle
from p2pfm.settlement.ledger import FederationParams, Submission
from p2pfm.settlement.memory_ledger import InMemoryLedger
from p2pfm.settlement.rewards import from_wire, submission_message
from p2pfm.types import Contribution, Digest, MemberIndex, Millis, PeerId, Round, Wei, compute_digest

PFM = 10**18
CHAIN = ChainConfig(1337, "0x" + "5f" * 20, "0x" + "70" * 20)
SPONSOR = "0x" + "59" * 20
PARAMS = FederationParams(
    committee_size=5,
    min_stake=Wei(100 * PFM),
    challenge_window_s=600,
    pool_per_epoch=Wei(100 * PFM),
    rounds_per_epoch=2,
    rotation_s=300,
    restart_s=50_000,
    response_s=1200,
    unbonding_s=6000,
    leaf_bond=Wei(PFM),
)
BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
TIMEOUT_S = 20.0


def make_peer(index: int) -> PeerId:
    """A name that looks as libp2p's do."""
    drawn = sha256(b"peer %d" % index).digest() + sha256(b"more %d" % index).digest()
    return PeerId("12D3KooW" + "".join(BASE58[byte % 58] for byte in drawn[:44]))


class Federation:
    """Members, rounds that they settle, and the blobs that their nodes would serve."""

    def __init__(self, peers: Sequence[PeerId], start_s: int = 1_790_000_000) -> None:
        self.now = [start_s]
        self.accounts = ["0x" + sha256(b"account %d" % i).hexdigest()[:40] for i in range(len(peers) + 4)]
        self.secrets = [bls.key_from_seed(sha256(b"secret %d" % i).digest()) for i in range(len(peers) + 4)]
        balances = {account: Wei(2000 * PFM) for account in (*self.accounts, SPONSOR)}
        self.ledger = InMemoryLedger(CHAIN, PARAMS, bls.BlsVerifier(), lambda: self.now[0], balances)
        self.network = NetworkConfig(
            name="chatterbot-demo",
            genesis_ms=Millis(0),
            backbone="smollm2-135m",
            probe="0" * 64,
            chain=CHAIN,
            settlement=SettlementConfig(rounds_per_epoch=PARAMS.rounds_per_epoch, pool_per_epoch_pfm=100),
        )
        self.blobs: dict[Digest, bytes] = {}
        self.history: list[Proposal] = []
        self.draw = np.random.default_rng(7)
        for peer in peers:
            self.join(peer)

    def join(self, peer: PeerId) -> None:
        """A member more."""
        index = len(self.ledger.get_roster().members)
        account, secret = self.accounts[index], self.secrets[index]
        proof = bls.prove_possession(secret, CHAIN, account, peer)
        self.ledger.register(account, peer, bls.public_key(secret), proof, Wei((100 + 25 * (index % 5)) * PFM))

    @property
    def any(self) -> Any:
        """The sponsor's ledger."""
        return self.ledger.as_account(SPONSOR)

    def found(self, pool_pfm: int = 1000) -> "Federation":
        """The pool filled, a committee drawn."""
        self.any.fund(Wei(pool_pfm * PFM))
        self.ledger.rotate()
        return self

    def propose(self, round: int) -> Proposal:
        """The round's right proposal: members differ in what they are worth, and some have nothing to give."""
        roster = self.ledger.get_roster()
        authors = [member.index for member in roster.members if member.active and (member.index + round) % 9 != 0]
        payloads = {author: compute_digest(b"%d %d" % (round, author)) for author in authors}
        previous = self.history[-1] if self.history else None
        base = previous.new_base if previous else Digest(b"b" * 32)
        announced = {
            payloads[author]: Announcement(Round(round), roster.members[author].peer, base, payloads[author], 10, 10)
            for author in authors
        }
        worth = {author: 4e6 * np.exp(-author / 4) - 2e5 + self.draw.normal(0, 2e5) for author in authors}
        reveals = [
            ScoreReveal(
                round=Round(round),
                member=MemberIndex(judge),
                salt=bytes(32),
                scores=tuple(
                    sorted(
                        (
                            Score(payloads[author], Contribution(int(worth[author] + self.draw.normal(0, 1e5))))
                            for author in authors
                        ),
                        key=lambda score: score.payload,
                    )
                ),
            )
            for judge in sorted(roster.committee)
        ]
        draft = draft_proposal(self.network, roster, previous, Round(round), base, reveals, announced)
        return msgspec.structs.replace(draft, new_base=compute_digest(b"base %d" % round))

    def settle(
        self,
        round: int,
        absent: int = 0,
        tamper: Callable[[Proposal], Proposal] = lambda proposal: proposal,
        is_served: bool = True,
    ) -> Proposal:
        """Propose, sign (the last `absent` of the committee do not) and submit a round."""
        proposal = tamper(self.propose(round))
        leaves = from_wire(proposal.leaves)
        tree = merkle.compute_root(leaves)
        committee = self.ledger.get_committee(proposal.epoch)
        missing = tuple(sorted(committee[len(committee) - absent :]))
        submission = Submission(
            round=proposal.round,
            epoch=proposal.epoch,
            nonce=proposal.nonce,
            prev_root=proposal.prev_root,
            root=tree.digest,
            num_leaves=len(leaves),
            sums=tree.sums,
            data_digest=proposal_digest(proposal),
            base=proposal.new_base,
            absent=missing,
            signature=bytes(96),
        )
        message = submission_message(CHAIN, submission)
        signatures = [bls.sign(self.secrets[index], message) for index in committee if index not in missing]
        self.any.submit_round(msgspec.structs.replace(submission, signature=bls.aggregate(signatures)))
        if is_served:
            self.blobs[submission.data_digest] = encode(proposal)
        self.history.append(proposal)
        return proposal

    def advance(self, seconds: int) -> None:
        """Let time pass."""
        self.now[0] += seconds


def overpay(proposal: Proposal) -> Proposal:
    """Half of the best paid peer's reward goes to the last one, in a tree that is consistent in itself."""
    values = list(from_wire(proposal.leaves))
    best = max(range(len(values)), key=lambda index: values[index].reward_wei)
    stolen = values[best].reward_wei // 2
    leaves = list(proposal.leaves)
    for index, change in ((best, -stolen), (len(leaves) - 1, stolen)):
        leaves[index] = msgspec.structs.replace(
            leaves[index],
            cumulative_wei=wei_to_wire(Wei(values[index].cumulative_wei + change)),
            reward_wei=wei_to_wire(Wei(values[index].reward_wei + change)),
        )
    return msgspec.structs.replace(proposal, leaves=tuple(leaves), root=merkle.compute_root(from_wire(leaves)).digest)


def eventful(num_peers: int = 14, num_rounds: int = 12, start_s: int | None = None) -> Federation:
    """Paid and unpaid rounds, absent signers, claims, a demand that was answered, a fraud that was voided."""
    begin = int(time.time()) - 240 * (num_rounds + 2) if start_s is None else start_s
    world = Federation([make_peer(index) for index in range(num_peers)], begin).found()
    for round in range(num_rounds):
        world.advance(240)
        if round == 5:
            world.settle(round, absent=1, tamper=overpay)
            lie = from_wire(world.history.pop().leaves)
            world.advance(60)
            world.ledger.as_account(world.accounts[2]).prove_reward(Round(round), MemberIndex(num_peers - 1), lie)
            world.ledger.rotate()
        proposal = world.settle(round, absent=round % 2)
        if round == 3:
            number = world.ledger.as_account(world.accounts[4]).demand_leaf(Round(round), MemberIndex(1))
            world.advance(90)
            world.ledger.as_account(world.accounts[1]).show_leaf(number, from_wire(proposal.leaves))
        if round in (8, 11):
            done = [settled for settled in world.any.get_rounds(Round(0)) if settled.is_final]
            leaves = from_wire(next(held.leaves for held in world.history if held.round == done[-1].round))
            for index in (0, 1, 3, 4)[: round // 3]:
                world.any.claim(done[-1].round, MemberIndex(index), leaves)
    return world


@contextmanager
def explored(
    *places: Place, poll_s: float = 0.1, heartbeat_s: float = 15.0, host_names: Sequence[str] = ()
) -> Iterator[str]:
    """The explorer's app on these networks; yields its URL."""
    sources = [Source(place, time.time) for place in places]
    ports: list[int] = []
    scopes: list[trio.CancelScope] = []
    started = threading.Event()
    tokens: list[Any] = []

    async def main() -> None:
        board = Board(sources)
        app = cast(Starlette, make_app(board, host_names, heartbeat_s))
        async with trio.open_nursery() as nursery:
            ports.append(await nursery.start(serve_http, app, "127.0.0.1", 0))
            nursery.start_soon(board.run, poll_s)
            scopes.append(nursery.cancel_scope)
            tokens.append(trio.lowlevel.current_trio_token())
            started.set()

    thread = threading.Thread(target=partial(trio.run, main), daemon=True)
    thread.start()
    assert started.wait(TIMEOUT_S)
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        trio.from_thread.run_sync(scopes[0].cancel, trio_token=tokens[0])
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
