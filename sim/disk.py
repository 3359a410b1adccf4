"""A simulated machine's blob store. Knows no peer."""

from collections.abc import MutableMapping

from p2pfm.types import Digest, compute_digest


class Ghost(bytes):
    """A few bytes that stand for many: a blob of which only the name and the length matter."""

    size: int

    def __len__(self) -> int:
        return self.size


def make_ghost(data: bytes, size: int) -> Ghost:
    """`data` says what it is; on the wire it weighs `size` [bytes]."""
    ghost = Ghost(data)
    ghost.size = size
    return ghost


class Disk:
    """A host's blob store. All hosts of a world share one pool of bytes, since equal digests mean equal bytes.

    Implements `work.BlobStore`.
    """

    def __init__(self, pool: MutableMapping[Digest, bytes]) -> None:
        self._pool = pool
        self.held: set[Digest] = set()

    def put(self, data: bytes) -> Digest:
        """See BlobStore."""
        return self.put_as(compute_digest(data), data)

    def put_as(self, digest: Digest, data: bytes) -> Digest:
        """Keep what is known by another name than its hash."""
        self._pool.setdefault(digest, data)
        self.held.add(digest)
        return digest

    def get(self, digest: Digest) -> bytes:
        """See BlobStore."""
        if digest not in self.held:
            raise KeyError(f"{digest.hex()[:10]} is not on this disk")
        return self._pool[digest]

    def can_read(self, digest: Digest) -> bool:
        """Whether any disk of the world still holds it."""
        return digest in self._pool

    def read(self, digest: Digest) -> bytes:
        """The bytes of a digest that some disk held a moment ago."""
        return self._pool[digest]
