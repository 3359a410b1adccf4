"""A node's auditor on a real ledger: what is false is contested, what nobody shows demanded, what is asked shown."""

import hashlib

import msgspec
import pytest
import trio
from ledger_worlds import ACCOUNTS, PARAMS, PEERS, SECRETS, SPONSOR, TOKENS, World, memory_world

from p2pfm.errors import ChainError
from p2pfm.messages import Proposal, encode
from p2pfm.protocol.events import Accuse
from p2pfm.runtime.auditor import Auditor
from p2pfm.settlement import bls, merkle
from p2pfm.settlement.ledger import Contested, LeafValue
from p2pfm.settlement.rewards import proposal_message, to_wire
from p2pfm.types import Digest, MemberIndex, Round, Wei

OVERPAID = (
    LeafValue(Wei(900), Wei(900), 1),
    LeafValue(Wei(100), Wei(100), 1),
    LeafValue(Wei(0), Wei(0), 0),
    LeafValue(Wei(0), Wei(0), 0),
)


class Net:
    """A federation and the data that its peers serve."""

    def __init__(self) -> None:
        self.world: World = memory_world().found(4, pool=1900)
        self.blobs: dict[Digest, bytes] = {}

    def settle(self, round: int, leaves: tuple[LeafValue, ...] | None = None, *, is_served: bool = True) -> None:
        """A certified round whose data is a real proposal; its leaves are what the rules give, or these."""
        if leaves is None:
            self.world.submission(round, [3, 1, 0, 0])
            leaves = self.world.leaves
        tree = merkle.compute_root(leaves)
        data = encode(proposal_of(round, leaves))
        digest = Digest(hashlib.sha256(data).digest())
        if is_served:
            self.blobs[digest] = data
        changes = {"root": tree.digest, "sums": tree.sums, "num_leaves": len(leaves), "data_digest": digest}
        self.world.any.submit_round(self.world.submission(round, **changes))
        self.world.leaves = leaves

    def auditor(self, account: int, *, is_contesting: bool = True) -> Auditor:
        async def fetch(digest: Digest) -> bytes | None:
            return self.blobs.get(digest)

        return Auditor(PEERS[account], self.world.ledgers[account], fetch, is_contesting=is_contesting)

    def watch(self, auditor: Auditor) -> None:
        trio.run(auditor.watch)


def proposal_of(round: int, leaves: tuple[LeafValue, ...]) -> Proposal:
    nothing = Digest(bytes(32))
    root = merkle.compute_root(leaves).digest
    return Proposal(
        round=Round(round),
        proposer=MemberIndex(0),
        epoch=1,
        nonce=0,
        base=nothing,
        new_base=nothing,
        prev_root=nothing,
        root=root,
        updates=(),
        reveals=(),
        leaves=to_wire(leaves),
    )


def test_an_honest_round_is_left_alone_and_judged_once() -> None:
    net = Net()
    net.settle(1)
    auditor = net.auditor(1)
    net.watch(auditor)
    net.blobs.clear()
    net.watch(auditor)
    assert auditor.findings == ()
    assert len(net.world.any.get_rounds(Round(0))) == 1


def test_a_false_reward_is_contested_in_time() -> None:
    net = Net()
    net.settle(1, OVERPAID)
    auditor = net.auditor(2)
    net.watch(auditor)
    assert net.world.any.get_head() is None
    assert net.world.any.get_balance(ACCOUNTS[2]) == TOKENS - 10 + 10
    assert "reward of member 0 is 900 wei, the rule says 500" in auditor.findings[0]
    net.watch(auditor)
    assert len(auditor.findings) == 2


def test_who_only_looks_tells_and_sends_nothing() -> None:
    net = Net()
    net.settle(1, OVERPAID)
    auditor = net.auditor(2, is_contesting=False)
    net.watch(auditor)
    assert net.world.any.get_head() is not None
    assert "is false" in auditor.findings[0]


def test_a_moved_sum_is_contested_by_the_leaves_before() -> None:
    net = Net()
    net.settle(1)
    moved = (*net.world.leaves[1:2], *net.world.leaves[:1], *net.world.leaves[2:])
    net.settle(2, tuple(msgspec.structs.replace(leaf, reward_wei=Wei(0), contribution=0) for leaf in moved))
    net.watch(net.auditor(3))
    assert [settled.round for settled in net.world.any.get_rounds(Round(0))] == [1]
    told = [entry.what for entry in net.world.any.get_entries() if isinstance(entry.what, Contested)]
    assert [what.fault for what in told] == ["transition"]


def test_what_nobody_serves_is_demanded_and_void_if_nobody_answers() -> None:
    net = Net()
    net.settle(1, is_served=False)
    auditor = net.auditor(2)
    net.watch(auditor)
    assert net.world.any.get_demands() == (), "others may serve it still"
    auditor._missing_since = dict.fromkeys(auditor._missing_since, float("-inf"))  # seen long ago
    net.watch(auditor)
    (demand,) = net.world.any.get_demands()
    assert (demand.index, demand.is_open) == (1, True)
    net.watch(net.auditor(3))
    assert len(net.world.any.get_demands()) == 1, "one demand is enough"
    net.world.advance(PARAMS.response_s)
    net.watch(auditor)
    assert net.world.any.get_head() is None
    assert any("ended unanswered" in finding for finding in auditor.findings)
    net.world.check_books()


def test_who_holds_the_data_answers_a_demand_and_earns_its_bond() -> None:
    net = Net()
    net.settle(1)
    number = net.world.ledgers[SPONSOR].demand_leaf(Round(1), MemberIndex(0))
    auditor = net.auditor(3)
    net.watch(auditor)
    assert not net.world.any.get_demands()[number].is_open
    assert net.world.any.get_balance(ACCOUNTS[3]) == TOKENS - 10 + PARAMS.leaf_bond
    net.watch(auditor)
    assert len(auditor.findings) == 1


def test_data_that_is_not_of_the_root_counts_as_not_served() -> None:
    net = Net()
    net.settle(1)
    (digest,) = net.blobs
    for lie in (b"", b"\x00" * 50, encode(proposal_of(1, OVERPAID))):
        net.blobs[digest] = lie
        auditor = net.auditor(2)
        net.watch(auditor)
        assert auditor._missing_since, "neither contested nor believed"
        assert net.world.any.get_head() is not None


def make_evidence(net: Net) -> Accuse:
    proposals = [
        msgspec.structs.replace(proposal_of(1, OVERPAID), new_base=Digest(bytes([number]) * 32)) for number in (1, 2)
    ]
    signatures = [bls.sign(SECRETS[3], proposal_message(net.world.chain, proposal)) for proposal in proposals]
    return Accuse(MemberIndex(2), proposals[0], signatures[0], proposals[1], signatures[1])


def test_evidence_waits_for_a_chain_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    auditor = net.auditor(2)

    def fail(*_: object) -> None:
        raise ChainError("no answer")

    with monkeypatch.context() as away:
        away.setattr(type(net.world.ledgers[2]), "get_committee", fail)
        trio.run(auditor.accuse, make_evidence(net))
        net.watch(auditor)
    told, waits = auditor.findings
    assert told == "member 2 signed two proposals of round 1"
    assert waits.startswith("not yet")
    net.watch(auditor)
    assert auditor.findings[-1] == "member 2 is slashed"
    num_told = len(auditor.findings)
    net.watch(auditor)
    assert len(auditor.findings) == num_told


def test_who_signed_two_proposals_is_slashed_on_the_evidence() -> None:
    net = Net()
    evidence = make_evidence(net)
    looking = net.auditor(2, is_contesting=False)
    trio.run(looking.accuse, evidence)
    assert net.world.any.get_roster().members[2].stake == 10
    auditor = net.auditor(2)
    trio.run(auditor.accuse, evidence)
    assert [member.stake for member in net.world.any.get_roster().members] == [10, 10, 0, 10]
    assert auditor.findings[-1] == "member 2 is slashed"
    trio.run(auditor.accuse, evidence)
    assert "NoFault" in auditor.findings[-1]
    trio.run(auditor.accuse, msgspec.structs.replace(evidence, member=MemberIndex(1)))
    assert "BadSignature" in auditor.findings[-1]
    net.world.check_books()
