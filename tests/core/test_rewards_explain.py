"""A reward that explains itself: every figure of `p2pfm rewards explain` follows from the vectors and the root."""

import io

import msgspec
import pytest
from ledger_worlds import PEERS
from rewards_world import POOL_WEI, Settled, get_payload, get_payload_bytes, move_reward
from rich.console import Console

from nodes.rewards.explain import EXCLUDED_MAX, Explanation, explain, find_makers, list_excluded
from nodes.rewards.measuring import DeepCheck, Remeasured, compute_balances
from nodes.rewards.reports import print_balances, print_explanation, print_findings
from nodes.rewards.tables import make_peers_table, to_plain
from nodes.rewards.views import view_peers, view_totals
from p2pfm.config import ScoringConfig
from p2pfm.errors import OperatorError, WorldError
from p2pfm.messages import LIST_MAX, Proposal, Score
from p2pfm.settlement import merkle
from p2pfm.types import WEIGHT_ONE, Contribution, Digest, MemberIndex, PeerId, Round


@pytest.fixture
def settled() -> Settled:
    return Settled()


def get(settled: Settled, member: int, round: int, excluded: Digest | None = None) -> Explanation:
    book = settled.book()
    reading = book.get_reading(Round(round))
    committee = settled.world.any.get_committee(reading.settled.epoch)
    return explain(book, book.roster.members[member], Round(round), settled.network, committee, excluded)


def verdicts(told: Explanation) -> dict[str, str]:
    return {gate.name: gate.verdict for gate in told.gates}


def test_an_update_is_followed_from_its_readings_to_its_reward(settled: Settled) -> None:
    settled.settle(0)
    settled.settle(1)
    told = get(settled, 2, 1)
    assert [(j.member, j.contribution) for j in sorted(told.judgements, key=lambda j: j.member)] == [
        (0, 90), (1, 95), (2, 5), (3, None),
    ]  # fmt: skip
    assert [j.is_revealed for j in sorted(told.judgements, key=lambda j: j.member)] == [True, True, True, False]
    assert (told.median, told.accumulated, told.rank, told.num_updates) == (90, 180, 1, 3)
    assert (told.pool_wei, told.sum_positive, told.share) == (POOL_WEI, 280, 180 / 280)
    assert told.reward_wei == told.expected_wei == POOL_WEI * 180 // 280
    assert (told.payout_round, told.epoch) == (1, 0)
    assert told.is_proven
    assert told.owed_wei == told.cumulative_wei == told.reward_wei
    assert told.status == "contestable"


def test_the_proof_shown_is_the_chains(settled: Settled) -> None:
    settled.settle(0)
    settled.settle(1)
    chain = settled.world.any.get_rounds(Round(1))[0]
    told = get(settled, 1, 1)
    leaf = settled.book().readings[1].leaves[1]
    assert merkle.verify(chain.root, chain.sums, chain.num_leaves, MemberIndex(1), leaf, told.siblings)
    assert not merkle.verify(chain.root, chain.sums, chain.num_leaves, MemberIndex(0), leaf, told.siblings)
    assert len(told.siblings) == 2


def test_a_round_within_the_epoch_says_when_it_is_paid(settled: Settled) -> None:
    settled.settle(0)
    told = get(settled, 2, 0)
    assert (told.pool_wei, told.reward_wei, told.payout_round) == (0, 0, 1)
    settled.settle(2)  # round 1 was void: round 2 pays
    assert get(settled, 2, 2).pool_wei == POOL_WEI
    assert get(settled, 2, 2).payout_round == 2


def test_a_weight_over_the_stakes_share_is_capped(settled: Settled) -> None:
    settled.settle(0)
    capped, within = get(settled, 2, 0), get(settled, 0, 0)
    assert (capped.wanted_weight, capped.weight_max) == (642_857_143, WEIGHT_ONE // 2)
    assert (capped.weight, capped.is_capped) == (WEIGHT_ONE // 2, True)
    assert verdicts(capped)["weight within the cap"] == "failed"
    assert (within.weight, within.is_capped) == (within.wanted_weight, False) == (357_142_857, False)
    settled.world.ledgers[4].unbond()  # the cap is of the stakes of then
    assert get(settled, 2, 0) == capped


def test_who_is_worth_nothing_is_told_so(settled: Settled) -> None:
    settled.settle(0)
    settled.settle(1)
    told = get(settled, 1, 1)
    assert (told.median, told.accumulated, told.rank, told.weight, told.reward_wei) == (-20, -40, 3, 0, 0)
    assert verdicts(told)["positive over the epoch"] == "failed"
    assert told.is_proven
    assert told.owed_wei == 0


def test_an_update_that_too_few_scored_is_found_by_its_maker(settled: Settled) -> None:
    settled.settle(0, measured={0: (50, 40, 60), 2: (90, None, None)})
    reading = settled.book().readings[0]
    assert list_excluded(reading) == (get_payload(0, 2),)
    served = {get_payload(0, 2): get_payload_bytes(0, 2)}
    assert find_makers(served.get, list_excluded(reading)) == {get_payload(0, 2): PEERS[3]}
    assert find_makers({}.get, list_excluded(reading)) == {}
    told = get(settled, 2, 0, excluded=get_payload(0, 2))
    gate = told.gates[0]
    assert (told.is_included, told.median, told.rank, told.weight) == (False, None, None, 0)
    assert (gate.verdict, gate.text) == ("failed", "only 1 of 3 revealed vectors have it: it was not merged")
    assert [j.contribution for j in told.judgements if j.contribution is not None] == [90]


def test_a_flood_of_payloads_that_nobody_merged_is_cut_and_what_most_scored_stays(settled: Settled) -> None:
    flood = tuple(Score(Digest(number.to_bytes(32, "big")), Contribution(0)) for number in range(1, LIST_MAX))

    def tamper(proposal: Proposal) -> Proposal:
        first, *others = proposal.reveals
        return msgspec.structs.replace(proposal, reveals=(msgspec.structs.replace(first, scores=flood), *others))

    settled.settle(0, tamper, measured={0: (50, 40, 60), 2: (None, 90, 90)})
    reading = settled.book().readings[0]
    merged = msgspec.structs.replace(reading.proposal, updates=())
    excluded = list_excluded(msgspec.structs.replace(reading, proposal=merged))
    assert len(excluded) == EXCLUDED_MAX
    assert set(excluded[:2]) == {get_payload(0, 0), get_payload(0, 2)}


def test_who_sent_nothing_is_told_what_cannot_be_told(settled: Settled) -> None:
    settled.settle(0)
    told = get(settled, 3, 0)
    assert (told.is_included, told.payload, told.accumulated) == (False, None, 0)
    assert "The data cannot tell which" in told.gates[0].text


def test_readings_of_exactly_zero_are_a_duplicate_or_an_empty_update(settled: Settled) -> None:
    settled.settle(0, measured={0: (50, 40, 60), 1: (0, 0, 7), 2: (0, 90, 95)})
    assert verdicts(get(settled, 0, 0))["no duplicate"] == "passed"
    assert verdicts(get(settled, 1, 0))["no duplicate"] == "failed"
    assert verdicts(get(settled, 2, 0))["no duplicate"] == "unknown"
    blind = Settled(scoring=ScoringConfig(duplicate_cosine=1, duplicate_overlap=1))
    blind.settle(0, measured={1: (0, 0, 7)})
    assert verdicts(get(blind, 1, 0))["no duplicate"] == "off"


def test_proofs_of_computation_are_told_as_far_as_vectors_tell(settled: Settled) -> None:
    settled.settle(0)
    assert verdicts(get(settled, 0, 0))["proof of computation"] == "off"
    proving = Settled(scoring=ScoringConfig(work_steps=4))
    proving.settle(0)
    assert verdicts(get(proving, 0, 0))["proof of computation"] == "passed"
    assert verdicts(get(proving, 1, 0))["proof of computation"] == "unknown"


def test_a_wrong_reward_is_seen_beside_the_rules(settled: Settled) -> None:
    settled.settle(1, lambda proposal: move_reward(proposal, 9, source=2, target=3))
    told = get(settled, 3, 1)
    assert (told.reward_wei, told.expected_wei, told.is_proven) == (9, 0, True)


def test_an_update_of_nobody_beside_the_others_leaves_only_the_cap_untold(settled: Settled) -> None:
    def tamper(proposal: Proposal) -> Proposal:
        nobody = msgspec.structs.replace(proposal.updates[0], member=MemberIndex(10**6))
        return msgspec.structs.replace(proposal, updates=(*proposal.updates, nobody))

    settled.settle(1, tamper)
    for member in range(4):
        told = get(settled, member, 1)
        assert told.reward_wei == told.expected_wei
        assert told.weight_max is None


def test_names_are_no_markup(settled: Settled) -> None:
    """A name on chain, or of a shard in what a committee signed, is anybody's text."""
    settled.settle(1)
    told = msgspec.structs.replace(get(settled, 2, 1), peer=PeerId("[/x]"))
    judgements = tuple(msgspec.structs.replace(judgement, peer=PeerId("[/x]")) for judgement in told.judgements)
    console = Console(width=160, record=True, file=io.StringIO())
    print_explanation(console, msgspec.structs.replace(told, judgements=judgements), None, "", with_proof=False)
    shard = PeerId("shard-[/y]")
    update = Remeasured(MemberIndex(0), shard, Contribution(1), 1, 1, 5, is_finding=False)
    checks = {Round(number): DeepCheck(Round(number), (update,), (), ()) for number in (0, 1)}
    print_findings(console, {Round(0): [], Round(1): []}, checks)
    print_balances(console, compute_balances(list(checks.values())))
    book = settled.book()
    lines = tuple(msgspec.structs.replace(line, peer=PeerId("[/z]")) for line in view_peers(book))
    console.print(make_peers_table(lines, view_totals(book), 160))
    text = console.export_text()
    assert all(name in text for name in ("[/x]", "shard-[/y]", "[/z]"))


def test_a_newcomer_has_no_leaf_in_earlier_rounds() -> None:
    settled = Settled(num_members=3)
    settled.settle(0)
    settled.world.join(4)
    with pytest.raises(OperatorError, match="joined after round 0"):
        get(settled, 3, 0)


def test_without_data_nothing_is_explained_but_how_to_force_them(settled: Settled) -> None:
    settled.settle(0)
    settled.lose(0)
    with pytest.raises(WorldError, match="challenge --round 0 --demand PEER"):
        get(settled, 0, 0)


def test_a_zero_pool_and_one_peer_alone_are_explained() -> None:
    free = Settled(pool=0)
    free.settle(1)
    told = get(free, 2, 1)
    assert (told.pool_wei, told.payout_round, told.reward_wei, told.expected_wei) == (0, 1, 0, 0)
    alone = Settled(num_members=1)
    alone.settle(1, measured={0: (50,)})
    told = get(alone, 0, 1)
    assert (told.reward_wei, told.share, told.siblings, told.is_proven) == (POOL_WEI, 1.0, (), True)


@pytest.mark.parametrize("member", range(4))
def test_the_text_and_the_json_hold_every_figure(settled: Settled, member: int) -> None:
    settled.settle(0)
    settled.settle(1)
    told = get(settled, member, 1)
    console = Console(width=160, record=True, file=io.StringIO())
    print_explanation(console, told, None, "its payload is not served any more", with_proof=True)
    text = console.export_text()
    assert PEERS[member + 1] in text
    assert all(node.digest.hex() in text for node in told.siblings)
    assert all(gate.name in text for gate in told.gates)
    assert told.root.hex() in text
    assert "its payload is not served any more" in text
    plain = to_plain(told)
    assert plain["reward_wei"] == str(told.reward_wei)
    assert [node["digest"] for node in plain["siblings"]] == [node.digest.hex() for node in told.siblings]
    assert msgspec.json.decode(msgspec.json.encode(plain)) == plain
