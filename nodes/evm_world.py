"""A simulated world whose ledger is the contract itself, in a real EVM with real BLS signatures: for small runs.

The one place that knows both drivers, the simulator's and the node's. The EVM's time is the world's, and its randomness
the scenario's.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from random import Random

import msgspec
from eth_account import Account
from eth_utils.abi import function_abi_to_4byte_selector

from nodes.testnet import ETHER, serve_chain
from p2pfm.config import ChainConfig, NetworkConfig
from p2pfm.errors import OperatorError
from p2pfm.runtime.chain_rpc import read_artifact
from p2pfm.runtime.web3_ledger import Web3Ledger, deploy
from p2pfm.settlement import bls
from p2pfm.settlement.ledger import Entry, FederationParams, LeafValue, Roster, SettledRound, Submission
from p2pfm.types import Digest, MemberIndex, Millis, PeerId, Round, Wei
from sim.chain import make_params
from sim.scenarios import Scenario, compute_stakes, make_network
from sim.signatures import Signatures
from sim.world import World

CHAIN_ID = 31337
CONTRACTS = ("Federation", "PFMToken")


class BlsSignatures(Signatures):
    """Real BLS for the committee; envelopes, which no chain checks, stay as they are."""

    def __init__(self, seed: int) -> None:
        super().__init__(Random(f"{seed} secret").randbytes(32))
        self._seed = seed
        self._secrets: dict[bytes, int] = {}
        self._public = cache(self._make_key)
        self._signed = cache(self._sign)

    def bls_key(self, peer: PeerId) -> bytes:
        """See Signatures, here and below."""
        return self._public(peer)

    def sign(self, bls_key: bytes, message: bytes) -> bytes:
        """Made once: it is compared with, too."""
        return self._signed(bls_key, message)

    def aggregate(self, signatures: Sequence[bytes]) -> bytes:
        """A sum of points."""
        return bls.aggregate(signatures)

    def prove_possession(self, chain: ChainConfig, account: str, peer: PeerId) -> bytes:
        """As the contract wants it."""
        return bls.prove_possession(self._secrets[self.bls_key(peer)], chain, account, peer)

    def verify_round(self, bls_keys: Sequence[bytes], message: Digest, signature: bytes) -> bool:
        """One pairing."""
        return bls.fast_aggregate_verify(bls_keys, message, signature)

    def _make_key(self, peer: PeerId) -> bytes:
        secret = bls.key_from_seed(sha256(f"{self._seed} bls {peer}".encode()).digest())
        key = bls.public_key(secret)
        self._secrets[key] = secret
        return key

    def _sign(self, bls_key: bytes, message: bytes) -> bytes:
        return bls.sign(self._secrets[bls_key], message)


class EvmLedger:
    """The federation in an EVM, as `sim.chain` calls a ledger. Implements sim.chain.OtherLedger."""

    def __init__(self, seed: int, make_rules: Callable[[ChainConfig], NetworkConfig], stakes: Sequence[Wei]) -> None:
        """Not usable before `open`; `make_rules` gives the network on a chain, `stakes` what each peer puts down."""
        from nodes.evm import EmbeddedChain

        self._clock: Callable[[], Millis] = lambda: Millis(1_000)
        self._keys = [sha256(f"{seed} account {index}".encode()).digest() for index in range(len(stakes) + 1)]
        accounts = [str(Account.from_key(key).address) for key in self._keys]
        self.accounts: Sequence[str] = accounts[1:]
        self._evm = EmbeddedChain(
            CHAIN_ID,
            dict.fromkeys(accounts, 1_000_000 * ETHER),
            clock=lambda: self._clock() / 1000,
            entropy=Random(f"{seed} evm").randbytes,
        )
        self._make_rules = make_rules
        self._stakes = stakes
        self.params: FederationParams
        self.network: NetworkConfig
        self._ledgers: dict[str, Web3Ledger]
        self._sponsor: Web3Ledger

    @contextmanager
    def open(self) -> Iterator["EvmLedger"]:
        """Deploy the contracts, and give every account its stake."""
        server = serve_chain(self._evm, "127.0.0.1", 0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            draft = self._make_rules(ChainConfig(CHAIN_ID, "0x" + "00" * 20, "0x" + "00" * 20))
            self.params = make_params(draft, len(self.accounts))
            chain = deploy(url, self._keys[0], self.params)
            self.network = self._make_rules(chain)
            self._sponsor, *ledgers = [Web3Ledger(url, chain, key, fresh_s=0) for key in self._keys]
            self._ledgers = dict(zip(self.accounts, ledgers, strict=True))
            for account, stake in zip(self.accounts, self._stakes, strict=True):
                self._sponsor.transfer(account, stake)
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def follow(self, clock: Callable[[], Millis]) -> None:
        """See OtherLedger, here and below."""
        self._clock = clock

    def get_gas(self) -> Mapping[str, int]:
        """By the contract's function, deployment left out."""
        spent: Counter[str] = Counter()
        for number in range(int(self._evm.handle("eth_blockNumber", []), 16) + 1):
            for digest in self._evm.handle("eth_getBlockByNumber", [hex(number), False])["transactions"]:
                transaction = self._evm.handle("eth_getTransactionByHash", [digest])
                if transaction["to"] is not None:
                    receipt = self._evm.handle("eth_getTransactionReceipt", [digest])
                    spent[_get_names()[transaction["input"][:10]]] += int(receipt["gasUsed"], 16)
        return dict(spent)

    def fund(self, account: str, amount: Wei) -> None:
        """The sponsor's, whoever is named."""
        self._sponsor.fund(amount)

    def register(self, account: str, peer: PeerId, bls_key: bytes, possession: bytes, stake: Wei) -> MemberIndex:
        """By the account itself."""
        return self._ledgers[account].register(peer, bls_key, possession, stake)

    def rotate(self) -> None:
        """Anybody may."""
        self._sponsor.rotate()

    def get_committee(self, epoch: int) -> tuple[MemberIndex, ...]:
        """As the contract tells it."""
        return self._sponsor.get_committee(epoch)

    def prove_equivocation(self, account: str, first: Submission, second: Submission) -> None:
        """By the account itself: it earns the bounty."""
        self._ledgers[account].prove_equivocation(first, second)

    def get_roster(self) -> Roster:
        """As the contract tells it."""
        return self._sponsor.get_roster()

    def get_head(self) -> SettledRound | None:
        """As the contract tells it."""
        return self._sponsor.get_head()

    def get_rounds(self, first: Round) -> tuple[SettledRound, ...]:
        """As the contract tells it."""
        return self._sponsor.get_rounds(first)

    def get_entries(self) -> tuple[Entry, ...]:
        """As the contract tells it."""
        return self._sponsor.get_entries()

    def get_claimed(self, index: MemberIndex) -> Wei:
        """As the contract tells it."""
        return self._sponsor.get_claimed(index)

    def submit_round(self, submission: Submission) -> None:
        """The contract checks the committee's signature itself."""
        self._sponsor.submit_round(submission)

    def claim_leaf(self, round: Round, index: MemberIndex, leaves: tuple[LeafValue, ...]) -> None:
        """Anybody may; the member's account is paid."""
        self._sponsor.claim(round, index, leaves)


@contextmanager
def open_evm_world(scenario: Scenario) -> Iterator[tuple[World, EvmLedger]]:
    """A scenario's world with the contract itself; to be run within the block.

    Raises:
        ConfigError: a scenario that cannot run.
        OperatorError: no py-evm here.
    """

    def make_rules(chain: ChainConfig) -> NetworkConfig:
        return msgspec.structs.replace(make_network(scenario), chain=chain)

    try:
        ledger = EvmLedger(scenario.seed, make_rules, compute_stakes(scenario))
    except ImportError as error:
        raise OperatorError(f"ledger evm needs py-evm: pip install 'p2pfm[testnet]' ({error})") from error
    with ledger.open():
        yield World(scenario, config=ledger.network, ledger=ledger, signatures=BlsSignatures(scenario.seed)), ledger


@cache
def _get_names() -> dict[str, str]:
    """Functions by their selector."""
    functions = [entry for name in CONTRACTS for entry in read_artifact(name)["abi"] if entry["type"] == "function"]
    return {"0x" + function_abi_to_4byte_selector(entry).hex(): str(entry["name"]) for entry in functions}
