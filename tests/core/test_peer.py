"""The core's rules, one test a rule: events in, actions out."""

import itertools

import msgspec
import pytest
from peer_bench import (
    BASE,
    CONFIG,
    NAMES,
    NUM_PEERS,
    ROSTER,
    ROUND,
    SALT,
    Bench,
    announcement_of,
    attest,
    certify,
    commit_of,
    every,
    make_roster,
    maker_of,
    only,
    payload_of,
    reveal_of,
    seal,
    settled_as,
)

from p2pfm.config import SettlementConfig
from p2pfm.messages import (
    Certificate,
    IncludedUpdate,
    Proposal,
    Score,
    ScoreCommit,
    ScoreReveal,
    Service,
    SyncRequest,
)
from p2pfm.protocol.events import (
    Accuse,
    Adopt,
    Aggregate,
    Aggregated,
    AnswerSync,
    AnyAction,
    AskSync,
    Blame,
    Fetch,
    Fetched,
    FetchFailed,
    Merge,
    Merged,
    Note,
    PeersChanged,
    Persist,
    Publish,
    Rewind,
    Rewound,
    RosterChanged,
    Scored,
    ScoreUpdates,
    Serve,
    SetTimer,
    Settle,
    SettledChanged,
    Sign,
    Signed,
    SyncAnswered,
    SyncAsked,
    Tick,
    Train,
    Trained,
)
from p2pfm.protocol.peer import EARLIER_MAX, FETCH_RETRY_MS, Peer, initial_durable
from p2pfm.protocol.phases import Phase
from p2pfm.protocol.round_state import EARLY_MAX
from p2pfm.protocol.updates import FETCH_TRIES_MAX
from p2pfm.settlement.rewards import proposal_message
from p2pfm.types import Contribution, Digest, MemberIndex, Millis, PeerId, Round, compute_digest

NEW_BASE = compute_digest(b"new base")


def said(actions: list[AnyAction], kind: type[msgspec.Struct]) -> list[msgspec.Struct]:
    return [action.message for action in every(actions, Publish) if isinstance(action.message, kind)]


def blamed(actions: list[AnyAction]) -> list[PeerId]:
    return [action.peer for action in every(actions, Blame)]


def proposal_in_attest(bench: Bench, round: Round = ROUND) -> tuple[Proposal, list[AnyAction]]:
    """Bring the bench to ATTEST and let it hear the first-ranked member's right proposal."""
    actions = bench.run_to_attest(round)
    proposal = msgspec.structs.replace(bench.draft(round), new_base=NEW_BASE)
    return proposal, actions + bench.hear(proposal.proposer, proposal)


def certified_round(bench: Bench, round: Round = ROUND, new_base: Digest = NEW_BASE) -> Certificate:
    """A certificate that the bench can adopt next."""
    return certify(msgspec.structs.replace(bench.draft(round), new_base=new_base))


# --- the clock


def test_every_phase_is_entered_at_its_time() -> None:
    bench = Bench()
    bench.join()
    for round in (Round(0), Round(1)):
        for phase in Phase:
            bench.go(phase, round)
            assert (bench.peer.round, bench.peer.phase) == (round, phase)


def test_a_clock_that_jumps_back_changes_nothing() -> None:
    bench = Bench()
    bench.join()
    bench.go(Phase.REVEAL, Round(1))
    bench.go(Phase.TRAIN, Round(0))
    assert (bench.peer.round, bench.peer.phase) == (1, Phase.REVEAL)


def test_a_clock_that_jumps_forward_enters_every_phase_between() -> None:
    bench = Bench()
    bench.join()
    bench.train()
    assert payload_of(bench.me) in [serve.digest for serve in every(bench.go(Phase.MERGE), Serve)]


def test_the_timer_never_lies_behind_a_phase_end() -> None:
    bench = Bench()
    for step in range(0, 120_000, 777):
        bench.now_ms = Millis(CONFIG.genesis_ms + step)
        timer = only(bench.feed(Tick()), SetTimer)
        assert bench.now_ms < timer.at_ms <= bench.now_ms + 10_000


# --- TRAIN and EXCHANGE


def test_training_starts_with_the_registry_and_from_the_base() -> None:
    bench = Bench()
    assert only(bench.join(), Train) == Train(Round(0), bench.me, BASE, None)


def test_announcing_anothers_digest_earns_its_maker_the_credit_and_the_copier_the_blame() -> None:
    """The copier has the lower peer id, which is what would decide if bytes did not name their maker."""
    bench = Bench(index=3)
    bench.join()
    copied = msgspec.structs.replace(announcement_of(NAMES[2]), peer=NAMES[1])
    for author, message in ((1, copied), (2, announcement_of(NAMES[2]))):
        bench.hear(author, message)
    fetch = only(bench.go(Phase.EXCHANGE), Fetch)
    assert fetch.digest == payload_of(NAMES[2])
    assert blamed(bench.feed(Fetched(fetch.digest, NAMES[2]))) == [NAMES[1]]
    scored = only(bench.go(Phase.SCORE), ScoreUpdates)
    assert [update.payload for update in scored.updates] == [payload_of(NAMES[2])]
    assert bench.peer.state.updates.by_payload()[payload_of(NAMES[2])].peer == NAMES[2]


def test_a_payload_that_nobody_who_announced_it_made_is_not_scored() -> None:
    bench = Bench(index=3)
    bench.join()
    bench.hear(1, msgspec.structs.replace(announcement_of(NAMES[2]), peer=NAMES[1]))
    fetch = only(bench.go(Phase.EXCHANGE), Fetch)
    assert blamed(bench.feed(Fetched(fetch.digest, NAMES[2]))) == [NAMES[1]]
    assert not every(bench.go(Phase.SCORE), ScoreUpdates)


def test_a_peer_that_is_not_registered_does_not_train() -> None:
    bench = Bench(index=3, roster=make_roster(committee=(0, 1, 2), num_peers=3))
    assert every(bench.join(), Train) == []


def test_an_announcement_is_durable_before_it_is_published() -> None:
    bench = Bench()
    bench.join()
    actions = bench.train()
    kinds = [type(action) for action in actions]
    assert kinds.index(Persist) < kinds.index(Publish)
    durable = only(actions, Persist).durable
    assert (durable.announced_round, durable.announced_payload) == (0, payload_of(bench.me))


def test_a_payload_is_served_only_after_train_closes() -> None:
    bench = Bench()
    bench.join()
    actions = bench.train()
    actions += bench.feed(SyncAsked(NAMES[1], SyncRequest(Round(0), (), -1), 1))
    bench.now_ms = Millis(bench.now_ms + 9_999)
    actions += bench.feed(Tick())
    assert every(actions, Serve) == []
    assert only(bench.go(Phase.EXCHANGE), Serve).digest == payload_of(bench.me)


def test_work_that_ends_after_train_is_not_announced() -> None:
    bench = Bench()
    bench.join()
    bench.go(Phase.EXCHANGE)
    assert every(bench.train(), Publish) == []


def test_work_from_an_old_base_is_not_announced() -> None:
    bench = Bench()
    bench.join()
    stale = Trained(Round(0), NEW_BASE, payload_of(bench.me), 100, 10, NEW_BASE, 0)
    assert every(bench.feed(stale), Publish) == []


def test_a_peer_announces_one_update_a_round_also_across_a_restart() -> None:
    bench = Bench()
    bench.join()
    bench.train()
    again = Bench(durable=bench.peer.durable)
    assert every(again.join(), Train) == []
    assert every(again.train(), Publish) == []


def test_a_restarted_peer_serves_what_it_announced() -> None:
    bench = Bench()
    bench.join()
    bench.train()
    again = Bench(durable=bench.peer.durable)
    again.join()
    assert payload_of(bench.me) in [serve.digest for serve in every(again.go(Phase.EXCHANGE), Serve)]


def test_payloads_are_asked_for_after_train_the_announcer_first() -> None:
    bench = Bench()
    bench.join()
    assert every(bench.hear(1, announcement_of(NAMES[1])), Fetch) == []
    fetch = only(bench.go(Phase.EXCHANGE), Fetch)
    assert (fetch.digest, fetch.kind, fetch.bytes_max) == (payload_of(NAMES[1]), "payload", 100)
    assert fetch.providers[0] == NAMES[1]
    assert set(fetch.providers[1:]) == {NAMES[2], NAMES[3]}


def test_an_announcement_for_another_is_blamed() -> None:
    bench = Bench()
    bench.join()
    assert blamed(bench.hear(2, announcement_of(NAMES[1]))) == [NAMES[2]]


def test_an_oversized_payload_is_blamed() -> None:
    bench = Bench()
    bench.join()
    size = CONFIG.limits.payload_bytes_max + 1
    huge = msgspec.structs.replace(announcement_of(NAMES[1]), payload_bytes=size)
    assert blamed(bench.hear(1, huge)) == [NAMES[1]]


def test_a_stranger_is_not_heard() -> None:
    bench = Bench()
    bench.join()
    stranger = PeerId("stranger")
    actions = bench.feed(seal(stranger, announcement_of(stranger)))
    assert blamed(actions) == []
    assert len(bench.peer.state.log) == 0


def test_a_malformed_payload_blames_its_announcer_and_is_not_asked_for_again() -> None:
    bench = Bench()
    bench.join()
    bench.hear(1, announcement_of(NAMES[1]))
    bench.go(Phase.EXCHANGE)
    assert blamed(bench.feed(FetchFailed(payload_of(NAMES[1]), is_malformed=True))) == [NAMES[1]]
    bench.now_ms = Millis(bench.now_ms + 5_000)
    assert every(bench.feed(Tick()), Fetch) == []


def test_a_payload_that_nobody_gave_rests_and_is_asked_for_again_a_bounded_number_of_times() -> None:
    bench = Bench()
    bench.join()
    bench.hear(1, announcement_of(NAMES[1]))
    asked = every(bench.go(Phase.EXCHANGE), Fetch)
    for _ in range(20):
        asked += every(bench.feed(FetchFailed(payload_of(NAMES[1]), is_malformed=False)), Fetch)
        bench.now_ms = Millis(bench.now_ms + FETCH_RETRY_MS)
        asked += every(bench.feed(Tick()), Fetch)
    assert len(asked) == FETCH_TRIES_MAX


# --- SCORE and REVEAL


def test_the_committee_scores_what_was_announced_in_time_and_came() -> None:
    bench = Bench()
    bench.join()
    bench.exchange()
    ask = only(bench.go(Phase.SCORE), ScoreUpdates)
    assert {update.payload for update in ask.updates} == {payload_of(name) for name in NAMES}
    assert sum(update.weight for update in ask.updates) == 10**9


def test_updates_are_scored_in_the_order_in_which_they_were_announced_and_revealed_in_that_of_digests() -> None:
    bench = Bench()
    bench.join()
    order = sorted(range(4), key=lambda index: payload_of(NAMES[index]), reverse=True)
    for index in order:
        bench.hear(index, announcement_of(NAMES[index]))
    bench.exchange()
    ask = only(bench.go(Phase.SCORE), ScoreUpdates)
    assert [update.payload for update in ask.updates] == [payload_of(NAMES[index]) for index in order]
    bench.feed(Scored(Round(0), tuple(Contribution(10 * (index + 1)) for index in order), SALT))
    (reveal,) = said(bench.go(Phase.REVEAL), ScoreReveal)
    assert reveal == reveal_of(0)


def test_updates_of_earlier_rounds_are_remembered_as_paid_or_not() -> None:
    bench = Bench()
    bench.join()
    bench.run_to_attest()  # nobody proposes: the round is void
    void = {payload_of(name) for name in NAMES}
    bench.go(Phase.TRAIN, Round(1))
    bench.exchange(Round(1))
    earlier = only(bench.go(Phase.SCORE, Round(1)), ScoreUpdates).earlier
    assert {item.payload for item in earlier if not item.is_paid} == void
    assert len(earlier) == 4
    proposal = msgspec.structs.replace(bench.draft(Round(1)), new_base=NEW_BASE)
    bench.hear(1, certify(proposal))
    bench.feed(Fetched(NEW_BASE))
    bench.go(Phase.TRAIN, Round(2))
    bench.exchange(Round(2))
    earlier = only(bench.go(Phase.SCORE, Round(2)), ScoreUpdates).earlier
    best_first = sorted(proposal.updates, key=lambda update: update.contribution, reverse=True)
    assert [item.payload for item in earlier if item.is_paid] == [update.payload for update in best_first]
    assert {item.payload for item in earlier if not item.is_paid} == void
    assert len(earlier) == 8


def test_no_more_than_a_bound_of_earlier_updates_is_remembered() -> None:
    bench = Bench()
    bench.join()
    num_rounds = EARLIER_MAX // NUM_PEERS + 3
    for number in range(num_rounds):
        bench.go(Phase.TRAIN, Round(number))
        for index, name in enumerate(NAMES):
            bench.hear(index, announcement_of(name, Round(number)))
        for fetch in every(bench.go(Phase.EXCHANGE, Round(number)), Fetch):
            bench.feed(Fetched(fetch.digest, bench.peer.state.updates.by_payload()[fetch.digest].peer))
    bench.go(Phase.TRAIN, Round(num_rounds))
    remembered = {item.payload for item in bench.peer.earlier}
    assert len(remembered) == EARLIER_MAX
    assert payload_of(NAMES[0], Round(2)) not in remembered
    assert payload_of(NAMES[0], Round(num_rounds - 1)) in remembered


def test_a_newcomer_that_fails_two_proofs_counts_as_worthless_until_it_passes_one() -> None:
    bench = Bench()
    bench.join()
    failures: list[set[int]] = [{1, 2}, {1, 2}, {2}]
    expected = [(10, 20, -30, 40), (10, 0, -30, 40), (10, 20, -30, 40)]
    for number, (failing, values) in enumerate(zip(failures, expected, strict=True)):
        round = Round(number)
        bench.go(Phase.TRAIN, round)
        bench.exchange(round)
        ask = only(bench.go(Phase.SCORE, round), ScoreUpdates)
        who = [maker_of(update.payload) for update in ask.updates]
        assert None not in who
        places = [NAMES.index(name) for name in who if name]
        measured = tuple(Contribution((10, 20, -30, 40)[place]) for place in places)
        bench.feed(Scored(round, measured, SALT, tuple(place not in failing for place in places)))
        (reveal,) = said(bench.go(Phase.REVEAL, round), ScoreReveal)
        assert reveal == reveal_of(0, round, values)


def test_who_does_not_sit_on_the_committee_does_not_score() -> None:
    bench = Bench(index=3, roster=make_roster(committee=(0, 1, 2)))
    bench.join()
    bench.exchange()
    assert every(bench.go(Phase.SCORE), ScoreUpdates) == []


def test_a_late_announcement_is_not_scored() -> None:
    bench = Bench()
    bench.join()
    bench.train()
    bench.hear(0, announcement_of(NAMES[0]))
    bench.go(Phase.EXCHANGE)
    bench.hear(1, announcement_of(NAMES[1]))
    ask = only(bench.go(Phase.SCORE), ScoreUpdates)
    assert [update.payload for update in ask.updates] == [payload_of(NAMES[0])]


def test_an_equivocator_is_blamed_once_and_not_scored() -> None:
    bench = Bench()
    bench.join()
    bench.hear(1, announcement_of(NAMES[1]))
    other = msgspec.structs.replace(announcement_of(NAMES[1]), payload=NEW_BASE)
    assert blamed(bench.hear(1, other)) == [NAMES[1]]
    assert blamed(bench.hear(1, other)) == []
    third = msgspec.structs.replace(announcement_of(NAMES[1]), payload=SALT)
    assert blamed(bench.hear(1, third)) == []
    bench.exchange()
    scored = [update.payload for update in only(bench.go(Phase.SCORE), ScoreUpdates).updates]
    assert payload_of(NAMES[1]) not in scored
    assert NEW_BASE not in scored


def test_the_hash_comes_before_the_vector() -> None:
    bench = Bench()
    bench.join()
    bench.exchange()
    bench.go(Phase.SCORE)
    actions = bench.feed(Scored(Round(0), tuple(Contribution(value) for value in (1, 2, 3, 4)), SALT))
    assert said(actions, ScoreReveal) == []
    (commit,) = said(actions, ScoreCommit)
    (reveal,) = said(bench.go(Phase.REVEAL), ScoreReveal)
    assert isinstance(reveal, ScoreReveal)
    assert commit == commit_of(reveal)


def test_scores_that_come_after_their_phase_are_not_sent() -> None:
    bench = Bench()
    bench.join()
    bench.exchange()
    bench.go(Phase.SCORE)
    bench.go(Phase.REVEAL)
    actions = bench.feed(Scored(Round(0), tuple(Contribution(value) for value in (1, 2, 3, 4)), SALT))
    assert every(actions, Publish) == []


def test_a_vector_that_does_not_match_its_commitment_is_not_kept() -> None:
    bench = Bench()
    bench.join()
    bench.exchange()
    bench.go(Phase.SCORE)
    bench.hear(1, commit_of(reveal_of(1)))
    bench.go(Phase.REVEAL)
    bench.hear(1, reveal_of(1, values=(1, 1, 1, 99)))
    assert bench.peer.state.reveals == {}
    bench.hear(1, reveal_of(1))
    assert list(bench.peer.state.reveals) == [1]


def test_a_vector_of_more_scores_than_members_is_dropped() -> None:
    bench = Bench()
    bench.join()
    bench.exchange()
    bench.go(Phase.SCORE)
    scores = tuple(Score(Digest(bytes([k]) * 32), Contribution(1)) for k in range(5))
    swollen = ScoreReveal(Round(0), MemberIndex(1), SALT, scores)
    bench.hear(1, commit_of(swollen))
    assert blamed(bench.hear(1, swollen)) == []  # its member may know a newer registry
    assert bench.peer.state.reveals == {}


def test_who_speaks_for_another_member_is_blamed() -> None:
    bench = Bench()
    bench.join()
    assert blamed(bench.hear(2, commit_of(reveal_of(1)))) == [NAMES[2]]


def test_a_word_from_outside_the_committee_is_dropped_without_blame() -> None:
    # Its author may already know the next committee.
    bench = Bench(roster=make_roster(committee=(0, 1, 2)))
    bench.join()
    assert blamed(bench.hear(3, commit_of(reveal_of(3)))) == []
    assert bench.peer.state.commitments == {}


# --- ATTEST


def test_the_first_ranked_proposes_what_the_vectors_give() -> None:
    bench = Bench()
    bench.join()
    bench.exchange()
    bench.reveal()
    merge = only(bench.go(Phase.ATTEST), Merge)
    (proposal,) = said(bench.feed(Merged(merge.request, NEW_BASE)), Proposal)
    assert proposal == msgspec.structs.replace(bench.draft(), new_base=NEW_BASE)


def test_the_rank_rotates_with_the_round() -> None:
    for round in range(4):
        for index in range(4):
            bench = Bench(index=index)
            bench.join()
            bench.go(Phase.TRAIN, Round(round))
            bench.exchange(Round(round))
            bench.reveal(Round(round))
            merges = every(bench.go(Phase.ATTEST, Round(round)), Merge)
            assert len(merges) == (round % 4 == index)


def test_too_few_vectors_give_no_proposal() -> None:
    bench = Bench()
    bench.join()
    bench.exchange()
    bench.reveal(members=(0, 1))
    assert every(bench.go(Phase.ATTEST), Merge) == []


def test_a_right_proposal_is_signed_after_it_is_durable() -> None:
    bench = Bench(index=1)
    bench.join()
    proposal, actions = proposal_in_attest(bench)
    actions = bench.answer_merge(actions, NEW_BASE)
    kinds = [type(action) for action in actions]
    assert kinds.index(Persist) < kinds.index(Sign)
    sign = only(actions, Sign)
    assert sign.message == proposal_message(CONFIG.chain, proposal)
    assert only(actions, Persist).durable.signed_round == 0
    (attestation,) = said(bench.feed(Signed(Round(0), sign.message, bytes(96))), type(attest(proposal, 1)))
    assert attestation == attest(proposal, 1)


def test_a_member_signs_at_most_one_proposal_a_round() -> None:
    bench = Bench(index=1)
    bench.join()
    proposal, actions = proposal_in_attest(bench)
    bench.answer_merge(actions, NEW_BASE)
    other = msgspec.structs.replace(bench.draft(members=(0, 1, 2)), new_base=NEW_BASE)
    assert other != proposal
    actions = bench.hear(0, other)
    assert blamed(actions) == [NAMES[0]]
    assert every(actions, Merge) == every(actions, Sign) == []


def test_a_member_signs_at_most_one_proposal_a_round_also_across_a_restart() -> None:
    bench = Bench(index=1)
    bench.join()
    _, actions = proposal_in_attest(bench)
    bench.answer_merge(actions, NEW_BASE)
    again = Bench(index=1, durable=bench.peer.durable)
    again.join()
    again.go(Phase.TRAIN)
    again.exchange()
    again.reveal(members=(0, 1, 2))
    again.go(Phase.ATTEST)
    other = msgspec.structs.replace(again.draft(members=(0, 1, 2)), new_base=NEW_BASE)
    actions = again.hear(0, other)
    assert every(again.answer_merge(actions, NEW_BASE), Sign) == []


def test_a_proposal_that_comes_before_attest_is_signed_in_attest() -> None:
    # The proposer's clock is ahead of ours.
    bench = Bench(index=1)
    bench.join()
    bench.exchange()
    bench.reveal()
    proposal = msgspec.structs.replace(bench.draft(), new_base=NEW_BASE)
    actions = bench.hear(0, proposal)
    assert every(bench.answer_merge(actions, NEW_BASE), Sign) == []
    assert only(bench.go(Phase.ATTEST), Sign).round == 0


def test_nothing_is_signed_after_attest() -> None:
    bench = Bench(index=1)
    bench.join()
    _, actions = proposal_in_attest(bench)
    merge = only(actions, Merge)
    bench.go(Phase.MERGE)
    assert every(bench.feed(Merged(merge.request, NEW_BASE)), Sign) == []


def test_a_proposal_with_another_base_is_not_signed_and_its_proposer_blamed() -> None:
    bench = Bench(index=1)
    bench.join()
    _, actions = proposal_in_attest(bench)
    actions = bench.answer_merge(actions, compute_digest(b"what the merge really gives"))
    assert every(actions, Sign) == []
    assert blamed(actions) == [NAMES[0]]


def _inflate(proposal: Proposal) -> Proposal:
    first, *rest = proposal.updates
    return msgspec.structs.replace(
        proposal, updates=(msgspec.structs.replace(first, contribution=first.contribution + 1), *rest)
    )


def _reweigh(proposal: Proposal) -> Proposal:
    first, second, *rest = proposal.updates
    changed: tuple[IncludedUpdate, ...] = (
        msgspec.structs.replace(first, weight=second.weight),
        msgspec.structs.replace(second, weight=first.weight),
    )
    return msgspec.structs.replace(proposal, updates=(*changed, *rest))


@pytest.mark.parametrize(
    "spoil",
    [
        _inflate,
        _reweigh,
        lambda p: msgspec.structs.replace(p, updates=p.updates[1:]),
        lambda p: msgspec.structs.replace(p, reveals=p.reveals[:2]),
        lambda p: msgspec.structs.replace(p, reveals=(*p.reveals[:3], reveal_of(3, values=(9, 9, 9, 9)))),
        lambda p: msgspec.structs.replace(p, leaves=p.leaves[::-1]),
        lambda p: msgspec.structs.replace(p, root=NEW_BASE),
        lambda p: msgspec.structs.replace(p, prev_root=NEW_BASE),
        lambda p: msgspec.structs.replace(p, base=NEW_BASE),
        lambda p: msgspec.structs.replace(p, epoch=2),
        lambda p: msgspec.structs.replace(p, nonce=1),
    ],
)
def test_a_wrong_proposal_is_not_signed(spoil) -> None:  # type: ignore[no-untyped-def]
    bench = Bench(index=1)
    bench.join()
    bench.run_to_attest()
    right = msgspec.structs.replace(bench.draft(), new_base=NEW_BASE)
    actions = bench.hear(0, spoil(right))
    assert every(actions, Merge) == every(actions, Sign) == []


def test_a_proposal_of_a_lower_ranked_member_is_not_considered() -> None:
    bench = Bench(index=1)
    bench.join()
    bench.run_to_attest()
    proposal = msgspec.structs.replace(bench.draft(), proposer=MemberIndex(2), new_base=NEW_BASE)
    assert every(bench.hear(2, proposal), Merge) == []
    assert bench.peer.state.proposal is None


def test_an_update_that_only_others_heard_in_time_is_fetched_for_their_proposal() -> None:
    bench = Bench(index=1)
    bench.join()
    for index in (0, 1, 2):
        bench.hear(index, announcement_of(NAMES[index]))
    for fetch in every(bench.go(Phase.EXCHANGE), Fetch):
        bench.feed(Fetched(fetch.digest, maker_of(fetch.digest)))
    bench.hear(3, announcement_of(NAMES[3]))
    bench.reveal()
    bench.go(Phase.ATTEST)
    actions = bench.hear(0, msgspec.structs.replace(bench.draft(), new_base=NEW_BASE))
    assert only(actions, Fetch).digest == payload_of(NAMES[3])
    actions = bench.feed(Fetched(payload_of(NAMES[3]), NAMES[3]))
    assert only(bench.answer_merge(actions, NEW_BASE), Sign).round == 0


def test_an_update_that_others_heard_first_from_an_equivocator_can_be_followed() -> None:
    bench = Bench(index=1)
    bench.join()
    other = msgspec.structs.replace(announcement_of(NAMES[3]), payload=NEW_BASE)
    bench.hear(3, other)
    bench.exchange()  # here member 3 says what everybody else heard first
    bench.reveal()
    bench.go(Phase.ATTEST)
    actions = bench.hear(0, msgspec.structs.replace(bench.draft(), new_base=NEW_BASE))
    assert only(actions, Fetch).digest == payload_of(NAMES[3])


def test_a_commitment_that_was_late_only_here_does_not_block_a_proposal() -> None:
    bench = Bench(index=1)
    bench.join()
    bench.exchange()
    bench.reveal(members=(0, 1, 2))
    bench.hear(3, commit_of(reveal_of(3)))
    bench.go(Phase.ATTEST)
    actions = bench.hear(0, msgspec.structs.replace(bench.draft(), new_base=NEW_BASE))
    assert len(only(actions, Merge).updates) == 4


def test_a_proposal_on_mostly_late_commitments_is_not_followed() -> None:
    bench = Bench(index=1)
    bench.join()
    bench.exchange()
    bench.reveal(members=(0, 1))
    for member in (2, 3):
        bench.hear(member, commit_of(reveal_of(member)))
    bench.go(Phase.ATTEST)
    actions = bench.hear(0, msgspec.structs.replace(bench.draft(), new_base=NEW_BASE))
    assert every(actions, Merge) == []


def test_a_proposer_takes_punctual_commitments_only() -> None:
    bench = Bench()
    bench.join()
    bench.exchange()
    bench.reveal(members=(0, 1, 2))
    bench.hear(3, commit_of(reveal_of(3)))
    bench.hear(3, reveal_of(3))
    merge = only(bench.go(Phase.ATTEST), Merge)
    (proposal,) = said(bench.feed(Merged(merge.request, NEW_BASE)), Proposal)
    assert isinstance(proposal, Proposal)
    assert [reveal.member for reveal in proposal.reveals] == [0, 1, 2]


# --- MERGE


def test_more_than_two_thirds_make_a_certificate() -> None:
    bench = Bench()
    bench.join()
    proposal, actions = proposal_in_attest(bench)
    bench.answer_merge(actions, NEW_BASE)
    for member in (0, 2, 3):
        bench.hear(member, attest(proposal, member))
    aggregate = only(bench.go(Phase.MERGE), Aggregate)
    assert [attestation.member for attestation in aggregate.attestations] == [0, 2, 3]
    assert aggregate.absent == (1,)
    actions = bench.feed(Aggregated(Round(0), aggregate.message, aggregate.absent, bytes(96)))
    assert only(actions, Adopt) == Adopt(Round(0), NEW_BASE)
    assert len(said(actions, Certificate)) == 1
    assert only(actions, Settle).rank == 0


def test_two_thirds_are_not_enough() -> None:
    bench = Bench()
    bench.join()
    proposal, actions = proposal_in_attest(bench)
    bench.answer_merge(actions, NEW_BASE)
    for member in (0, 2):
        bench.hear(member, attest(proposal, member))
    assert every(bench.go(Phase.MERGE), Aggregate) == []
    # A signature that comes in MERGE still counts.
    assert len(only(bench.hear(3, attest(proposal, 3)), Aggregate).attestations) == 3


def test_signatures_of_another_proposal_do_not_count() -> None:
    bench = Bench()
    bench.join()
    proposal, actions = proposal_in_attest(bench)
    bench.answer_merge(actions, NEW_BASE)
    other = msgspec.structs.replace(proposal, new_base=BASE)
    for member in (0, 1, 2, 3):
        bench.hear(member, attest(other, member))
    assert every(bench.go(Phase.MERGE), Aggregate) == []


def test_a_proposal_that_comes_after_its_signatures_is_aggregated() -> None:
    bench = Bench(index=1)
    bench.join()
    bench.run_to_attest()
    proposal = msgspec.structs.replace(bench.draft(), new_base=NEW_BASE)
    for member in (0, 2, 3):
        bench.hear(member, attest(proposal, member))
    bench.go(Phase.MERGE)
    assert only(bench.hear(0, proposal), Aggregate).absent == (1,)


def test_a_void_round_keeps_base_residual_and_head() -> None:
    bench = Bench()
    bench.join()
    bench.train()
    before = bench.peer.durable
    bench.exchange()
    actions = bench.go(Phase.TRAIN, Round(1))
    assert any("void" in note.text for note in every(actions, Note))
    after = bench.peer.durable
    assert (after.base, after.residual, after.head) == (before.base, before.residual, before.head)
    assert only(actions, Train).residual is None


def test_the_residual_advances_when_the_update_was_merged() -> None:
    bench = Bench()
    bench.join()
    bench.train()
    pending = bench.peer.durable.pending_residual
    certificate = certified_round(bench)
    bench.feed(SyncAnswered(NAMES[1], certificate))
    bench.feed(Fetched(NEW_BASE))
    assert pending is not None
    assert bench.peer.durable.residual == pending


def test_the_residual_is_kept_when_the_update_was_not_merged() -> None:
    bench = Bench()
    bench.join()
    bench.train()
    proposal = msgspec.structs.replace(bench.draft(), new_base=NEW_BASE)
    mine = [update.payload == payload_of(bench.me) for update in proposal.updates].index(True)
    updates = list(proposal.updates)
    updates[mine] = msgspec.structs.replace(updates[mine], weight=0)
    bench.feed(SyncAnswered(NAMES[1], certify(msgspec.structs.replace(proposal, updates=tuple(updates)))))
    bench.feed(Fetched(NEW_BASE))
    assert bench.peer.durable.base == NEW_BASE
    assert bench.peer.durable.residual is None


# --- absence and the chain


def test_the_newest_certificate_is_adopted_after_absence() -> None:
    bench = Bench()
    bench.join()
    certificate = certified_round(bench, Round(5))
    bench.go(Phase.SCORE, Round(7))
    fetch = only(bench.feed(SyncAnswered(NAMES[1], certificate)), Fetch)
    assert (fetch.digest, fetch.kind) == (NEW_BASE, "base")
    assert set(fetch.providers) == {NAMES[1], NAMES[2], NAMES[3]}
    actions = bench.feed(Fetched(NEW_BASE))
    assert only(actions, Persist).durable.head == certificate
    assert only(actions, Adopt).base == NEW_BASE
    assert NEW_BASE in [serve.digest for serve in every(actions, Serve)]


def test_an_older_certificate_is_not_adopted() -> None:
    bench = Bench()
    bench.join()
    old = certified_round(bench, Round(4), new_base=SALT)
    bench.feed(SyncAnswered(NAMES[1], certified_round(bench, Round(5))))
    bench.feed(Fetched(NEW_BASE))
    assert every(bench.feed(SyncAnswered(NAMES[2], old)), Fetch) == []


def test_a_base_that_could_not_be_fetched_is_asked_for_with_the_next_certificate() -> None:
    bench = Bench()
    bench.join()
    certificate = certified_round(bench)
    bench.go(Phase.TRAIN, Round(1))
    bench.feed(SyncAnswered(NAMES[1], certificate))
    assert every(bench.feed(SyncAnswered(NAMES[2], certificate)), Fetch) == []
    bench.feed(FetchFailed(NEW_BASE, is_malformed=False))
    assert only(bench.feed(SyncAnswered(NAMES[2], certificate)), Fetch).digest == NEW_BASE


def test_training_starts_again_from_a_base_that_comes_in_train() -> None:
    bench = Bench()
    bench.join()
    certificate = certified_round(bench)
    assert only(bench.go(Phase.TRAIN, Round(1)), Train).base == BASE
    bench.feed(SyncAnswered(NAMES[1], certificate))
    assert only(bench.feed(Fetched(NEW_BASE)), Train).base == NEW_BASE


def test_a_certificate_that_the_chain_contradicts_is_not_adopted() -> None:
    bench = Bench()
    bench.join()
    certificate = certified_round(bench)
    bench.feed(SettledChanged(settled_as(0, compute_digest(b"another root"))))
    assert every(bench.feed(SyncAnswered(NAMES[1], certificate)), Fetch) == []


def test_a_certificate_that_passes_over_a_settled_round_is_not_adopted() -> None:
    bench = Bench()
    bench.join()
    skips = certified_round(bench, Round(1))
    bench.feed(SettledChanged(settled_as(0, compute_digest(b"root of round 0"))))
    assert every(bench.feed(SyncAnswered(NAMES[1], skips)), Fetch) == []


def test_the_chain_is_the_arbiter_between_two_certified_roots() -> None:
    bench = Bench()
    bench.join()
    mine = certified_round(bench)
    theirs = msgspec.structs.replace(
        mine, proposal=msgspec.structs.replace(mine.proposal, new_base=SALT, root=compute_digest(b"their root"))
    )
    bench.feed(SyncAnswered(NAMES[1], mine))
    bench.feed(Fetched(NEW_BASE))
    assert every(bench.feed(SyncAnswered(NAMES[1], theirs)), Fetch) == []
    bench.feed(SettledChanged(settled_as(0, theirs.proposal.root)))
    bench.now_ms = Millis(bench.now_ms + 5_000)
    assert only(bench.feed(Tick()), AskSync).request.head_round == -1
    bench.feed(SyncAnswered(NAMES[1], theirs))
    assert only(bench.feed(Fetched(SALT)), Adopt).base == SALT
    assert bench.peer.durable.head == theirs


def test_who_is_behind_the_chain_neither_proposes_nor_signs() -> None:
    for index in (0, 1):
        bench = Bench(index=index)
        bench.join()
        bench.exchange(Round(0))
        bench.go(Phase.TRAIN, Round(1))
        bench.exchange(Round(1))
        bench.reveal(Round(1))
        bench.feed(SettledChanged(settled_as(0, compute_digest(b"root of round 0"))))
        actions = bench.go(Phase.ATTEST, Round(1))
        actions += bench.hear(1, msgspec.structs.replace(bench.draft(Round(1)), new_base=NEW_BASE))
        assert every(actions, Merge) == []


def test_a_registry_older_than_the_newest_certificate_stops_nothing() -> None:
    bench = Bench()
    bench.join()
    certificate = certified_round(bench)
    leaves = (*certificate.proposal.leaves, certificate.proposal.leaves[0])
    grown = msgspec.structs.replace(certificate.proposal, leaves=leaves)
    bench.feed(SyncAnswered(NAMES[1], certify(grown)))
    bench.feed(Fetched(NEW_BASE))
    assert bench.peer.durable.base == NEW_BASE
    bench.go(Phase.TRAIN, Round(4))
    bench.exchange(Round(4))
    bench.reveal(Round(4))
    assert every(bench.go(Phase.ATTEST, Round(4)), Merge) == []


def test_before_the_first_draw_nobody_can_propose() -> None:
    bench = Bench()
    proposal = bench.draft()
    bench.roster = make_roster(committee=())
    bench.join()
    bench.exchange()
    bench.go(Phase.ATTEST)
    assert every(bench.hear(0, proposal), Merge) == []


def test_a_round_keeps_the_registry_that_it_began_with() -> None:
    bench = Bench()
    bench.join()
    bench.feed(RosterChanged(make_roster(epoch=2)))
    assert bench.peer.state.roster == bench.roster
    bench.go(Phase.TRAIN, Round(1))
    assert bench.peer.state.roster == make_roster(epoch=2)


# --- gossip


def test_messages_of_the_next_round_wait_for_it() -> None:
    bench = Bench()
    bench.join()
    bench.hear(1, announcement_of(NAMES[1], Round(1)))
    assert bench.peer.state.updates.announcements == {}
    bench.go(Phase.TRAIN, Round(1))
    assert list(bench.peer.state.updates.announcements) == [NAMES[1]]


def test_no_stranger_and_no_chatterer_fills_the_room_for_early_messages() -> None:
    bench = Bench()
    bench.join()
    for number in range(EARLY_MAX + 10):
        bench.feed(seal(PeerId(f"stranger {number}"), announcement_of(NAMES[1], Round(1))))
        chatter = msgspec.structs.replace(announcement_of(NAMES[2], Round(1)), num_tokens=number)
        bench.hear(2, chatter)
    assert len(bench.peer.early) == 1
    bench.hear(1, announcement_of(NAMES[1], Round(1)))
    bench.go(Phase.TRAIN, Round(1))
    assert NAMES[1] in bench.peer.state.updates.announcements


def test_messages_of_other_rounds_are_dropped() -> None:
    bench = Bench()
    bench.join()
    bench.go(Phase.TRAIN, Round(3))
    for round in (Round(1), Round(2), Round(5), Round(2**50)):
        assert blamed(bench.hear(1, announcement_of(NAMES[1], round))) == []
    assert len(bench.peer.state.log) == len(bench.peer.early) == 0


def test_a_sync_is_answered_with_what_the_asker_lacks() -> None:
    bench = Bench()
    bench.join()
    for index in (0, 1):
        bench.hear(index, announcement_of(NAMES[index]))
    everything = only(bench.feed(SyncAsked(NAMES[1], SyncRequest(Round(0), (), -1), 7)), AnswerSync)
    assert everything.token == 7
    assert {envelope.author for envelope in everything.reply.envelopes} == {NAMES[0], NAMES[1]}
    have = (compute_digest(everything.reply.envelopes[0].body),)
    rest = only(bench.feed(SyncAsked(NAMES[1], SyncRequest(Round(0), have, -1), 8)), AnswerSync)
    assert rest.reply.envelopes == everything.reply.envelopes[1:]
    assert only(bench.feed(SyncAsked(NAMES[1], SyncRequest(Round(9), (), -1), 9)), AnswerSync).reply.envelopes == ()


def test_neighbours_are_asked_in_turn_and_not_all_by_everybody_at_once() -> None:
    first = set()
    for index in range(4):
        bench = Bench(index=index)
        bench.join()
        asked = []
        for _ in range(3):
            bench.now_ms = Millis(bench.now_ms + 3_000)
            asked.append(only(bench.feed(Tick()), AskSync).peer)
        assert sorted([*asked, bench.me]) == sorted(NAMES)
        first.add(asked[0])
    assert len(first) > 1


def test_a_peer_alone_asks_nobody() -> None:
    peer = Peer(NAMES[0], CONFIG, Bench().peer.durable)
    assert every(peer.handle(PeersChanged(()), CONFIG.genesis_ms), AskSync) == []


def test_a_voided_round_is_forgotten_and_the_one_before_it_adopted_again() -> None:
    bench = Bench()
    bench.join()
    first = certified_round(bench)
    bench.feed(SyncAnswered(NAMES[1], first))
    bench.feed(Fetched(NEW_BASE))
    bench.feed(SettledChanged(settled_as(0, first.proposal.root)))
    second = certified_round(bench, Round(1))
    second = msgspec.structs.replace(second, proposal=msgspec.structs.replace(second.proposal, new_base=SALT))
    bench.go(Phase.TRAIN, Round(2))
    bench.feed(SyncAnswered(NAMES[1], second))
    bench.feed(Fetched(SALT))
    assert bench.peer.durable.base == SALT
    restarted = msgspec.structs.replace(ROSTER, nonce=1)
    rewind = only(bench.feed(RosterChanged(restarted)), Rewind)
    assert (rewind.round, rewind.root) == (0, first.proposal.root)
    assert every(bench.feed(SyncAnswered(NAMES[1], second)), Adopt) == [], "what is void stays void"
    assert every(bench.go(Phase.TRAIN, Round(3)), Train) == [], "nothing is done until the base is right"
    bench.feed(Rewound(first, BASE))
    actions = bench.feed(Fetched(NEW_BASE))
    assert only(actions, Adopt).base == NEW_BASE
    assert only(actions, Train).base == NEW_BASE
    assert bench.peer.durable.head == first


def test_a_voided_first_round_leads_back_to_the_beginning() -> None:
    bench = Bench()
    bench.join()
    first = certified_round(bench)
    bench.feed(SyncAnswered(NAMES[1], first))
    bench.feed(Fetched(NEW_BASE))
    bench.feed(SettledChanged(settled_as(0, first.proposal.root)))
    assert every(bench.feed(SettledChanged(None)), Rewind) == [], "the roster tells that it was voided, not delayed"
    assert only(bench.feed(RosterChanged(msgspec.structs.replace(ROSTER, nonce=1))), Rewind).round == -1
    actions = bench.feed(Rewound(None, BASE))
    assert only(actions, Adopt).base == BASE
    assert only(actions, Persist).durable.head is None


def test_a_peer_that_slept_through_a_void_goes_back_when_it_wakes() -> None:
    bench = Bench()
    bench.join()
    first = certified_round(bench)
    bench.feed(SyncAnswered(NAMES[1], first))
    bench.feed(Fetched(NEW_BASE))
    woken = Bench(durable=bench.peer.durable, roster=msgspec.structs.replace(ROSTER, nonce=1))
    assert only(woken.join(), Rewind).round == -1


def test_nothing_is_signed_in_a_round_that_began_before_a_restart() -> None:
    bench = Bench(index=0)
    bench.join()
    bench.go(Phase.TRAIN)
    bench.exchange()
    bench.reveal()
    bench.feed(RosterChanged(msgspec.structs.replace(ROSTER, nonce=1)))
    actions = bench.go(Phase.ATTEST)
    actions += bench.hear(0, msgspec.structs.replace(bench.draft(), new_base=NEW_BASE))
    assert every(actions, Merge) == []


def test_nothing_is_signed_for_a_slashed_committee_until_another_is_drawn() -> None:
    """A round may begin between the slash, which counts the nonce up, and the next draw."""
    bench = Bench(index=0, roster=msgspec.structs.replace(ROSTER, nonce=1, epoch_min=2))
    bench.join()
    bench.go(Phase.TRAIN)
    bench.exchange()
    bench.reveal()
    assert every(bench.go(Phase.ATTEST), Merge) == []
    assert "none was drawn since" in bench.peer.state.failure
    alive = Bench(index=0, roster=msgspec.structs.replace(ROSTER, nonce=1, epoch=2, epoch_min=2))
    alive.join()
    alive.go(Phase.TRAIN)
    alive.exchange()
    alive.reveal()
    assert every(alive.go(Phase.ATTEST), Merge) != []


def test_what_a_slashed_committee_certified_all_the_same_is_taken_by_nobody() -> None:
    bench = Bench(roster=msgspec.structs.replace(ROSTER, epoch_min=2))
    bench.join()
    bench.feed(SyncAnswered(NAMES[1], certified_round(bench)))
    assert every(bench.feed(Fetched(NEW_BASE)), Adopt) == []


def test_who_signs_two_proposals_of_a_round_is_accused_once_with_both_signatures() -> None:
    """Whatever order the four words come in: proposer 0 makes two proposals, and member 2 signs both."""
    proposal = msgspec.structs.replace(Bench().draft(), new_base=NEW_BASE)
    rival = msgspec.structs.replace(proposal, new_base=SALT)
    words = [(0, proposal), (0, rival), (2, attest(proposal, 2)), (2, attest(rival, 2))]
    for order in itertools.permutations(range(4)):
        bench = Bench(index=1)
        bench.join()
        bench.go(Phase.TRAIN)
        bench.exchange()
        bench.reveal()
        bench.go(Phase.ATTEST)
        actions: list[AnyAction] = []
        for number in order:
            actions += bench.hear(*words[number])
        actions += bench.hear(2, words[2][1])
        accusation = only(actions, Accuse)
        assert accusation.member == 2
        assert {accusation.first.new_base, accusation.second.new_base} == {NEW_BASE, SALT}


def test_one_word_or_two_of_one_proposal_accuse_nobody() -> None:
    bench = Bench(index=1)
    bench.join()
    bench.go(Phase.TRAIN)
    bench.exchange()
    bench.reveal()
    bench.go(Phase.ATTEST)
    proposal = msgspec.structs.replace(bench.draft(), new_base=NEW_BASE)
    rival = msgspec.structs.replace(proposal, new_base=SALT)
    actions = bench.hear(0, proposal) + bench.hear(0, rival)
    actions += bench.hear(2, attest(proposal, 2)) + bench.hear(3, attest(rival, 3))
    again = msgspec.structs.replace(attest(proposal, 2), signature=bytes([1]) * 96)
    actions += bench.hear(2, again)
    actions += bench.hear(3, attest(msgspec.structs.replace(proposal, new_base=BASE), 3))
    assert every(actions, Accuse) == []


def test_a_certificate_of_a_committee_that_is_too_old_is_void() -> None:
    bench = Bench()
    bench.join()
    first = certified_round(bench)
    bench.feed(SyncAnswered(NAMES[1], first))
    bench.feed(Fetched(NEW_BASE))
    assert every(bench.feed(RosterChanged(make_roster(epoch=2))), Rewind) == [], "one rotation in flight is no harm"
    assert only(bench.feed(RosterChanged(make_roster(epoch=3))), Rewind).round == -1


def test_what_only_looked_void_is_taken_up_again_from_disk() -> None:
    bench = Bench()
    bench.join()
    first = certified_round(bench)
    bench.feed(SyncAnswered(NAMES[1], first))
    bench.feed(Fetched(NEW_BASE))
    bench.feed(RosterChanged(msgspec.structs.replace(ROSTER, nonce=1)))
    bench.feed(Rewound(None, BASE))
    assert bench.peer.durable.head is None
    settled = settled_as(0, first.proposal.root)
    assert only(bench.feed(SettledChanged(settled)), Rewind).root == settled.root
    bench.feed(Rewound(first, BASE))
    assert only(bench.feed(Fetched(NEW_BASE)), Adopt).base == NEW_BASE


def test_a_round_that_ends_a_settlement_epoch_asks_what_replicas_are_due_and_reveals_it() -> None:
    paying = SettlementConfig(rounds_per_epoch=1, serving_per_epoch_pfm=10)
    for round, epoch in ((Round(0), None), (Round(1), 0)):  # before the second epoch nobody has shown receipts
        bench = Bench()
        bench.peer = Peer(bench.me, msgspec.structs.replace(CONFIG, settlement=paying), initial_durable(BASE))
        bench.join()
        bench.go(Phase.TRAIN, round)
        bench.exchange(round)
        ask = only(bench.go(Phase.SCORE, round), ScoreUpdates)
        assert ask.served_epoch == epoch
    services = (Service(MemberIndex(2), 7),)
    bench.feed(Scored(Round(1), tuple(Contribution(1) for _ in ask.updates), SALT, served=services))
    (reveal,) = said(bench.go(Phase.REVEAL, Round(1)), ScoreReveal)
    assert reveal.served == services


def test_a_reveal_of_impossible_services_is_blamed_and_one_of_strangers_is_not_counted() -> None:
    """Else one member could reveal what voids every proposal that holds it."""
    for named, is_blamed in (((2, 1), True), ((1, 77), False)):
        bench = Bench()
        bench.join()
        services = tuple(Service(MemberIndex(member), 5) for member in named)
        reveal = msgspec.structs.replace(reveal_of(1), served=services)
        bench.exchange()
        bench.go(Phase.SCORE)
        bench.hear(1, ScoreCommit(Round(0), MemberIndex(1), reveal.commitment))
        bench.go(Phase.REVEAL)
        assert bool(every(bench.hear(1, reveal), Blame)) == is_blamed
        assert MemberIndex(1) not in bench.peer.state.reveals
