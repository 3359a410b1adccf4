"""`Web3Ledger`: the contract on any Ethereum JSON-RPC endpoint, as `settlement.ledger.Ledger` wants it.

Calls block: a driver runs them in a worker thread. One sender a key: a lock, a local nonce, a fresh one after any
doubt. Every change is idempotent, so that a caller who lost the answer just calls again. Knows no round's protocol.
"""

import json
import threading
import time
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import msgspec
from eth_account import Account
from eth_hash.auto import keccak
from requests.exceptions import RequestException
from web3 import HTTPProvider, Web3
from web3.exceptions import BadFunctionCallOutput, ContractLogicError, TimeExhausted, Web3Exception, Web3RPCError
from web3.types import RPCEndpoint

from p2pfm.config import ChainConfig
from p2pfm.errors import ChainError, Reverted
from p2pfm.settlement import bls, merkle
from p2pfm.settlement.ledger import LeafValue, Member, Roster, SettledRound, Submission, Sums
from p2pfm.settlement.memory_ledger import FederationParams, is_settled
from p2pfm.types import Digest, MemberIndex, PeerId, Round, Wei

VERSION = 1
"""Of the contract's interface (IFederation.VERSION)."""

TOKEN_SUPPLY = Wei(10**9 * 10**18)
"""What `deploy` mints: a thousand million PFM [wei]."""

REQUEST_SECONDS_MAX = 20.0
RECEIPT_SECONDS_MAX = 120.0
RECEIPT_POLL_S = 0.1
STATE_FRESH_S = 0.5
"""A poll reads registry, head and pool one after the other: they share one call."""
PAGE = 64
"""Members or rounds a call, so that no answer grows with the network."""
GAS_MARGIN = 1.25
"""Over the estimate: the state may have moved by the time the transaction runs."""
TIP_WEI = 1
NONCE_TRIES_MAX = 3

_PANIC = keccak(b"Panic(uint256)")[:4]


READ_ONLY_KEY = (1).to_bytes(32, "big")
"""For who only reads: a key that everyone knows and nobody funds."""


class Web3Ledger:
    """The Ledger of one account."""

    def __init__(
        self,
        rpc_url: str,
        chain: ChainConfig,
        private_key: bytes,
        confirmations: int = 1,
        fresh_s: float = STATE_FRESH_S,
    ) -> None:
        """Connects on first use, so that a node can start while the chain is down.

        Args:
            confirmations: blocks, its own included, after which a transaction counts as done.
            fresh_s: how old an answer of the chain may be [s]; one's own changes are seen at once.
        """
        self._fresh_s = fresh_s
        self._rpc = _Rpc(rpc_url, chain.chain_id, private_key, confirmations)
        self._chain = chain
        self._federation: Any = self._rpc.contract("Federation", chain.federation)
        self._token: Any = self._rpc.contract("PFMToken", chain.token)
        self._lock = threading.RLock()
        self._is_checked = False
        self._window_s = 0
        self._state: Any = None
        self._state_at = 0.0
        self._members: list[Member] = []
        self._committee: tuple[int, tuple[MemberIndex, ...]] = (0, ())
        self._rounds: list[tuple[SettledRound, int]] = []

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
            if self._is_checked:
                return
            self._rpc.check()
            try:
                version = self._rpc.call(self._federation.functions.VERSION())
                token = self._rpc.call(self._federation.functions.token())
                params = self._rpc.call(self._federation.functions.params())
            except (_NoContract, Reverted) as error:
                raise ChainError(
                    f"no p2pfm federation at {self._chain.federation} on chain {self._chain.chain_id}; "
                    "check network.chain.federation"
                ) from error
            if version != VERSION:
                raise ChainError(f"expected a federation of version {VERSION}, got {version}; update p2pfm")
            if token != self._chain.token:
                raise ChainError(f"expected reward token {self._chain.token}, but the federation pays in {token}")
            self._window_s = params[5]
            self._is_checked = True

    def get_roster(self) -> Roster:
        """See Ledger. One call when nothing has changed."""
        with self._lock:
            state = self._read_state()
            epoch, nonce, num_members = state[1], state[2], state[3]
            while len(self._members) < num_members:
                page = self._rpc.call(self._federation.functions.members(len(self._members), PAGE))
                if not page:
                    break
                self._members += [_member(len(self._members) + i, entry) for i, entry in enumerate(page)]
            if self._committee[0] != epoch:
                drawn = self._rpc.call(self._federation.functions.committee(epoch))
                self._committee = (epoch, tuple(MemberIndex(index) for index in drawn))
            return Roster(epoch, nonce, tuple(self._members[:num_members]), self._committee[1])

    def get_head(self) -> SettledRound | None:
        """See Ledger."""
        rounds = self.get_rounds(Round(0))
        return rounds[-1] if rounds else None

    def get_rounds(self, first: Round) -> tuple[SettledRound, ...]:
        """See Ledger. One call when nothing has changed."""
        with self._lock:
            now_s = self._read_rounds()
            return tuple(
                _with_finality(settled, now_s >= accepted_s + self._window_s)
                for settled, accepted_s in self._rounds
                if settled.round >= first
            )

    def get_claimed(self, index: MemberIndex) -> Wei:
        """See Ledger."""
        self.check()
        return Wei(self._rpc.call(self._federation.functions.claimed(index)))

    def get_balance(self, account: str) -> Wei:
        """See Ledger."""
        self.check()
        return Wei(self._rpc.call(self._token.functions.balanceOf(account)))

    def get_pool(self) -> Wei:
        """See Ledger."""
        with self._lock:
            return Wei(self._read_state()[7])

    # --- changes ---------------------------------------------------------------------------------------------------

    def register(self, peer: PeerId, bls_key: bytes, possession: bytes, stake: Wei) -> MemberIndex:
        """See Ledger. Registering again with the same peer and key gives the same index."""
        held = self._find(peer, bls_key)
        if held is not None:
            return held
        try:
            key, proof = _words(bls.decompress_key(bls_key)), _words(bls.decompress_signature(possession))
        except ValueError as error:
            raise Reverted("BadPossession", str(error)) from error
        self._approve(stake)
        self._send(self._federation.functions.register(peer, key, proof, stake))
        index = self._find(peer, bls_key)
        if index is None:
            raise ChainError(f"{peer} was registered but is not in the registry: the endpoint lags, try again")
        return index

    def rotate(self) -> None:
        """See Ledger."""
        self._send(self._federation.functions.rotate())

    def fund(self, amount: Wei) -> None:
        """See Ledger."""
        self._approve(amount)
        self._send(self._federation.functions.fund(amount))

    def submit_round(self, submission: Submission) -> None:
        """See Ledger. A round that the chain holds already with this root is success: somebody was faster."""
        if self._is_settled(submission):
            return
        try:
            signature = _words(bls.decompress_signature(submission.signature))
        except ValueError as error:
            raise Reverted("BadSignature", str(error)) from error
        call = self._federation.functions.submitRound(_statement(submission), list(submission.absent), signature)
        try:
            self._send(call)
        except Reverted:
            if not self._is_settled(submission):
                raise

    def claim(self, round: Round, index: MemberIndex, leaves: tuple[LeafValue, ...]) -> Wei:
        """See Ledger. Nothing is sent when nothing is left to draw."""
        if not 0 <= index < len(leaves):
            raise Reverted("BadProof", f"the tree has no leaf {index}")
        with self._lock:
            self._read_rounds()
            positions = [i for i, (settled, _) in enumerate(self._rounds) if settled.round == round]
        if not positions:
            raise Reverted("UnknownRound", f"round {round} is not on chain")
        leaf = leaves[index]
        siblings = [
            (node.digest, node.sums.cumulative_wei, node.sums.reward_wei, node.sums.contribution)
            for node in merkle.prove(merkle.build(leaves), index)
        ]
        values = (leaf.cumulative_wei, leaf.reward_wei, leaf.contribution)
        call = self._federation.functions.claim(positions[0], index, values, siblings)
        if self._rpc.call(call) == 0:
            return Wei(0)
        receipt = self._send(call)
        paid = [self._federation.events.Claimed().process_log(log) for log in receipt["logs"] if _is_claimed(log)]
        return Wei(sum(event["args"]["amount"] for event in paid))

    def restart_round(self) -> None:
        """Void what is not final and kill outstanding signatures, after a long time without progress."""
        self._send(self._federation.functions.restartRound())

    def transfer(self, account: str, amount: Wei) -> None:
        """Give reward tokens to an account."""
        self._send(self._token.functions.transfer(account, amount))

    def send_ether(self, account: str, amount_wei: int) -> None:
        """Give an account ether for gas."""
        self.check()
        self._rpc.send({"to": account, "value": amount_wei, "data": b""})

    # --- inside ----------------------------------------------------------------------------------------------------

    def _read_state(self) -> Any:
        self.check()
        if self._state is None or time.monotonic() - self._state_at >= self._fresh_s:
            self._state = self._rpc.call(self._federation.functions.state())
            self._state_at = time.monotonic()
        return self._state

    def _read_rounds(self) -> int:
        """Bring the copy of the accepted rounds up to date; returns the chain's time [s]."""
        state = self._read_state()
        num_rounds, head_root = state[4], state[6]
        held_root = self._rounds[-1][0].root if self._rounds else merkle.EMPTY_ROOT
        if num_rounds < len(self._rounds) or (num_rounds == len(self._rounds) and held_root != head_root):
            self._rounds = []  # rounds were voided, or the chain was reorganised
        while len(self._rounds) < num_rounds:
            page = [
                _settled(entry) for entry in self._rpc.call(self._federation.functions.rounds(len(self._rounds), PAGE))
            ]
            if not page:
                break
            if self._rounds and page[0][0].prev_root != self._rounds[-1][0].root:
                self._rounds = []
                continue
            self._rounds += page
        return int(state[0])

    def _find(self, peer: PeerId, bls_key: bytes) -> MemberIndex | None:
        for member in self.get_roster().members:
            if (member.account, member.peer, member.bls_key) == (self.account, peer, bls_key):
                return member.index
        return None

    def _is_settled(self, submission: Submission) -> bool:
        return is_settled(self.get_rounds(submission.round), submission)

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


def deploy(rpc_url: str, private_key: bytes, params: FederationParams, supply: Wei = TOKEN_SUPPLY) -> ChainConfig:
    """Deploy token and federation; the deployer holds the whole supply.

    Raises:
        ChainError: unreachable, or not enough ether.
        Reverted: BadParameter.
    """
    rpc = _Rpc(rpc_url, None, private_key, confirmations=1)
    chain_id = rpc.check()
    token = rpc.deploy("PFMToken", (rpc.account, supply))
    rules = (
        params.committee_size,
        params.members_max,
        params.min_stake,
        params.pool_per_epoch,
        params.rounds_per_epoch,
        params.challenge_window_s,
        params.rotation_s,
        params.restart_s,
    )
    return ChainConfig(chain_id, rpc.deploy("Federation", (token, rules)), token)


def read_artifact(contract: str) -> Mapping[str, Any]:
    """ABI and bytecode as the build committed them."""
    text = files("contracts").joinpath("artifacts", f"{contract}.json").read_text()
    artifact: Mapping[str, Any] = json.loads(text)
    return artifact


class _NoContract(ChainError):
    """Nothing, or something else, is at the contract's address."""


class _Rpc:
    """One endpoint and one key: calls, and transactions one after the other."""

    def __init__(self, url: str, chain_id: int | None, private_key: bytes, confirmations: int) -> None:
        provider = HTTPProvider(
            url,
            request_kwargs={"timeout": REQUEST_SECONDS_MAX},
            cache_allowed_requests=True,  # web3 asks for the chain id before every call
            cacheable_requests={RPCEndpoint("eth_chainId")},
            exception_retry_configuration=None,
        )
        self._url = url
        self._web3 = Web3(provider)
        self._chain_id = chain_id
        self._signer = Account.from_key(private_key)
        self._confirmations = confirmations
        self._send_lock = threading.Lock()
        self._nonce: int | None = None
        self.account: str = self._signer.address

    def contract(self, name: str, address: str) -> Any:
        return self._web3.eth.contract(address=Web3.to_checksum_address(address), abi=read_artifact(name)["abi"])

    def check(self) -> int:
        """The chain id. Raises: ChainError when it is not the expected one."""
        found = int(self._guard(lambda: self._web3.eth.chain_id))
        if self._chain_id not in (None, found):
            raise ChainError(f"expected chain id {self._chain_id} at {self._url}, got {found}; check `rpc`")
        self._chain_id = found
        return found

    def call(self, function: Any) -> Any:
        return self._guard(lambda: function.call({"from": self.account}))

    def deploy(self, name: str, arguments: tuple[Any, ...]) -> str:
        artifact = read_artifact(name)
        factory = self._web3.eth.contract(abi=artifact["abi"], bytecode=artifact["bytecode"])
        receipt = self.send({"value": 0, "data": factory.constructor(*arguments).data_in_transaction})
        return str(receipt["contractAddress"])

    def send(self, transaction: Mapping[str, Any]) -> Any:
        """Sign, send, wait; the receipt of a transaction that succeeded.

        Raises:
            ChainError: no answer, no ether, or not mined in time; the nonce is read anew for the next one.
            Reverted: the contract refuses; found before sending where possible.
        """
        with self._send_lock:
            try:
                return self._guard(lambda: self._send(transaction))
            except ChainError:
                self._nonce = None
                raise

    def _send(self, transaction: Mapping[str, Any]) -> Any:
        eth = self._web3.eth
        gas = int(eth.estimate_gas({**transaction, "from": self.account}) * GAS_MARGIN)
        digest = self._send_signed(transaction, gas)
        receipt = eth.wait_for_transaction_receipt(digest, RECEIPT_SECONDS_MAX, RECEIPT_POLL_S)
        while eth.block_number - receipt["blockNumber"] + 1 < self._confirmations:
            time.sleep(RECEIPT_POLL_S)
        if receipt["status"] != 1:
            eth.call({**transaction, "from": self.account})  # the same again tells why, by reverting
            raise ChainError(f"transaction {digest.to_0x_hex()} failed but would pass now; try again")
        return receipt

    def _send_signed(self, transaction: Mapping[str, Any], gas: int) -> Any:
        """The hash of the transaction, sent under the next nonce.

        A nonce that is refused means that nothing was sent (another program uses this key): read it and sign again.
        """
        eth = self._web3.eth
        base_fee = eth.get_block("latest")["baseFeePerGas"]
        for attempt in range(NONCE_TRIES_MAX):
            if self._nonce is None:
                self._nonce = eth.get_transaction_count(self.account, "pending")
            envelope = {
                **transaction,
                "chainId": self._chain_id,
                "nonce": self._nonce,
                "gas": gas,
                "maxFeePerGas": 2 * base_fee + TIP_WEI,
                "maxPriorityFeePerGas": TIP_WEI,
                "type": 2,
            }
            try:
                digest = eth.send_raw_transaction(self._signer.sign_transaction(envelope).raw_transaction)
            except Web3RPCError as error:
                if "nonce" not in str(error) or attempt == NONCE_TRIES_MAX - 1:
                    raise
                self._nonce = None
            else:
                self._nonce += 1
                return digest
        raise AssertionError("the last attempt returns or raises")

    def _guard(self, action: Any) -> Any:
        try:
            return action()
        except ContractLogicError as error:
            raise _reverted(error) from error
        except BadFunctionCallOutput as error:
            raise _NoContract(f"no contract answers at {self._url}: has the chain begun anew?") from error
        except RequestException as error:
            raise ChainError(
                f"no answer from the chain at {self._url} ({type(error).__name__}); is it running?"
            ) from error
        except TimeExhausted as error:
            raise ChainError(f"not mined within {RECEIPT_SECONDS_MAX:.0f} s: {error}") from error
        except Web3Exception as error:
            raise ChainError(f"the chain at {self._url} refused: {error}") from error
        except (ValueError, TypeError, AttributeError, KeyError) as error:  # what web3 makes of an answer that is none
            raise ChainError(f"no JSON-RPC endpoint answers at {self._url} ({error!r:.80}); check `rpc`") from error


def _reverted(error: ContractLogicError) -> Reverted:
    data = error.data if isinstance(error.data, str) else ""
    selector = bytes.fromhex(data.removeprefix("0x"))[:4]
    if selector == _PANIC:
        return Reverted("Panic", data)
    return Reverted(_ERRORS.get(selector, "Error"), "" if selector in _ERRORS else str(error.message or data))


def _error_names() -> dict[bytes, str]:
    names = {}
    for contract in ("Federation", "PFMToken"):
        for entry in read_artifact(contract)["abi"]:
            if entry["type"] == "error":
                signature = f"{entry['name']}({','.join(argument['type'] for argument in entry['inputs'])})"
                names[keccak(signature.encode())[:4]] = str(entry["name"])
    return names


_ERRORS = _error_names()
_CLAIMED = keccak(b"Claimed(uint32,address,uint64,uint256)")


def _is_claimed(log: Any) -> bool:
    return bool(bytes(log["topics"][0]) == _CLAIMED)


def _words(point: bytes) -> list[int]:
    return [int.from_bytes(point[i : i + 32], "big") for i in range(0, len(point), 32)]


def _member(index: int, entry: Any) -> Member:
    account, stake, is_active, peer, key = entry
    point = b"".join(word.to_bytes(32, "big") for word in key)
    return Member(MemberIndex(index), account, PeerId(peer), bls.compress_key(point), Wei(stake), is_active)


def _statement(submission: Submission) -> tuple[Any, ...]:
    return (
        submission.epoch,
        submission.nonce,
        submission.round,
        submission.prev_root,
        submission.root,
        submission.sums.cumulative_wei,
        submission.sums.reward_wei,
        submission.sums.contribution,
        submission.data_digest,
        submission.base,
    )


def _settled(entry: Any) -> tuple[SettledRound, int]:
    (epoch, nonce, round, prev_root, root, cumulative, reward, contribution, data, base), accepted_s = entry
    settled = SettledRound(
        round=Round(round),
        epoch=epoch,
        nonce=nonce,
        prev_root=Digest(bytes(prev_root)),
        root=Digest(bytes(root)),
        sums=Sums(Wei(cumulative), Wei(reward), contribution),
        data_digest=Digest(bytes(data)),
        base=Digest(bytes(base)),
        is_final=False,
    )
    return settled, accepted_s


def _with_finality(settled: SettledRound, is_final: bool) -> SettledRound:
    return settled if settled.is_final == is_final else msgspec.structs.replace(settled, is_final=is_final)
