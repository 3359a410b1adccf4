"""What a page's tests have for a node's /status: as much of a real one as the page shows."""

from typing import Any

PHASES = {"TRAIN": 6000, "EXCHANGE": 2000, "SCORE": 4000, "REVEAL": 1500, "ATTEST": 2500, "MERGE": 2000}


def make_status(name: str = "tiny-net", stage: str = "running") -> dict[str, Any]:
    """As `p2pfm.runtime.status` gives it, which test_node_processes.py compares with a real node's."""
    status: dict[str, Any] = {
        "peer": "door0", "account": "0x" + "a1" * 20, "network": {"name": name, "id": "00", "backbone": "tiny"},
        "stage": stage, "round": 3, "level": None, "phase": "SCORE", "phase_ends_in_ms": 3000, "phases_ms": PHASES,
        "addresses": ["/ip4/127.0.0.1/tcp/4001"], "peers": ["one", "two", name],
        "reach": {"bootstrap": {"state": "ok", "found": name}}, "traffic": {},
        "clock": {"offset_ms": 4, "num_peers": 2, "is_off": False},
        "chain": {"error": "", "member": 0, "members": 3, "committee": [0, 1], "settled_round": 2},
    }  # fmt: skip
    if stage == "running":
        status["protocol"] = {
            "waits_for": "commitments: 1 of 2", "certified_round": 2, "losses_nats": {"-1": 5.7, "2": 5.1},
            "notes": [{"round": 3, "text": name}],
            "updates": [{"peer": "door0", "contribution_nats": 0.0105}, {"peer": "one", "contribution_nats": -0.002}],
        }  # fmt: skip
        status["rewards"] = {
            "allotted_wei": str(28 * 10**18), "claimed_wei": str(20 * 10**18),
            "served_wei": str(3 * 10**18), "claimed_served_wei": "0",
        }  # fmt: skip
        status["serving"] = {
            "versions": ["11"], "sessions": 1, "sessions_max": 4, "replicas": 2, "generated_tokens": 1234,
            "replaced_replicas": 1,
        }  # fmt: skip
    return status


OPEN = {"phases_ms", "reach", "traffic", "losses_nats"}
"""Whose names come from rounds, phases or ways, not from the code."""


def find_missing(wanted: Any, real: Any, where: str = "") -> list[str]:
    """Fields of `wanted` that `real` has not, or of another type; None: not known yet."""
    if isinstance(wanted, dict) and isinstance(real, dict):
        fields = () if where.rpartition(".")[2] in OPEN else wanted
        return [
            missing
            for name in fields
            for missing in (
                find_missing(wanted[name], real[name], f"{where}.{name}") if name in real else [f"{where}.{name}"]
            )
        ]
    if isinstance(wanted, list) and isinstance(real, list):
        return find_missing(wanted[0], real[0], f"{where}[]") if wanted and real else []
    kinds = [(int, float) if isinstance(value, (int, float)) else type(value) for value in (wanted, real)]
    return [] if wanted is None or real is None or kinds[0] == kinds[1] else [f"{where}: {wanted!r}, {real!r}"]
