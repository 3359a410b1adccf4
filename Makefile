# What a person runs. Everything is installed into .venv; nothing outside this folder and ~/.cache/p2pfm is touched.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
CONTRACTS := contracts/node_modules/.ready
JS_PEER := tests/net/js/node_modules/.ready

.PHONY: setup demo test mutate check slither clean

setup: $(READY)

# torch first and alone: its pinned version is the CPU build where one is offered, and nothing may pull another.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# The whole story on one machine. JSON=FILE also writes its figures; CHAIN=anvil runs it on anvil (needs Node.js).
demo: $(READY) $(if $(filter anvil,$(CHAIN)),$(CONTRACTS))
	@$(BIN)/p2pfm demo $(if $(JSON),--json '$(JSON)')

# The tests that compile contracts, use anvil or start a js-libp2p peer need Node.js; without it they are skipped.
# Most wait more than they compute, so three files run at a time; networks that keep to the clock run alone. TESTS='...'
# runs just what is named.
test: $(READY) $(CONTRACTS) $(JS_PEER)
ifdef TESTS
	$(BIN)/python -m pytest $(TESTS)
else
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile -m 'not alone'
	$(BIN)/python -m pytest -m alone
endif

# Breaks the contract's rules one by one: each must be noticed by a test. Needs Node.js; about half an hour.
mutate: $(READY) $(CONTRACTS)
	$(BIN)/python contracts/mutate.py $(MUTATE)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Static analysis of the contracts, in an environment of its own; needs Node.js.
slither: $(CONTRACTS)
	PYTHON=$(PYTHON) contracts/slither.sh

$(CONTRACTS): contracts/package.json
	@if command -v npm > /dev/null; then npm install --prefix contracts --no-audit --no-fund --no-package-lock --silent; \
	else echo 'no npm: contracts are not recompiled, anvil is not used'; mkdir -p contracts/node_modules; fi
	@touch $@

# Where the registry is not reached, the one test that needs these packages says so and is skipped.
$(JS_PEER): tests/net/js/package.json
	@if command -v npm > /dev/null; then npm install --prefix tests/net/js --no-audit --no-fund --no-package-lock --silent \
	|| echo 'npm failed: no js-libp2p peer is tested'; else echo 'no npm: no js-libp2p peer is tested'; fi
	@mkdir -p tests/net/js/node_modules && touch $@

clean:
	rm -rf .venv contracts/node_modules tests/net/js/node_modules demo-out
