"""How long a broadcast takes through a gossip mesh of many hops. Knows no message, and of the hosts only their links.

A message floods a random mesh (gossipsub: every peer keeps `degree` neighbours of a topic, hands on what it hears
first), so it reaches a peer over the quickest path, and that is not the one with the fewest hops. `compute_flood` finds
the arrivals exactly; a network draws from samples of it, which costs a look-up a receiver instead of a flood a message.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

NEVER_MS = 1 << 56
"""An arrival that does not happen; far above any that does, and far below an overflow."""


def draw_mesh(num_nodes: int, degree: int, bits: np.random.PCG64) -> Ints:
    """A random mesh in which every node has `degree` (even) neighbours, a few of them twice.

    It is made of rings, so it is never in two pieces.

    Returns: (degree, num_nodes): a node's neighbours; the mesh is undirected.
    """
    mesh = np.empty((degree, num_nodes), np.int64)
    for row in range(0, degree, 2):
        ring = np.argsort(bits.random_raw(num_nodes), kind="stable")
        mesh[row, ring] = np.roll(ring, 1)
        mesh[row + 1, ring] = np.roll(ring, -1)
    return mesh


def compute_flood(mesh: Ints, link_ms: Ints, source: int) -> Ints:
    """When a message from `source` is first heard by every node.

    Args:
        mesh: (degree, num_nodes), see `draw_mesh`.
        link_ms: (degree, num_nodes): from that neighbour to the node; NEVER_MS: it does not arrive.

    Returns: (num_nodes,) [ms]; NEVER_MS or more: not reached.
    """
    arrivals = np.full(mesh.shape[1], NEVER_MS, np.int64)
    arrivals[source] = 0
    while True:
        heard = np.minimum(arrivals, (arrivals[mesh] + link_ms).min(axis=0))
        if np.array_equal(heard, arrivals):
            return arrivals
        arrivals = heard


def draw_samples(
    groups: Ints,
    sources: list[int],
    num_samples: int,
    degree: int,
    draw_links: Callable[[Ints], Ints],
    bits: np.random.PCG64,
) -> Ints:
    """Samples of a flood's arrivals by the groups of source and target.

    Args:
        groups: (num_nodes,): 0 to num_groups - 1, every one of them taken by two nodes at least.
        sources: nodes whose messages are followed, each over a mesh of its own; every group holds one at least.
        draw_links: from a mesh to its `link_ms`, drawn anew.

    Returns: (num_groups, num_groups, num_samples) arrivals [ms]; -1: not reached.
    """
    num_groups = int(groups.max()) + 1
    heard: list[list[list[Ints]]] = [[[] for _ in range(num_groups)] for _ in range(num_groups)]
    for source in sources:
        mesh = draw_mesh(len(groups), degree, bits)
        arrivals = compute_flood(mesh, draw_links(mesh), source)
        arrivals[arrivals >= NEVER_MS] = -1
        for target in range(num_groups):
            is_target = groups == target
            is_target[source] = False
            heard[groups[source]][target].append(arrivals[is_target])
    samples = np.empty((num_groups, num_groups, num_samples), np.int64)
    for row in range(num_groups):
        for column in range(num_groups):
            pool = np.concatenate(heard[row][column])
            picks = bits.random_raw(num_samples) % np.uint64(len(pool))
            samples[row, column] = pool[picks.astype(np.int64)]
    return samples
