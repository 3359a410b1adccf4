"""Keys on disk: private, whole, never shown."""

import stat
from pathlib import Path

import pytest

from p2pfm.errors import OperatorError
from p2pfm.runtime.keys import ACCOUNT_FILE, BLS_FILE, PEER_FILE, create_keys, load_keys


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "node" / "keys"


def test_keys_load_as_they_were_created(folder: Path) -> None:
    created = create_keys(folder, "secret", light=True)
    loaded = load_keys(folder, "secret")
    assert loaded == created
    assert created.peer.startswith("12D3Koo")
    assert created.account_address.startswith("0x")
    assert len(created.account_address) == 42


def test_account_address_is_that_of_the_private_key(folder: Path) -> None:
    from eth_account import Account

    keys = create_keys(folder, "secret", light=True)
    assert Account.from_key(keys.account_private_key).address == keys.account_address


def test_folder_and_files_are_private(folder: Path) -> None:
    create_keys(folder, "secret", light=True)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted([ACCOUNT_FILE, BLS_FILE, PEER_FILE])
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in names} == {0o600}


@pytest.mark.parametrize("name", [ACCOUNT_FILE, BLS_FILE, PEER_FILE])
def test_loading_refuses_a_file_that_others_can_use(folder: Path, name: str) -> None:
    create_keys(folder, "secret", light=True)
    (folder / name).chmod(0o640)
    with pytest.raises(OperatorError, match=f"chmod 600 .*{name}"):
        load_keys(folder, "secret")


def test_loading_refuses_a_wrong_password(folder: Path) -> None:
    create_keys(folder, "secret", light=True)
    with pytest.raises(OperatorError, match="wrong password"):
        load_keys(folder, "other")


def test_loading_names_a_missing_file(folder: Path) -> None:
    create_keys(folder, "secret", light=True)
    (folder / BLS_FILE).unlink()
    with pytest.raises(OperatorError, match=BLS_FILE):
        load_keys(folder, "secret")


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"not json"])
def test_loading_refuses_a_damaged_keystore(folder: Path, damage: bytes) -> None:
    create_keys(folder, "secret", light=True)
    (folder / ACCOUNT_FILE).write_bytes(damage)
    with pytest.raises(OperatorError, match=ACCOUNT_FILE):
        load_keys(folder, "secret")


def test_creating_never_replaces_keys(folder: Path) -> None:
    keys = create_keys(folder, "secret", light=True)
    with pytest.raises(OperatorError, match="has keys already"):
        create_keys(folder, "secret", light=True)
    assert load_keys(folder, "secret") == keys


def test_secrets_are_not_shown(folder: Path) -> None:
    keys = create_keys(folder, "secret", light=True)
    shown = repr(keys) + str(keys)
    for secret in (keys.peer_seed, keys.account_private_key):
        assert secret.hex() not in shown
        assert repr(secret) not in shown
    assert str(keys.bls_secret) not in shown
