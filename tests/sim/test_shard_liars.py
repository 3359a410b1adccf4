"""Two thirds of one shard's committee lie about what it certified: that costs their own shard, and nobody else."""

from collections.abc import Callable, Sequence

import msgspec
import pytest

from p2pfm.messages import Certificate, IncludedUpdate, Proposal, ShardMessage
from p2pfm.protocol.committee import shard_message
from p2pfm.protocol.events import AnyAction, Note, Publish, Settle
from p2pfm.protocol.shards import Deal, deal
from p2pfm.types import Contribution, Digest, MemberIndex, PeerId, Round, Weight
from sim.host import Host
from sim.scenarios import LearnerModel, Scenario
from sim.world import World

NUM_PEERS, LIARS = 24, 0
Forge = Callable[[Proposal, Deal, Host], Proposal]
Change = Callable[[Host, AnyAction], AnyAction]


class Watched(World):
    """A world of three shards whose actions are looked at, and perhaps changed, before they are carried out."""

    def __init__(self, change: Change = lambda host, action: action, **fields: object) -> None:
        scenario = Scenario(
            seed=6, num_peers=NUM_PEERS, shard_size=8, committee_size=5, learner=LearnerModel(kind="digests"),
            **{"num_rounds": 3, "rounds_per_epoch": 3, **fields},  # type: ignore[arg-type]
        )  # fmt: skip
        super().__init__(scenario)
        self._change = change
        self.notes: list[str] = []
        self.settled: dict[Round, set[Digest]] = {}
        """What seated peers keep of the shards of a round."""

    def _act(self, host: Host, *rest: object) -> None:
        *others, actions = rest
        assert isinstance(actions, list)
        for action in actions:
            if isinstance(action, Note):
                self.notes.append(action.text)
            if isinstance(action, Settle):
                kept = self.settled.setdefault(action.certificate.proposal.round, set())
                kept.update(shard.digest for shard in action.shards)
        super()._act(host, *others, [self._change(host, action) for action in actions])  # type: ignore[arg-type]


def run_liars(forge: Forge) -> Watched:
    """Every round the first shard's speakers tell what `forge` makes of its certificate, signed by its committee."""

    def change(host: Host, action: AnyAction) -> AnyAction:
        match action:
            case Publish(message=ShardMessage(shard=shard, message=Certificate() as told)) if shard == LIARS:
                false = sign(world, forge(told.proposal, get_deal(world), host), told.absent)
                return msgspec.structs.replace(action, message=ShardMessage(shard, false))
        return action

    world = Watched(change)
    world.run()
    return world


def get_deal(world: World) -> Deal:
    dealt = deal(world.config, world.chain.roster, Round(0))
    assert dealt is not None
    return dealt


def sign(world: World, proposal: Proposal, absent: Sequence[MemberIndex]) -> Certificate:
    roster = get_deal(world).shards[LIARS]
    message = shard_message(world.config.chain, LIARS, proposal)
    signers = [roster.by_index[index] for index in roster.committee if index not in absent]
    signatures = [world._signatures.sign(member.bls_key, message) for member in signers]
    return Certificate(proposal, tuple(absent), world._signatures.aggregate(signatures))


def add_stranger(proposal: Proposal, dealt: Deal, host: Host) -> Proposal:
    one = IncludedUpdate(PeerId("nobody"), MemberIndex(10**6), Digest(b"\1" * 32), Contribution(1), Weight(0))
    return msgspec.structs.replace(proposal, updates=(*proposal.updates, one))


def rob_others(proposal: Proposal, dealt: Deal, host: Host) -> Proposal:
    stolen = tuple(
        IncludedUpdate(member.peer, member.index, Digest(bytes([member.index]) * 32), Contribution(-(2**60)), Weight(0))
        for shard in dealt.shards[1:]
        for member in shard.members
    )
    return msgspec.structs.replace(proposal, updates=(*proposal.updates, *stolen))


def swamp_a_mate(proposal: Proposal, dealt: Deal, host: Host) -> Proposal:
    first, *rest = proposal.updates
    return msgspec.structs.replace(
        proposal, updates=(msgspec.structs.replace(first, contribution=Contribution(-(2**60))), *rest)
    )


def name_itself(proposal: Proposal, dealt: Deal, host: Host) -> Proposal:
    """Its two speakers tell two things with one payload."""
    return msgspec.structs.replace(proposal, proposer=MemberIndex(host.index))


def weigh_otherwise(proposal: Proposal, dealt: Deal, host: Host) -> Proposal:
    first, *rest = proposal.updates
    return msgspec.structs.replace(
        proposal, updates=(msgspec.structs.replace(first, weight=Weight(first.weight + 1)), *rest)
    )


def hide_vectors(proposal: Proposal, dealt: Deal, host: Host) -> Proposal:
    return msgspec.structs.replace(proposal, reveals=proposal.reveals[:3])


def judge_themselves(proposal: Proposal, dealt: Deal, host: Host) -> Proposal:
    """Vectors of whom nobody seated."""
    seated = set(dealt.shards[LIARS].committee)
    others = [member.index for member in dealt.shards[LIARS].members if member.index not in seated]
    pairs = zip(proposal.reveals, others, strict=False)
    false = tuple(msgspec.structs.replace(reveal, member=index) for reveal, index in pairs)
    return msgspec.structs.replace(proposal, reveals=(*false, *proposal.reveals[len(false) :]))


@pytest.mark.parametrize(
    "forge", [add_stranger, rob_others, swamp_a_mate, weigh_otherwise, hide_vectors, judge_themselves]
)
def test_a_shard_that_lies_loses_its_own_update_and_nothing_else(forge: Forge) -> None:
    world = run_liars(forge)
    liars = {member.index for member in get_deal(world).shards[LIARS].members}
    assert sorted(world.checks.certificates) == [0, 1, 2]
    assert any("certified is not right" in note for note in world.notes)
    for certificate in world.checks.certificates.values():
        assert {update.member for update in certificate.proposal.updates} == {1, 2}
    leaves = world.checks.certificates[Round(2)].proposal.leaves
    assert all((leaf.contribution > 0) == (index not in liars) for index, leaf in enumerate(leaves))


def test_a_speaker_that_tells_another_tale_is_not_heard_and_the_other_one_is() -> None:
    world = run_liars(name_itself)
    assert sorted(world.checks.certificates) == [0, 1, 2]
    assert all(len(certificate.proposal.updates) == 3 for certificate in world.checks.certificates.values())


@pytest.mark.parametrize("rounds_per_epoch", [1, 2, 3])
def test_what_the_shards_certified_is_kept_also_in_rounds_in_which_a_committee_is_drawn(rounds_per_epoch: int) -> None:
    """Those who sat in the round settle it: the next committee, drawn meanwhile, knows nothing of its shards."""
    world = Watched(num_rounds=8, rounds_per_epoch=rounds_per_epoch)
    world.run()
    assert len(world.checks.certificates) >= 7
    for round, certificate in world.checks.certificates.items():
        assert certificate.proposal.shards
        assert set(certificate.proposal.shards) <= world.settled[round], f"round {round}"
