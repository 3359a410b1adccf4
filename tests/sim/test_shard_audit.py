"""An auditor of a network of shards: who contributed what, whether both levels follow the rules, measured again."""

from dataclasses import dataclass, field
from functools import partial

import msgspec
import pytest
from rewards_world import with_root
from rich.console import Console

from nodes.explorer.evidence import judge
from nodes.rewards.blobs import Blobs
from nodes.rewards.checking import Unchecked, find_roster, is_accusation, verify_proposal, verify_reading
from nodes.rewards.contests import search_round
from nodes.rewards.explain import explain, list_excluded
from nodes.rewards.measuring import DeepCheck, Meter
from nodes.rewards.reading import Book, Reading, list_rosters, make_rows, read_book, read_round
from nodes.rewards.reports import print_explanation
from nodes.rewards.views import view_peers, view_rounds
from p2pfm.errors import Reject, WorldError
from p2pfm.learner import Learner
from p2pfm.messages import LIST_MAX, Proposal, Score, ScoreReveal, encode
from p2pfm.protocol.committee import draft_top_proposal
from p2pfm.protocol.shards import deal
from p2pfm.settlement import merkle
from p2pfm.settlement.ledger import Accepted, LeafValue, Left
from p2pfm.settlement.rewards import from_wire, to_wire
from p2pfm.types import Contribution, Digest, MemberIndex, PeerId, Round, Wei, Weight
from sim.scenarios import Scenario
from sim.workshop import make_lab
from sim.world import World

NUM_PEERS, NUM_SHARDS, NUM_ROUNDS = 24, 3, 4


@dataclass
class Watched:
    """A world that has run, and all that its nodes would serve."""

    world: World
    blobs: Blobs = field(default_factory=lambda: Blobs(None, ()))
    num_told: int = 0
    """Certificates of which a seated peer knew what every shard certified."""

    def watch(self, round: Round) -> None:
        """Put aside what the round's data were, as nodes do when they settle it."""
        certificate = self.world.checks.certificates.get(round)
        if certificate is None:
            return
        self.blobs.put(encode(certificate.proposal))
        for host in self.world.hosts:
            assert host.peer is not None
            if not host.peer.top.is_outside() and host.peer.durable.head == certificate:
                shards = host.peer.top.list_shards(certificate.proposal)
                self.num_told += len(shards) == len(certificate.proposal.shards)
                for shard in shards:
                    self.blobs.put(encode(shard))
            for digest in host.disk.held:
                self.blobs.put(host.disk.get(digest))

    @property
    def book(self) -> Book:
        """What the chain and these blobs tell."""
        return read_book(self.world.chain.ledger, self.blobs)  # type: ignore[arg-type]

    def verify(self, reading: Reading, **changes: object) -> list[str]:
        """What is wrong with the round, its proposal changed by `changes`."""
        assert reading.proposal is not None
        proposal = msgspec.structs.replace(reading.proposal, **changes)
        before = self.book.get_before(reading)
        roster = list_rosters(self.book, reading.settled.position)[0]
        previous = before.proposal if before else None
        told = msgspec.structs.replace(reading, proposal=proposal)
        return verify_proposal(told, roster, previous, self.world.config)


@pytest.fixture(scope="module")
def watched() -> Watched:
    world = World(
        Scenario(
            seed=6,
            num_peers=NUM_PEERS,
            shard_size=NUM_PEERS // NUM_SHARDS,
            committee_size=5,
            num_rounds=NUM_ROUNDS,
            rounds_per_epoch=2,
        )
    )
    watched = Watched(world)
    world.run(watched.watch)
    assert sorted(world.checks.certificates) == list(range(NUM_ROUNDS))
    return watched


def test_a_seated_peer_keeps_what_the_shards_certified(watched: Watched) -> None:
    assert watched.num_told >= 3 * NUM_ROUNDS
    for reading in watched.book.readings:
        assert reading.proposal is not None
        assert len(reading.proposal.shards) == len(reading.proposal.updates) == NUM_SHARDS
        assert reading.gap == ""


def test_a_peers_contribution_is_its_part_of_its_shards(watched: Watched) -> None:
    """Not that of the shard whose number is its registry index; and over an epoch they sum to what the leaf says."""
    book = watched.book
    sums = dict.fromkeys(range(NUM_PEERS), 0)
    for reading in book.readings:
        assert reading.proposal is not None
        if reading.settled.round % 2 == 0:
            sums = dict.fromkeys(range(NUM_PEERS), 0)
        rows = make_rows(book, reading)
        assert len(rows) == NUM_PEERS
        for row in rows:
            assert row.contribution is not None
            sums[row.member] += row.contribution
            assert sums[row.member] == row.total
        assert sum(row.weight for row in rows) == pytest.approx(
            sum(update.weight for update in reading.proposal.updates), rel=0.01
        )
    assert {line.num_rounds for line in view_peers(book)} == {NUM_ROUNDS}
    assert {line.num_updates for line in view_rounds(book, 2)} == {NUM_PEERS}


def test_an_honest_history_has_no_findings(watched: Watched) -> None:
    for reading in watched.book.readings:
        assert watched.verify(reading) == []


def forge(reading: Reading, place: int, **changes: object) -> Reading:
    """One shard certified something else, and the committee above took it."""
    shards = list(reading.shards)
    shards[place] = msgspec.structs.replace(shards[place], **changes)
    return msgspec.structs.replace(reading, shards=tuple(shards))


def test_what_a_shard_certified_wrongly_is_found(watched: Watched) -> None:
    reading = watched.book.readings[1]
    assert reading.proposal is not None
    shard, name = reading.shards[0], reading.proposal.updates[0].peer
    assert shard is not None
    first, *others = shard.updates
    raised = msgspec.structs.replace(first, contribution=Contribution(first.contribution + 10**9))
    findings = watched.verify(forge(reading, 0, updates=(raised, *others)))
    assert any(finding.startswith(f"{name}: update") and "median" in finding for finding in findings)
    assert any(finding.startswith("leaf of member") for finding in findings), "who inflates it takes from the others"
    heavier = msgspec.structs.replace(first, weight=Weight(first.weight + 7))
    assert "merge weight" in watched.verify(forge(reading, 0, updates=(heavier, *others)))[0]
    few = watched.verify(forge(reading, 0, reveals=shard.reveals[:2]))
    assert any("2 members revealed a vector, at least 4 must" in finding for finding in few)
    strange = msgspec.structs.replace(shard.reveals[0], member=shard.reveals[1].member)
    assert "twice" in watched.verify(forge(reading, 0, reveals=(strange, *shard.reveals[1:])))[0]
    assert "payload: should be" in watched.verify(forge(reading, 0, new_base=Digest(b"x" * 32)))[0]
    assert "base: should be" in watched.verify(forge(reading, 0, base=Digest(b"x" * 32)))[0]
    for name, value in {"proposer": MemberIndex(99), "epoch": 9, "nonce": 9, "root": Digest(b"x" * 32)}.items():
        assert f"field {name!r} differs" in watched.verify(forge(reading, 0, **{name: value}))[0]


def test_a_shard_cannot_pay_a_friend_for_anothers_update(watched: Watched) -> None:
    """Its liars name one payload twice, first as the friend's: who is paid goes by the list."""
    reading = watched.book.readings[1]
    assert reading.proposal is not None
    shard, name = reading.shards[0], reading.proposal.updates[0].peer
    assert shard is not None
    friend, *_, last = shard.updates
    fake = msgspec.structs.replace(last, peer=friend.peer, member=friend.member, contribution=Contribution(2**59))
    findings = watched.verify(forge(reading, 0, updates=(*shard.updates[:-1], fake, last)))
    assert any(finding.startswith(f"{name}: updates: expected") for finding in findings)


def test_what_the_committee_above_certified_wrongly_is_found(watched: Watched) -> None:
    reading = watched.book.readings[1]
    assert reading.proposal is not None
    first, *others = reading.proposal.updates
    raised = msgspec.structs.replace(first, contribution=Contribution(first.contribution + 10**9))
    findings = watched.verify(reading, updates=(raised, *others))
    assert [finding for finding in findings if "the reveals' median" in finding and first.peer in finding]
    for stranger in (
        msgspec.structs.replace(first, peer=others[0].peer),
        msgspec.structs.replace(first, member=MemberIndex(99)),
        msgspec.structs.replace(first, peer=watched.book.roster.members[0].peer),
    ):
        assert "none of the round's 3 shards" in watched.verify(reading, updates=(stranger, *others))[0]
    twice = forge_twice(reading, 0)
    assert any("updates: expected 3, each once" in finding for finding in watched.verify(twice))
    left_out = forge_without(reading, 0)
    assert any("certificate is not known" in finding for finding in watched.verify(left_out))


def forge_twice(reading: Reading, place: int) -> Reading:
    """One shard's update stands there once more."""
    proposal = reading.proposal
    assert proposal is not None
    updates, digests = (*proposal.updates, proposal.updates[place]), (*proposal.shards, proposal.shards[place])
    proposal = msgspec.structs.replace(proposal, updates=updates, shards=digests)
    return msgspec.structs.replace(reading, proposal=proposal, shards=(*reading.shards, reading.shards[place]))


def forge_without(reading: Reading, place: int) -> Reading:
    assert reading.proposal is not None
    updates, digests, shards = list(reading.proposal.updates), list(reading.proposal.shards), list(reading.shards)
    for items in (updates, digests, shards):
        del items[place]  # type: ignore[attr-defined]
    proposal = msgspec.structs.replace(reading.proposal, updates=tuple(updates), shards=tuple(digests))
    return msgspec.structs.replace(reading, proposal=proposal, shards=tuple(shards))


def test_a_second_certificate_of_a_shard_that_was_scored_accuses_nobody(watched: Watched) -> None:
    """Of two words of one shard the lower digest stands; nobody serves what the other one was."""
    reading = watched.book.readings[1]
    assert reading.proposal is not None
    twice = tuple(
        msgspec.structs.replace(
            reveal, scores=(*reveal.scores, msgspec.structs.replace(reveal.scores[-1], payload=Digest(b"\xff" * 32)))
        )
        for reveal in reading.proposal.reveals
    )
    assert watched.verify(reading, reveals=twice) == []


def test_a_second_word_beside_an_absent_shard_accuses_nobody(watched: Watched) -> None:
    """Whose it was nobody can tell: perhaps the absent one's only word. A lower digest should have been merged."""
    proposal, shards = watched.book.readings[1].proposal, watched.book.readings[1].shards
    before, roster = watched.book.readings[0].proposal, list_rosters(watched.book, 1)[0]
    dealt = deal(watched.world.config, roster, Round(1))
    assert proposal is not None
    assert dealt is not None
    absent = proposal.updates[-1].payload

    def score(payload: Digest) -> tuple[ScoreReveal, ...]:
        """The reveals with this in place of what the absent shard certified."""
        named = ({score.payload: score.contribution for score in reveal.scores} for reveal in proposal.reveals)
        swapped = ({payload if key == absent else key: value for key, value in scores.items()} for scores in named)
        return tuple(
            msgspec.structs.replace(reveal, scores=tuple(Score(key, scores[key]) for key in sorted(scores)))
            for reveal, scores in zip(proposal.reveals, swapped, strict=True)
        )

    certified = {
        update.payload: (update.member, shard)
        for update, shard in zip(proposal.updates, shards, strict=True)
        if shard is not None and update.payload != absent
    }
    second = Digest(b"\xff" * 32)
    known = {**certified, second: certified[min(certified)]}
    right = draft_top_proposal(
        watched.world.config, roster, dealt, before, Round(1), proposal.base, score(second), known
    )
    right = msgspec.structs.replace(right, new_base=proposal.new_base)
    reading = read_as(watched, right)
    (finding,) = watched.verify(reading)
    assert isinstance(finding, Unchecked)
    assert is_accusation([str(finding)])  # who accuses is no matter of words: some of them are a liar's
    data = {**watched.blobs.kept, right.digest: encode(right)}
    assert judge(reading.settled, data.get, [roster], before, watched.world.config).state == "missing"
    assert is_accusation(watched.verify(reading, reveals=score(Digest(bytes(32)))))


def test_what_nobody_serves_is_named_and_hides_the_rest_of_nothing(watched: Watched) -> None:
    gone = watched.book.readings[1].proposal.shards[1]  # type: ignore[union-attr]
    book = read_book(watched.world.chain.ledger, lambda digest: None if digest == gone else watched.blobs(digest))  # type: ignore[arg-type]
    reading = book.readings[1]
    assert reading.gap == "round 1: nobody serves what 1 of 3 shards certified of their members"
    rows = make_rows(book, reading)
    assert sum(row.contribution is None for row in rows) == NUM_PEERS // NUM_SHARDS
    assert all(row.total for row in rows)
    assert view_rounds(book, 2)[1].problem == reading.gap
    unknown = next(row for row in rows if row.contribution is None)
    with pytest.raises(WorldError, match="perhaps of this peer"):
        explain(book, book.roster.members[unknown.member], Round(1), watched.world.config, ())


def read_as(watched: Watched, proposal: Proposal) -> Reading:
    """What is read of a round whose committee signed this instead."""
    leaves = from_wire(proposal.leaves)
    tree = merkle.compute_root(leaves)
    settled = msgspec.structs.replace(
        watched.book.readings[1].settled,
        root=tree.digest,
        sums=tree.sums,
        num_leaves=len(leaves),
        data_digest=proposal.digest,
    )
    return read_round(settled, lambda digest: encode(proposal) if digest == proposal.digest else watched.blobs(digest))


def find_in(watched: Watched, reading: Reading) -> tuple[Book, list[str]]:
    """A book with round 1 read so, and what is found wrong with it."""
    first, _, *others = watched.book.readings
    book = msgspec.structs.replace(watched.book, readings=(first, reading, *others))
    return book, verify_reading(book, 1, watched.world.config, ())


def test_a_wrong_list_of_shards_is_the_signers_lie_and_hides_no_leaf(watched: Watched) -> None:
    """A theft can be proven by its leaves, whatever else the proposal says."""
    right = watched.book.readings[1].proposal
    assert right is not None
    robbed, *others = from_wire(right.leaves)
    assert robbed.reward_wei > 0
    poorer = LeafValue(Wei(robbed.cumulative_wei - 1), Wei(robbed.reward_wei - 1), robbed.contribution)
    theft = with_root(msgspec.structs.replace(right, leaves=to_wire((poorer, *others))))
    update, digest = right.updates[0], right.shards[0]
    num_more = NUM_PEERS + 1
    for says, changes in (
        ("3 updates of shards, and names what 4 certified", {"shards": (*right.shards, Digest(b"x" * 32))}),
        ("twice", {"shards": (digest, *right.shards[:-1])}),
        ("no proposal", {"shards": (right.base, *right.shards[1:])}),
        (
            f"{num_more} shards certified, and has leaves for {NUM_PEERS}",
            {"updates": (update,) * num_more, "shards": tuple(Digest(bytes([i]) * 32) for i in range(num_more))},
        ),
    ):
        reading = read_as(watched, msgspec.structs.replace(theft, **changes))
        assert not reading.is_lie
        book, findings = find_in(watched, reading)
        assert any(says in finding for finding in findings)
        assert {fault.index for fault in search_round(book, reading)} == {MemberIndex(0)}
        assert len(make_rows(book, reading)) == NUM_PEERS
        assert view_rounds(book, 2)[1].problem == reading.gap
        lost = next(row.member for row in make_rows(book, reading) if row.contribution is None)
        with pytest.raises(Reject, match="cannot be told"):
            explain(book, book.roster.members[lost], Round(1), watched.world.config, ())


def test_of_a_list_that_can_be_none_of_shards_nothing_is_fetched(watched: Watched) -> None:
    right = watched.book.readings[1].proposal
    assert right is not None
    many = msgspec.structs.replace(
        right,
        updates=(right.updates[0],) * LIST_MAX,
        shards=tuple(Digest(number.to_bytes(32, "big")) for number in range(LIST_MAX)),
    )
    asked = []

    def fetch(digest: Digest) -> bytes:
        asked.append(digest)
        return encode(many)

    settled = msgspec.structs.replace(watched.book.readings[1].settled, data_digest=many.digest)
    assert read_round(settled, fetch).flaw
    assert asked == [many.digest]


@pytest.mark.parametrize("number", range(NUM_ROUNDS))
def test_a_reward_is_explained_through_both_levels(watched: Watched, number: int) -> None:
    book, console = watched.book, Console(record=True, width=200)
    reading = book.readings[number]
    assert reading.proposal is not None
    assert list_excluded(reading) == ()
    told = explain(book, book.roster.members[5], Round(number), watched.world.config, ())
    update, part = reading.get_update(MemberIndex(5)), told.part
    assert update is not None
    assert part is not None
    assert told.contribution == update.contribution
    assert told.median is not None
    assert told.contribution == abs(told.median) * abs(part.contribution) // part.sum_positive
    assert len([judgement for judgement in told.judgements if judgement.contribution is not None]) >= 4
    assert len(told.judgements) == 5, "its own shard's committee"
    assert (told.num_updates, told.is_proven, told.reward_wei) == (NUM_PEERS, True, told.expected_wei)
    assert told.weight_max is not None, "the weights inside of the shard come out"
    print_explanation(console, told, None, "not measured", with_proof=False)
    text = console.export_text()
    assert f"shard {part.shard} of 3 contributed" in text


def test_a_shard_without_vectors_or_updates_is_explained_as_far_as_it_goes(watched: Watched) -> None:
    reading = watched.book.readings[1]
    assert reading.shards[0] is not None
    maker = reading.shards[0].updates[0].member
    for changes in ({"reveals": ()}, {"updates": ()}):
        first, _, *others = watched.book.readings
        readings = (first, forge(reading, 0, **changes), *others)
        book = msgspec.structs.replace(watched.book, readings=readings)
        told = explain(book, book.roster.members[maker], Round(1), watched.world.config, ())
        assert told.reward_wei == told.expected_wei


def test_a_registry_that_changed_within_the_round_is_told_by_its_deal(watched: Watched) -> None:
    """A third left while the round ran, and the next deal has two shards: by it each member had another committee."""
    right, lie = watched.book, watched.book.readings[1].proposal
    assert lie is not None
    raised = msgspec.structs.replace(lie.updates[0], contribution=Contribution(10**9))
    lie = msgspec.structs.replace(lie, updates=(raised, *lie.updates[1:]))
    entries = list(right.entries)
    at = next(
        place
        for place, entry in enumerate(entries)
        if isinstance(entry.what, Accepted) and entry.what.settled.round == 1
    )
    leavers = range(NUM_PEERS // NUM_SHARDS)
    entries[at:at] = [msgspec.structs.replace(entries[at], what=Left(MemberIndex(index))) for index in leavers]
    changed = msgspec.structs.replace(right, entries=tuple(entries))
    assert not list_rosters(changed, 1)[0].members[0].active
    for member in right.roster.members:
        told = explain(changed, member, Round(1), watched.world.config, ())
        assert told.part is not None
        assert told.part.num_shards == NUM_SHARDS
        assert told == explain(right, member, Round(1), watched.world.config, ())
    # The same where the round recomputes by none of them, so that what is wrong in it can be measured.
    first, second, *others = right.readings
    readings = (first, msgspec.structs.replace(second, proposal=lie), *others)
    known = find_roster(msgspec.structs.replace(changed, readings=readings), 1, watched.world.config)
    assert known is not None
    assert all(member.active for member in known.members)


def check(watched: Watched, reading: Reading, blobs: Blobs | None = None) -> DeepCheck:
    meter = Meter(make_learner(watched), blobs or watched.blobs, watched.world.config)
    roster = list_rosters(watched.book, reading.settled.position)[0]
    return meter.check_round(watched.book, reading, roster, 12, lambda *_: None)


def make_learner(watched: Watched) -> Learner:
    """The auditor's own: it has the public probe, and never trains."""
    return make_lab(watched.world.scenario, watched.world.config, NUM_PEERS).learners[0]


@pytest.mark.parametrize("number", range(NUM_ROUNDS))
def test_both_levels_measure_as_they_were_certified(watched: Watched, number: int) -> None:
    found = check(watched, watched.book.readings[number])
    assert found.findings == ()
    assert found.notes == ()
    assert len(found.updates) == NUM_SHARDS + NUM_PEERS


def test_a_lie_at_either_level_is_measured(watched: Watched) -> None:
    reading = watched.book.readings[2]
    assert reading.proposal is not None
    first, *others = reading.proposal.updates
    raised = msgspec.structs.replace(first, contribution=Contribution(9 * abs(first.contribution) + 10**8))
    proposal = msgspec.structs.replace(reading.proposal, updates=(raised, *others))
    found = check(watched, msgspec.structs.replace(reading, proposal=proposal))
    assert any(finding.startswith(f"update of {first.peer}: certified") for finding in found.findings)
    shard = reading.shards[0]
    assert shard is not None
    inner, *rest = shard.updates
    inflated = msgspec.structs.replace(inner, contribution=Contribution(9 * abs(inner.contribution) + 10**8))
    found = check(watched, forge(reading, 0, updates=(inflated, *rest)))
    assert any(finding.startswith(f"update of member {inner.member}: certified") for finding in found.findings)
    swapped = tuple(msgspec.structs.replace(item, weight=Weight(item.weight // 2 + 3)) for item in shard.updates)
    found = check(watched, forge(reading, 0, updates=(swapped[0], *shard.updates[1:])))
    assert any(finding.startswith(f"{first.peer}: its updates make") for finding in found.findings)


@pytest.mark.parametrize("kind", ["no payload", "no reveals", "another base", "a stranger", "a name that is none"])
def test_nonsense_of_one_shard_hides_nothing_of_the_others(watched: Watched, kind: str) -> None:
    reading = watched.book.readings[2]
    proposal, (shard, other, _) = reading.proposal, reading.shards
    assert proposal is not None
    assert shard is not None
    assert other is not None
    update, *rest = shard.updates
    if kind == "no payload":
        bogus = msgspec.structs.replace(update, payload=proposal.base)
        forged, says = forge(reading, 0, updates=(bogus, *rest)), "its payload is none"
    elif kind == "no reveals":
        forged, says = forge(reading, 0, reveals=()), "nobody scored it"
    elif kind == "another base":
        forged, says = forge(reading, 0, base=Digest(b"x" * 32)), "it started from 7878"
    elif kind == "a stranger":
        forged, says = forge(reading, 0, updates=(*shard.updates, other.updates[0])), "of others than its members"
    else:
        forged, says = reading, "its payload is of shard-"
    top, *tops = proposal.updates
    if kind == "a name that is none":
        top = msgspec.structs.replace(top, peer=PeerId("shard-" + "é" * 100))
    *tops, last = tops
    raised = msgspec.structs.replace(last, contribution=Contribution(9 * abs(last.contribution) + 10**8))
    proposal = msgspec.structs.replace(proposal, updates=(top, *tops, raised))
    found = check(watched, msgspec.structs.replace(forged, proposal=proposal))
    assert any(says in line for line in (*found.findings, *found.notes))
    if kind == "a name that is none":
        assert len(found.updates) == NUM_PEERS, "inside of each shard all is measured"
    else:
        assert len(found.updates) == NUM_SHARDS + NUM_PEERS * (NUM_SHARDS - 1) // NUM_SHARDS
        assert any(finding.startswith(f"update of {raised.peer}: certified") for finding in found.findings)


def test_a_base_that_is_none_is_a_finding(watched: Watched) -> None:
    reading = watched.book.readings[2]
    assert reading.proposal is not None
    proposal = msgspec.structs.replace(reading.proposal, base=reading.proposal.updates[0].payload)
    found = check(watched, msgspec.structs.replace(reading, proposal=proposal))
    assert found.findings[0].startswith("base: what it starts from is none")


def test_an_update_is_left_out_of_a_shard_of_nonsense_only_where_that_can_be(watched: Watched) -> None:
    reading = forge(watched.book.readings[0], 0, base=Digest(b"x" * 32))
    meter = Meter(make_learner(watched), watched.blobs, watched.world.config)
    shard = reading.shards[0]
    assert shard is not None
    with pytest.raises(WorldError, match="nobody serves the base 7878"):
        meter.compare_without(watched.book, reading, shard.updates[0].payload)


def test_members_whose_updates_are_gone_are_not_measured_and_the_others_are(watched: Watched) -> None:
    reading = watched.book.readings[2]
    shard = reading.shards[1]
    assert shard is not None
    less = Blobs(None, ())
    for digest, data in watched.blobs.kept.items():
        if digest != shard.updates[0].payload:
            less.put(data)
    found = check(watched, reading, less)
    assert found.findings == ()
    (note,) = found.notes
    assert "its members were not measured" in note
    assert len(found.updates) == NUM_SHARDS + NUM_PEERS * (NUM_SHARDS - 1) // NUM_SHARDS


def test_where_the_deal_is_not_known_nobody_is_accused(watched: Watched) -> None:
    reading = watched.book.readings[2]
    meter = Meter(make_learner(watched), watched.blobs, watched.world.config)
    today = list_rosters(watched.book, 2)[0]
    for roster in (
        msgspec.structs.replace(today, committee=tuple(reversed(today.committee))),
        msgspec.structs.replace(today, members=today.members[: NUM_PEERS // NUM_SHARDS]),
    ):
        found = meter.check_round(watched.book, reading, roster, 3, lambda *_: None)
        assert (found.updates, found.findings) == ((), ())
        assert "not those of the registry" in found.notes[0]


def test_one_update_is_left_out_of_its_shard(watched: Watched) -> None:
    reading = watched.book.readings[0]
    meter = Meter(make_learner(watched), watched.blobs, watched.world.config)
    leave_out = partial(meter.compare_without, watched.book, reading)
    effects = [leave_out(update.payload) for update in reading.updates]
    assert len({effect.loss_with for effect in effects}) == 1
    assert sum(effect.gain > 0 for effect in effects) > NUM_PEERS // 2
    assert all(abs(effect.gain) < effect.loss_before - effect.loss_with for effect in effects)


def test_the_wire_says_nothing_of_shards_where_there_are_none() -> None:
    world = World(Scenario(seed=6, num_peers=4, num_rounds=1))
    world.run()
    (certificate,) = world.checks.certificates.values()
    assert isinstance(certificate.proposal, Proposal)
    assert certificate.proposal.shards == ()
