"""Users' own LoRA on a node: taken from peft folders or peers, checked, kept on disk, and in the engine while wanted.

Knows the folder, the engine and a way to fetch a blob; no HTTP and no peer's transport. In the engine is what was asked
for lately; what is there no more comes back from disk. A stream keeps the adapter that it began with, whatever leaves.
"""

from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, Protocol

import trio

from p2pfm.config import ServingConfig
from p2pfm.errors import OperatorError, PeerUnreachable, Reject, WorldError
from p2pfm.lora.user_adapter import (
    BACKBONE_VERSION,
    CONFIG_NAME,
    START_BYTES_MAX,
    WEIGHTS_NAME,
    Factors,
    Sizes,
    decode_adapter,
    encode_adapter,
    read_header,
    validate_factors,
)
from p2pfm.messages import GenerateRequest, TokenChunk
from p2pfm.runtime.adapter_folder import UPLOAD_PREFIX, AdapterFolder, validate_name
from p2pfm.runtime.model_names import RESERVED
from p2pfm.serving.session import BrokenLogits, UnknownVersion
from p2pfm.types import Digest, PeerId

FETCH_S = 20.0
"""For all of an adapter from peers: who asked for it waits so long."""

LOADS_MAX = 2
"""Adapters that are fetched or loaded at once for this node's own clients, whose others wait; and as many for other
peers, whose others are refused.
"""

FAILURES_MAX = 256
FAILURE_S = 15.0
"""What could not be had is not tried again for so long, whoever asks."""

PROBE_TOKEN = 1
"""Read once with each adapter when it is loaded: one that gives no numbers there is not served at all."""


class LoraEngine(Protocol):
    """What of an engine this needs."""

    async def add_lora(self, version: Digest, factors: Factors) -> None:
        """Offer it. Raises: Reject."""
        ...

    def drop(self, version: Digest) -> None:
        """Offer it no longer."""
        ...

    def lora_sizes(self) -> Sizes:
        """(out, in) of the layers that it may change."""
        ...

    def generate(self, request: GenerateRequest, *, is_local: bool) -> AsyncGenerator[TokenChunk, None]:
        """Chunks of a stream."""
        ...


class FetchBlob(Protocol):
    """How a blob comes from peers."""

    async def __call__(self, digest: Digest, asker: PeerId | None, bytes_max: int) -> bytes:
        """The checked bytes, from `asker` before others. Raises: PeerUnreachable, Reject."""
        ...


ReadLora = Callable[[Path, int], tuple[str, Factors]]
"""`lora.checkpoint.read_lora`, which needs torch."""


class Described(NamedTuple):
    """One adapter that lies here."""

    version: Digest
    num_bytes: int
    num_layers: int
    rank: int
    """The largest."""


class UserAdapters:
    """All users' adapters of one node."""

    def __init__(
        self,
        backbone: str,
        config: ServingConfig,
        folder: AdapterFolder,
        engine: LoraEngine | None,
        fetch: FetchBlob,
        read_lora: ReadLora | None = None,
    ) -> None:
        """`backbone`: the network's name for it. `engine` None: this node only routes, others' engines check shapes.

        `read_lora`: None: this node reads no peft folders.
        """
        self.folder = folder
        self._backbone, self._config, self._engine, self._fetch = backbone, config, engine, fetch
        self._loaded: OrderedDict[Digest, None] = OrderedDict()  # in the engine; least recently asked for first
        self._running: dict[Digest, trio.Event] = {}
        self._own_turns, self._peers_turns = trio.Semaphore(LOADS_MAX), trio.Semaphore(LOADS_MAX)
        self._failures: OrderedDict[tuple[Digest, PeerId | None], tuple[float, Reject]] = OrderedDict()
        self._read_lora = read_lora
        self._reading = trio.CapacityLimiter(1)  # each holds a file and its arrays in memory

    def names(self) -> Mapping[str, Digest]:
        """By the names that this node's users gave."""
        return self.folder.names()

    def held(self) -> tuple[Digest, ...]:
        """All that lie here."""
        return self.folder.held()

    def is_known(self, version: Digest) -> bool:
        """It is a user's adapter, and lies here: any peer that knows its digest may fetch it."""
        return self.folder.has(version)

    def is_loaded(self, version: Digest) -> bool:
        """It is in the engine now: an answer need not wait for it."""
        return version in self._loaded

    def loaded(self) -> tuple[Digest, ...]:
        """What is in the engine, least recently asked for first."""
        return tuple(self._loaded)

    async def prepare(self, version: Digest, asker: PeerId | None = None) -> None:
        """Return when it can be asked for here: loaded, or on a node without engine at least held.

        Args:
            asker: the peer that wants it; None: a client of this node.

        Raises:
            UnknownVersion: nobody gave it.
            Reject: it is no adapter of this backbone.
            WorldError: too many are being fetched for other peers.
        """
        while version in self._running:
            await self._running[version].wait()
        if version == BACKBONE_VERSION or self._touch(version):
            return
        self._check_allowed()
        self._raise_if_failed(version, asker)
        turns = self._own_turns if asker is None else self._peers_turns
        if asker is not None and not turns.value:
            raise WorldError(f"{LOADS_MAX} other adapters are being fetched; try again in a moment")
        done = self._running[version] = trio.Event()
        try:
            async with turns:
                await self._find_and_load(version, asker)
        except Reject as error:
            self._note_failure(version, asker, error)
            raise
        except OSError as error:
            raise WorldError(f"the adapter could not be kept: {error.strerror}") from error
        finally:
            del self._running[version]
            done.set()

    async def _find_and_load(self, version: Digest, asker: PeerId | None) -> None:
        data = await trio.to_thread.run_sync(self.folder.find, version)
        if data is None:
            data = await self._fetch_checked(version, asker)
        await self._load(version, data)
        try:
            await trio.to_thread.run_sync(self.folder.put, data)
        except BaseException:
            self._unload(version)
            raise

    async def add_folder(self, path: Path, name: str = "") -> Described:
        """Serve the LoRA of a local peft folder, as BACKBONE+NAME and by its digest. The files may go afterwards.

        Raises:
            Reject: it is no LoRA of this backbone within the limits; says why. Paths in it are relative to the folder.
        """
        self._check_allowed()
        if name:
            validate_name(name)
        if name in RESERVED:
            raise Reject(f"expected a name other than {', '.join(RESERVED)}, got {name!r}")
        data = await trio.to_thread.run_sync(self._read_folder, path, limiter=self._reading)
        return await self._add(data, name)

    async def add_files(self, config: bytes, weights: bytes, name: str = "") -> Described:
        """The same of a peft folder's two files, adapter_config.json and adapter_model.safetensors."""
        with TemporaryDirectory(prefix=UPLOAD_PREFIX, dir=self.folder.path) as folder:
            await trio.Path(folder, CONFIG_NAME).write_bytes(config)
            await trio.Path(folder, WEIGHTS_NAME).write_bytes(weights)
            return await self.add_folder(Path(folder), name)

    async def describe(self, version: Digest) -> Described:
        """What is known of one that lies here. Raises: UnknownVersion."""
        total, data = await trio.to_thread.run_sync(self.folder.get_part, version, 0, START_BYTES_MAX)
        if not total:
            raise UnknownVersion(f"no adapter {version.hex()[:16]} lies here")
        return self._describe(version, data, total)

    def drop_name(self, name: str) -> bool:
        """The name means nothing from now on; False: it did not. Its digest may be asked for until there is no room."""
        return self.folder.drop_name(name)

    async def _add(self, data: bytes, name: str) -> Described:
        version = await trio.to_thread.run_sync(self.folder.put, data)
        self._failures.pop((version, None), None)
        try:
            await self.prepare(version)
        except Reject:
            await trio.to_thread.run_sync(self.folder.remove, version)
            raise
        if name:
            await trio.to_thread.run_sync(self.folder.set_name, name, version)
        return self._describe(version, data, len(data))

    def _describe(self, version: Digest, data: bytes, num_bytes: int) -> Described:
        header, _ = read_header(data, self._backbone)
        ranks = [target.rank for target in header.targets]
        return Described(version, num_bytes, len(ranks), max(ranks))

    def _read_folder(self, path: Path) -> bytes:
        bytes_max = self._config.adapter_bytes_max
        if self._read_lora is None:
            raise Reject("this node has no model library to read an adapter with; ask one that serves the backbone")
        try:
            named, factors = self._read_lora(path, bytes_max)
        except OperatorError as error:
            raise Reject(str(error).replace(f"{path}/", "").replace(str(path), "the folder")) from error
        try:
            num_bytes = sum(4 * (low.size + high.size) for low, high in factors.values())
            if num_bytes > bytes_max:
                raise Reject(f"expected at most {bytes_max} bytes of factors as float32, got {num_bytes}")
            if self._engine is not None:
                validate_factors(factors, self._engine.lora_sizes(), self._config.adapter_rank_max)
        except Reject as error:
            told = f" (it names the backbone {named[:200]!r}; this network's is {self._backbone!r})" if named else ""
            raise Reject(f"{error}{told}") from error
        return encode_adapter(self._backbone, factors)

    async def _fetch_checked(self, version: Digest, asker: PeerId | None) -> bytes:
        name = version.hex()[:16]
        try:
            with trio.fail_after(FETCH_S):
                data = await self._fetch(version, asker, self._config.adapter_bytes_max)
        except trio.TooSlowError:
            raise UnknownVersion(f"no peer gave the adapter {name} within {FETCH_S:g} s") from None
        except (PeerUnreachable, Reject) as error:
            raise UnknownVersion(f"no peer gave the adapter {name}: {str(error)[:300]}") from error
        return data

    async def _load(self, version: Digest, data: bytes) -> None:
        if self._engine is None:
            read_header(data, self._backbone)
            self._keep_loaded(version)
            return
        sizes, rank_max = self._engine.lora_sizes(), self._config.adapter_rank_max
        factors = await trio.to_thread.run_sync(
            decode_adapter, data, self._backbone, sizes, rank_max, limiter=self._reading
        )
        await self._engine.add_lora(version, factors)
        try:
            await self._probe(version)
        except BaseException:
            self._engine.drop(version)
            raise
        self._keep_loaded(version)

    async def _probe(self, version: Digest) -> None:
        assert self._engine is not None
        request = GenerateRequest(version, (PROBE_TOKEN,), (), 1, 0, 1000, 0, 0)
        try:
            async with aclosing(self._engine.generate(request, is_local=True)) as chunks:
                async for _ in chunks:
                    pass
        except BrokenLogits as error:
            raise Reject("adapter: with it the backbone gives no numbers; has its training diverged?") from error

    def _keep_loaded(self, version: Digest) -> None:
        self._loaded[version] = None
        while len(self._loaded) > self._config.adapters_max:
            self._unload(next(iter(self._loaded)))

    def _unload(self, version: Digest) -> None:
        self._loaded.pop(version, None)
        if self._engine is not None:
            self._engine.drop(version)

    def _touch(self, version: Digest) -> bool:
        if version not in self._loaded:
            return False
        self._loaded.move_to_end(version)
        return True

    def _check_allowed(self) -> None:
        if not self._config.adapters_max:
            raise UnknownVersion("this node serves no users' adapters (serving.adapters_max = 0)")

    def _note_failure(self, version: Digest, asker: PeerId | None, error: Reject) -> None:
        self._failures[version, asker] = trio.current_time(), error
        while len(self._failures) > FAILURES_MAX:
            self._failures.popitem(last=False)

    def _raise_if_failed(self, version: Digest, asker: PeerId | None) -> None:
        when_s, error = self._failures.get((version, asker), (-FAILURE_S, Reject("")))
        if trio.current_time() - when_s < FAILURE_S:
            raise type(error)(str(error))
