"""`p2pfm localnet up` without --out: its folder goes when all went well, and is named when not."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from nodes import cli
from p2pfm.errors import WorldError


def lose_the_chain(home: Path) -> None:
    (home / "peer-0").mkdir()
    raise WorldError("the chain is gone")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("options", [("--model", "bogus"), ("--chain", "bogus"), ("--adapter", "bogus")])
def test_an_option_that_is_refused_leaves_no_folder(options: tuple[str, ...], temporary: Path) -> None:
    assert "bogus" in str(CliRunner().invoke(cli.app, ["localnet", "up", *options]).exception)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("end", [None, KeyboardInterrupt(), SystemExit(143)])
def test_a_temporary_folder_goes_at_the_end(end: BaseException | None, temporary: Path) -> None:
    try:
        with cli._open_folder(None) as home:
            (home / "peer-0").mkdir()
            if end:
                raise end
    except (KeyboardInterrupt, SystemExit):
        pass
    assert list(temporary.iterdir()) == []


def test_after_an_error_a_temporary_folder_stays_and_is_named(
    temporary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WorldError), cli._open_folder(None) as home:
        lose_the_chain(home)
    assert list(temporary.iterdir()) == [home]
    assert str(home) in capsys.readouterr().err


def test_a_folder_that_was_asked_for_stays(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), cli._open_folder(tmp_path) as home:
        raise KeyboardInterrupt
    assert home.exists()


def test_a_demos_folder_is_no_place_for_a_local_network(tmp_path: Path) -> None:
    (tmp_path / ".p2pfm-demo").touch()
    result = CliRunner().invoke(cli.app, ["localnet", "up", "--model", "toy", "--out", str(tmp_path)])
    assert "is a demo's folder" in str(result.exception)
