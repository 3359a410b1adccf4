"""Rules of the contract broken on purpose: the tests that guard them must notice. `make mutate` breaks them all."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

CONTRACTS = Path(__file__).resolve().parents[2] / "contracts"
CHOSEN = ("no prevRoot check", "no Drained guard", "equivocation slashes the union")
"""Of a certificate, of money, of a contest."""


@pytest.fixture(scope="module")
def mutate() -> Any:
    spec = importlib.util.spec_from_file_location("mutate", CONTRACTS / "mutate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_mutant_breaks_a_rule_that_stands_in_the_source_once(mutate: Any) -> None:
    names = [mutant.name for mutant in mutate.MUTANTS]
    assert len(names) == len(set(names)) >= 30
    for mutant in mutate.MUTANTS:
        assert (CONTRACTS / mutant.path).read_text().count(mutant.old) == 1, mutant.name
        assert mutant.new != mutant.old


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOSEN)
def test_a_broken_rule_is_noticed(mutate: Any, name: str) -> None:
    if shutil.which("node") is None or not (CONTRACTS / "node_modules" / "solc").is_dir():
        pytest.skip("needs Node.js and `npm install --prefix contracts`; .ci/run has both")
    (mutant,) = [mutant for mutant in mutate.MUTANTS if mutant.name == name]
    assert mutate.find_killer(mutant, is_hint_enough=True)
