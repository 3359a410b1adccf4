"""BLS: both libraries give equal bytes and equal verdicts, and bad input is refused before a library sees it."""

import pytest

from p2pfm.config import ChainConfig
from p2pfm.settlement import bls
from p2pfm.types import PeerId

CHAIN = ChainConfig(1337, "0x" + "11" * 20, "0x" + "22" * 20)
ACCOUNT = "0x" + "ab" * 20
PEER = PeerId("12D3KooWtest")
SECRETS = [bls.key_from_seed(bytes([i]) * 32) for i in range(1, 4)]
MESSAGE = b"m" * 32
INFINITY_KEY = bytes([0xC0]) + bytes(47)
INFINITY_SIGNATURE = bytes([0xC0]) + bytes(95)
FAST = bls.BEST
"""The same library as the reference where arkworks is not installed; then only the refusals are tested."""

KEYS = [bls.public_key(secret) for secret in SECRETS]
SIGNATURES = [bls.sign(secret, MESSAGE) for secret in SECRETS]


def test_both_libraries_give_equal_bytes() -> None:
    secret = SECRETS[0]
    for function in (
        lambda lib: bls.public_key(secret, lib),
        lambda lib: bls.sign(secret, MESSAGE, lib),
        lambda lib: bls.aggregate(SIGNATURES, lib),
        lambda lib: bls.prove_possession(secret, CHAIN, ACCOUNT, PEER, lib),
        lambda lib: bls.decompress_key(KEYS[1], lib),
        lambda lib: bls.decompress_signature(SIGNATURES[1], lib),
    ):
        assert function(bls.PY_ECC) == function(FAST)


def test_key_round_trips_through_the_chains_encoding() -> None:
    for key in KEYS:
        assert bls.compress_key(bls.decompress_key(key)) == key


def _off_curve(data: bytes) -> bytes:
    """The same x plus something that is on no curve point."""
    for step in range(1, 200):
        changed = data[:-1] + bytes([(data[-1] + step) % 256])
        try:
            bls.PY_ECC.key_coordinates(changed) if len(data) == 48 else bls.PY_ECC.signature_coordinates(changed)
        except ValueError:
            return changed
    raise AssertionError("every neighbour is a valid point")


BAD_KEYS = {
    "empty": b"",
    "short": KEYS[0][:-1],
    "long": KEYS[0] + b"\0",
    "infinity": INFINITY_KEY,
    "infinity with rubbish": bytes([0xC0]) + b"\1" * 47,
    "not compressed": bytes([KEYS[0][0] & 0x7F]) + KEYS[0][1:],
    "x over the modulus": bytes([0x9F]) + b"\xff" * 47,
    "off the curve or the subgroup": _off_curve(KEYS[0]),
}
BAD_SIGNATURES = {
    "empty": b"",
    "short": SIGNATURES[0][:-1],
    "infinity": INFINITY_SIGNATURE,
    "not compressed": bytes([SIGNATURES[0][0] & 0x7F]) + SIGNATURES[0][1:],
    "x over the modulus": bytes([0x9F]) + b"\xff" * 95,
    "of another key": SIGNATURES[1],
    "the other sign": bytes([SIGNATURES[0][0] ^ 0x20]) + SIGNATURES[0][1:],
    "off the curve or the subgroup": _off_curve(SIGNATURES[0]),
}


@pytest.mark.parametrize("library", [bls.PY_ECC, FAST], ids=["py_ecc", "best"])
@pytest.mark.parametrize("case", BAD_KEYS)
def test_verify_rejects_a_bad_key(case: str, library: bls.Library) -> None:
    assert not bls.verify(BAD_KEYS[case], MESSAGE, SIGNATURES[0], library)
    assert not bls.fast_aggregate_verify([KEYS[1], BAD_KEYS[case]], MESSAGE, SIGNATURES[0], library)
    assert not bls.verify_possession(CHAIN, ACCOUNT, PEER, BAD_KEYS[case], SIGNATURES[0], library)


@pytest.mark.parametrize("library", [bls.PY_ECC, FAST], ids=["py_ecc", "best"])
@pytest.mark.parametrize("case", BAD_SIGNATURES)
def test_verify_rejects_a_bad_signature(case: str, library: bls.Library) -> None:
    assert not bls.verify(KEYS[0], MESSAGE, BAD_SIGNATURES[case], library)


@pytest.mark.parametrize("library", [bls.PY_ECC, FAST], ids=["py_ecc", "best"])
def test_verify_accepts_what_was_signed_and_nothing_else(library: bls.Library) -> None:
    total = bls.aggregate(SIGNATURES, library)
    assert bls.verify(KEYS[0], MESSAGE, SIGNATURES[0], library)
    assert bls.fast_aggregate_verify(KEYS, MESSAGE, total, library)
    assert not bls.fast_aggregate_verify(KEYS[:2], MESSAGE, total, library)
    assert not bls.fast_aggregate_verify(KEYS, b"n" * 32, total, library)
    assert not bls.fast_aggregate_verify([], MESSAGE, total, library)


@pytest.mark.parametrize("library", [bls.PY_ECC, FAST], ids=["py_ecc", "best"])
def test_aggregate_rejects_nothing_and_infinity(library: bls.Library) -> None:
    with pytest.raises(ValueError, match="at least one"):
        bls.aggregate([], library)
    with pytest.raises(ValueError, match="infinity"):
        bls.aggregate([SIGNATURES[0], INFINITY_SIGNATURE], library)
    opposite = bytes([SIGNATURES[0][0] ^ 0x20]) + SIGNATURES[0][1:]
    with pytest.raises(ValueError, match="infinity"):
        bls.aggregate([SIGNATURES[0], opposite], library)
    with pytest.raises(ValueError, match=r".+"):
        bls.aggregate([SIGNATURES[0], BAD_SIGNATURES["off the curve or the subgroup"]], library)


def test_keys_that_cancel_each_other_verify_nothing() -> None:
    opposite = bytes([KEYS[0][0] ^ 0x20]) + KEYS[0][1:]
    for library in (bls.PY_ECC, FAST):
        assert not bls.fast_aggregate_verify([KEYS[0], opposite], MESSAGE, SIGNATURES[0], library)


def test_possession_is_bound_to_account_peer_contract_and_chain() -> None:
    proof = bls.prove_possession(SECRETS[0], CHAIN, ACCOUNT, PEER)
    elsewhere = (
        (ChainConfig(1, CHAIN.federation, CHAIN.token), ACCOUNT, PEER),
        (ChainConfig(CHAIN.chain_id, "0x" + "12" * 20, CHAIN.token), ACCOUNT, PEER),
        (CHAIN, "0x" + "ac" * 20, PEER),
        (CHAIN, ACCOUNT, PeerId("another")),
    )
    assert bls.verify_possession(CHAIN, ACCOUNT, PEER, KEYS[0], proof)
    assert not any(bls.verify_possession(*place, KEYS[0], proof) for place in elsewhere)
    assert not bls.verify_possession(CHAIN, ACCOUNT, PEER, KEYS[1], proof)


def test_a_signature_is_not_a_proof_of_possession() -> None:
    message = bls.possession_message(CHAIN, ACCOUNT, PEER, KEYS[0])
    assert not bls.verify_possession(CHAIN, ACCOUNT, PEER, KEYS[0], bls.sign(SECRETS[0], message))


def test_secrets_outside_the_group_are_refused() -> None:
    for secret in (0, -1, bls.curve_order):
        with pytest.raises(ValueError, match="secret"):
            bls.sign(secret, MESSAGE)
    with pytest.raises(ValueError, match="seed"):
        bls.key_from_seed(b"short")
