"""Measure again, on the network's own backbone and public probe: contributions, the merge, and what one update gave.

The measurement is the committee's (`work.score_updates`), on samples that anybody draws alike. Loads torch.
"""

import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import torch
from transformers.utils import logging as transformers_logging

from nodes.models import resolve
from nodes.rewards.blobs import Blobs
from nodes.rewards.games import Game, list_games, validate_held
from nodes.rewards.reading import Book, Reading, name_maker, validate_reading
from p2pfm import work
from p2pfm.config import NetworkConfig, NodeConfig
from p2pfm.errors import OperatorError, Reject, WorldError
from p2pfm.learner import Learner
from p2pfm.lora.delta import decode_tensors, encode_tensors
from p2pfm.lora.layers import choose_device, load_backbone
from p2pfm.lora.samples import parse_probe
from p2pfm.lora.torch_learner import TorchLearner
from p2pfm.messages import Proposal
from p2pfm.protocol.committee import merge_request
from p2pfm.protocol.events import Condense, Merge, ScoreUpdates, Weighted
from p2pfm.protocol.shards import get_shard_name, is_shard_name
from p2pfm.settlement.ledger import Roster
from p2pfm.types import Contribution, Digest, MemberIndex, PeerId, Round, Weight, compute_digest

DRAWS = 8
"""Samples that contributions are measured on again, by default."""

CONFIRMING = 4
"""Times as many draws, before a round is called false."""

TOLERANCE_SPREADS = 6.0
"""Honest medians differ from an audit, since everyone measures on other samples. bench/audit_tolerance.py, on the
demonstration's rounds with SmolLM2: of 17 certified medians the furthest was 1.6 spreads off; of 80,000 resampled
honest committees of 1 to 9 members 1 in 100 was further than 3, 1 in 5,000 further than 6, whatever their size."""

ROUNDING_OWN = 0.04
"""Part of a contribution that another machine may change: on the same sample fp32 gave up to 1.9% less than
the backbone's bf16, and another attention kernel 1.1% less."""

ROUNDING_ROUND = 0.005
"""The same for what is next to nothing: part of the round's largest contribution."""

NO_SALT = bytes(32)

Tell = Callable[[int, int, str], None]
"""(steps done, steps in all, what is being done)"""


class Remeasured(msgspec.Struct, frozen=True):
    """One update's certified contribution beside what an auditor measures [nano-nats/token]."""

    member: MemberIndex
    peer: PeerId
    certified: Contribution
    measured: int
    """What the committee's median is expected to be."""
    spread: int
    """Standard deviation of the difference, were everyone honest."""
    tolerance: int
    """Greatest difference that is no finding."""
    is_finding: bool
    note: str = ""

    @property
    def name(self) -> str:
        """Whose update, for people."""
        return name_maker(self.peer, self.member)


class DeepCheck(msgspec.Struct, frozen=True):
    """What measuring a round again gave."""

    round: Round
    updates: tuple[Remeasured, ...]
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    """What could not be checked, and why."""


class Balance(msgspec.Struct, frozen=True):
    """One peer over all rounds that were measured: a small lie in every round adds up, chance does not."""

    member: MemberIndex
    peer: PeerId
    num_rounds: int
    certified: int
    """Sum over these rounds [nano-nats/token]."""
    measured: int
    tolerance: int
    is_finding: bool


class Counterfactual(msgspec.Struct, frozen=True):
    """Held-out loss on the probe's test split [nats/token]: with the update, without it, and before the round."""

    loss_before: float
    loss_with: float
    loss_without: float
    """The other updates at the scale and weight that they were certified with."""

    @property
    def gain(self) -> float:
        """By how much the update lowered the loss [nats/token]; negative: it did harm."""
        return self.loss_without - self.loss_with


class Meter:
    """A learner on the network's backbone that trains nothing, and the blobs that it measures."""

    def __init__(self, learner: Learner, blobs: Blobs, network: NetworkConfig) -> None:
        self.learner = learner
        self._blobs = blobs
        self._network = network
        self._shapes = dict(learner.shapes())
        blobs.put(encode_tensors(learner.initial()))  # the first base, which everybody can make

    def compare_without(self, book: Book, reading: Reading, payload: Digest) -> Counterfactual:
        """What the round's merge would have been without one update.

        Its weight becomes 0; the others keep their certified weights, and the norm that all were brought to.

        Raises:
            WorldError: a payload or the base is not served any more; says which.
        """
        proposal = validate_reading(reading)
        validate_held(self._blobs, proposal)
        base = self.find_base(book, reading)
        merge = merge_request(proposal)
        if merge is None:  # nobody's contribution was positive: the base stayed
            loss = self._evaluate(base)
            return Counterfactual(loss, loss, loss)
        without = self._leave_out(reading, merge, payload)
        merged = (
            work.merge_updates(self._blobs, self._shapes, self._network, action).new_base for action in (merge, without)
        )
        loss_with, loss_without = (self._evaluate(digest) for digest in merged)
        return Counterfactual(self._evaluate(base), loss_with, loss_without)

    def _leave_out(self, reading: Reading, merge: Merge, payload: Digest) -> Merge:
        """The merge in which an update weighs nothing: inside of its shard, where it is part of one."""
        for update, shard in zip(validate_reading(reading).updates, reading.shards, strict=False):
            if shard is not None and payload in shard.payloads:
                rest = self._condense(shard, get_shard_name(update.member), payload)
                if rest is None:
                    return _set_aside(merge, update.payload)
                instead = (
                    Weighted(rest, item.weight) if item.payload == update.payload else item for item in merge.updates
                )
                return msgspec.structs.replace(merge, updates=tuple(instead))
        return _set_aside(merge, payload)

    def _condense(self, shard: Proposal, name: PeerId, without: Digest | None = None) -> Digest | None:
        """The payload of what a shard certified, perhaps without one update; None: nothing in it has a weight."""
        validate_held(self._blobs, shard)
        merge = merge_request(shard)
        if merge is None:
            return None
        self._validate("base", merge.base)
        rest = _set_aside(merge, without) if without else merge
        if not any(item.weight for item in rest.updates):
            return None
        action = Condense(rest.request, rest.base, rest.updates, name)
        return work.condense_updates(self._blobs, self._shapes, self._network, action).new_base

    def check_round(self, book: Book, reading: Reading, roster: Roster, num_draws: int, tell: Tell) -> DeepCheck:
        """Measure a round's contributions again and compare them with the certified medians; recompute its merge.

        Args:
            roster: of then: stakes give the scoring game's shares.
        """
        round = reading.settled.round
        try:
            proposal = validate_reading(reading)
            self.find_base(book, reading)
            if not proposal.updates:
                return DeepCheck(round, (), self.compare_merge(proposal), ())
            games, notes = list_games(self._network, self._blobs, book, reading, roster)
        except (WorldError, Reject) as error:
            return DeepCheck(round, (), (), (f"not measured: {error}",))
        try:
            self._validate("base", proposal.base)
        except Reject as error:
            return DeepCheck(round, (), (f"base: what it starts from is none: {error}",), notes)
        updates: list[Remeasured] = []
        findings: list[str] = []
        lacking: list[str] = []
        for number, game in enumerate(games):

            def tell_all(done: int, total: int, number: int = number) -> None:
                tell(number * total + done, len(games) * total, f"round {round}")

            where = f"{game.name}: " if game.name else ""
            try:
                found, wrong = self._check_game(game, reading.settled.data_digest, num_draws, tell_all)
            except WorldError as error:
                lacking.append(f"{where}not measured: {error}")
                continue
            updates += found
            findings += (where + line for line in wrong)
        lies = [
            f"update of {item.name}: certified {item.certified}, measured {item.measured} "
            f"(tolerance {item.tolerance} nano-nats/token)"
            for item in updates
            if item.is_finding
        ]
        return DeepCheck(round, tuple(updates), (*lies, *findings), (*notes, *lacking))

    def _check_game(
        self, game: Game, data_digest: Digest, num_draws: int, tell: Callable[[int, int], None]
    ) -> tuple[tuple[Remeasured, ...], list[str]]:
        """(a game's updates, measured again; what else is wrong with it). Raises: WorldError."""
        faults = self._find_faults(game)
        if faults:
            return (), faults
        action = self._drop_nonsense(game.action)
        game = msgspec.structs.replace(game, action=action)
        updates = self._compare_draws(game, data_digest, num_draws, tell)
        if any(item.is_finding for item in updates):
            # So few draws may take the spread for far too small: nobody is accused before more have been seen.
            updates = self._compare_draws(game, data_digest, num_draws * CONFIRMING, tell)
        return updates, [*self._compare_made(game)]

    def _find_faults(self, game: Game) -> list[str]:
        """What of a game no honest member can have scored or certified: then there is nothing to measure."""
        certified = game.certified
        scored = {score.payload for reveal in certified.reveals for score in reveal.scores}
        faults = []
        if certified.base != game.action.base:
            faults.append(f"base: expected {game.action.base.hex()}, it started from {certified.base.hex()}")
        for update in certified.updates:
            name = f"update of {name_maker(update.peer, update.member)}"
            if update.payload not in scored:
                faults.append(f"{name}: nobody scored it")
            try:
                maker = self._validate("payload", update.payload)
            except Reject as error:
                faults.append(f"{name}: its payload is none: {error}")
                continue
            if maker != update.peer:
                faults.append(f"{name}: its payload is of {maker}")
        return faults

    def _drop_nonsense(self, action: ScoreUpdates) -> ScoreUpdates:
        """Without what earlier rounds certified and is no update, or no base: nothing repeats it."""

        def is_right(kind: str, digest: Digest) -> bool:
            try:
                self._validate(kind, digest)
            except (WorldError, Reject):
                return False
            return True

        has_previous = action.previous is not None and is_right("base", action.previous)
        return msgspec.structs.replace(
            action,
            previous=action.previous if has_previous else None,
            earlier=tuple(item for item in action.earlier if is_right("payload", item.payload)),
        )

    def _validate(self, kind: str, digest: Digest) -> PeerId | None:
        """The maker of a payload. Raises: Reject, if bytes are none; WorldError, if nobody serves them."""
        data = self._blobs(digest)
        if data is None:
            raise WorldError(f"nobody serves the {kind} {digest.hex()[:16]}")
        return work.validate_blob(kind, data, self._shapes, self._network)

    def _compare_draws(
        self, game: Game, data_digest: Digest, num_draws: int, tell: Callable[[int, int], None]
    ) -> tuple[Remeasured, ...]:
        draws = self._draw(game.action, data_digest, num_draws, tell)
        by_payload = {item.payload: [draw[place] for draw in draws] for place, item in enumerate(game.action.updates)}
        largest = max(abs(statistics.fmean(values)) for values in by_payload.values())
        return tuple(
            self.compare(game.certified, update.payload, by_payload[update.payload], largest, has_gaps=game.has_gaps)
            for update in game.certified.updates
        )

    def _draw(
        self, action: ScoreUpdates, data_digest: Digest, num_draws: int, tell: Callable[[int, int], None]
    ) -> list[tuple[Contribution, ...]]:
        """Contributions by draw, in the order of `action.updates`."""
        draws = []
        for number in range(num_draws):
            tell(number, num_draws)
            seed = draw_audit_seed(data_digest, number)
            scored = work.score_updates(self.learner, self._blobs, self._network, action, seed, NO_SALT)
            draws.append(scored.contributions)
        tell(num_draws, num_draws)
        return draws

    def _compare_made(self, game: Game) -> tuple[str, ...]:
        """Whether the certified updates make what was certified: the new base, or a shard's payload."""
        if not game.name:
            return self.compare_merge(game.certified)
        certified = game.certified.new_base
        made = self._condense(game.certified, game.name) or game.certified.base
        return () if made == certified else (f"its updates make {made.hex()}, it certified {certified.hex()}",)

    def find_base(self, book: Book, reading: Reading) -> Digest:
        """The digest of a round's base, whose bytes are at hand then: fetched, or merged again from an older one.

        Raises:
            WorldError: neither is possible.
        """
        wanted = validate_reading(reading).base
        missing: list[Proposal] = []
        digest, before = wanted, book.get_before(reading)
        while self._blobs(digest) is None:
            proposal = before.proposal if before else None
            if before is None or proposal is None or proposal.new_base != digest:
                raise WorldError(f"nobody serves the base {wanted.hex()[:16]} any more")
            missing.append(proposal)
            digest, before = proposal.base, book.get_before(before)
        for proposal in reversed(missing):
            validate_held(self._blobs, proposal)
            if self._merge(proposal) != proposal.new_base:
                raise WorldError(
                    f"nobody serves the base {wanted.hex()[:16]}, and the merge of round {proposal.round} gives another"
                )
        return wanted

    def compare(
        self, proposal: Proposal, payload: Digest, draws: Sequence[int], largest: float, *, has_gaps: bool
    ) -> Remeasured:
        """An update's certified contribution beside `draws` of an auditor, in a round whose `largest` is this.

        Args:
            has_gaps: something of earlier rounds is not known here, and may have been repeated.
        """
        update = next(update for update in proposal.updates if update.payload == payload)
        num_readings = sum(score.payload == payload for reveal in proposal.reveals for score in reveal.scores)
        measured, spread = compute_expected_median(draws, num_readings)
        rounding = ROUNDING_OWN * abs(measured) + ROUNDING_ROUND * largest
        tolerance = math.ceil(TOLERANCE_SPREADS * spread + rounding)
        is_off = abs(update.contribution - measured) > tolerance
        note = ""
        if is_off and update.contribution < measured:
            if has_gaps:
                note = "less than measured here, perhaps for what it repeats of updates that are not at hand"
            elif self._network.scoring.work_steps and update.contribution <= 0:
                note = "less than measured here, perhaps for failed proofs of computation"
        return Remeasured(
            member=update.member,
            peer=update.peer,
            certified=update.contribution,
            measured=round(measured),
            spread=round(spread),
            tolerance=tolerance,
            is_finding=is_off and not note,
            note=note,
        )

    def compare_merge(self, proposal: Proposal) -> tuple[str, ...]:
        """Whether the certified updates merge to the certified base; their bytes are at hand."""
        made = self._merge(proposal)
        if made == proposal.new_base:
            return ()
        return (f"base: the certified updates merge to {made.hex()}, the chain holds {proposal.new_base.hex()}",)

    def _merge(self, proposal: Proposal) -> Digest:
        action = merge_request(proposal)
        if action is None:
            return proposal.base
        return work.merge_updates(self._blobs, self._shapes, self._network, action).new_base

    def _evaluate(self, base: Digest) -> float:
        loss = self.learner.evaluate(decode_tensors(self._blobs.get(base), self._shapes))
        if not math.isfinite(loss):
            raise WorldError("the held-out loss is no finite number at this base")
        return loss


def _set_aside(merge: Merge, payload: Digest) -> Merge:
    rest = (Weighted(item.payload, Weight(0) if item.payload == payload else item.weight) for item in merge.updates)
    return msgspec.structs.replace(merge, updates=tuple(rest))


def open_meter(config: NodeConfig, blobs: Blobs) -> Meter:
    """Load the network's backbone and probe.

    Raises:
        OperatorError: the model is not on this machine, or nobody gives the declared probe.
    """
    network = config.network
    wanted = Digest(bytes.fromhex(network.probe))
    if config.probe:
        try:
            blobs.put(Path(config.probe).read_bytes())
        except OSError as error:
            raise OperatorError(
                f"probe: {config.probe}: {error.strerror}. Check the path in the node's TOML"
            ) from error
    data = blobs(wanted)
    if data is None:
        raise OperatorError(
            f"probe: nobody serves the probe set {wanted.hex()[:16]} that the network declares; start the node, or "
            "set `probe` in its TOML to the file"
        )
    probe = parse_probe(data, "the probe set")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.disable_progress_bar()
    model, tokenizer = load_backbone(resolve(network.backbone), device=choose_device())
    public = next(iter(probe.probe.values()))  # it must have samples to train on, and never trains
    return Meter(TorchLearner(model, tokenizer, network, public, probe), blobs, network)


def check_rounds(
    meter: Meter,
    book: Book,
    readings: Sequence[Reading],
    get_roster: Callable[[int], Roster | None],
    num_draws: int,
    seconds: float,
    tell: Tell,
) -> tuple[DeepCheck, ...]:
    """Check rounds, the newest first, for about `seconds`: those for which there was no time say so.

    Returns them in the order of rounds.

    Args:
        get_roster: by position; None: the registry of then cannot be told.
    """
    began, checks, slowest = time.monotonic(), [], 0.0
    for number, reading in enumerate(reversed(readings)):
        start = time.monotonic()
        if number and start - began + slowest > seconds:
            note = f"not measured: no time left of {seconds / 60:g} minutes (--minutes, --round)"
            checks.append(DeepCheck(reading.settled.round, (), (), (note,)))
            continue

        def tell_all(done: int, total: int, what: str, number: int = number) -> None:
            tell(number * total + done, len(readings) * total, what)

        roster = get_roster(reading.settled.position)
        if roster is None:
            checks.append(DeepCheck(reading.settled.round, (), (), ("not measured: its registry cannot be told",)))
            continue
        checks.append(meter.check_round(book, reading, roster, num_draws, tell_all))
        slowest = max(slowest, time.monotonic() - start)
    return tuple(reversed(checks))


def compute_balances(checks: Sequence[DeepCheck]) -> tuple[Balance, ...]:
    """Each peer's sums over the rounds in which it was measured without a note, by registry index; then the shards'.

    Spreads of different rounds add as squares, what rounding may change adds as it is.
    """
    by_member: dict[tuple[bool, MemberIndex], list[Remeasured]] = {}
    for update in (update for check in checks for update in check.updates if not update.note):
        by_member.setdefault((is_shard_name(update.peer), update.member), []).append(update)
    balances = []
    for (_, member), updates in sorted(by_member.items()):
        certified, measured = sum(item.certified for item in updates), sum(item.measured for item in updates)
        rounding = sum(item.tolerance - TOLERANCE_SPREADS * item.spread for item in updates)
        tolerance = math.ceil(TOLERANCE_SPREADS * math.hypot(*(item.spread for item in updates)) + rounding)
        is_off = abs(certified - measured) > tolerance
        balances.append(Balance(member, updates[0].peer, len(updates), certified, measured, tolerance, is_off))
    return tuple(balances)


def draw_audit_seed(data_digest: Digest, number: int) -> int:
    """The seed of an audit's sample: the same for every auditor of a round, and not known before it was certified."""
    drawn = compute_digest(b"p2pfm audit" + data_digest + number.to_bytes(8, "big"))
    return int.from_bytes(drawn[:8], "big") >> 1


def compute_expected_median(draws: Sequence[int], num_readings: int) -> tuple[float, float]:
    """(expected lower median of so many honest readings, standard deviation of its difference from the certified one).

    Exactly what resampling the draws without end would give: the r-th smallest of n is at most the k-th of m draws
    with the probability that r or more of n fall there. What is not known for having so few draws is added.

    Raises:
        ValueError: fewer than two draws, or no readings.
    """
    if len(draws) < 2 or num_readings < 1:
        raise ValueError(f"expected two draws or more and a reading, got {len(draws)} and {num_readings}")
    ordered, rank = sorted(draws), (num_readings - 1) // 2 + 1
    below = [_at_least(rank, num_readings, place / len(ordered)) for place in range(len(ordered) + 1)]
    chances = [right - left for left, right in pairwise(below)]
    mean = sum(chance * value for chance, value in zip(chances, ordered, strict=True))
    spread = statistics.stdev(draws)
    variance = sum(chance * (value - mean) ** 2 for chance, value in zip(chances, ordered, strict=True))
    # Resampled from m draws a variance is (m - 1) / m of what it is; the centre itself is as uncertain as a mean of m.
    variance *= len(draws) / (len(draws) - 1)
    return mean, math.sqrt(variance + spread**2 / len(draws))


def _at_least(rank: int, count: int, chance: float) -> float:
    """The probability of `rank` or more successes in `count` trials."""
    return sum(
        math.comb(count, hits) * chance**hits * (1 - chance) ** (count - hits) for hits in range(rank, count + 1)
    )
