"""Proof of computation: whether an update was trained on the public batch that was drawn for its peer.

Knows a loss on drawn batches; no model, text or message. After Templar's Gauntlet: the loss must fall more on the batch
that a peer was told to take its last local steps on than on others. It proves those steps and no more.
"""

from collections.abc import Callable, Iterable, Sequence
from random import Random

from p2pfm.types import Digest, PeerId, Round, Tensors, compute_digest

WorkLoss = Callable[[Tensors, int], float]
"""Loss [nats/token] at an adapter on the public batch that is drawn by a seed."""

NUM_REFERENCES = 4
"""Other batches whose mean drop is to be exceeded: one alone decides by its own difficulty."""


def draw_work(network: Digest, round: Round, maker: PeerId) -> int:
    """The seed of a peer's batch: anyone can compute it, and nobody chooses it."""
    digest = compute_digest(b"p2pfm work 1" + network + int(round).to_bytes(8, "big") + maker.encode())
    return int.from_bytes(digest[:8], "big")


def check_work(
    loss: WorkLoss, base: Tensors, trained: Iterable[Tensors], seeds: Sequence[int], secret: int
) -> list[bool]:
    """For each update whether it knows its batch; one that changes nothing does not.

    Args:
        trained: the base after each update; `seeds`: of its own batch, in the same order.
        secret: draws the other batches, which nobody can train for.
    """
    draw = Random(f"references {secret}")
    references = [draw.getrandbits(63) for _ in range(NUM_REFERENCES)]
    before = [loss(base, reference) for reference in references]
    proofs = []
    for adapter, seed in zip(trained, seeds, strict=True):
        drops = [at_base - loss(adapter, reference) for at_base, reference in zip(before, references, strict=True)]
        proofs.append(loss(base, seed) - loss(adapter, seed) > sum(drops) / NUM_REFERENCES)
    return proofs
