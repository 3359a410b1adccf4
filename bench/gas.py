"""Gas of everything that the contract does, by committee and by size of the rewards tree, beside plainer ways to pay.

    python bench/gas.py [--json FILE] [--check] [--quick]

Every figure is `gasUsed` of a transaction that passed on a local chain with Prague's rules: anvil, or the embedded
chain where Node.js is missing, whose trees are no larger than its registries.

A tree of n leaves needs a registry of n members, and to register 10,000 takes too long: the length of the registry is
written into the contract's storage (`anvil_setStorageAt`). Members beyond the committee are empty then. That changes no
gas of a round, a claim or a proof, which read the length alone. For rotations by size of the registry, which read every
stake, account and stake of every member are written too. The references are compiled code (bench/gas_references), sent
in transactions of so many peers as fit the gas cap; what is marked ~ is extrapolated from the largest measured.
"""

import hashlib
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import harness
import httpx
import msgspec
from eth_account import Account
from web3 import HTTPProvider, Web3

from nodes.evm import TRANSACTION_GAS_MAX
from nodes.testnet import CHAIN_ID, account_keys, find_anvil, run_testnet
from p2pfm.config import ChainConfig
from p2pfm.runtime.chain_rpc import read_artifact
from p2pfm.runtime.web3_ledger import deploy
from p2pfm.settlement import bls, merkle
from p2pfm.settlement.ledger import FederationParams, LeafValue, Submission, Sums
from p2pfm.settlement.rewards import compute_leaves, submission_message
from p2pfm.types import Digest, MemberIndex, PeerId, Round, Wei

CODE_BYTES_MAX = 24_576
PFM = ETHER = 10**18
MEMBERS_SLOT = 6
"""Of `Federation._members` (storage layout); the registry's length is compared with what lies there before."""
MEMBER_SLOTS = 5
"""Of a Federation.Member."""
BATCH = 500
"""Peers a transaction of the references: pushing to so many new holders fits the cap."""
REFERENCES = Path(__file__).parent / "gas_references"
PARAMS = FederationParams(
    committee_size=4,
    min_stake=Wei(100 * PFM),
    challenge_window_s=86_400,
    pool_per_epoch=Wei(1000 * PFM),
    rounds_per_epoch=1,
    rotation_s=3600,
    restart_s=400_000,
    members_max=1000,
    response_s=43_200,
    unbonding_s=300_000,
    leaf_bond=Wei(10 * PFM),
)
NO_RECORD = ((0, 0, 0, bytes(32), bytes(32), 0, 0, 0, 0, bytes(32), bytes(32)), 0, 0)
FIELDS = (
    *("epoch", "nonce", "round", "prevRoot", "root", "numLeaves"),
    *("cumulative", "reward", "contribution", "data", "base"),
)


class Size(NamedTuple):
    """How much is run."""

    committees: tuple[int, ...]
    trees: tuple[int, ...]
    registries: tuple[int, ...]
    """Whose rotation is measured."""
    references: tuple[int, ...]
    """Peers that the references really pay; the last one's figures are extrapolated to larger trees."""


DEFAULT = Size((4, 16, 64), (10, 100, 1000, 10_000), (100, 1000, 2000, 4000), (10, 100, 1000))
QUICK = Size((4,), (10, 100), (100,), (10, 100))
EMBEDDED = Size((4,), (2, 4), (), (10,))
"""Nothing can be written into its storage."""


# --- a chain, and a federation on it ----------------------------------------------------------------------------------


class Chain:
    """Transactions and their gas."""

    def __init__(self, url: str, is_anvil: bool) -> None:
        self.url, self.is_anvil = url, is_anvil
        self.web3 = Web3(HTTPProvider(url))
        self.sponsor = account_keys(1)[0]
        self.most = 0
        """Gas of the largest transaction of a federation so far."""
        self._nonces: dict[bytes, int] = {}

    def send(self, call: Any, key: bytes | None = None) -> int:
        """Gas that a call used as a transaction. It must pass."""
        return self._send(call.build_transaction, key or self.sponsor)

    def send_ether(self, account: str) -> None:
        """Enough for any number of calls."""
        self._send(lambda fields: {**fields, "to": account, "value": 100 * ETHER, "chainId": CHAIN_ID}, self.sponsor)

    def create(self, abi: Any, bytecode: str) -> Any:
        """A contract without arguments, deployed."""
        call = self.web3.eth.contract(abi=abi, bytecode=bytecode).constructor()
        nonce = self._nonce(self.sponsor)
        self.send(call)
        return self.web3.eth.contract(address=_created(self.web3, self.sponsor, nonce), abi=abi)

    def at(self, address: str, name: str) -> Any:
        """One of our contracts."""
        return self.web3.eth.contract(address=self.web3.to_checksum_address(address), abi=read_artifact(name)["abi"])

    def advance(self, seconds: int) -> None:
        """Let time pass."""
        self._rpc([("evm_increaseTime", [seconds])])
        self._rpc([("evm_mine", [])])

    def write(self, address: str, slots: Mapping[int, int]) -> None:
        """Into a contract's storage, past its code (anvil only)."""
        calls = [("anvil_setStorageAt", [address, hex(slot), f"0x{value:064x}"]) for slot, value in slots.items()]
        for first in range(0, len(calls), BATCH):
            self._rpc(calls[first : first + BATCH])

    def forget_nonces(self) -> None:
        """Somebody else has sent from our keys."""
        self._nonces.clear()

    def _rpc(self, calls: Sequence[tuple[str, list[Any]]]) -> None:
        requests = [
            {"jsonrpc": "2.0", "id": i, "method": method, "params": params} for i, (method, params) in enumerate(calls)
        ]
        answer = httpx.post(self.url, json=requests if len(requests) > 1 else requests[0], timeout=60).json()
        for part in answer if isinstance(answer, list) else [answer]:
            assert "error" not in part, part

    def _nonce(self, key: bytes) -> int:
        if key not in self._nonces:
            self._nonces[key] = self.web3.eth.get_transaction_count(Account.from_key(key).address)
        return self._nonces[key]

    def _send(self, build: Callable[[Any], Any], key: bytes) -> int:
        fields = {
            "from": Account.from_key(key).address,
            "nonce": self._nonce(key),
            "gas": TRANSACTION_GAS_MAX,
            "gasPrice": 2 * self.web3.eth.get_block("latest")["baseFeePerGas"] + 1,
        }
        transaction = {name: value for name, value in build(fields).items() if name != "from"}
        signed = Account.sign_transaction(transaction, key)
        digest = self.web3.eth.send_raw_transaction(signed.raw_transaction)
        self._nonces[key] += 1
        receipt = self.web3.eth.wait_for_transaction_receipt(digest, timeout=60, poll_latency=0.005)
        if not receipt["status"]:
            raise RuntimeError(f"a transaction failed with {receipt['gasUsed']} gas")
        return int(receipt["gasUsed"])


@dataclass
class Federation:
    """One, with members who sign; every call is measured."""

    chain: Chain
    config: ChainConfig
    contract: Any
    keys: list[bytes]
    """Of accounts, by registry index."""
    secrets: list[int]
    gas: dict[str, int] = field(default_factory=dict)
    """By what was done; the last time counts."""
    trees: list[tuple[LeafValue, ...]] = field(default_factory=list)
    """By position."""
    levels: list[merkle.Levels] = field(default_factory=list)

    def do(self, name: str, call: Any, key: bytes | None = None) -> int:
        """Send and note."""
        used = self.chain.send(call, key)
        self.gas[name] = used
        self.chain.most = max(self.chain.most, used)
        return used

    def grow(self, num_members: int, is_staked: bool = False) -> None:
        """Write the registry's length, and the stakes, into storage. A no-op where the registry is as large."""
        count = len(self.keys)
        if num_members <= count:
            return
        stored = self.chain.web3.eth.get_storage_at(self.contract.address, MEMBERS_SLOT)
        assert int.from_bytes(stored, "big") == count, "the storage layout has changed: mend MEMBERS_SLOT"
        slots = {MEMBERS_SLOT: num_members}
        if is_staked:
            start = int.from_bytes(Web3.keccak(MEMBERS_SLOT.to_bytes(32, "big")), "big")
            slots |= {
                (start + MEMBER_SLOTS * i) % 2**256: PARAMS.min_stake << 160 | (i + 1)
                for i in range(count, num_members)
            }
        self.chain.write(self.contract.address, slots)
        assert self.contract.functions.state().call()[4] == num_members

    def draft(self, leaves: tuple[LeafValue, ...], num_absent: int = 0, **changes: Any) -> tuple[Submission, Any]:
        """The next round with these leaves, and its certificate as the contract takes it."""
        state = self.contract.functions.state().call()
        epoch, nonce, num_rounds, head_round, head_root = state[1], state[3], state[5], state[6], state[7]
        seats = self.contract.functions.committee(epoch).call()
        levels = merkle.build(leaves)
        root = levels[-1][0]
        submission = Submission(
            round=Round(head_round + 1 if num_rounds else 0),
            epoch=epoch,
            nonce=nonce,
            prev_root=Digest(bytes(head_root)),
            root=root.digest,
            num_leaves=len(leaves),
            sums=root.sums,
            data_digest=Digest(Web3.keccak(text="data")),
            base=Digest(Web3.keccak(text="base")),
            absent=(),
            signature=b"",
        )
        submission = msgspec.structs.replace(submission, **changes)
        self._levels = levels
        message = submission_message(self.config, submission)
        signature = bls.aggregate([bls.sign(self.secrets[index], message) for index in seats[num_absent:]])
        return submission, (_statement(submission), (1 << num_absent) - 1, _words(bls.decompress_signature(signature)))

    def settle(self, name: str, leaves: tuple[LeafValue, ...], num_absent: int = 0) -> int:
        """Submit a round with these leaves."""
        _, certificate = self.draft(leaves, num_absent)
        used = self.do(name, self.contract.functions.submitRound(certificate))
        self.trees.append(leaves)
        self.levels.append(self._levels)
        return used

    def next_leaves(self, num_leaves: int, seed: int = 0) -> tuple[LeafValue, ...]:
        """The honest leaves of a paying round: everybody has contributed."""
        random = Random(seed)
        gains = {MemberIndex(i): random.randrange(10**6, 10**9) for i in range(num_leaves)}
        before = self.trees[-1] if self.trees else ()
        return compute_leaves(before, gains, num_leaves, PARAMS.pool_per_epoch, True, True)

    def proof(self, position: int, index: int) -> Any:
        """As the contract takes it."""
        siblings = merkle.prove(self.levels[position], MemberIndex(index))
        return _leaf(self.trees[position][index]), [(node.digest, *_sums(node.sums)) for node in siblings]

    def record(self, position: int) -> Any:
        """As the log of its acceptance tells it."""
        if position < 0:
            return NO_RECORD
        events = self.contract.events.RoundAccepted()
        told = events.get_logs(from_block=0, argument_filters={"position": position})[-1]["args"]["record"]
        return tuple(told["statement"][name] for name in FIELDS), told["absent"], told["acceptedAt"]

    def place(self, position: int) -> Any:
        """With the record before."""
        return position, self.record(position), self.record(position - 1)

    def claim(self, name: str, index: int) -> int:
        """A member's own, from the newest round."""
        position = len(self.trees) - 1
        call = self.contract.functions.claim(position, self.record(position), index, self.proof(position, index))
        return self.do(name, call, self.keys[index])


def found(chain: Chain, committee_size: int) -> Federation:
    """A federation whose members are its committee; its pool pays for some rounds."""
    chain.forget_nonces()
    config = deploy(chain.url, chain.sponsor, msgspec.structs.replace(PARAMS, committee_size=committee_size))
    chain.forget_nonces()
    contract, token = chain.at(config.federation, "Federation"), chain.at(config.token, "PFMToken")
    keys = [bytes(Web3.keccak(text=f"member {i}")) for i in range(committee_size)]
    secrets = [bls.key_from_seed(Web3.keccak(text=f"secret {i}")) for i in range(committee_size)]
    federation = Federation(chain, config, contract, keys, secrets)
    for i, (key, secret) in enumerate(zip(keys, secrets, strict=True)):
        account = Account.from_key(key).address
        if chain.web3.eth.get_balance(account) < 50 * ETHER:
            chain.send_ether(account)
        chain.send(token.functions.transfer(account, PARAMS.min_stake))
        chain.send(token.functions.approve(config.federation, PARAMS.min_stake), key)
        peer = PeerId(f"12D3KooW{Web3.keccak(text=str(i)).hex()[:44]}")
        point = _words(bls.decompress_key(bls.public_key(secret)))
        proof = _words(bls.decompress_signature(bls.prove_possession(secret, config, account, peer)))
        federation.do("join", contract.functions.register(peer, point, proof, PARAMS.min_stake), key)
    chain.send(token.functions.approve(config.federation, 10**30))
    federation.do("fund", contract.functions.fund(100 * PARAMS.pool_per_epoch))
    federation.do("rotate", contract.functions.rotate())
    return federation


# --- what is measured -------------------------------------------------------------------------------------------------


def measure_rounds(chain: Chain, committee_size: int, trees: Sequence[int]) -> tuple[dict[str, int], dict[int, Any]]:
    """Joining, rotating, settling, leaving by this committee; settling and claiming by tree."""
    federation = found(chain, committee_size)
    federation.grow(trees[-1])
    federation.settle("settle, the very first", federation.next_leaves(trees[0]))
    chain.advance(PARAMS.challenge_window_s)
    federation.claim("claim, the federation's first", 0)
    by_tree: dict[int, Any] = {}
    # Each tree wants a member who has claimed nothing yet.
    for index, num_leaves in enumerate(trees[1 - committee_size :], start=1):
        settled = federation.settle("settle, all signing", federation.next_leaves(num_leaves, seed=index))
        absent = (committee_size - 1) // 3
        federation.settle("settle, 1/3 absent", federation.next_leaves(num_leaves, seed=50 + index), absent)
        chain.advance(PARAMS.challenge_window_s)
        first = federation.claim("claim, first of a member", index)
        federation.settle("settle, all signing", federation.next_leaves(num_leaves, seed=100 + index))
        chain.advance(PARAMS.challenge_window_s)
        later = federation.claim("claim, later", index)
        by_tree[num_leaves] = {"settle": settled, "claim, first": first, "claim, later": later}
    return federation.gas, by_tree


def measure_leaving(chain: Chain, committee_size: int) -> dict[str, int]:
    """Restart, unbond, withdraw; rotations among a settled committee."""
    federation = found(chain, committee_size)
    do = federation.contract.functions
    chain.advance(PARAMS.rotation_s)
    federation.do("rotate", do.rotate())
    chain.advance(PARAMS.restart_s)
    federation.do("restart", do.restart())
    federation.do("unbond", do.unbond(), federation.keys[0])
    for _ in range(3):
        chain.advance(PARAMS.rotation_s)
        chain.send(do.rotate())
    chain.advance(PARAMS.unbonding_s)
    federation.do("withdraw", do.withdraw(), federation.keys[0])
    return federation.gas


def measure_contests(chain: Chain, committee_size: int, num_leaves: int) -> dict[str, int]:
    """Every contest, each in a federation of its own, since it ends with a slash of the whole committee."""
    gas: dict[str, int] = {}

    def contested(cheat: Callable[[tuple[LeafValue, ...]], tuple[LeafValue, ...]]) -> Federation:
        federation = found(chain, committee_size)
        federation.grow(num_leaves)
        federation.settle("settle", federation.next_leaves(num_leaves))
        federation.settle("settle", cheat(federation.next_leaves(num_leaves, seed=1)))
        return federation

    federation = contested(_overpay)
    call = federation.contract.functions.proveReward(federation.place(1), 0, federation.proof(1, 0))
    gas["prove a wrong reward"] = federation.do("reward", call)

    federation = contested(_move)
    proofs = (federation.proof(0, 0), federation.proof(1, 0))
    call = federation.contract.functions.proveTransition(federation.place(1), 0, *proofs)
    gas["prove a wrong sum"] = federation.do("transition", call)

    federation = contested(lambda leaves: leaves)
    do = federation.contract.functions
    gas["demand a leaf"] = federation.do("demand", do.demandLeaf(1, federation.record(1), 0))
    gas["show it"] = federation.do("show", do.showLeaf(0, federation.record(1), federation.proof(1, 0)))
    gas["demand a leaf"] = federation.do("demand", do.demandLeaf(1, federation.record(1), 1))
    chain.advance(PARAMS.response_s)
    gas["close a demand, void"] = federation.do("close", do.closeDemand(1, federation.place(1)))

    federation = found(chain, committee_size)
    federation.grow(num_leaves)
    leaves = federation.next_leaves(num_leaves)
    _, one = federation.draft(leaves)
    _, other = federation.draft(leaves, base=Digest(Web3.keccak(text="another base")))
    call = federation.contract.functions.proveEquivocation(one, other)
    gas["prove equivocation"] = federation.do("equivocation", call)
    return gas


def measure_rotations(chain: Chain, committee_size: int, registries: Sequence[int]) -> dict[int, int | None]:
    """Gas of a draw among so many staked members; None: more than a transaction may use."""
    gas: dict[int, int | None] = {}
    for num_members in registries:
        federation = found(chain, committee_size)
        federation.grow(num_members, is_staked=True)
        chain.advance(PARAMS.rotation_s)
        # The first draw after `found` chooses among those who were there; the next among all.
        chain.send(federation.contract.functions.rotate())
        chain.advance(PARAMS.rotation_s)
        try:
            gas[num_members] = federation.do("rotate", federation.contract.functions.rotate())
        except RuntimeError:
            gas[num_members] = None
            chain.forget_nonces()
    return gas


def measure_references(chain: Chain, nums: Sequence[int]) -> dict[int, dict[str, int]]:
    """The first round's gas and a later one's of each way to pay so many peers."""
    artifact = json.loads((REFERENCES / "References.json").read_text())
    source = (REFERENCES / "References.sol").read_bytes()
    assert artifact["sourceHash"] == hashlib.sha256(source).hexdigest(), "run node bench/gas_references/build.mjs"
    gas: dict[int, dict[str, int]] = {}
    for num in nums:
        chain.forget_nonces()
        config = deploy(chain.url, chain.sponsor, PARAMS)
        chain.forget_nonces()
        token = chain.at(config.token, "PFMToken")
        references = chain.create(artifact["abi"], artifact["bytecode"])
        chain.send(token.functions.transfer(references.address, 10**6 * PFM))
        do = references.functions
        accounts = [Web3.to_checksum_address(Web3.keccak(text=f"peer {i}")[:20].hex()) for i in range(num)]
        figures: dict[str, int] = {}
        for moment in ("first", "later"):
            random = Random(num + len(moment))
            scores = [random.randrange(10**6, 10**9) for _ in range(num)]
            amounts = [score * 10**9 for score in scores]
            packed = [sum(s << 64 * k for k, s in enumerate(scores[i : i + 4])) for i in range(0, num, 4)]
            parts = [slice(first, first + BATCH) for first in range(0, num, BATCH)]
            calls = {
                "store": [do.storeAll(part.start, scores[part]) for part in parts],
                "packed": [do.storePacked(part.start, packed[part]) for part in parts if packed[part]],
                "push": [do.push(token.address, accounts[part], amounts[part]) for part in parts],
            }
            figures |= {f"{name}, {moment}": sum(chain.send(call) for call in found) for name, found in calls.items()}
        gas[num] = figures
    return gas


def _overpay(leaves: tuple[LeafValue, ...]) -> tuple[LeafValue, ...]:
    """One wei from the second to the first: the total is right, two leaves are not."""
    one, two = leaves[:2]
    return (_plus(one, 1, 1), _plus(two, -1, -1), *leaves[2:])


def _move(leaves: tuple[LeafValue, ...]) -> tuple[LeafValue, ...]:
    """One wei of what was allotted earlier."""
    one, two = leaves[:2]
    return (_plus(one, 1, 0), _plus(two, -1, 0), *leaves[2:])


def _plus(leaf: LeafValue, cumulative: int, reward: int) -> LeafValue:
    return LeafValue(Wei(leaf.cumulative_wei + cumulative), Wei(leaf.reward_wei + reward), leaf.contribution)


def _statement(submission: Submission) -> Any:
    return (
        *(submission.epoch, submission.nonce, submission.round, submission.prev_root, submission.root),
        *(submission.num_leaves, *_sums(submission.sums), submission.data_digest, submission.base),
    )


def _sums(sums: Sums) -> tuple[int, int, int]:
    return sums.cumulative_wei, sums.reward_wei, sums.contribution


def _leaf(leaf: LeafValue) -> tuple[int, int, int, int]:
    return leaf.cumulative_wei, leaf.reward_wei, leaf.contribution, leaf.served_wei


def _words(point: bytes) -> list[int]:
    return [int.from_bytes(point[i : i + 32], "big") for i in range(0, len(point), 32)]


def _created(web3: Web3, key: bytes, nonce: int) -> str:
    """The address of the contract that this transaction of an account creates."""
    account = bytes.fromhex(Account.from_key(key).address[2:])
    encoded = nonce.to_bytes((nonce.bit_length() + 7) // 8, "big")
    tail = bytes([nonce]) if 0 < nonce < 128 else bytes([128 + len(encoded)]) + encoded
    body = bytes([128 + 20]) + account + tail
    return str(web3.to_checksum_address(web3.keccak(bytes([192 + len(body)]) + body)[12:].hex()))


# --- tables -----------------------------------------------------------------------------------------------------------


def main() -> None:
    """See the module."""
    options = harness.parse_options(__doc__ or "")
    is_anvil = find_anvil() is not None
    size = EMBEDDED if not is_anvil else QUICK if options.quick else DEFAULT
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with run_testnet(port, is_anvil) as testnet:
        chain = Chain(testnet.rpc_url, is_anvil)
        by_committee: dict[int, dict[str, int]] = {}
        by_tree: dict[int, dict[str, int]] = {}
        for committee in size.committees:
            gas, trees = measure_rounds(chain, committee, size.trees)
            contests = measure_contests(chain, committee, size.trees[-1])
            by_committee[committee] = {**gas, **measure_leaving(chain, committee), **contests}
            by_tree = trees
        for num_leaves in size.trees:
            by_tree[num_leaves] |= measure_contests(chain, size.committees[0], num_leaves)
        rotations = {committee: measure_rotations(chain, committee, size.registries) for committee in size.committees}
        references = measure_references(chain, size.references)
    _print_columns(f"Gas by committee; trees of {size.trees[-1]} leaves", "members", by_committee)
    _print_columns(f"Gas by leaves of the tree; contests of a committee of {size.committees[0]}", "leaves", by_tree)
    if size.registries:
        rows = [
            [f"a committee of {committee}", *("over the cap" if used is None else used for used in found.values())]
            for committee, found in rotations.items()
        ]
        harness.print_table("Gas of a rotation by members of the registry", ["", *map(str, size.registries)], rows)
    _print_references(size, by_tree, references)
    print(f"\nlargest transaction {chain.most} gas; {'anvil' if is_anvil else 'the embedded chain'}")
    settled = [figures["settle"] for figures in by_tree.values()]
    steady = [*settled, *(figures["settle, all signing"] for figures in by_committee.values())]
    bytes_largest = max(read_artifact(name)["deployedBytes"] for name in ("Federation", "PFMToken"))
    later = by_tree[size.trees[-1]]["claim, later"]
    targets = [
        harness.Target("settling, largest tree over smallest", settled[-1] / settled[0], 1.01, "less"),
        harness.Target("settling with all signing [gas]", max(steady), 260_000, "less"),
        harness.Target(f"later claim, {size.trees[-1]} leaves [gas]", later, 100_000, "less"),
        harness.Target("largest transaction within the cap [gas]", chain.most, TRANSACTION_GAS_MAX, "less"),
        harness.Target("largest contract [bytes]", bytes_largest, CODE_BYTES_MAX, "less"),
    ]
    figures = {
        "size": size._asdict(),
        "chain": "anvil" if is_anvil else "embedded",
        "by_committee": by_committee,
        "by_tree": by_tree,
        "rotations": rotations,
        "references": references,
    }
    harness.finish(options, figures, targets)


def _print_columns(title: str, what: str, columns: Mapping[int, Mapping[str, int]]) -> None:
    names = list(next(iter(columns.values())))
    rows = [[name, *(figures[name] for figures in columns.values())] for name in names]
    harness.print_table(title, ["", *(f"{num} {what}" for num in columns)], rows)


def _print_references(
    size: Size, by_tree: Mapping[int, Mapping[str, int]], references: Mapping[int, Mapping[str, int]]
) -> None:
    """A round for n peers by each way; a tree's figures need no extrapolation."""
    rows = []
    largest = size.references[-1]
    names = list(references[largest])
    for num in sorted({*size.references, *size.trees}):
        if num in by_tree:
            settle, later = by_tree[num]["settle"], by_tree[num]["claim, later"]
            ours: list[object] = [settle, settle + num * later]
        else:
            ours = ["", ""]
        if num in references:
            theirs: list[object] = [references[num][name] for name in names]
        else:
            theirs = [f"~{references[largest][name] * num // largest}" for name in names]
        rows.append([num, *ours, *theirs])
    columns = ["peers", "settle", "settle, and all claim", *names]
    harness.print_table("Gas of a round for all peers; ~ extrapolated", columns, rows)


if __name__ == "__main__":
    main()
