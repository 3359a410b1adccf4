"""The contract itself, beyond the ledger's rules: attacks with raw calldata, equality with the Python code, gas."""

import threading
from collections.abc import Iterator

import msgspec
import pytest
from eth_account import Account
from eth_hash.auto import keccak
from ledger_worlds import (
    ACCOUNTS,
    BLS_KEYS,
    IMPLEMENTATIONS,
    KEYS,
    PARAMS,
    PEERS,
    SECRETS,
    TOKENS,
    chain_world,
    running_chain,
)
from py_ecc.bls import G2ProofOfPossession
from py_ecc.bls.g2_primitives import pubkey_to_G1
from py_ecc.optimized_bls12_381 import add, neg, normalize
from raw_chain import (
    Deployed,
    key_outside_the_subgroup,
    padded,
    raw_certificate,
    raw_node,
    raw_proof,
    raw_statement,
    signature_outside_the_subgroup,
    words,
)

from p2pfm.errors import ChainError, Reverted
from p2pfm.runtime.chain_rpc import read_artifact
from p2pfm.runtime.web3_ledger import Web3Ledger, deploy
from p2pfm.settlement import bls, merkle
from p2pfm.settlement.ledger import LeafValue, Sums
from p2pfm.settlement.rewards import submission_message
from p2pfm.settlement.sampling import draw_committee
from p2pfm.types import Digest, MemberIndex, Round, Wei

SUBMIT_GAS_MAX = 260_000
"""Settling with all signing: 227k for the signature, the rest storage; must not grow with members."""
CLAIM_GAS_MAX = 120_000
"""The first of a member and of the federation."""
CODE_BYTES_MAX = 24_576


@pytest.fixture(scope="module", params=IMPLEMENTATIONS[1:])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    with running_chain(request.param) as rpc_url:
        yield rpc_url


@pytest.fixture
def deployed(url: str) -> Deployed:
    return Deployed(url)


def test_both_sides_sign_the_same_bytes(deployed: Deployed) -> None:
    world = deployed.world.found(4)
    submission = world.submission(7, [5, -3, 9, 0], absent=[1])
    on_chain = deployed.contract.functions.roundMessage(raw_statement(submission)).call()
    assert on_chain == submission_message(world.chain, submission)
    key = words(bls.decompress_key(BLS_KEYS[2]))
    on_chain = deployed.contract.functions.possessionMessage(ACCOUNTS[2], PEERS[2], key).call()
    assert on_chain == bls.possession_message(world.chain, ACCOUNTS[2], PEERS[2], BLS_KEYS[2])


def test_both_sides_draw_the_same_committee(deployed: Deployed) -> None:
    world = deployed.world
    for member in range(1, 6):
        world.join(member, 10 * member)
    stakes = [Wei(10 * member) for member in range(1, 6)]
    for _ in range(3):
        seed = deployed.contract.functions.seed().call()
        world.any.rotate()
        assert world.any.get_roster().committee == draw_committee(seed, stakes, PARAMS.committee_size)
        assert deployed.contract.functions.seed().call() != seed
        world.advance(PARAMS.rotation_s)


def test_registration_refuses_points_that_are_no_keys(deployed: Deployed) -> None:
    world = deployed.world
    possession = words(bls.decompress_signature(bls.prove_possession(SECRETS[1], world.chain, ACCOUNTS[1], PEERS[1])))
    good = words(bls.decompress_key(BLS_KEYS[1]))
    bad_keys = {
        "infinity": [0, 0, 0, 0],
        "off the curve": [*good[:3], good[3] ^ 1],
        "coordinate over the modulus": [good[0] + 2**200, *good[1:]],
        "outside the subgroup": key_outside_the_subgroup(),
        "of somebody else": words(bls.decompress_key(BLS_KEYS[2])),
    }
    register = deployed.contract.functions.register
    for case, key in bad_keys.items():
        assert deployed.revert_of(register(PEERS[1], key, possession, 10)) == "BadPossession", case
    bad_proofs = {
        "infinity": [0] * 8,
        "off the curve": [*possession[:7], possession[7] ^ 1],
        "outside the subgroup": signature_outside_the_subgroup(),
        "plain proof, not bound to the account": words(
            bls.decompress_signature(bytes(G2ProofOfPossession.PopProve(SECRETS[1])))
        ),
    }
    for case, proof in bad_proofs.items():
        assert deployed.revert_of(register(PEERS[1], good, proof, 10)) == "BadPossession", case
    front_run = deployed.revert_of(register(PEERS[1], good, possession, 10), account=2)
    assert front_run == "BadPossession", "a proof seen in the mempool is worth nothing to another account"
    # The right one passes every check and fails only at the tokens that were not approved.
    assert deployed.revert_of(register(PEERS[1], good, possession, 10)) == "ERC20InsufficientAllowance"


def test_a_rogue_key_cannot_join(deployed: Deployed) -> None:
    """mine - theirs: its holder could sign for both alone, if only it could prove possession."""
    theirs = pubkey_to_G1(BLS_KEYS[1])
    mine = pubkey_to_G1(BLS_KEYS[2])
    rogue = padded([int(c) for c in normalize(add(mine, neg(theirs)))])
    proof = bls.prove_possession(SECRETS[2], deployed.world.chain, ACCOUNTS[2], PEERS[2])
    call = deployed.contract.functions.register(PEERS[2], words(rogue), words(bls.decompress_signature(proof)), 10)
    assert deployed.revert_of(call, account=2) == "BadPossession"


def test_a_certificate_is_worth_nothing_to_another_federation(url: str, deployed: Deployed) -> None:
    mine, other = deployed.world.found(4), chain_world(url).found(4)
    certificate = mine.submission(0)
    with pytest.raises(Reverted, match="BadSignature"):
        other.any.submit_round(certificate)
    mine.any.submit_round(certificate)


def test_a_signature_outside_the_subgroup_settles_nothing(deployed: Deployed) -> None:
    world = deployed.world.found(4)
    submission = world.submission(0)
    good = words(bls.decompress_signature(submission.signature))
    submit = deployed.contract.functions.submitRound
    assert deployed.revert_of(submit(raw_certificate(submission))) == ""
    for bad in (signature_outside_the_subgroup(), [0] * 8, [*good[:7], good[7] ^ 1]):
        assert deployed.revert_of(submit(raw_certificate(submission, signature=bad))) == "BadSignature"


def test_gas_and_size_stay_within_their_bounds(deployed: Deployed) -> None:
    world = deployed.world.found(4)
    assert read_artifact("Federation")["deployedBytes"] <= CODE_BYTES_MAX
    world.any.submit_round(world.submission(0))
    world.any.submit_round(world.submission(1, [5, 3, 9, 1]))
    assert deployed.gas_of_last_block() <= SUBMIT_GAS_MAX
    world.advance(PARAMS.challenge_window_s)
    world.any.claim(Round(1), MemberIndex(0), world.leaves)
    assert deployed.gas_of_last_block() <= CLAIM_GAS_MAX


def test_the_client_names_a_wrong_chain_a_wrong_contract_and_a_dead_endpoint(url: str, deployed: Deployed) -> None:
    chain = deployed.world.chain
    with pytest.raises(ChainError, match=r"expected chain id 5 .* got 1337"):
        Web3Ledger(url, msgspec.structs.replace(chain, chain_id=5), KEYS[1]).get_roster()
    with pytest.raises(ChainError, match="no p2pfm federation at"):
        Web3Ledger(url, msgspec.structs.replace(chain, federation=ACCOUNTS[1]), KEYS[1]).get_roster()
    with pytest.raises(ChainError, match="pays in"):
        Web3Ledger(url, msgspec.structs.replace(chain, token=ACCOUNTS[1]), KEYS[1]).get_roster()
    with pytest.raises(ChainError, match="is it running"):
        Web3Ledger("http://127.0.0.1:9", chain, KEYS[1]).get_roster()


def test_an_account_without_ether_is_told_so(url: str, deployed: Deployed) -> None:
    deployed.world.join(1)
    poor = Web3Ledger(url, deployed.world.chain, bytes(Account.create().key))
    with pytest.raises(ChainError, match=r"(?i)insufficient|balance|fund|gas"):
        poor.rotate()


def test_one_keys_sender_survives_a_nonce_used_elsewhere(url: str, deployed: Deployed) -> None:
    world = deployed.world
    twin = Web3Ledger(url, world.chain, KEYS[3], fresh_s=0)
    world.ledgers[3].fund(Wei(1))
    twin.fund(Wei(1))
    world.ledgers[3].fund(Wei(1))
    assert world.any.get_pool() == 3


def test_concurrent_sends_of_one_key_all_land(deployed: Deployed) -> None:
    ledger = deployed.world.ledgers[2]
    ledger.fund(Wei(1))
    failures: list[BaseException] = []

    def send() -> None:
        try:
            ledger.transfer(ACCOUNTS[3], Wei(1))
        except ChainError as error:
            failures.append(error)

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert ledger.get_balance(ACCOUNTS[2]) == TOKENS - 1 - 8


def test_a_proof_longer_than_the_tree_is_refused(deployed: Deployed) -> None:
    world = deployed.world.found(4)
    world.any.submit_round(world.submission(1, [5, 3, 9, 1]))
    world.advance(PARAMS.challenge_window_s)
    record = deployed.record(0)
    values, siblings = raw_proof(world.leaves, 0)
    claim = deployed.contract.functions.claim
    assert deployed.revert_of(claim(0, record, 0, (values, siblings))) == ""
    nothing = (bytes(32), 0, 0, 0)
    huge = (bytes(32), 2**128 - 1, 0, 0)
    for wrong in ([*siblings, nothing], siblings[:1], [], [huge, huge], [nothing] * 65):
        assert deployed.revert_of(claim(0, record, 0, (values, wrong))) == "BadProof"
    assert deployed.revert_of(claim(0, record, 4, (values, siblings))) == "BadProof"
    assert deployed.revert_of(claim(1, record, 0, (values, siblings))) == "UnknownRound"


def test_sums_that_come_round_to_the_announced_ones_prove_nothing(deployed: Deployed) -> None:
    """Two leaves of 2**127 and more, announced as what is left of their sum. No client builds such a tree."""
    world = deployed.world.found(2)
    half = LeafValue(Wei(2**127 + 500), Wei(500), 1)
    node = merkle.compute_leaf_node(half)
    digest = Digest(keccak(merkle._encode(node) * 2))
    world.settle(1, root=digest, sums=Sums(Wei(1000), Wei(1000), 2), num_leaves=2)
    world.advance(PARAMS.challenge_window_s)
    proof = (half.cumulative_wei, half.reward_wei, half.contribution, 0), [raw_node(node)]
    claim = deployed.contract.functions.claim(0, deployed.record(0), 0, proof)
    assert deployed.revert_of(claim) == "BadProof"


def test_the_constructor_refuses_rules_that_cannot_work(url: str) -> None:
    for changes in ({"committee_size": 0}, {"min_stake": Wei(0)}, {"rounds_per_epoch": 0}, {"members_max": 3}):
        with pytest.raises(Reverted, match="BadParameter"):
            deploy(url, KEYS[0], msgspec.structs.replace(PARAMS, **changes))


def test_what_happened_can_be_followed_by_events(deployed: Deployed) -> None:
    world = deployed.world.found(4)
    world.any.submit_round(world.submission(1, [5, 3, 9, 1]))
    world.advance(PARAMS.challenge_window_s)
    world.any.claim(Round(1), MemberIndex(2), world.leaves)
    events = deployed.contract.events
    joined = events.Registered().get_logs(from_block=0)
    assert [(event["args"]["account"], event["args"]["peer"]) for event in joined] == list(
        zip(ACCOUNTS[1:5], PEERS[1:5], strict=True)
    )
    (accepted,) = events.RoundAccepted().get_logs(from_block=0)
    assert accepted["args"]["record"]["statement"]["root"] == world.any.get_rounds(Round(1))[0].root
    claims = events.Claimed().get_logs(from_block=0, argument_filters={"index": 2})
    assert [event["args"]["amount"] for event in claims] == [world.leaves[2].cumulative_wei]
    assert events.Claimed().get_logs(from_block=0, argument_filters={"index": 0}) == []
