"""Bases on a vLLM server that takes LoRA while it runs: written as peft folders where it can read them, loaded by name.

Knows peft only through a function that it is given. The name is the version's digest, so what is left there of an
earlier run is the same. llama.cpp has nothing like it: it reads adapters when it starts.
"""

import shutil
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from p2pfm.errors import OperatorError
from p2pfm.runtime.backend import BackendFailed
from p2pfm.runtime.upstream_wire import Ask
from p2pfm.types import Digest, Tensors

Post = Callable[[Ask], Awaitable[bytes]]
"""`Server.post`."""


class VllmAdapters:
    """The newest bases on one server. A stream keeps its own while it runs."""

    def __init__(self, folder: Path, versions_max: int, write: Callable[[Path, Tensors], None]) -> None:
        """`folder`: this node's, emptied; `write`: a base as a peft folder (`lora.checkpoint.write_checkpoint`)."""
        shutil.rmtree(folder, ignore_errors=True)
        self._folder, self._versions_max, self._write = folder, versions_max, write
        self._loaded: list[Digest] = []  # oldest first
        self._running: Counter[Digest] = Counter()

    def versions(self) -> tuple[Digest, ...]:
        """What may be asked for, newest first."""
        return tuple(reversed(self._loaded[-self._versions_max :]))

    def hold(self, version: Digest) -> Callable[[], None]:
        """A stream uses it, until it calls what this returns."""
        self._running[version] += 1
        return lambda: self._running.subtract((version,))

    async def add(self, version: Digest, tensors: Tensors, post: Post) -> None:
        """Have the server load it; those beyond the bound that no stream uses go. Raises: BackendFailed."""
        if version not in self._loaded:
            await self._load(version, tensors, post)
        else:
            self._loaded.remove(version)
        self._loaded.append(version)
        for old in self._loaded[: -self._versions_max]:
            if not self._running[old]:
                self._loaded.remove(old)
                await self._unload(old, post)

    async def _load(self, version: Digest, tensors: Tensors, post: Post) -> None:
        folder = self._folder / version.hex()
        try:
            await trio.to_thread.run_sync(lambda: folder.mkdir(parents=True, exist_ok=True))
            await trio.to_thread.run_sync(self._write, folder, tensors)
        except (OperatorError, OSError) as error:
            raise BackendFailed(str(error)) from error
        ask = Ask("/v1/load_lora_adapter", {"lora_name": version.hex(), "lora_path": str(folder.resolve())})
        try:
            await post(ask)
        except BackendFailed:  # of an earlier run, from a folder that is there no more
            await post(_make_unload(version))
            await post(ask)

    async def _unload(self, version: Digest, post: Post) -> None:
        try:
            await post(_make_unload(version))
        finally:
            await trio.to_thread.run_sync(lambda: shutil.rmtree(self._folder / version.hex(), ignore_errors=True))


def _make_unload(version: Digest) -> Ask:
    return Ask("/v1/unload_lora_adapter", {"lora_name": version.hex()})
