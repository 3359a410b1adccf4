"""Changes the contract's rules one by one and runs the tests against each change: what no test notices, no test guards.

    python contracts/mutate.py [--only NAME]... [--every K --from I] [--list] [--table FILE]

Each mutant is compiled into a temporary folder with the committed settings and tested on the embedded chain: first with
the tests that its rule names, then with the suites and the state machine. Ends with 1 if a mutant survives. Needs
Node.js and `npm install --prefix contracts`.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

CONTRACTS = Path(__file__).resolve().parent
ROOT = CONTRACTS.parent
ARTIFACTS = "P2PFM_TEST_ARTIFACTS"
"""Tells the tests (tests/ledger_worlds.py) where the artifacts are."""
COMPILE_SECONDS_MAX = 120
TEST_SECONDS_MAX = 600
SUITES = (
    *("tests/suites", "tests/chain/test_contract_attacks.py", "tests/chain/test_contract.py"),
    "tests/chain/test_machine.py",  # the longest last
)


class Mutant(NamedTuple):
    """One rule, broken: `old`, which stands in `path` exactly once, becomes `new`."""

    name: str
    path: str
    old: str
    new: str
    hint: str
    """pytest -k: the tests that should notice; they run first, and if they do not, all others."""


FEDERATION, TREE, BLS = "src/Federation.sol", "src/libraries/RewardTree.sol", "src/libraries/BLS381.sol"
SERVING = "src/ServingPool.sol"

MUTANTS = (
    Mutant(
        "serving paid before the round is final",
        SERVING,
        "if (!FEDERATION.isFinal(position, record)) revert NotFinal();",
        "FEDERATION.isFinal(position, record);",
        "serving_is_paid",
    ),
    Mutant("serving paid twice", SERVING, "claimed[index] = drawn + paid;", "", "serving_is_paid"),
    Mutant(
        "serving paid beyond its epochs",
        SERVING,
        "if (claimedTotal + paid > PER_EPOCH * numEpochs) revert OverBudget();",
        "",
        "cannot_draw_more",
    ),
    Mutant("what was drawn for serving is not added up", SERVING, "claimedTotal += paid;", "", "cannot_draw_more"),
    Mutant(
        "a dry serving pool reverts",
        SERVING,
        "Math.min(proof.leaf.served - drawn, TOKEN.balanceOf(address(this)))",
        "proof.leaf.served - drawn",
        "runs_dry",
    ),
    Mutant("serving: a leaf of any root", SERVING, "top.digest != statement.root || ", "", "served_leaves"),
    Mutant(
        "what is served is not hashed",
        TREE,
        "keccak256(abi.encode(leaf))",
        "keccak256(abi.encode(leaf.cumulative, leaf.reward, leaf.contribution))",
        "serving_is_paid",
    ),
    Mutant(
        "quorum of two thirds, not more",
        FEDERATION,
        "present < 2 * size / 3 + 1",
        "present < 2 * size / 3",
        "quorum or forg or sign",
    ),
    Mutant("no nonce check", FEDERATION, "if (statement.nonce != head.nonce) revert BadNonce();", "", "follows"),
    Mutant(
        "no prevRoot check", FEDERATION, "if (statement.prevRoot != _headRoot) revert BadPrevRoot();", "", "follows"
    ),
    Mutant(
        "a round may come twice", FEDERATION, "statement.round <= head.round", "statement.round < head.round", "follows"
    ),
    Mutant(
        "certificates live two epochs",
        FEDERATION,
        "epoch + EPOCH_LAG_MAX < head.epoch",
        "epoch + EPOCH_LAG_MAX + 1 < head.epoch",
        "outlives",
    ),
    Mutant("no epochMin", FEDERATION, "epoch < head.epochMin || ", "", "void or slash"),
    Mutant("a slash sets no epochMin", FEDERATION, "_head.epochMin = _head.epoch + 1;", "", "void"),
    Mutant(
        "numLeaves may fall",
        FEDERATION,
        "statement.numLeaves < head.numLeaves || statement.numLeaves > _members.length",
        "statement.numLeaves > _members.length",
        "taken_back",
    ),
    Mutant(
        "more leaves than members",
        FEDERATION,
        "statement.numLeaves < head.numLeaves || statement.numLeaves > _members.length",
        "statement.numLeaves < head.numLeaves",
        "taken_back",
    ),
    Mutant(
        "cumulative sum unchecked",
        FEDERATION,
        "if (statement.cumulative != uint256(money.cumulative) + statement.reward) revert BadSums();",
        "",
        "begins or allots",
    ),
    Mutant(
        "a round may allot more than the pool holds",
        FEDERATION,
        " || statement.reward > money.pool) revert",
        ") revert",
        "allots",
    ),
    Mutant(
        "a round may allot more than its epoch's budget",
        FEDERATION,
        "statement.reward > budget || statement.reward > money.pool",
        "statement.reward > money.pool",
        "allots",
    ),
    Mutant(
        "payout rule off by one",
        FEDERATION,
        "return (uint256(round) + 1) / ROUNDS_PER_EPOCH > last / ROUNDS_PER_EPOCH;",
        "return uint256(round) / ROUNDS_PER_EPOCH > last / ROUNDS_PER_EPOCH;",
        "allots or settle",
    ),
    Mutant(
        "payout counts from the last round, not the one after",
        FEDERATION,
        "uint256 last = head.numRounds == 0 ? 0 : uint256(head.round) + 1;",
        "uint256 last = head.numRounds == 0 ? 0 : uint256(head.round);",
        "allots or settle",
    ),
    Mutant("the pool is not reduced", FEDERATION, "money.pool - statement.reward", "money.pool", "settle"),
    Mutant(
        "claim before final",
        FEDERATION,
        "if (!isFinal(position, record)) revert NotFinal();",
        "_validateRecord(position, record);",
        "claim",
    ),
    Mutant("no Drained guard", FEDERATION, "if (total > _money.cumulative) revert Drained();", "", "draws_no_more"),
    Mutant("a claim is not remembered", FEDERATION, "claimed[index] = proof.leaf.cumulative;", "", "claim"),
    Mutant(
        "a claim pays the caller",
        FEDERATION,
        "safeTransfer(_members[index].account, paid)",
        "safeTransfer(msg.sender, paid)",
        "claim",
    ),
    Mutant(
        "an older root resets what was claimed",
        FEDERATION,
        "if (proof.leaf.cumulative <= drawn) return 0;",
        "if (proof.leaf.cumulative == drawn) return 0;",
        "cumulative",
    ),
    Mutant(
        "a claim checks the digest but not the sums",
        FEDERATION,
        "statement.root || top.cumulative != statement.cumulative || top.reward != statement.reward\n"
        "                || top.contribution != statement.contribution\n",
        "statement.root\n",
        "announces",
    ),
    Mutant(
        "a restart at any time",
        FEDERATION,
        "if (block.timestamp < _head.progressAt + RESTART_PERIOD) revert TooEarly();",
        "",
        "restart",
    ),
    Mutant(
        "a restart keeps the nonce",
        FEDERATION,
        "emit Restarted(++_head.nonce);",
        "emit Restarted(_head.nonce);",
        "restart",
    ),
    Mutant(
        "a round is no progress",
        FEDERATION,
        "        head.progressAt = uint48(block.timestamp);\n        head.numLeaves",
        "        head.numLeaves",
        "restart",
    ),
    Mutant(
        "record hash unchecked",
        FEDERATION,
        "if (recordHash(position) != hash) revert UnknownRound();",
        "",
        "altered_root or altered_record",
    ),
    Mutant(
        "absent seats beyond the committee",
        FEDERATION,
        "if (size < COMMITTEE_MAX && absent >> size != 0) revert BadAbsent();",
        "",
        "absent_bit_beyond",
    ),
    Mutant(
        "a demand after the window",
        FEDERATION,
        "if (block.timestamp >= record.acceptedAt + CHALLENGE_WINDOW) revert NotContestable();",
        "",
        "final_round or holds",
    ),
    Mutant(
        "a demand holds nothing",
        FEDERATION,
        "if (!isHeld || deadline + RESPONSE_PERIOD > _times.until) _times.until = deadline + RESPONSE_PERIOD;",
        "",
        "holds",
    ),
    Mutant(
        "a demand holds its round alone",
        FEDERATION,
        "bool isHeld = position >= _times.from",
        "bool isHeld = position == _times.from",
        "held_with_it",
    ),
    Mutant(
        "a later demand lets an earlier round go",
        FEDERATION,
        "if (!isHeld || position < _times.from) _times.from = position;",
        "_times.from = position;",
        "holds",
    ),
    Mutant(
        "a hold has no end of its own",
        FEDERATION,
        "(isHeld ? 2 * RESPONSE_PERIOD : 0)",
        "(isHeld ? 200 * RESPONSE_PERIOD : 0)",
        "chain_of_demands",
    ),
    Mutant(
        "a leaf shown after the deadline",
        FEDERATION,
        "if (block.timestamp >= demand.deadline) revert TooLate();",
        "",
        "not_shown",
    ),
    Mutant(
        "a leaf shown for another record",
        FEDERATION,
        "if (_validateRecord(demand.position, record) != demand.hash) revert UnknownRound();",
        "_validateRecord(demand.position, record);",
        "took_its",
    ),
    Mutant(
        "a shown leaf leaves the demand open",
        FEDERATION,
        "        demand.isOpen = false;\n        emit Shown",
        "        emit Shown",
        "shown",
    ),
    Mutant(
        "a demand closed before its deadline",
        FEDERATION,
        "if (block.timestamp < demand.deadline) revert TooEarly();",
        "",
        "shown",
    ),
    Mutant(
        "a demand voids a final round",
        FEDERATION,
        "if (!isFinal(place.position, place.record)) {",
        "{",
        "bond_comes_back",
    ),
    Mutant("the bond is not returned", FEDERATION, "uint256 paid = LEAF_BOND;", "uint256 paid = 0;", "bond"),
    Mutant(
        "the reward is rounded up",
        FEDERATION,
        "Math.mulDiv(POOL_PER_EPOCH, contribution, statement.contribution)",
        "Math.mulDiv(POOL_PER_EPOCH, contribution, statement.contribution, Math.Rounding.Ceil)",
        "framed",
    ),
    Mutant(
        "a reward is owed in every round",
        FEDERATION,
        "if (_isPayout(statement.round, last) && statement.contribution > 0) {",
        "if (statement.contribution > 0) {",
        "between_payouts",
    ),
    Mutant(
        "transition without the previous leaf",
        FEDERATION,
        "            _validateLeaf(place.previous.statement, index, before);\n",
        "",
        "framed",
    ),
    Mutant(
        "transition forgets what was drawn before",
        FEDERATION,
        "drawn = before.leaf.cumulative;",
        "drawn = 0;",
        "framed",
    ),
    Mutant(
        "a void goes back to any earlier record",
        FEDERATION,
        "            _validateRecord(place.position - 1, place.previous);\n            (head.round",
        "            (head.round",
        "void_back_to",
    ),
    Mutant(
        "a proof after the window",
        FEDERATION,
        "if (isFinal(place.position, place.record)) revert NotContestable();",
        "_validateRecord(place.position, place.record);",
        "final_round",
    ),
    Mutant("equivocation without signatures", FEDERATION, "        _validateSignature(first);\n", "", "framed"),
    Mutant(
        "one statement twice is equivocation",
        FEDERATION,
        "if (roundMessage(a) == roundMessage(b)) revert NoFault();",
        "",
        "framed",
    ),
    Mutant(
        "statements about two rounds are equivocation",
        FEDERATION,
        " || a.round != b.round) revert",
        ") revert",
        "framed",
    ),
    Mutant("equivocation over two nonces", FEDERATION, " || a.nonce != b.nonce", "", "framed"),
    Mutant(
        "equivocation slashes the union",
        FEDERATION,
        "first.absent | second.absent",
        "first.absent & second.absent",
        "signed_both or framed",
    ),
    Mutant(
        "a void slashes the absent too",
        FEDERATION,
        "_slash(statement.epoch, place.record.absent)",
        "_slash(statement.epoch, 0)",
        "overpaid",
    ),
    Mutant("a slash keeps the nonce", FEDERATION, "        ++_head.nonce;\n", "", "overpaid"),
    Mutant("a slash by equivocation is told by halves", FEDERATION, "emit Restarted(_head.nonce);", "", "everything"),
    Mutant(
        "a void does not restore the pool",
        FEDERATION,
        "money.pool + money.cumulative - cumulative",
        "money.pool",
        "overpaid",
    ),
    Mutant(
        "a void does not restore the head root",
        FEDERATION,
        "(head.round, head.numLeaves, _headRoot) = (previous.round, previous.numLeaves, previous.root);",
        "(head.round, head.numLeaves) = (previous.round, previous.numLeaves);",
        "void or moved",
    ),
    Mutant(
        "a void does not restore the head round",
        FEDERATION,
        "(head.round, head.numLeaves, _headRoot) = (previous.round, previous.numLeaves, previous.root);",
        "(head.numLeaves, _headRoot) = (previous.numLeaves, previous.root);",
        "void or moved",
    ),
    Mutant(
        "a void does not restore the leaves",
        FEDERATION,
        "(head.round, head.numLeaves, _headRoot) = (previous.round, previous.numLeaves, previous.root);",
        "(head.round, _headRoot) = (previous.round, previous.root);",
        "number_of_leaves_too",
    ),
    Mutant(
        "a void keeps what follows",
        FEDERATION,
        "head.numRounds = place.position;",
        "head.numRounds = head.numRounds - 1;",
        "void",
    ),
    Mutant(
        "a void keeps the hold",
        FEDERATION,
        "if (_times.from >= place.position) _times.until = 0;",
        "",
        "void_ends",
    ),
    Mutant(
        "a void is no progress",
        FEDERATION,
        "        head.numRounds = place.position;\n        head.progressAt = uint48(block.timestamp);",
        "        head.numRounds = place.position;",
        "void_gives",
    ),
    Mutant("the bounty is the whole", FEDERATION, "bounty = total / BOUNTY_DIVISOR;", "bounty = total;", "overpaid"),
    Mutant("what is slashed is lost", FEDERATION, "_money.pool += uint128(total - bounty);", "", "overpaid"),
    Mutant("a slashed stake stays", FEDERATION, "_members[seats[seat]].stake = 0;", "", "overpaid"),
    Mutant("no rotation after a slash", FEDERATION, "_times.rotatableAt = 0;", "", "void"),
    Mutant(
        "unbonding is not waited for",
        FEDERATION,
        "block.timestamp < _drawnAt[freeEpoch] + UNBONDING_PERIOD",
        "block.timestamp < _drawnAt[freeEpoch]",
        "leaver",
    ),
    Mutant(
        "unbonding counts one epoch too few",
        FEDERATION,
        "_lastEpochs[index] + EPOCH_LAG_MAX + 1;",
        "_lastEpochs[index] + EPOCH_LAG_MAX;",
        "leaver",
    ),
    Mutant(
        "a leaver is dropped from the known draw",
        FEDERATION,
        "_lastEpochs[index] = _head.epoch + 1;",
        "_lastEpochs[index] = _head.epoch;",
        "known or knows",
    ),
    Mutant(
        "a leaver is drawn for ever",
        FEDERATION,
        "if ((leavers >> (i & 255)) & 1 == 1 && _lastEpochs[i] < epoch) continue;",
        "",
        "knows",
    ),
    Mutant(
        "a withdrawn account stays registered", FEDERATION, "delete _places[msg.sender];", "", "leaver or come_back"
    ),
    Mutant(
        "a stake is withdrawn twice",
        FEDERATION,
        "        member.stake = 0;\n        delete _places[msg.sender];",
        "",
        "leaver or come_back",
    ),
    Mutant(
        "newcomers are in the draw whose seed they knew",
        FEDERATION,
        "_draw(isEverybody ? count : _times.numCandidates, epoch)",
        "_draw(count, epoch)",
        "large_registry",
    ),
    Mutant(
        "a rotation at any time",
        FEDERATION,
        "if (block.timestamp < _times.rotatableAt) revert TooEarly();",
        "",
        "small_registry",
    ),
    Mutant(
        "the seed is kept",
        FEDERATION,
        "seed = keccak256(abi.encode(seed, block.prevrandao, blockhash(block.number - 1)));",
        "",
        "draw",
    ),
    Mutant(
        "a draw gives everybody one chance",
        FEDERATION,
        "            urn[i] = stake;\n            total += stake;",
        "            urn[i] = 1;\n            total += 1;",
        "draw",
    ),
    Mutant("one is drawn twice", FEDERATION, "            total -= urn[i];\n            urn[i] = 0;", "", "draw"),
    Mutant("too little stake", FEDERATION, "if (stake < MIN_STAKE) revert StakeTooLow();", "", "joining"),
    Mutant(
        "no proof of possession",
        FEDERATION,
        "if (!point.verify(message, possession, POSSESSION_TAG)) revert BadPossession();",
        "",
        "possession",
    ),
    Mutant(
        "possession not bound to the account",
        FEDERATION,
        "bytes32 message = possessionMessage(msg.sender, peer, key);",
        "bytes32 message = possessionMessage(address(0), peer, key);",
        "joining or order",
    ),
    Mutant(
        "a certificate is good for every federation",
        FEDERATION,
        "abi.encode(ROUND_TYPEHASH, block.chainid, address(this), statement)",
        "abi.encode(ROUND_TYPEHASH, block.chainid, address(0), statement)",
        "settle",
    ),
    Mutant("a peer id taken twice", FEDERATION, "if (_isPeerTaken[peerHash]) revert PeerTaken();", "", "joining"),
    Mutant("a key taken twice", FEDERATION, "if (_isKeyTaken[keyHash]) revert KeyTaken();", "", "joining"),
    Mutant(
        "unbonding may be shorter than a contest", FEDERATION, " || p.unbondingPeriod < contest", "", "work_together"
    ),
    Mutant(
        "a proof may have any length",
        TREE,
        "index >= numLeaves || proof.siblings.length != height",
        "index >= numLeaves",
        "proof_that_is_too",
    ),
    Mutant(
        "an index beyond the leaves",
        TREE,
        "index >= numLeaves || proof.siblings.length != height",
        "proof.siblings.length != height",
        "index_beyond",
    ),
    Mutant(
        "negative contributions are summed",
        TREE,
        "return contribution > 0 ? uint128(contribution) : 0;",
        "return uint128(contribution);",
        "claim",
    ),
    Mutant(
        "node sums may overflow",
        TREE,
        "if ((cumulative | reward | contribution) >> 128 != 0) revert BadProof();",
        "",
        "come_round",
    ),
    Mutant(
        "sums are not hashed",
        TREE,
        "or(shl(128, mload(add(node, 32))), mload(add(node, 64)))",
        "mload(add(node, 64))",
        "claim",
    ),
    Mutant("a sibling's sums are not hashed", TREE, "or(shl(128, cumulative), reward)", "reward", "claim"),
    Mutant("left and right are the same", TREE, "mul(96, side)", "0", "claim"),
    Mutant(
        "a rotation may outgrow a transaction",
        FEDERATION,
        " || rotation > ROTATION_GAS_MAX",
        "",
        "rules_that_cannot",
    ),
    Mutant("a contest may overflow", FEDERATION, "contest > CONTEST_MAX || ", "", "rules_that_cannot"),
    Mutant(
        "infinity signs",
        BLS,
        "if (isInfinity(key) || _isZero(signature)) return false;",
        "",
        "infinity",
    ),
)


def main() -> int:
    """Test the chosen mutants; prints a table; 1 if any survives."""
    parser = argparse.ArgumentParser(description="break the contract's rules one by one and see whether tests notice")
    parser.add_argument("--only", action="append", default=[], help="a name; may be repeated")
    parser.add_argument("--every", type=int, default=1, help="one of so many")
    parser.add_argument("--from", dest="first", type=int, default=0, help="beginning with this one")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--table", type=Path, help="append the rows to this file, as they come")
    parser.add_argument("--hints-only", action="store_true", help="run the named tests alone: quick, and may be wrong")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not arguments.only or mutant.name in arguments.only]
    chosen = chosen[arguments.first :: arguments.every]
    if arguments.list:
        print("\n".join(mutant.name for mutant in chosen))
        return 0
    if not arguments.only and not arguments.hints_only:
        failing = run_tests(CONTRACTS, SUITES, "not anvil and not memory")
        if failing:
            sys.exit(f"{failing} fails on the contract as it is: mend that first")
    survivors = []
    print("| mutant | killed by | seconds |\n|---|---|---|")
    for mutant in chosen:
        begun = time.monotonic()
        try:
            killer = find_killer(mutant, arguments.hints_only)
        except ValueError as error:  # no mutant at all: counted as one that survived, and told why
            killer = ""
            print(error, file=sys.stderr)
        row = f"| {mutant.name} | {killer or '**survived**'} | {time.monotonic() - begun:.0f} |"
        print(row, flush=True)
        if arguments.table:
            with arguments.table.open("a") as table:
                table.write(row + "\n")
        if not killer:
            survivors.append(mutant.name)
    print(f"{len(chosen)} mutants, {len(chosen) - len(survivors)} killed, {len(survivors)} survived")
    return 1 if survivors else 0


def find_killer(mutant: Mutant, is_hint_enough: bool = False) -> str:
    """The first test that fails on the mutant; empty if none does.

    Raises:
        ValueError: the rule does not stand in the source exactly once, or the mutant does not compile.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compile_mutant(mutant, folder)
        killer = run_tests(folder, SUITES, f"({mutant.hint}) and not anvil and not memory")
        return killer or ("" if is_hint_enough else run_tests(folder, SUITES, "not anvil and not memory"))


def compile_mutant(mutant: Mutant, folder: Path) -> None:
    """Write the mutant's artifacts into `folder`/artifacts."""
    shutil.copytree(CONTRACTS / "src", folder / "src")
    script = (CONTRACTS / "build.mjs").read_text()
    # With a rule less the optimiser inlines more: a mutant may be larger than what can be deployed elsewhere.
    (folder / "build.mjs").write_text(script.replace("CODE_BYTES_MAX = 24576", "CODE_BYTES_MAX = 49152"))
    (folder / "node_modules").symlink_to(CONTRACTS / "node_modules")
    source = folder / mutant.path
    text = source.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.name}: expected its rule once in {mutant.path}, found it {text.count(mutant.old)} times"
        )
    source.write_text(text.replace(mutant.old, mutant.new))
    command = ["node", str(folder / "build.mjs"), str(folder / "artifacts")]
    built = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS_MAX, check=False)
    if built.returncode:
        raise ValueError(f"{mutant.name} does not compile: {built.stderr}")


def run_tests(folder: Path, paths: Sequence[str], chosen: str) -> str:
    """The first test that fails with the artifacts in `folder`; empty if all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-k", chosen, *paths]
    environment = {**os.environ, ARTIFACTS: str(folder / "artifacts")}
    try:
        run = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TEST_SECONDS_MAX, check=False
        )
    except subprocess.TimeoutExpired:
        return "a test that does not end"
    failed = re.search(r"^(?:FAILED|ERROR) \S+?::(\S+)", run.stdout, re.MULTILINE)
    if run.returncode and run.returncode != 5 and not failed:
        raise ValueError(f"the tests do not run: {run.stdout[-2000:]}{run.stderr[-2000:]}")
    return re.sub(r"\[embedded-?|\]", " ", failed.group(1)).strip() if failed else ""


if __name__ == "__main__":
    sys.exit(main())
