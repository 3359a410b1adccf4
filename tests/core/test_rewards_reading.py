"""Rewards are read from the chain and recomputed: whatever a committee certified wrongly is found."""

from pathlib import Path

import msgspec
import pytest
from ledger_worlds import PARAMS, PEERS
from rewards_world import MEASURED, POOL_WEI, Settled, add_served, move_cumulative, move_reward, with_root

from nodes.rewards import claim_newest, read_rewards, rows_to_json, verify_rewards
from nodes.rewards.checking import UNFIT_REGISTRY, find_roster
from nodes.rewards.plots import plot_rewards
from nodes.rewards.reading import find_member
from p2pfm.errors import OperatorError, Reject, WorldError
from p2pfm.messages import Proposal, Service
from p2pfm.types import WEIGHT_ONE, Contribution, Digest, MemberIndex, Round, Weight


@pytest.fixture
def settled() -> Settled:
    return Settled()


def test_rows_hold_what_the_chain_allotted(settled: Settled) -> None:
    settled.settle(0)
    settled.settle(1)
    settled.world.advance(PARAMS.challenge_window_s)
    assert claim_newest(settled.world.any, PEERS[1], settled.blobs.get) == POOL_WEI * 100 // 280
    rows = read_rewards(settled.world.any, settled.blobs.get)
    assert [(row.round, row.member, row.peer) for row in rows] == [
        (round, member, PEERS[member + 1]) for round in (0, 1) for member in range(4)
    ]
    assert [row.contribution for row in rows] == [50, -20, 90, None] * 2
    assert [row.total for row in rows] == [50, -20, 90, 0, 100, -40, 180, 0]
    assert [row.reward_wei for row in rows[:4]] == [0, 0, 0, 0]
    assert [row.reward_wei for row in rows[4:]] == [POOL_WEI * 100 // 280, 0, POOL_WEI * 180 // 280, 0]
    assert [row.claimed_wei for row in rows[4:]] == [POOL_WEI * 100 // 280, 0, 0, 0]
    assert all(row.is_final for row in rows)
    assert rows_to_json(rows)[4]["reward_wei"] == str(POOL_WEI * 100 // 280)


def test_an_honest_history_has_no_findings(settled: Settled) -> None:
    for round in (0, 1, 3):  # round 2 was void
        settled.settle(round)
    assert settled.findings() == {0: [], 1: [], 3: []}


def test_rounds_that_a_chain_took_late_are_judged_by_the_registry_of_their_own_time() -> None:
    """Two rounds were certified while it was away; then a member left before either was accepted, and one joined."""
    settled = Settled()
    first = settled.draft(0)
    settled.previous = first
    second = settled.draft(1)
    settled.world.ledgers[4].unbond()
    settled.world.join(5)
    settled.accept(first)
    settled.accept(second)
    assert settled.findings() == {0: [], 1: []}
    book = settled.book()
    for position in (0, 1):
        known = find_roster(book, position, settled.network)
        assert known is not None
        assert [member.active for member in known.members] == [True] * 4
    settled.settle(2)
    assert settled.findings()[Round(2)] == []
    told = find_roster(settled.book(), 2, settled.network)
    assert told is not None
    assert [member.active for member in told.members] == [True, True, True, False, True]


def test_verify_finds_a_raised_median(settled: Settled) -> None:
    def tamper(proposal: Proposal) -> Proposal:
        first = msgspec.structs.replace(proposal.updates[0], contribution=Contribution(10_000))
        return msgspec.structs.replace(proposal, updates=(first, *proposal.updates[1:]))

    settled.settle(0, tamper)
    assert any("median" in finding for finding in settled.findings()[Round(0)])


def test_verify_finds_a_leaf_that_is_paid_of_anothers_reward(settled: Settled) -> None:
    settled.settle(0)
    settled.settle(1, lambda proposal: move_reward(proposal, 5, source=2, target=3))
    assert [finding.split(":")[0] for finding in settled.findings()[Round(1)]] == [
        "leaf of member 2",
        "leaf of member 3",
    ]


def test_verify_finds_a_sum_that_moved(settled: Settled) -> None:
    settled.settle(1)
    settled.settle(2, lambda proposal: move_cumulative(proposal, 7, source=2, target=1))
    assert len(settled.findings()[Round(2)]) == 2
    assert settled.findings()[Round(1)] == []


def test_verify_finds_pay_for_serving_that_nobody_revealed(settled: Settled) -> None:
    settled.settle(3, lambda proposal: add_served(proposal, 9, target=2))
    findings = settled.findings()[Round(3)]
    assert findings == ["leaf of member 2: sum for serving [wei] should be 0, the proposal says 9"]


def test_verify_finds_a_wrong_merge_weight(settled: Settled) -> None:
    def tamper(proposal: Proposal) -> Proposal:
        swapped = [proposal.updates[1].weight, proposal.updates[0].weight]
        changed = [
            msgspec.structs.replace(update, weight=weight)
            for update, weight in zip(proposal.updates, swapped, strict=False)
        ]
        return msgspec.structs.replace(proposal, updates=(*changed, *proposal.updates[2:]))

    settled.settle(0, tamper)
    assert all("merge weight" in finding for finding in settled.findings()[Round(0)])
    assert len(settled.findings()[Round(0)]) == 2


@pytest.mark.parametrize("places", [(0, 0, 1, 2), (0, 1, 2, 0), (1, 0, 2)])
def test_verify_finds_updates_that_stand_there_twice_or_in_another_order(settled: Settled, places: tuple[int]) -> None:
    def tamper(proposal: Proposal) -> Proposal:
        return msgspec.structs.replace(proposal, updates=tuple(proposal.updates[place] for place in places))

    settled.settle(0, tamper)
    (finding,) = settled.findings()[Round(0)]
    assert finding.startswith("updates: expected 3, each once")


def test_verify_finds_a_wrong_entry_beside_the_right_one(settled: Settled) -> None:
    def tamper(proposal: Proposal) -> Proposal:
        heavy = msgspec.structs.replace(proposal.updates[0], weight=Weight(WEIGHT_ONE))
        return msgspec.structs.replace(proposal, updates=(heavy, *proposal.updates))

    settled.settle(0, tamper)
    assert settled.findings()[Round(0)]


def test_verify_finds_a_round_from_another_base(settled: Settled) -> None:
    settled.settle(0)
    settled.settle(1, lambda proposal: msgspec.structs.replace(proposal, base=Digest(b"x" * 32)))
    (finding,) = settled.findings()[Round(1)]
    assert finding.startswith("base: the round before ended with")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("a replica that is no member", "names a replica that is no member"),
        ("an update of nobody", "updates: expected 3"),
        ("scores out of order", "not sorted"),
    ],
)
def test_nonsense_that_a_committee_signed_is_a_finding_and_ends_nothing(settled: Settled, kind: str, says: str) -> None:
    def tamper(proposal: Proposal) -> Proposal:
        reveal, *others = proposal.reveals
        if kind == "a replica that is no member":
            served = (Service(MemberIndex(10**6), WEIGHT_ONE),)
            reveals = (msgspec.structs.replace(reveal, served=served), *others)
            return msgspec.structs.replace(proposal, reveals=reveals)
        if kind == "scores out of order":
            reveals = (msgspec.structs.replace(reveal, scores=reveal.scores[::-1]), *others)
            return msgspec.structs.replace(proposal, reveals=reveals)
        nobody = msgspec.structs.replace(proposal.updates[0], member=MemberIndex(10**6))
        return msgspec.structs.replace(proposal, updates=(nobody, *proposal.updates))

    settled.settle(0, tamper)
    assert says in settled.findings()[Round(0)][0]
    known = find_roster(settled.book(), 0, settled.network)
    assert known is not None
    assert known.members == settled.world.any.get_roster().members


def test_a_sum_for_serving_that_cannot_grow_ends_nothing(settled: Settled) -> None:
    """The contract bounds no sum for serving: a leaf may hold all that 16 bytes can, and later ones saturate there."""

    def serve(proposal: Proposal) -> Proposal:
        served = (Service(MemberIndex(0), WEIGHT_ONE),)
        reveals = (msgspec.structs.replace(reveal, served=served) for reveal in proposal.reveals)
        return msgspec.structs.replace(proposal, reveals=tuple(reveals))

    settled.settle(0, lambda proposal: add_served(proposal, 2**128 - 1, target=0))
    settled.settle(1, serve)
    network = msgspec.structs.replace(
        settled.network,
        settlement=msgspec.structs.replace(settled.network.settlement, serving_per_epoch_pfm=1),
        chain=msgspec.structs.replace(settled.network.chain, serving_pool="0x" + "33" * 20),
    )
    findings = verify_rewards(settled.world.any, settled.blobs.get, network)
    assert "sum for serving" in findings[Round(0)][0]
    assert findings[Round(1)] == []


def test_verify_finds_leaves_that_are_not_of_the_root(settled: Settled) -> None:
    settled.settle(0, lambda proposal: msgspec.structs.replace(proposal, root=Digest(b"r" * 32)))
    assert any("root" in finding for finding in settled.findings()[Round(0)])
    with pytest.raises(Reject, match="root"):
        read_rewards(settled.world.any, settled.blobs.get)


def test_verify_finds_data_that_is_not_of_the_hash(settled: Settled) -> None:
    settled.settle(0)
    (digest,) = settled.blobs
    settled.blobs[digest] += b"\0"
    (finding,) = settled.findings()[Round(0)]
    assert "what was given has SHA-256" in finding
    with pytest.raises(WorldError, match="nobody serves"):
        read_rewards(settled.world.any, settled.blobs.get)


def test_a_round_whose_data_nobody_serves_is_named(settled: Settled) -> None:
    settled.settle(0)
    settled.settle(1)
    first = settled.world.any.get_rounds(Round(0))[0]
    del settled.blobs[first.data_digest]
    with pytest.raises(WorldError, match="round 0: nobody serves"):
        read_rewards(settled.world.any, settled.blobs.get)
    assert {row.round for row in read_rewards(settled.world.any, settled.blobs.get, is_partial=True)} == {1}
    findings = settled.findings()
    assert "cannot be checked" in findings[Round(0)][0]
    assert "not at hand" in findings[Round(1)][0]


def test_rows_become_a_picture(settled: Settled, tmp_path: Path) -> None:
    settled.settle(0)
    settled.settle(1)
    rows = read_rewards(settled.world.any, settled.blobs.get)
    picture = tmp_path / "rewards.png"
    plot_rewards(rows, picture, {PEERS[1]: "ada"})
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least one"):
        plot_rewards((), picture)


def test_a_peer_with_nothing_to_claim_is_told_why(settled: Settled) -> None:
    with pytest.raises(WorldError, match="no round is final"):
        claim_newest(settled.world.any, PEERS[1], settled.blobs.get)
    settled.settle(0)
    settled.world.advance(PARAMS.challenge_window_s)
    assert claim_newest(settled.world.any, PEERS[1], settled.blobs.get) == 0
    with pytest.raises(WorldError, match="not registered"):
        claim_newest(settled.world.any, PEERS[6], settled.blobs.get)


def test_a_leavers_stake_counted_when_its_round_was_proposed(settled: Settled) -> None:
    """Merge weights are capped by shares of the stakes of then: a member that leaves later changes nothing."""
    settled.settle(0, measured={0: (50, 50, 50)})
    settled.world.ledgers[1].unbond()
    assert settled.findings() == {0: []}
    settled.settle(1, measured={1: (50, 50, 50)})
    settled.world.ledgers[2].unbond()
    assert settled.findings() == {0: [], 1: []}


def test_a_newcomer_changes_nothing_in_earlier_rounds() -> None:
    settled = Settled(num_members=3)
    settled.settle(0, measured={0: (50, 50, 50)})
    settled.world.join(4)
    settled.settle(1)
    assert settled.findings() == {0: [], 1: []}
    assert [len(reading.leaves) for reading in settled.book().readings] == [3, 4]


def test_verify_finds_a_newcomer_who_is_left_out() -> None:
    """A committee that was drawn after it joined knew of it; one that was drawn before may not have."""
    settled = Settled(num_members=3)
    settled.settle(0)
    early = settled.draft(1)
    settled.world.join(4)
    settled.accept(early)
    assert settled.findings()[Round(1)] == []
    settled.world.advance(PARAMS.rotation_s)
    settled.world.any.rotate()
    alike = dict.fromkeys(range(3), (50, 50, 50))
    settled.settle(2, lambda proposal: with_root(msgspec.structs.replace(proposal, leaves=proposal.leaves[:3])), alike)
    assert settled.findings()[Round(2)][0] == UNFIT_REGISTRY
    assert find_roster(settled.book(), 2, settled.network) is None


def test_verify_finds_a_vector_of_somebody_who_is_not_in_the_committee(settled: Settled) -> None:
    settled.world.ledgers[4].unbond()
    settled.world.advance(PARAMS.rotation_s)
    settled.world.any.rotate()  # the seed of this draw was known: the leaver is still in it
    settled.world.advance(PARAMS.rotation_s)
    settled.world.any.rotate()
    assert MemberIndex(3) not in settled.world.any.get_roster().committee

    def tamper(proposal: Proposal) -> Proposal:
        reveals = tuple(
            msgspec.structs.replace(reveal, member=MemberIndex(3)) if reveal.member == 2 else reveal
            for reveal in proposal.reveals
        )
        return msgspec.structs.replace(proposal, reveals=reveals)

    settled.settle(0, tamper, measured={0: MEASURED[0], 2: MEASURED[2]})
    assert any("member 3 is not in the committee" in finding for finding in settled.findings()[Round(0)])


def test_a_peer_is_found_by_index_id_or_unique_end(settled: Settled) -> None:
    roster = settled.world.any.get_roster()
    assert find_member(roster, "2").peer == PEERS[3]
    assert find_member(roster, PEERS[2]).index == 1
    assert find_member(roster, "peer4").index == 3
    assert find_member(roster, "…peer4").index == 3
    for name in ("9", "nobody", "eer1x", "", "r1"):
        with pytest.raises(OperatorError, match="nobody of that name is registered"):
            find_member(roster, name)
    members = tuple(msgspec.structs.replace(member, peer=f"{member.index}-same-end") for member in roster.members)
    with pytest.raises(OperatorError, match=r"several fit: 0 .*3 "):
        find_member(msgspec.structs.replace(roster, members=members), "same-end")


def test_a_peer_that_came_back_is_meant_at_its_present_place(settled: Settled) -> None:
    roster = settled.world.any.get_roster()
    gone = msgspec.structs.replace(roster.members[0], active=False)
    back = msgspec.structs.replace(roster.members[0], index=MemberIndex(4))
    returned = msgspec.structs.replace(roster, members=(gone, *roster.members[1:], back))
    assert find_member(returned, PEERS[1]).index == 4
    assert find_member(returned, "0").index == 0
