"""An Ethereum chain in this process: py-evm (Prague) behind the JSON-RPC methods that an unmodified web3 client uses.

One block a transaction, mined at once; while somebody looks, a block at least every second, so that block time follows
the clock it is given. Reads answer for the newest state only. Knows no socket: `nodes.testnet` serves it over HTTP.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from eth.abc import ComputationAPI
from eth.chains.base import MiningChain
from eth.constants import GENESIS_PARENT_HASH, POST_MERGE_DIFFICULTY, POST_MERGE_MIX_HASH, POST_MERGE_NONCE
from eth.db import get_db_backend
from eth.exceptions import Revert, VMError
from eth.precompiles.bls12_381.constants import BLS12_G2_ADD_GAS, BLS12_MAP_FP2_G2_GAS
from eth.vm.forks import PragueVM
from eth.vm.forks.prague.computation import PRAGUE_PRECOMPILES, PragueComputation
from eth.vm.forks.prague.state import PragueState
from eth.vm.spoof import SpoofTransaction
from eth_utils.address import to_checksum_address
from eth_utils.exceptions import ValidationError
from rlp.exceptions import RLPException  # type: ignore[import-untyped]

BLOCK_GAS_MAX = 30_000_000
TRANSACTION_GAS_MAX = 16_777_216
"""The cap of EIP-7825, which live networks enforce [gas]."""
BLOCK_SECONDS = 1
ESTIMATE_MARGIN = 1.3
"""An estimate is the gas of one run and this margin: inner calls get 63/64, and state may move meanwhile."""
REVERT_CODE = 3
"""JSON-RPC error code of a revert that carries data (geth's)."""

_PAIRING, _G2ADD, _MAP_FP2 = (number.to_bytes(20, "big") for number in (0x0F, 0x0D, 0x11))
_FIELD = slice(16, 64)
"""The 48 bytes of a field element inside EIP-2537's 64."""


class RpcError(Exception):
    """A JSON-RPC error: code, message and, for a revert, its data."""

    def __init__(self, code: int, message: str, data: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.data = code, message, data


class EmbeddedChain:
    """The chain and its JSON-RPC methods; not thread-safe, the server serialises calls."""

    def __init__(
        self, chain_id: int, balances: Mapping[str, int], clock: Callable[[], float], entropy: Callable[[int], bytes]
    ) -> None:
        """`balances`: wei of ether by address at genesis; `clock`: seconds since 1970; `entropy(n)`: n random bytes."""
        self._clock = clock
        self._entropy = entropy
        self._offset_s = 0
        genesis = {
            "coinbase": bytes(20),
            "difficulty": POST_MERGE_DIFFICULTY,
            "extra_data": b"",
            "gas_limit": BLOCK_GAS_MAX,
            "mix_hash": POST_MERGE_MIX_HASH,
            "nonce": POST_MERGE_NONCE,
            "timestamp": int(clock()),
        }
        state = {
            bytes.fromhex(address[2:]): {"balance": balance, "nonce": 0, "code": b"", "storage": {}}
            for address, balance in balances.items()
        }
        rules = {"chain_id": chain_id, "vm_configuration": ((0, _vm()),)}
        chain_class: Any = type("EmbeddedMiningChain", (_ConstantGasChain,), rules)
        self._chain = chain_class.from_genesis(get_db_backend(), genesis, state)
        self._mined_at_s = clock()
        self._blocks: list[dict[str, Any]] = [self._describe(self._chain.get_canonical_block_by_number(0), [])]
        self._by_hash: dict[str, int] = {self._blocks[0]["hash"]: 0}
        self._transactions: dict[str, dict[str, Any]] = {}
        self._receipts: dict[str, dict[str, Any]] = {}
        self._logs: list[dict[str, Any]] = []
        self._methods: dict[str, Callable[..., Any]] = {
            "web3_clientVersion": lambda: "p2pfm-embedded/py-evm",
            "net_version": lambda: str(chain_id),
            "net_listening": lambda: True,
            "eth_chainId": lambda: hex(chain_id),
            "eth_syncing": lambda: False,
            "eth_accounts": list,
            "eth_blockNumber": lambda: hex(len(self._blocks) - 1),
            "eth_gasPrice": lambda: hex(2 * self._chain.header.base_fee_per_gas + 1),
            "eth_maxPriorityFeePerGas": lambda: hex(1),
            "eth_feeHistory": self._fee_history,
            "eth_getBalance": lambda address, *_: hex(self._state().get_balance(_bytes(address))),
            "eth_getTransactionCount": lambda address, *_: hex(self._state().get_nonce(_bytes(address))),
            "eth_getCode": lambda address, *_: _hex(self._state().get_code(_bytes(address))),
            "eth_getStorageAt": self._storage_at,
            "eth_call": lambda call, *_: _hex(self._run(call).output),
            "eth_estimateGas": self._estimate,
            "eth_sendRawTransaction": self._send,
            "eth_getTransactionByHash": self._transactions.get,
            "eth_getTransactionReceipt": self._receipts.get,
            "eth_getBlockByNumber": self._block_by_number,
            "eth_getBlockByHash": lambda digest, is_full=False: (
                self._show(self._blocks[self._by_hash[digest]], is_full) if digest in self._by_hash else None
            ),
            "eth_getLogs": self._get_logs,
            "evm_mine": lambda *_: self._mine(),
            "evm_increaseTime": self._increase_time,
        }

    def handle(self, method: str, params: Sequence[Any]) -> Any:
        """The `result` of a JSON-RPC request.

        Raises:
            RpcError: the method is unknown, its parameters are wrong, or the call reverted.
        """
        if method not in self._methods:
            raise RpcError(-32601, f"the method {method} does not exist")
        self._follow_clock()
        try:
            return self._methods[method](*params)
        except (ValidationError, VMError, RLPException) as error:
            raise RpcError(-32000, str(error)) from error
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise RpcError(-32602, f"{method}: invalid parameters: {error}") from error

    # --- blocks ----------------------------------------------------------------------------------------------------

    def _now(self) -> int:
        return int(self._clock()) + self._offset_s

    def _follow_clock(self) -> None:
        """An idle chain mines an empty block when it is looked at, so that its time has not stopped."""
        if self._clock() - self._mined_at_s >= BLOCK_SECONDS:
            self._mine()

    def _open_block(self) -> None:
        header = self._chain.header
        timestamp = max(self._now(), int(self._blocks[-1]["timestamp"], 16) + 1)
        self._chain.header = header.copy(timestamp=timestamp, mix_hash=self._entropy(32))

    def _mine(self) -> str:
        self._open_block()
        self._close_block([])
        return "0x0"

    def _close_block(self, hashes: list[str]) -> dict[str, Any]:
        header = self._chain.header
        block = self._chain.mine_block(coinbase=header.coinbase, mix_hash=header.mix_hash, blob_gas_used=0)
        described = self._describe(block, hashes)
        self._by_hash[described["hash"]] = len(self._blocks)
        self._blocks.append(described)
        self._mined_at_s = self._clock()
        return described

    def _increase_time(self, seconds: int | str) -> str:
        # A block a transaction, each a second later, has led the chain ahead of the clock: go on from there.
        lead_s = max(0, int(self._blocks[-1]["timestamp"], 16) - self._now())
        self._offset_s += lead_s + (int(seconds, 0) if isinstance(seconds, str) else seconds)
        self._mine()
        return hex(self._offset_s)

    def _describe(self, block: Any, hashes: list[str]) -> dict[str, Any]:
        header = block.header
        return {
            "number": hex(header.block_number),
            "hash": _hex(block.hash),
            "parentHash": _hex(header.parent_hash or GENESIS_PARENT_HASH),
            "timestamp": hex(header.timestamp),
            "gasLimit": hex(header.gas_limit),
            "gasUsed": hex(header.gas_used),
            "baseFeePerGas": hex(header.base_fee_per_gas),
            "mixHash": _hex(header.mix_hash),
            "miner": to_checksum_address(header.coinbase),
            "stateRoot": _hex(header.state_root),
            "receiptsRoot": _hex(header.receipt_root),
            "transactionsRoot": _hex(header.transaction_root),
            "logsBloom": hex(header.bloom),
            "extraData": "0x",
            "difficulty": "0x0",
            "nonce": _hex(bytes(8)),
            "sha3Uncles": _hex(header.uncles_hash),
            "size": "0x0",
            "uncles": [],
            "transactions": hashes,
        }

    def _block_by_number(self, number: str, is_full: bool = False) -> dict[str, Any] | None:
        if number == "earliest":
            return self._show(self._blocks[0], is_full)
        if not number.startswith("0x"):
            return self._show(self._blocks[-1], is_full)
        position = int(number, 16)
        return self._show(self._blocks[position], is_full) if position < len(self._blocks) else None

    def _show(self, block: dict[str, Any], is_full: bool) -> dict[str, Any]:
        """A block with its transactions, or with their hashes only."""
        if not is_full:
            return block
        return {**block, "transactions": [self._transactions[digest] for digest in block["transactions"]]}

    def _fee_history(self, count: int | str, *_: Any) -> dict[str, Any]:
        number = min(int(count, 0) if isinstance(count, str) else count, len(self._blocks))
        recent = self._blocks[-number:]
        return {
            "oldestBlock": recent[0]["number"],
            "baseFeePerGas": [block["baseFeePerGas"] for block in recent] + [hex(self._chain.header.base_fee_per_gas)],
            "gasUsedRatio": [int(block["gasUsed"], 16) / BLOCK_GAS_MAX for block in recent],
            "reward": [["0x1"] for _ in recent],
        }

    # --- state and execution ---------------------------------------------------------------------------------------

    def _state(self) -> Any:
        return self._chain.get_vm().state

    def _storage_at(self, address: str, slot: str, *_: Any) -> str:
        return _hex(self._state().get_storage(_bytes(address), int(slot, 16)).to_bytes(32, "big"))

    def _run(self, call: Mapping[str, Any]) -> ComputationAPI:
        """Execute a call on the newest state at the present time, and forget what it changed."""
        self._open_block()
        vm = self._chain.get_vm(self._chain.header.copy(base_fee_per_gas=0))
        state = vm.state  # of this VM alone, and never persisted
        sender = _bytes(call.get("from") or "0x" + "00" * 20)
        unsigned = vm.get_transaction_builder().new_unsigned_dynamic_fee_transaction(
            chain_id=self._chain.chain_id,
            nonce=state.get_nonce(sender),
            max_priority_fee_per_gas=0,
            max_fee_per_gas=0,
            gas=min(int(call.get("gas", hex(BLOCK_GAS_MAX)), 16), BLOCK_GAS_MAX),
            to=_bytes(call.get("to") or "0x"),
            value=int(call.get("value", "0x0"), 16),
            data=_bytes(call.get("data") or call.get("input") or "0x"),
            access_list=(),
        )
        computation = state.apply_transaction(SpoofTransaction(unsigned, from_=sender))
        if computation.is_error and isinstance(computation.error, Revert):
            data = computation.error.args[0] if computation.error.args else b""
            raise RpcError(REVERT_CODE, "execution reverted", _hex(bytes(data)))
        if computation.is_error:
            raise RpcError(-32000, f"execution failed: {type(computation.error).__name__} {computation.error}")
        return computation

    def _estimate(self, call: Mapping[str, Any], *_: Any) -> str:
        computation = self._run({**call, "gas": hex(BLOCK_GAS_MAX)})
        used = BLOCK_GAS_MAX - computation.get_gas_remaining()
        return hex(min(int(used * ESTIMATE_MARGIN), TRANSACTION_GAS_MAX))

    def _send(self, raw: str) -> str:
        transaction = self._chain.get_vm().get_transaction_builder().decode(_bytes(raw))
        digest = _hex(transaction.hash)
        if transaction.gas > TRANSACTION_GAS_MAX:
            raise RpcError(-32000, f"transaction gas limit {transaction.gas} is over {TRANSACTION_GAS_MAX}")
        expected = self._state().get_nonce(transaction.sender)
        if transaction.nonce != expected:
            fault = "low" if transaction.nonce < expected else "high"
            raise RpcError(-32000, f"nonce too {fault}: expected {expected}, got {transaction.nonce}")
        self._open_block()
        _, receipt, computation = self._chain.apply_transaction(transaction)
        block = self._close_block([digest])
        place = {
            "blockHash": block["hash"],
            "blockNumber": block["number"],
            "transactionHash": digest,
            "transactionIndex": "0x0",
        }
        logs = [
            {
                **place,
                "address": to_checksum_address(log.address),
                "topics": [_hex(topic.to_bytes(32, "big")) for topic in log.topics],
                "data": _hex(log.data),
                "logIndex": hex(position),
                "removed": False,
                "blockTimestamp": block["timestamp"],
            }
            for position, log in enumerate(receipt.logs)
        ]
        self._logs += logs
        to = to_checksum_address(transaction.to) if transaction.to else None
        price = block["baseFeePerGas"]
        self._receipts[digest] = {
            **place,
            "from": to_checksum_address(transaction.sender),
            "to": to,
            "contractAddress": to_checksum_address(computation.msg.storage_address) if to is None else None,
            "status": "0x0" if computation.is_error else "0x1",
            "gasUsed": hex(receipt.gas_used),
            "cumulativeGasUsed": hex(receipt.gas_used),
            "effectiveGasPrice": price,
            "logs": logs,
            "logsBloom": hex(receipt.bloom),
            "type": hex(transaction.type_id or 0),
        }
        self._transactions[digest] = {
            "hash": digest,
            "blockHash": block["hash"],
            "blockNumber": block["number"],
            "transactionIndex": "0x0",
            "from": to_checksum_address(transaction.sender),
            "to": to,
            "nonce": hex(transaction.nonce),
            "gas": hex(transaction.gas),
            "gasPrice": price,
            "value": hex(transaction.value),
            "input": _hex(transaction.data),
            "chainId": hex(self._chain.chain_id),
            "type": hex(transaction.type_id or 0),
        }
        return digest

    def _get_logs(self, query: Mapping[str, Any]) -> list[dict[str, Any]]:
        newest = len(self._blocks) - 1
        first, last = (_position(query.get(key), newest) for key in ("fromBlock", "toBlock"))
        addresses = query.get("address", [])
        wanted = {address.lower() for address in ([addresses] if isinstance(addresses, str) else addresses)}
        topics = query.get("topics", [])
        start = bisect_left(self._logs, first, key=_block_number)
        end = bisect_right(self._logs, last, key=_block_number)
        return [
            log
            for log in self._logs[start:end]
            if (not wanted or log["address"].lower() in wanted) and _has_topics(log["topics"], topics)
        ]


class _ConstantGasChain(MiningChain):  # type: ignore[misc]
    def create_header_from_parent(self, parent_header: Any, **header_params: Any) -> Any:
        """The gas limit stays; py-evm would let it drift."""
        return super().create_header_from_parent(
            parent_header, **{**header_params, "gas_limit": parent_header.gas_limit}
        )


def fast_precompiles() -> dict[bytes, Callable[[ComputationAPI], None]]:
    """The pairing check and the G2 precompiles in Rust (1.5 ms instead of 0.9 s); empty without py-arkworks-bls12381.

    Same gas, same results, same refusals as py-evm's own; `tests/chain` compares them.
    """
    if not find_spec("py_arkworks_bls12381"):
        return {}
    from py_arkworks_bls12381 import GT, G1Point, G2Point

    def coordinates(data: bytes) -> bytes:
        """EIP-2537's 64-byte field elements as 48-byte ones."""
        chunks = [data[i : i + 64] for i in range(0, len(data), 64)]
        if any(any(chunk[:16]) for chunk in chunks):
            raise VMError("coordinate >= field modulus")
        return b"".join(chunk[_FIELD] for chunk in chunks)

    def point(kind: Any, data: bytes, is_checked: bool) -> Any:
        if not any(data):
            return kind.identity()
        decode = kind.from_xy_bytes_be if is_checked else kind.from_xy_bytes_unchecked_be
        try:
            return decode(coordinates(data))
        except ValueError as error:
            raise VMError(f"not a valid point: {error}") from error

    def encode(value: Any) -> bytes:
        if value == G2Point.identity():
            return bytes(256)
        xy = bytes(value.to_xy_bytes_be())
        return b"".join(bytes(16) + xy[i : i + 48] for i in range(0, 192, 48))

    def pairing(computation: ComputationAPI) -> None:
        data = computation.msg.data_as_bytes
        if not data or len(data) % 384:
            raise VMError("length of data must be a multiple of 384 bytes")
        pairs = [data[i : i + 384] for i in range(0, len(data), 384)]
        computation.consume_gas(32_600 * len(pairs) + 37_700, "BLS12_PAIRING_CHECK gas")
        keys = [point(G1Point, pair[:128], is_checked=True) for pair in pairs]
        signatures = [point(G2Point, pair[128:], is_checked=True) for pair in pairs]
        computation.output = GT.pairing_check(keys, signatures).to_bytes(32, "big")

    def add(computation: ComputationAPI) -> None:
        data = computation.msg.data_as_bytes
        if len(data) != 512:
            raise VMError("length of data must be 512 bytes")
        computation.consume_gas(BLS12_G2_ADD_GAS, "BLS12_G2ADD gas")
        left, right = (point(G2Point, part, is_checked=False) for part in (data[:256], data[256:]))
        computation.output = encode(left + right)

    def map_to_curve(computation: ComputationAPI) -> None:
        data = computation.msg.data_as_bytes
        if len(data) != 128:
            raise VMError("length of data must be 128 bytes")
        computation.consume_gas(BLS12_MAP_FP2_G2_GAS, "BLS12_MAP_FP2_TO_G2 gas")
        try:
            computation.output = encode(G2Point.map_from_fp2_be(coordinates(data)))
        except ValueError as error:
            raise VMError(f"coordinate >= field modulus: {error}") from error

    return {_PAIRING: pairing, _G2ADD: add, _MAP_FP2: map_to_curve}


def _vm() -> type[PragueVM]:
    computation = type(
        "Computation", (PragueComputation,), {"_precompiles": {**PRAGUE_PRECOMPILES, **fast_precompiles()}}
    )
    state = type("State", (PragueState,), {"computation_class": computation})
    return type("VM", (PragueVM,), {"_state_class": state})


def _position(block: str | None, newest: int) -> int:
    if block == "earliest":
        return 0
    return int(block, 16) if block and block.startswith("0x") else newest


def _block_number(log: Mapping[str, Any]) -> int:
    return int(log["blockNumber"], 16)


def _has_topics(topics: Sequence[str], wanted: Sequence[Any]) -> bool:
    if len(wanted) > len(topics):
        return False
    return all(
        pattern is None or topic == pattern or (isinstance(pattern, list) and topic in pattern)
        for topic, pattern in zip(topics, wanted, strict=False)
    )


def _hex(data: bytes) -> str:
    return "0x" + data.hex()


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.removeprefix("0x"))
