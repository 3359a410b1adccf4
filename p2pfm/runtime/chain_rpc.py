"""One Ethereum JSON-RPC endpoint and one key: calls, logs, and transactions that land once.

A key has one sender: a lock and a local nonce. What was signed is sent again, byte for byte, until the chain shows it
or has given its nonce to another: so an outage, a restart or a reorganisation neither loses nor doubles it. Calls
block: a driver runs them in a worker thread. Knows no federation.
"""

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar

import requests
from eth_account import Account
from eth_hash.auto import keccak
from hexbytes import HexBytes
from requests.adapters import HTTPAdapter
from requests.exceptions import HTTPError, RequestException
from web3 import HTTPProvider, Web3
from web3.exceptions import (
    BadFunctionCallOutput,
    ContractLogicError,
    TransactionNotFound,
    Web3Exception,
    Web3RPCError,
)
from web3.types import RPCEndpoint

from p2pfm.errors import ChainError, Reverted
from p2pfm.runtime.endpoints import hide_endpoint, name_endpoint

REQUEST_SECONDS_MAX = 20.0
PATIENCE_S = 120.0
"""How long a change waits for an endpoint that is away, and for its transaction to be mined."""
POLL_S = 0.1
RESEND_S = 2.0
"""A transaction that the chain does not show is sent again, the same bytes, so often."""
LOST_LOOKS = 5
"""A nonce that is used without our receipt must look so this often: machines behind one address may lag each other."""
TAKER_BLOCKS = 32
"""So many blocks before the signing, and all after it, are searched for the transaction that took a nonce."""
CONNECTIONS_MAX = 4
"""Kept to the endpoint: settler, auditor and door ask at the same time now and then; more are closed after use."""
SENT_MAX = 256
"""Signed transactions kept, to send them again when the chain forgets blocks that held them."""
REFUSALS = {*range(400, 429)} - {408}
"""HTTP status codes of a request that is refused for what it asks; others may pass when tried again."""
GARBLED = (ValueError, TypeError, AttributeError, KeyError)
"""What web3 makes of an answer that is none."""
GAS_MARGIN = 1.25
"""Over the estimate: the state may have moved by the time the transaction runs."""
TIP_WEI = 1

_PANIC = keccak(b"Panic(uint256)")[:4]

T = TypeVar("T")


class NoContract(ChainError):
    """Nothing, or something else, is at the contract's address."""


class Unreachable(ChainError):
    """The endpoint does not answer: worth trying again."""


def _make_session() -> requests.Session:
    """One for all threads. web3 8.0.0 would keep one a thread, a hundred in all, long after the threads have gone."""
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_connections=1, pool_maxsize=CONNECTIONS_MAX))
    return session


class Rpc:
    """Reads of anybody, changes of one account."""

    def __init__(
        self, url: str, chain_id: int | None, private_key: bytes, confirmations: int = 1, patience_s: float = PATIENCE_S
    ) -> None:
        """Connects on first use.

        Args:
            chain_id: the expected one; None takes what is there.
            confirmations: blocks, its own included, after which a transaction counts as done.
            patience_s: how long a change survives an outage.
        """
        provider = HTTPProvider(
            url,
            request_kwargs={"timeout": REQUEST_SECONDS_MAX},
            session=_make_session(),
            cache_allowed_requests=True,  # web3 asks for the chain id before every call
            cacheable_requests={RPCEndpoint("eth_chainId")},
            exception_retry_configuration=None,
        )
        self._url = url
        self._name = name_endpoint(url)
        self._web3 = Web3(provider)
        self._chain_id = chain_id
        self._signer = Account.from_key(private_key)
        self._confirmations = confirmations
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._nonce: int | None = None
        self._sent: OrderedDict[int, HexBytes] = OrderedDict()
        """By nonce: a reorganisation may take back what was done, and what follows waits for it."""
        self.account: str = self._signer.address

    # --- reads -----------------------------------------------------------------------------------------------------

    def contract(self, name: str, address: str) -> Any:
        """A web3 contract with the committed ABI."""
        return self._web3.eth.contract(address=Web3.to_checksum_address(address), abi=read_artifact(name)["abi"])

    def check(self) -> int:
        """The chain id. Raises: ChainError when it is not the expected one."""
        found = int(self._guard(lambda: self._web3.eth.chain_id))
        if self._chain_id not in (None, found):
            raise ChainError(f"expected chain id {self._chain_id} at {self._name}, got {found}; check `rpc`")
        self._chain_id = found
        return found

    def call(self, function: Any) -> Any:
        """The result of a view, or of a change as if it were made now. Raises: Reverted, ChainError."""
        return self._guard(lambda: function.call({"from": self.account}))

    def get_block(self, number: int | None = None) -> tuple[int, str, int]:
        """Number, hash and time [s] of a block; None: the newest. Raises: ChainError."""
        block: Any = self._guard(lambda: self._web3.eth.get_block("latest" if number is None else number))
        return int(block["number"]), HexBytes(block["hash"]).to_0x_hex(), int(block["timestamp"])

    def get_ether(self, account: str) -> int:
        """What an account holds [wei]. Raises: ChainError."""
        return int(self._guard(lambda: self._web3.eth.get_balance(Web3.to_checksum_address(account))))

    def get_logs(self, address: str, first: int, last: int) -> list[Any]:
        """Raw logs of a contract in these blocks, both included. Raises: ChainError."""
        filters: Any = {"address": Web3.to_checksum_address(address), "fromBlock": first, "toBlock": last}
        return list(self._guard(lambda: self._web3.eth.get_logs(filters)))

    # --- changes ---------------------------------------------------------------------------------------------------

    def deploy(self, name: str, arguments: tuple[Any, ...]) -> str:
        """The address of a new contract. Raises: Reverted, ChainError."""
        artifact = read_artifact(name)
        factory = self._web3.eth.contract(abi=artifact["abi"], bytecode=artifact["bytecode"])
        receipt = self.send({"value": 0, "data": factory.constructor(*arguments).data_in_transaction})
        return str(receipt["contractAddress"])

    def send(self, transaction: Mapping[str, Any]) -> Any:
        """Sign, send, wait; the receipt of a transaction that succeeded. Many threads may: their nonces follow.

        Raises:
            ChainError: no answer for `patience_s`, no ether, not mined in time, or the chain shows the nonce used and
                not by what; what was sent may land, or have landed.
            Reverted: the contract refuses; found before sending where possible.
        """
        deadline = time.monotonic() + self._patience_s
        while True:
            with self._lock:
                signed, nonce = self._patiently(deadline, lambda: self._sign_and_send(transaction))
            receipt = self._wait(signed, nonce, deadline)
            if receipt is not None:
                break
            self._give_up(signed, nonce)  # another program uses this key and took the nonce: it can land no more
        if receipt["status"] != 1:
            self._guard(lambda: self._web3.eth.call({**transaction, "from": self.account}))
            raise ChainError(f"transaction {signed.hash.to_0x_hex()} failed but would pass now; try again")
        return receipt

    def _sign_and_send(self, transaction: Mapping[str, Any]) -> tuple[Any, int]:
        """Sign under the next nonce and send once. From the signature on, only that nonce's fate decides."""
        eth = self._web3.eth
        values: Any = {**transaction, "from": self.account}
        gas = int(eth.estimate_gas(values) * GAS_MARGIN)
        base_fee = eth.get_block("latest")["baseFeePerGas"]
        # Another program with this key may have been faster; the pool of a restarted node may know less than we do.
        nonce = max(self._nonce or 0, eth.get_transaction_count(self._signer.address, "pending"))
        envelope = {
            **transaction,
            "chainId": self._chain_id,
            "nonce": nonce,
            "gas": gas,
            "maxFeePerGas": 2 * base_fee + TIP_WEI,
            "maxPriorityFeePerGas": TIP_WEI,
            "type": 2,
        }
        signed = self._signer.sign_transaction(envelope)
        try:
            eth.send_raw_transaction(signed.raw_transaction)
        except Web3RPCError as error:
            if not _is_about_nonce(error):
                raise  # refused for what it is (no ether, ...): the nonce is free still
            self._nonce = None  # used elsewhere, or this very one is known already: waiting tells which
            self._sent.setdefault(nonce, signed.raw_transaction)
            return signed, nonce
        except RequestException:
            pass  # perhaps it arrived
        self._nonce = nonce + 1
        self._sent[nonce] = signed.raw_transaction
        while len(self._sent) > SENT_MAX:
            self._sent.popitem(last=False)
        return signed, nonce

    def _wait(self, signed: Any, nonce: int, deadline: float) -> Any:
        """The receipt, once confirmed; None when the chain gave the nonce to another transaction."""
        sent_at, num_lost, lost_block, trouble = time.monotonic(), 0, 0, ""
        first_block: int | None = None
        while True:
            if time.monotonic() > deadline:
                self._give_up(signed, nonce)
                text = f"transaction {signed.hash.to_0x_hex()} was not mined within {self._patience_s:.0f} s"
                raise ChainError(f"{text}: {trouble}" if trouble else text)
            try:
                receipt, num_used, newest = self._guard(lambda: self._look(signed.hash))
                first_block = newest if first_block is None else first_block
                if receipt is not None and newest - receipt["blockNumber"] + 1 >= self._confirmations:
                    return receipt
                num_lost = num_lost + 1 if receipt is None and num_used > nonce else 0
                lost_block = lost_block if num_lost > 1 else newest
                trouble = trouble if num_lost else ""
                # As sure as a receipt must be: were the other one taken back, this one could land after all.
                if num_lost >= LOST_LOOKS and newest - lost_block + 1 >= self._confirmations:
                    if self._is_taken(nonce, signed.hash, first_block - TAKER_BLOCKS, newest):
                        return None
                    # So looks a node that was restored without its receipts, too: to sign anew would pay twice.
                    num_lost, trouble = 0, f"nonce {nonce} is used, and no block shows by which transaction"
            except ChainError as error:  # whatever it answers: the transaction is out, and only its fate counts
                trouble = str(error)
                time.sleep(POLL_S)
                continue
            if receipt is None and num_used <= nonce and time.monotonic() - sent_at > RESEND_S:
                self._resend(num_used, nonce)
                sent_at = time.monotonic()
            time.sleep(POLL_S)

    def _look(self, digest: HexBytes) -> tuple[Any, int, int]:
        """Receipt if there is one, transactions of this account so far, newest block: in an order that cannot mislead.

        The count comes first: a nonce that is used by then and still has no receipt was used by another.
        """
        eth = self._web3.eth
        num_used = eth.get_transaction_count(self._signer.address, "latest")
        try:
            receipt: Any = eth.get_transaction_receipt(digest)
        except TransactionNotFound:
            receipt = None
        return receipt, num_used, eth.block_number

    def _is_taken(self, nonce: int, digest: HexBytes, first: int, last: int) -> bool:
        """Whether one of these blocks, both included, holds another transaction of this account with this nonce."""
        for number in range(last, max(first, 0) - 1, -1):
            block: Any = self._guard(partial(self._web3.eth.get_block, number, full_transactions=True))
            for transaction in block["transactions"]:
                if transaction["from"] == self._signer.address and transaction["nonce"] == nonce:
                    return bool(transaction["hash"] != digest)
        return False

    def _give_up(self, signed: Any, nonce: int) -> None:
        """Never send it again from here, and ask the chain what comes next."""
        with self._lock:
            self._nonce = None
            if self._sent.get(nonce) == signed.raw_transaction:
                del self._sent[nonce]

    def _resend(self, first: int, last: int) -> None:
        """The same bytes: what the chain knows already it refuses, and nothing happens twice.

        All from the chain's next nonce on: a reorganisation or a restart may have dropped some that were done.
        """
        with self._lock:
            raws = [self._sent[nonce] for nonce in range(max(first, last - SENT_MAX), last + 1) if nonce in self._sent]
        for raw in raws:
            try:
                self._web3.eth.send_raw_transaction(raw)
            except (Web3Exception, RequestException, ValueError):
                continue

    def _patiently(self, deadline: float, action: Callable[[], T]) -> T:
        while True:
            try:
                return self._guard(action)
            except Unreachable:
                self._nonce = None
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_S)

    def _tell(self, error: Exception) -> str:
        """What went wrong, without the endpoint's key: others read it in /status, logs and on the explorer's page."""
        return hide_endpoint(
            f"{type(error).__name__}: {error}" if isinstance(error, GARBLED) else str(error), self._url
        )

    def _guard(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except ContractLogicError as error:
            raise _reverted(error) from error
        except BadFunctionCallOutput as error:
            raise NoContract(f"no contract answers at {self._name}: has the chain begun anew?") from error
        except RequestException as error:
            if isinstance(error, HTTPError) and error.response is not None and error.response.status_code in REFUSALS:
                raise ChainError(f"the chain at {self._name} refused: {self._tell(error)}") from error
            raise Unreachable(
                f"no answer from the chain at {self._name} ({type(error).__name__}); is it running?"
            ) from error
        except Web3Exception as error:
            raise ChainError(f"the chain at {self._name} refused: {self._tell(error)}") from error
        except GARBLED as error:
            raise ChainError(
                f"no JSON-RPC endpoint answers at {self._name} ({self._tell(error):.80}); check `rpc`"
            ) from error


def read_artifact(contract: str) -> Mapping[str, Any]:
    """ABI and bytecode as the build committed them."""
    text = files("contracts").joinpath("artifacts", f"{contract}.json").read_text()
    artifact: Mapping[str, Any] = json.loads(text)
    return artifact


def _is_about_nonce(error: Web3RPCError) -> bool:
    """Refusals that say that the nonce is used, or the transaction known; each node has its own words."""
    text = str(error).lower()
    return any(words in text for words in ("nonce", "already known", "already imported", "replacement"))


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
