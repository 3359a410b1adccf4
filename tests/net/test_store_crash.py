"""A SIGKILL at any instruction loses nothing that was acknowledged: a real child is killed at random, in a loop."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from p2pfm.runtime.keys import create_keys, load_keys
from p2pfm.runtime.store import Store
from p2pfm.types import Digest, compute_digest

NUM_KILLS = 20

CHILD = """
import sys
from pathlib import Path

from p2pfm.learner import Spending
from p2pfm.runtime.store import Store
from store_child import certificate_of, durable_of, residual_of

with Store(Path(sys.argv[1])) as store:
    saved = store.load_durable()
    number = saved.signed_round + 1 if saved else 0
    while True:
        residual = store.put(residual_of(number))
        print("blob", residual.hex(), flush=True)
        store.save_durable(durable_of(number))
        print("durable", number, flush=True)
        store.queue_settlement(certificate_of(number))
        print("queued", number, flush=True)
        store.add_spending(Spending(1.0, 0.5, 1))
        print("spent", number, flush=True)
        store.prune({residual}, 20 * len(residual_of(number)))
        number += 1
"""

KEY_CHILD = """
import sys
from pathlib import Path

from p2pfm.runtime.keys import create_keys

print("ready", flush=True)
create_keys(Path(sys.argv[1]), "secret", light=True)
print("made", flush=True)
"""


@pytest.mark.slow
def test_what_was_acknowledged_survives_sigkill_at_any_point(tmp_path: Path) -> None:
    draw = random.Random(7)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_WAIT_POLICY": "passive"}
    last_durable, num_spent = -1, 0
    for _ in range(NUM_KILLS):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, env=environment, text=True
        )
        assert child.stdout is not None
        lines: list[str] = []
        num_lines = draw.randrange(1, 40)
        while len(lines) < num_lines:
            line = child.stdout.readline()
            assert line, "the child could not go on after the last kill"
            lines.append(line)
        for _ in range(draw.randrange(2000)):  # kill not only right after a line
            pass
        child.send_signal(signal.SIGKILL)
        rest, _ = child.communicate()
        said = [line.split() for line in [*lines, *rest.splitlines(keepends=True)] if line.endswith("\n")]
        last_durable = max([last_durable, *(int(value) for word, value in said if word == "durable")])
        num_spent += sum(word == "spent" for word, _ in said)
        check(tmp_path, said, last_durable, num_spent)
    assert last_durable > NUM_KILLS


def check(folder: Path, said: list[list[str]], last_durable: int, num_spent: int) -> None:
    with Store(folder) as store:
        durable = store.load_durable()
        if last_durable >= 0:
            assert durable is not None
        if durable is not None:
            assert durable.signed_round in (last_durable, last_durable + 1)  # saved, but killed before it could say so
            assert durable.residual is not None
            assert store.find(durable.residual) is not None, "the residual of the durable state is lost"
        blobs = [Digest(bytes.fromhex(value)) for word, value in said if word == "blob"]
        for digest in blobs[-5:]:  # older ones may have been pruned
            data = store.find(digest)
            assert data is not None
            assert compute_digest(data) == digest
        counted = sum(spending.steps for spending in store.get_spendings())
        assert counted >= num_spent, "a crash made the node forget what training has cost"
        queued = {int(value) for word, value in said if word == "queued"}
        assert queued <= {certificate.proposal.round for certificate in store.get_settlements()}
    assert not list(folder.glob("blobs/*/.*.tmp"))


@pytest.mark.slow
def test_keys_are_whole_or_absent_after_sigkill_while_they_are_made(tmp_path: Path) -> None:
    draw = random.Random(8)
    for number in range(3):
        folder = tmp_path / str(number)
        child = subprocess.Popen([sys.executable, "-c", KEY_CHILD, str(folder)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        for _ in range(draw.randrange(200_000)):
            pass
        child.send_signal(signal.SIGKILL)
        rest, _ = child.communicate()
        if "made" in rest:
            load_keys(folder, "secret")
        for path in folder.glob("*.key"):
            assert path.stat().st_size == 32
        for path in folder.glob("*.json"):
            assert path.read_bytes().endswith(b"}")
        if not any(folder.glob("[!.]*")):
            create_keys(folder, "secret", light=True)
            load_keys(folder, "secret")
