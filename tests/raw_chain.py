"""A federation with raw access to its contract: what an attacker sends who has no honest client in the way."""

from collections.abc import Sequence
from typing import Any

from eth_account import Account
from ledger_worlds import ACCOUNTS, KEYS, PARAMS, World, chain_world
from py_ecc.bls.g2_primitives import pubkey_to_G1, signature_to_G2, subgroup_check
from py_ecc.optimized_bls12_381 import normalize
from web3 import HTTPProvider, Web3
from web3.exceptions import ContractLogicError

from p2pfm.runtime.chain_rpc import read_artifact
from p2pfm.settlement import bls, merkle
from p2pfm.settlement.ledger import FederationParams, LeafValue, Submission
from p2pfm.types import MemberIndex

ATTACK_GAS = 6_000_000
"""Given to every raw transaction: none fails for want of it."""
NO_RECORD = ((0, 0, 0, bytes(32), bytes(32), 0, 0, 0, 0, bytes(32), bytes(32)), 0, 0)
FIELDS = (
    *("epoch", "nonce", "round", "prevRoot", "root", "numLeaves"),
    *("cumulative", "reward", "contribution", "data", "base"),
)


class Deployed:
    """A federation and its contract."""

    def __init__(self, url: str, params: FederationParams = PARAMS) -> None:
        self.url = url
        self.world: World = chain_world(url, params)
        self.web3 = Web3(HTTPProvider(url))
        self.contract = self._at(self.world.chain.federation, "Federation")
        self.token = self._at(self.world.chain.token, "PFMToken")
        self._errors = {
            self.web3.keccak(text=f"{entry['name']}({','.join(i['type'] for i in entry['inputs'])})")[:4].hex(): entry[
                "name"
            ]
            for entry in (*self.contract.abi, *self.token.abi)
            if entry["type"] == "error"
        }

    def revert_of(self, function: Any, account: int = 1) -> str:
        """The name of the custom error that a call gives; empty if it passes."""
        try:
            function.call({"from": ACCOUNTS[account]})
        except ContractLogicError as error:
            return str(self._errors.get(str(error.data)[2:10], error.data))
        return ""

    def send(self, function: Any, account: int = 1) -> bool:
        """Send it as a transaction whatever a dry run says; whether it passed."""
        nonce = self.web3.eth.get_transaction_count(self.web3.to_checksum_address(ACCOUNTS[account]), "latest")
        transaction = function.build_transaction(
            {
                "from": ACCOUNTS[account],
                "nonce": nonce,
                "gas": ATTACK_GAS,
                "gasPrice": 10 * self.web3.eth.get_block("latest")["baseFeePerGas"] + 1,
            }
        )
        signed = Account.sign_transaction(transaction, KEYS[account])
        digest = self.web3.eth.send_raw_transaction(signed.raw_transaction)
        return bool(self.web3.eth.wait_for_transaction_receipt(digest, poll_latency=0.02)["status"])

    def snapshot(self) -> Any:
        """All that the contract holds or owes, and what every account has; not the time."""
        read = self.contract.functions
        members = read.members(0, 100).call()
        holders = [*ACCOUNTS, self.world.chain.federation]
        return (
            read.state().call()[1:],
            members,
            [read.claimed(index).call() for index in range(len(members))],
            [read.recordHash(position).call() for position in range(4)],
            [self.token.functions.balanceOf(holder).call() for holder in holders],
        )

    def gas_of_last_block(self) -> int:
        """Gas that the newest transaction used."""
        number = self.web3.eth.block_number
        while not self.web3.eth.get_block(number)["transactions"]:
            number -= 1
        return int(self.web3.eth.get_block(number)["gasUsed"])

    def record(self, position: int) -> Any:
        """The record that the newest `RoundAccepted` at a position told."""
        logs = self.contract.events.RoundAccepted().get_logs(from_block=0, argument_filters={"position": position})
        told = logs[-1]["args"]["record"]
        return tuple(told["statement"][name] for name in FIELDS), told["absent"], told["acceptedAt"]

    def place(self, position: int) -> Any:
        """A position, its record and the one before it."""
        return position, self.record(position), self.record(position - 1) if position else NO_RECORD

    def _at(self, address: str, name: str) -> Any:
        return self.web3.eth.contract(address=self.web3.to_checksum_address(address), abi=read_artifact(name)["abi"])


def raw_statement(submission: Submission) -> tuple[Any, ...]:
    """As the contract takes it."""
    sums = submission.sums
    return (
        *(submission.epoch, submission.nonce, submission.round, submission.prev_root, submission.root),
        *(submission.num_leaves, sums.cumulative_wei, sums.reward_wei, sums.contribution),
        *(submission.data_digest, submission.base),
    )


def raw_certificate(submission: Submission, absent: int = 0, signature: Sequence[int] | None = None) -> Any:
    """As the contract takes it; `absent` by seat, whatever the submission says."""
    point = words(bls.decompress_signature(submission.signature)) if signature is None else list(signature)
    return raw_statement(submission), absent, point


def raw_proof(leaves: Sequence[LeafValue], index: int) -> Any:
    """A leaf with its siblings."""
    leaf = leaves[index]
    siblings = merkle.prove(merkle.build(leaves), MemberIndex(index))
    values = (leaf.cumulative_wei, leaf.reward_wei, leaf.contribution, leaf.served_wei)
    return values, [raw_node(node) for node in siblings]


def raw_node(node: merkle.Node) -> tuple[bytes, int, int, int]:
    """A sibling."""
    return node.digest, node.sums.cumulative_wei, node.sums.reward_wei, node.sums.contribution


def words(point: bytes) -> list[int]:
    """A point's 32-byte words."""
    return [int.from_bytes(point[i : i + 32], "big") for i in range(0, len(point), 32)]


def padded(coordinates: list[int]) -> bytes:
    """Coordinates as EIP-2537 has them."""
    return b"".join(coordinate.to_bytes(64, "big") for coordinate in coordinates)


def key_outside_the_subgroup() -> list[int]:
    """Words of a point of G1's curve that no secret has."""
    for x in range(1, 1000):
        try:
            point = pubkey_to_G1(bytes([0x80]) + x.to_bytes(47, "big"))
        except ValueError:
            continue
        if not subgroup_check(point):
            return words(padded([int(c) for c in normalize(point)]))
    raise AssertionError("no such point")


def signature_outside_the_subgroup() -> list[int]:
    """Words of a point of G2's curve that is nobody's signature of anything."""
    for x in range(1, 1000):
        try:
            point = signature_to_G2(bytes([0x80]) + bytes(47) + x.to_bytes(48, "big"))
        except ValueError:
            continue
        if not subgroup_check(point):
            x2, y2 = normalize(point)
            return words(padded([int(c) for c in (*x2.coeffs, *y2.coeffs)]))
    raise AssertionError("no such point")
