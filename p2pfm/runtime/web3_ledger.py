"""`Web3Ledger`: the contract on any Ethereum JSON-RPC endpoint, as `settlement.ledger.Ledger` wants it.

The contract's storage holds a hash a round; what happened stands in its logs, which are followed here and compared
with its state. Calls block: a driver runs them in a worker thread. Every change is idempotent, so that a caller who
lost the answer just calls again. Knows no round's protocol.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
from eth_abi.abi import encode
from eth_hash.auto import keccak
from web3 import Web3
from web3.exceptions import Web3Exception

from p2pfm.config import ChainConfig, NodeConfig
from p2pfm.errors import ChainError, OperatorError, Reverted
from p2pfm.runtime.chain_rpc import NoContract, Rpc
from p2pfm.runtime.log_follower import LogFollower
from p2pfm.settlement import bls, merkle
from p2pfm.settlement.ledger import (
    Accepted,
    Claimed,
    Closed,
    Contested,
    Demand,
    Demanded,
    Entry,
    FederationParams,
    Funded,
    Happening,
    Joined,
    LeafValue,
    Left,
    Member,
    Restarted,
    Roster,
    Rotated,
    SettledRound,
    Shown,
    Slashed,
    Submission,
    Sums,
    Voided,
    Withdrawn,
)
from p2pfm.settlement.merkle import EMPTY_ROOT
from p2pfm.settlement.proofs import get_demand, is_settled, make_proof
from p2pfm.types import Digest, MemberIndex, PeerId, Round, Wei

VERSION = 3
"""Of the contract's interface (IFederation.VERSION)."""

TOKEN_SUPPLY = Wei(10**9 * 10**18)
"""What `deploy` mints: a thousand million PFM [wei]."""

STATE_FRESH_S = 0.5
"""A poll reads registry, head and pool one after the other: they share one call."""
PAGE = 64
"""Members a call, so that no answer grows with the network."""
AGREE_TRIES_MAX = 5
"""Logs and state are read one after the other: a block may come between. More often than this, somebody lies."""

CONFIRMED_MAX = 64
"""So many newest records are compared with the contract's hash of them: those that anybody still acts on."""
SPEND_TRIES_MAX = 3
"""Another thread of this account, or a transaction that a reorganisation brought back, may spend what was approved."""

FAULTS = ("reward", "transition", "leaf", "equivocation")
"""In the order of the contract's enum."""

ROUND_MAX = 2**48 - 1
"""The contract's type of it; messages carry larger numbers."""

READ_ONLY_KEY = (1).to_bytes(32, "big")
"""For who only reads: a key that everyone knows and nobody funds."""


class _Kept(msgspec.Struct, frozen=True):
    """A round, and its record as the contract wants to see it again."""

    settled: SettledRound
    record: Any


class Web3Ledger:
    """The Ledger of one account."""

    def __init__(
        self,
        rpc_url: str,
        chain: ChainConfig,
        private_key: bytes,
        confirmations: int = 1,
        fresh_s: float = STATE_FRESH_S,
        witness_url: str = "",
    ) -> None:
        """Connects on first use, so that a node can start while the chain is down.

        Args:
            confirmations: blocks, its own included, after which a transaction counts as done.
            fresh_s: how old an answer of the chain may be [s]; one's own changes are seen at once.
            witness_url: a second endpoint, of somebody else, that must tell the same rounds; empty: none.
        """
        self._fresh_s = fresh_s
        self._chain = chain
        self._rpc = Rpc(rpc_url, chain.chain_id, private_key, confirmations)
        self._federation: Any = self._rpc.contract("Federation", chain.federation)
        self._token: Any = self._rpc.contract("PFMToken", chain.token)
        self._serving: Any = self._rpc.contract("ServingPool", chain.serving_pool) if chain.serving_pool else None
        self._witness = Rpc(witness_url, chain.chain_id, READ_ONLY_KEY) if witness_url else None
        self._lock = threading.RLock()
        self._follower: LogFollower | None = None
        self._params: FederationParams | None = None
        self._state: Any = None
        self._state_at = 0.0
        self._members: list[Member] = []
        self._num_changes = 0
        """Logs so far that changed a member: then the registry is read anew."""
        self._happenings: list[Happening] = []
        """By log of the federation."""
        self._rounds: list[_Kept] = []
        self._committees: dict[int, tuple[MemberIndex, ...]] = {}
        self._demands: list[Demand] = []
        self._times: dict[int, int] = {}
        self._confirmed: set[tuple[int, Any]] = set()
        """By position: records whose hash is the contract's."""
        self._decoders = self._make_decoders()

    @property
    def account(self) -> str:
        """The checksummed address that pays and, once registered, is paid."""
        return self._rpc.account

    # --- reads -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Whether this is the chain and the contract that the network names.

        Raises:
            ChainError: unreachable, another chain id, no such contract, or one of another version.
        """
        with self._lock:
            if self._follower is not None:
                return
            self._rpc.check()
            try:
                version = self._rpc.call(self._federation.functions.VERSION())
                if version != VERSION:
                    raise ChainError(f"expected a federation of version {VERSION}, got {version}; update p2pfm")
                token = self._rpc.call(self._federation.functions.token())
                self._params = _params(self._rpc.call(self._federation.functions.params()), self._check_serving())
                first = self._rpc.call(self._federation.functions.DEPLOYED_BLOCK())
            except (NoContract, Reverted) as error:
                raise ChainError(
                    f"no p2pfm federation at {self._chain.federation} on chain {self._chain.chain_id}; "
                    "check network.chain.federation"
                ) from error
            if token != self._chain.token:
                raise ChainError(f"expected reward token {self._chain.token}, but the federation pays in {token}")
            self._follower = LogFollower(self._rpc, self._chain.federation, first)

    def _check_serving(self) -> Wei:
        """Most that an epoch allots out of the network's serving pool. Raises: ChainError, if it is another's."""
        if self._serving is None:
            return Wei(0)
        try:
            federation = self._rpc.call(self._serving.functions.FEDERATION())
            per_epoch = self._rpc.call(self._serving.functions.PER_EPOCH())
        except (NoContract, Reverted) as error:
            raise ChainError(
                f"no p2pfm serving pool at {self._chain.serving_pool}; check network.chain.serving_pool"
            ) from error
        if federation != self._chain.federation:
            raise ChainError(f"the serving pool at {self._chain.serving_pool} is of another federation, {federation}")
        return Wei(per_epoch)

    def get_params(self) -> FederationParams:
        """See Ledger."""
        self.check()
        assert self._params is not None, "set by check"
        return self._params

    def get_roster(self) -> Roster:
        """See Ledger."""
        with self._lock:
            state = self._read()
            changes = sum(isinstance(what, Joined | Left | Withdrawn | Slashed) for what in self._happenings)
            if changes != self._num_changes or len(self._members) != state["numMembers"]:
                self._members = self._read_members(state["numMembers"])
                self._num_changes = changes
            committee = self._committees.get(state["epoch"], ())
            return Roster(state["epoch"], state["nonce"], tuple(self._members), committee, state["epochMin"])

    def get_committee(self, epoch: int) -> tuple[MemberIndex, ...]:
        """See Ledger."""
        with self._lock:
            self._read()
            return self._committees.get(epoch, ())

    def get_head(self) -> SettledRound | None:
        """See Ledger."""
        with self._lock:
            state = self._read()
            return self._with_finality(self._rounds[-1].settled, state) if self._rounds else None

    def get_rounds(self, first: Round) -> tuple[SettledRound, ...]:
        """See Ledger."""
        with self._lock:
            state = self._read()
            return tuple(
                self._with_finality(kept.settled, state) for kept in self._rounds if kept.settled.round >= first
            )

    def get_demands(self) -> tuple[Demand, ...]:
        """See Ledger."""
        with self._lock:
            self._read()
            return tuple(self._demands)

    def get_entries(self) -> tuple[Entry, ...]:
        """See Ledger."""
        with self._lock:
            self._read()
            assert self._follower is not None, "set by check"
            return tuple(
                Entry(int(log["blockNumber"]), self._get_time(log), log["transactionHash"].to_0x_hex(), what)
                for log, what in zip(self._follower.logs, self._happenings, strict=True)
            )

    def get_claimed(self, index: MemberIndex) -> Wei:
        """See Ledger."""
        self.check()
        return Wei(self._rpc.call(self._federation.functions.claimed(index)))

    def get_balance(self, account: str) -> Wei:
        """See Ledger."""
        self.check()
        return Wei(self._rpc.call(self._token.functions.balanceOf(account)))

    def get_ether(self, account: str) -> int:
        """What an account holds to pay gas with [wei of ether]."""
        self.check()
        return self._rpc.get_ether(account)

    def get_time(self) -> int:
        """The newest block's time [s since 1970]."""
        self.check()
        return self._rpc.get_block()[2]

    def get_pool(self) -> Wei:
        """See Ledger."""
        with self._lock:
            return Wei(self._read()["pool"])

    def get_serving_pool(self) -> Wei:
        """See Ledger."""
        return self.get_balance(self._chain.serving_pool) if self._serving is not None else Wei(0)

    def get_claimed_served(self, index: MemberIndex) -> Wei:
        """See Ledger."""
        self.check()
        return Wei(self._rpc.call(self._serving.functions.claimed(index))) if self._serving is not None else Wei(0)

    # --- membership ------------------------------------------------------------------------------------------------

    def register(self, peer: PeerId, bls_key: bytes, possession: bytes, stake: Wei) -> MemberIndex:
        """See Ledger. Registering again with the same peer and key gives the same index."""
        held = self._find_member(peer, bls_key)
        if held is not None:
            return held
        try:
            key, proof = _words(bls.decompress_key(bls_key)), _words(bls.decompress_signature(possession))
        except ValueError as error:
            raise Reverted("BadPossession", str(error)) from error
        self._spend(stake, self._federation.functions.register(peer, key, proof, stake))
        index = self._find_member(peer, bls_key)
        if index is None:
            raise ChainError(f"{peer} was registered but is not in the registry: the endpoint lags, try again")
        return index

    def unbond(self) -> None:
        """See Ledger."""
        self._send(self._federation.functions.unbond())

    def withdraw(self) -> Wei:
        """See Ledger."""
        told = self._told(self._send(self._federation.functions.withdraw()), Withdrawn)
        return Wei(sum(withdrawn.amount for withdrawn in told))

    def rotate(self) -> None:
        """See Ledger."""
        self._send(self._federation.functions.rotate())

    # --- rounds and rewards ----------------------------------------------------------------------------------------

    def fund(self, amount: Wei) -> None:
        """See Ledger."""
        self._spend(amount, self._federation.functions.fund(amount))

    def submit_round(self, submission: Submission) -> None:
        """See Ledger. A round that the chain holds already with this root is success: somebody was faster."""
        if self._is_settled(submission):
            return
        call = self._federation.functions.submitRound(self._certificate(submission))
        try:
            self._send(call)
        except Reverted:
            if not self._is_settled(submission):
                raise

    def claim(self, round: Round, index: MemberIndex, leaves: tuple[LeafValue, ...]) -> Wei:
        """See Ledger. Nothing is sent when nothing is left to draw."""
        kept = self._find_round(round)
        proof = _proof(leaves, index)
        call = self._federation.functions.claim(kept.settled.position, kept.record, index, proof)
        if self._rpc.call(call) == 0:
            return Wei(0)
        return Wei(sum(claimed.amount for claimed in self._told(self._send(call), Claimed)))

    def fund_serving(self, amount: Wei) -> None:
        """See Ledger."""
        if self._serving is None:
            raise Reverted("NoServingPool", "this network pays nobody for serving")
        self.transfer(self._chain.serving_pool, amount)

    def claim_served(self, round: Round, index: MemberIndex, leaves: tuple[LeafValue, ...]) -> Wei:
        """See Ledger. Nothing is sent when nothing is left to draw."""
        if self._serving is None:
            return Wei(0)
        kept = self._find_round(round)
        call = self._serving.functions.claim(kept.settled.position, kept.record, index, _proof(leaves, index))
        paid = Wei(self._rpc.call(call))
        if paid:
            before = self.get_claimed_served(index)
            self._send(call)
            paid = Wei(self.get_claimed_served(index) - before)
        return paid

    def restart(self) -> None:
        """See Ledger."""
        self._send(self._federation.functions.restart())

    def transfer(self, account: str, amount: Wei) -> None:
        """Give reward tokens to an account. Raises: OperatorError, if it is none."""
        _refuse_no_address(account)
        self._send(self._token.functions.transfer(account, amount))

    def send_ether(self, account: str, amount_wei: int) -> None:
        """Give an account ether for gas. Raises: OperatorError, if it is none."""
        _refuse_no_address(account)
        self.check()
        self._rpc.send({"to": account, "value": amount_wei, "data": b""})

    # --- contests --------------------------------------------------------------------------------------------------

    def demand_leaf(self, round: Round, index: MemberIndex) -> int:
        """See Ledger."""
        kept = self._find_round(round)
        call = self._federation.functions.demandLeaf(kept.settled.position, kept.record, index)
        receipt = self._spend(self.get_params().leaf_bond, call)
        return int(self._told(receipt, Demanded)[0].demand.number)

    def show_leaf(self, number: int, leaves: tuple[LeafValue, ...]) -> None:
        """See Ledger."""
        demand = get_demand(self, number)
        record = self._record_at(demand.position)
        self._send(self._federation.functions.showLeaf(number, record, _proof(leaves, demand.index)))

    def close_demand(self, number: int) -> None:
        """See Ledger."""
        place = self._place(get_demand(self, number).position)
        self._send(self._federation.functions.closeDemand(number, place))

    def prove_reward(self, round: Round, index: MemberIndex, leaves: tuple[LeafValue, ...]) -> None:
        """See Ledger."""
        place = self._place(self._find_round(round).settled.position)
        self._send(self._federation.functions.proveReward(place, index, _proof(leaves, index)))

    def prove_transition(
        self, round: Round, index: MemberIndex, before: tuple[LeafValue, ...], leaves: tuple[LeafValue, ...]
    ) -> None:
        """See Ledger."""
        place = self._place(self._find_round(round).settled.position)
        earlier = _proof(before, index) if index < len(before) else ((0, 0, 0, 0), ())
        self._send(self._federation.functions.proveTransition(place, index, earlier, _proof(leaves, index)))

    def prove_equivocation(self, first: Submission, second: Submission) -> None:
        """See Ledger."""
        certificates = (self._certificate(first), self._certificate(second))
        self._send(self._federation.functions.proveEquivocation(*certificates))

    # --- following -------------------------------------------------------------------------------------------------

    def _read(self) -> Any:
        """The contract's state by field, and everything derived from its logs as of the same time.

        Raises:
            ChainError: unreachable, or the logs and the state, or two endpoints, tell different stories.
        """
        self.check()
        if self._state is not None and time.monotonic() - self._state_at < self._fresh_s:
            return self._state
        assert self._follower is not None, "set by check"
        for attempt in range(AGREE_TRIES_MAX):
            if attempt > 1:  # no block came between: logs were missing or false, perhaps for a moment only
                self._follower.forget()
            trouble = self._follow()
            state = _state(self._rpc.call(self._federation.functions.state()))
            trouble = trouble or self._find_difference(state)
            if not trouble:
                self._ask_witness()
                self._state, self._state_at = state, time.monotonic()
                return state
        self._follower.forget()
        raise ChainError(f"{trouble}: the endpoint is not to be trusted, name another as `rpc`")

    def _find_difference(self, state: Any) -> str:
        """Where logs and state tell different stories; empty if they agree."""
        head_root = self._rounds[-1].settled.root if self._rounds else EMPTY_ROOT
        if (len(self._rounds), bytes(head_root)) != (state["numRounds"], bytes(state["headRoot"])):
            return (
                f"the endpoint's logs tell {len(self._rounds)} rounds up to root {head_root.hex()[:10]}, its state "
                f"{state['numRounds']} up to {bytes(state['headRoot']).hex()[:10]}"
            )
        if max(self._committees, default=0) != state["epoch"]:
            return f"the endpoint's logs tell {max(self._committees, default=0)} epochs, its state {state['epoch']}"
        newest = {(kept.settled.position, kept.record) for kept in self._rounds[-CONFIRMED_MAX:]}
        for position, record in sorted(newest - self._confirmed):
            digest = bytes(self._rpc.call(self._federation.functions.recordHash(position)))
            if digest != keccak(encode([_RECORD_TYPE], [record])):
                return (
                    f"the endpoint's logs tell another record of round {self._rounds[position].settled.round} than its "
                    f"state, {digest.hex()[:10]}"
                )
        self._confirmed = newest
        return ""

    def _follow(self) -> str:
        """Derive everything from what the logs say now; returns what makes no sense in them, if anything does."""
        assert self._follower is not None, "set by check"
        if self._follower.update() < len(self._happenings):  # blocks were replaced: all is derived anew
            self._forget_derived()
        try:
            for log in self._follower.logs[len(self._happenings) :]:
                self._take(log)
        except (ValueError, LookupError, TypeError, Web3Exception) as error:
            self._forget_derived()
            return f"the endpoint's logs tell what the contract's state cannot be ({error!r:.80})"
        return ""

    def _forget_derived(self) -> None:
        self._happenings, self._rounds, self._demands, self._committees, self._times = [], [], [], {}, {}
        self._num_changes = -1

    def _take(self, log: Any) -> None:
        what = self._decoders[bytes(log["topics"][0])](log)
        self._happenings.append(what)
        match what:
            case Rotated(epoch=epoch, committee=committee):
                self._committees[epoch] = committee
            case Accepted(settled=settled):
                head_root = self._rounds[-1].settled.root if self._rounds else EMPTY_ROOT
                if (settled.position, settled.prev_root) != (len(self._rounds), head_root):
                    raise ValueError(f"round {settled.round} does not follow the one before it")
                record = _record(self._decode("RoundAccepted", log)["record"])
                self._rounds.append(_Kept(settled, record))
            case Voided(position=position):
                del self._rounds[position:]
            case Demanded(demand=demand):
                self._demands.append(demand)
            case Shown(number=number) | Closed(number=number):
                self._demands[number] = msgspec.structs.replace(self._demands[number], is_open=False)
            case _:
                pass

    def _ask_witness(self) -> None:
        """A second endpoint must hold the same newest round; a lie about older ones would change it."""
        if self._witness is None or not self._rounds:
            return
        position = self._rounds[-1].settled.position
        mine = self._rpc.call(self._federation.functions.recordHash(position))
        other: Any = self._witness.contract("Federation", self._chain.federation)
        theirs = self._witness.call(other.functions.recordHash(position))
        if mine != theirs:
            raise ChainError(
                f"two endpoints disagree about round {self._rounds[-1].settled.round}: `rpc` says {mine.hex()[:10]}, "
                f"`rpc_witness` {theirs.hex()[:10]}; nothing is done until they agree"
            )

    def _read_members(self, num_members: int) -> list[Member]:
        members: list[Member] = []
        while len(members) < num_members:
            page = self._rpc.call(self._federation.functions.members(len(members), PAGE))
            if not page:
                break
            members += [_member(len(members) + i, entry) for i, entry in enumerate(page)]
        return members

    def _get_time(self, log: Any) -> int:
        told = log.get("blockTimestamp")
        if told is not None:
            return int(told, 16) if isinstance(told, str) else int(told)
        number = int(log["blockNumber"])
        if number not in self._times:
            self._times[number] = self._rpc.get_block(number)[2]
        return self._times[number]

    def _with_finality(self, settled: SettledRound, state: Any) -> SettledRound:
        params = self.get_params()
        is_held = settled.position >= state["holdFrom"] and state["time"] < state["holdUntil"]
        window_s = params.contest_s if is_held else params.challenge_window_s
        is_final = state["time"] >= settled.accepted_s + window_s
        return msgspec.structs.replace(settled, is_final=True) if is_final else settled

    # --- from and to the contract's words --------------------------------------------------------------------------

    def _make_decoders(self) -> dict[bytes, Callable[[Any], Happening]]:
        """By a log's first topic: what it means."""
        meanings: dict[str, Callable[[Any], Happening]] = {
            "Registered": lambda a: Joined(a["index"], a["account"], a["peer"], a["stake"]),
            "Left": lambda a: Left(a["index"]),
            "Withdrawn": lambda a: Withdrawn(a["index"], a["amount"]),
            "Rotated": lambda a: Rotated(a["epoch"], tuple(a["committee"])),
            "Funded": lambda a: Funded(a["sponsor"], a["amount"]),
            "RoundAccepted": lambda a: Accepted(self._settled(a["position"], a["record"])),
            "Claimed": lambda a: Claimed(a["index"], a["round"], a["amount"]),
            "Demanded": lambda a: Demanded(
                Demand(a["number"], a["account"], a["position"], a["index"], a["deadline"], is_open=True)
            ),
            "Shown": lambda a: Shown(
                a["number"],
                a["account"],
                LeafValue(*(a["leaf"][name] for name in ("cumulative", "reward", "contribution", "served"))),
            ),
            "Closed": lambda a: Closed(a["number"]),
            "Slashed": lambda a: Slashed(a["index"], a["amount"]),
            "Contested": lambda a: Contested(a["round"], FAULTS[a["fault"]], a["account"], a["bounty"]),
            "Voided": lambda a: Voided(a["position"], a["round"], a["nonce"]),
            "Restarted": lambda a: Restarted(a["nonce"]),
        }

        def decoder(name: str) -> Callable[[Any], Happening]:
            return lambda log: meanings[name](self._decode(name, log))

        return {bytes.fromhex(self._federation.events[name]().topic[2:]): decoder(name) for name in meanings}

    def _decode(self, name: str, log: Any) -> Any:
        return self._federation.events[name]().process_log(log)["args"]

    def _told(self, receipt: Any, kind: type[Any]) -> list[Any]:
        """What a transaction's own logs say of this kind."""
        logs = [log for log in receipt["logs"] if log["address"] == self._chain.federation]
        told = [self._decoders[bytes(log["topics"][0])](log) for log in logs]
        return [what for what in told if isinstance(what, kind)]

    def _settled(self, position: int, record: Any) -> SettledRound:
        given = record["statement"]
        seats = self._committees.get(given["epoch"], ())
        return SettledRound(
            round=Round(given["round"]),
            epoch=given["epoch"],
            nonce=given["nonce"],
            prev_root=Digest(bytes(given["prevRoot"])),
            root=Digest(bytes(given["root"])),
            num_leaves=given["numLeaves"],
            sums=Sums(Wei(given["cumulative"]), Wei(given["reward"]), given["contribution"]),
            data_digest=Digest(bytes(given["data"])),
            base=Digest(bytes(given["base"])),
            absent=tuple(sorted(index for seat, index in enumerate(seats) if record["absent"] >> seat & 1)),
            position=position,
            accepted_s=record["acceptedAt"],
            is_final=False,
        )

    def _certificate(self, submission: Submission) -> Any:
        """As the contract takes it: who is absent by seat. Raises: Reverted (BadAbsent, BadRound, BadSignature)."""
        seats = self.get_committee(submission.epoch)
        absent = list(submission.absent)
        if sorted(set(absent)) != absent or not set(absent) <= set(seats):
            raise Reverted("BadAbsent" if seats else "BadEpoch")
        if submission.round > ROUND_MAX:
            raise Reverted("BadRound", f"expected at most {ROUND_MAX}")
        try:
            signature = _words(bls.decompress_signature(submission.signature))
        except ValueError as error:
            raise Reverted("BadSignature", str(error)) from error
        return _statement(submission), sum(1 << seats.index(index) for index in absent), signature

    def _find_member(self, peer: PeerId, bls_key: bytes) -> MemberIndex | None:
        for member in self.get_roster().members:
            if (member.account, member.peer, member.bls_key) == (self.account, peer, bls_key) and member.active:
                return member.index
        return None

    def _find_round(self, round: Round) -> _Kept:
        with self._lock:
            self._read()
            kept = next((kept for kept in self._rounds if kept.settled.round == round), None)
        if kept is None:
            raise Reverted("UnknownRound", f"round {round} is not on chain")
        return kept

    def _record_at(self, position: int) -> Any:
        """The record at a position; zeros where no round stands (any more)."""
        with self._lock:
            self._read()
            return self._rounds[position].record if 0 <= position < len(self._rounds) else _NO_RECORD

    def _place(self, position: int) -> Any:
        return position, self._record_at(position), self._record_at(position - 1)

    def _is_settled(self, submission: Submission) -> bool:
        return is_settled(self.get_rounds(submission.round), submission)

    def _spend(self, amount: Wei, call: Any) -> Any:
        """The receipt of a call that takes tokens from this account."""
        for _ in range(SPEND_TRIES_MAX - 1):
            self._approve(amount)
            try:
                return self._send(call)
            except Reverted as error:
                if error.reason != "ERC20InsufficientAllowance":
                    raise
        self._approve(amount)
        return self._send(call)

    def _approve(self, amount: Wei) -> None:
        self.check()
        if self._rpc.call(self._token.functions.allowance(self.account, self._chain.federation)) < amount:
            self._send(self._token.functions.approve(self._chain.federation, amount))

    def _send(self, call: Any) -> Any:
        self.check()
        try:
            return self._rpc.send({"to": call.address, "value": 0, "data": call._encode_transaction_data()})
        finally:
            with self._lock:
                self._state = None


def _refuse_no_address(account: str) -> None:
    if not Web3.is_address(account):  # sent to "", ether would make a contract
        raise OperatorError(f"expected an account, 0x and 40 hex digits, got {account!r}")


def open_ledger(config: NodeConfig, private_key: bytes) -> Web3Ledger:
    """The ledger that a node's configuration names, for the account of this key."""
    return Web3Ledger(
        config.rpc,
        config.network.chain,
        private_key,
        confirmations=config.confirmations,
        witness_url=config.rpc_witness,
    )


def deploy(rpc_url: str, private_key: bytes, params: FederationParams, supply: Wei = TOKEN_SUPPLY) -> ChainConfig:
    """Deploy token and federation; the deployer holds the whole supply.

    Raises:
        ChainError: unreachable, or not enough ether.
        Reverted: BadParameter.
    """
    rpc = Rpc(rpc_url, None, private_key)
    chain_id = rpc.check()
    token = rpc.deploy("PFMToken", (rpc.account, supply))
    rules = (
        params.committee_size,
        params.members_max,
        params.min_stake,
        params.leaf_bond,
        params.pool_per_epoch,
        params.rounds_per_epoch,
        params.challenge_window_s,
        params.response_s,
        params.unbonding_s,
        params.rotation_s,
        params.restart_s,
    )
    federation = rpc.deploy("Federation", (token, rules))
    per_epoch = params.serving_per_epoch
    pool = rpc.deploy("ServingPool", (federation, token, per_epoch)) if per_epoch else ""
    return ChainConfig(chain_id, federation, token, pool)


_NO_RECORD = ((0, 0, 0, EMPTY_ROOT, EMPTY_ROOT, 0, 0, 0, 0, EMPTY_ROOT, EMPTY_ROOT), 0, 0)

_STATEMENT = (
    *("epoch", "nonce", "round", "prevRoot", "root", "numLeaves"),
    *("cumulative", "reward", "contribution", "data", "base"),
)

_RECORD_TYPE = "((uint32,uint32,uint48,bytes32,bytes32,uint32,uint128,uint128,uint128,bytes32,bytes32),uint256,uint64)"

_STATE = (
    *("time", "epoch", "epochMin", "nonce", "numMembers", "numRounds", "headRound", "headRoot"),
    *("pool", "cumulative", "claimed", "holdFrom", "holdUntil"),
)


def _state(values: Any) -> dict[str, Any]:
    return dict(zip(_STATE, values, strict=True))


def _record(told: Any) -> Any:
    """As the contract takes it, from the log that told it."""
    return tuple(told["statement"][name] for name in _STATEMENT), told["absent"], told["acceptedAt"]


def _params(values: Any, serving_per_epoch: Wei) -> FederationParams:
    size, members_max, stake, bond, pool, rounds, window, response, unbonding, rotation, restart = values
    return FederationParams(
        committee_size=size,
        min_stake=Wei(stake),
        challenge_window_s=window,
        pool_per_epoch=Wei(pool),
        rounds_per_epoch=rounds,
        rotation_s=rotation,
        restart_s=restart,
        members_max=members_max,
        response_s=response,
        unbonding_s=unbonding,
        leaf_bond=Wei(bond),
        serving_per_epoch=serving_per_epoch,
    )


def _proof(leaves: tuple[LeafValue, ...], index: MemberIndex) -> Any:
    proof = make_proof(leaves, index)
    return (
        (proof.leaf.cumulative_wei, proof.leaf.reward_wei, proof.leaf.contribution, proof.leaf.served_wei),
        [_node(sibling) for sibling in proof.siblings],
    )


def _node(node: merkle.Node) -> Any:
    return node.digest, node.sums.cumulative_wei, node.sums.reward_wei, node.sums.contribution


def _words(point: bytes) -> list[int]:
    return [int.from_bytes(point[i : i + 32], "big") for i in range(0, len(point), 32)]


def _member(index: int, entry: Any) -> Member:
    account, stake, is_active, peer, key = entry
    point = b"".join(word.to_bytes(32, "big") for word in key)
    return Member(
        MemberIndex(index),
        Web3.to_checksum_address(account),
        PeerId(peer),
        bls.compress_key(point),
        Wei(stake),
        is_active,
    )


def _statement(submission: Submission) -> tuple[Any, ...]:
    return (
        submission.epoch,
        submission.nonce,
        submission.round,
        submission.prev_root,
        submission.root,
        submission.num_leaves,
        submission.sums.cumulative_wei,
        submission.sums.reward_wei,
        submission.sums.contribution,
        submission.data_digest,
        submission.base,
    )
