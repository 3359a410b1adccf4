"""What a model's name means: BACKBONE, BACKBONE+ADAPTER or BACKBONE+ADAPTER@VERSION to an adapter's version.

Knows which versions a gateway can ask for and which adapters users brought; no request, token or model.

    BACKBONE                   the backbone as it is, without any adapter
    BACKBONE+base              the newest certified base
    BACKBONE+base@VERSION      a base that is still served
    BACKBONE+private           this node's private adapter on the newest base; only here
    BACKBONE+NAME[@VERSION]    an adapter that this node's users named
    BACKBONE+lora@VERSION      any user's LoRA; one that is not here is fetched from peers, by its whole digest

VERSION: the first 8 or more hex digits of a digest.
"""

from collections.abc import Iterable, Mapping

from p2pfm.errors import Reject, WorldError
from p2pfm.lora.user_adapter import BACKBONE_VERSION
from p2pfm.runtime.gateway import Gateway
from p2pfm.runtime.openai_wire import ApiError
from p2pfm.serving.session import UnknownVersion
from p2pfm.types import DIGEST_BYTES, Digest

BASE, PRIVATE, LORA = "base", "private", "lora"
RESERVED = (BASE, PRIVATE, LORA)
"""Names that no user can give an adapter."""

PREFIX_DIGITS_MIN = 8
PREFIX_DIGITS = 16
"""Hex digits of a version in the names that are listed."""

LISTED_MAX = 40
"""Names in an error's text."""


class ModelNames:
    """The names of one node."""

    def __init__(self, backbone: str, gateway: Gateway) -> None:
        """`backbone`: its name, as the network's configuration has it."""
        self._backbone, self._gateway = backbone, gateway

    def names(self) -> dict[str, Digest]:
        """What exists now: the newest base, the private adapter on it, each base by its version, the users' named
        adapters, the bare backbone.
        """
        versions, base, private = self._gateway.versions(), self._gateway.base, self._gateway.private
        found: dict[str, Digest] = {}
        if base is not None and base in versions:
            found[self._join(BASE)] = base
        if private is not None:
            found[self._join(PRIVATE)] = private
        # Of two versions that begin alike (someone made them so) the first is meant: our own stand first.
        for version in self._bases():
            found.setdefault(self._join(f"{BASE}@{version.hex()[:PREFIX_DIGITS]}"), version)
        if not found and base is None:  # still starting: many take the first name there is, and mean the newest base
            return found
        found |= {self._join(name): version for name, version in sorted(self._named().items())}
        if BACKBONE_VERSION in versions:
            found[self._backbone] = BACKBONE_VERSION
        return found

    async def resolve(self, name: str) -> Digest:
        """The version that `name` means, ready to be asked for.

        Raises:
            ApiError: 404, says which models or versions exist; 400, an adapter that does not fit; 503, nobody gave it.
        """
        if name == self._backbone and BACKBONE_VERSION in self._gateway.versions():
            return BACKBONE_VERSION
        adapter, at, version = name.removeprefix(f"{self._backbone}+").partition("@")
        if not name.startswith(f"{self._backbone}+"):
            raise self._unknown(name)
        if adapter == LORA and at:
            return await self._prepare(self._pick_lora(name, version.lower()), name)
        if adapter in self._named():
            found = self._named()[adapter]
            if at:
                self._pick(name, version.lower(), [found])
            return await self._prepare(found, name)
        if adapter == BASE and at:
            return self._pick(name, version.lower(), self._bases())
        known = self.names().get(name)
        if known is None:
            raise self._unknown(name)
        return known

    def _join(self, adapter: str) -> str:
        return f"{self._backbone}+{adapter}"

    def _named(self) -> Mapping[str, Digest]:
        return self._gateway.adapters.names() if self._gateway.adapters is not None else {}

    def _bases(self) -> list[Digest]:
        return [version for version in self._gateway.versions() if version != BACKBONE_VERSION]

    def _pick(self, name: str, prefix: str, versions: Iterable[Digest]) -> Digest:
        """The one version that begins so."""
        told = list(versions)
        found = [version for version in told if version.hex().startswith(prefix)]
        if len(prefix) >= PREFIX_DIGITS_MIN and len(found) == 1:
            return found[0]
        exist = ", ".join(version.hex()[:PREFIX_DIGITS] for version in told[:LISTED_MAX]) or "none yet"
        if len(prefix) < PREFIX_DIGITS_MIN:
            why = f"expected at least {PREFIX_DIGITS_MIN} hex digits of a version after the @"
        else:
            why = f"{len(found)} versions begin so" if found else "no such version is served"
        raise _not_found(f"The model '{name}' does not exist: {why}. Versions served now: {exist}.")

    def _pick_lora(self, name: str, prefix: str) -> Digest:
        """One that is held here, or a whole digest that others may hold."""
        held = self._gateway.adapters.held() if self._gateway.adapters is not None else ()
        try:
            whole = Digest(bytes.fromhex(prefix))
        except ValueError:
            whole = Digest(b"")
        if len(whole) == DIGEST_BYTES:
            return whole
        found = [version for version in held if version.hex().startswith(prefix)]
        if len(prefix) >= PREFIX_DIGITS_MIN and len(found) == 1:
            return found[0]
        raise _not_found(
            f"The model '{name}' does not exist: {len(found) or 'no'} adapters held here have a digest that begins so. "
            f"Give all {2 * DIGEST_BYTES} hex digits to have it fetched from peers."
        )

    async def _prepare(self, version: Digest, name: str) -> Digest:
        if self._gateway.adapters is None:
            raise self._unknown(name)
        try:
            await self._gateway.adapters.prepare(version)
        except UnknownVersion as error:
            raise _not_found(f"The model '{name}' does not exist: {error}. {self._exist()}") from error
        except Reject as error:
            raise ApiError(400, f"model: {error}.", "invalid_adapter", "model") from error
        except WorldError as error:
            raise ApiError(503, f"model: {error}.", "adapter_unavailable", "model") from error
        return version

    def _unknown(self, name: str) -> ApiError:
        return _not_found(f"The model '{name}' does not exist. {self._exist()}")

    def _exist(self) -> str:
        names = list(self.names())
        more = f" and {len(names) - LISTED_MAX} more" if len(names) > LISTED_MAX else ""
        told = ", ".join(names[:LISTED_MAX]) or "none yet: this node has no certified base and knows no replica"
        return f"Models served now: {told}{more}."


def _not_found(message: str) -> ApiError:
    return ApiError(404, message, "model_not_found", "model")
