"""A node's private adapter at work: one file in its home, refined when the model is free, handed to its own gateway.

Knows a learner of this node's own data, that file and the gateway; no store, transport or peer. What it makes is in no
blob, no message and no event, so nothing that answers peers can give it away.
"""

import logging
import math
from pathlib import Path

import trio

from p2pfm.config import PersonalConfig
from p2pfm.errors import OperatorError, P2PFMError
from p2pfm.learner import Learner
from p2pfm.lora.delta import zeros
from p2pfm.lora.personal import decode_private, encode_private, mix, refine
from p2pfm.runtime.files import write_durably
from p2pfm.runtime.gateway import Gateway
from p2pfm.types import Round, Tensors

FILE_NAME = "private.adapter"

log = logging.getLogger(__name__)


class Personal:
    """The private adapter of one node. `run` refines it once a round; `losses` tells what it gives."""

    def __init__(
        self,
        config: PersonalConfig,
        home: Path,
        own: Learner,
        shared: Learner,
        gateway: Gateway,
        turns: trio.CapacityLimiter,
    ) -> None:
        """One file in `home` (0600) outlives the process.

        Args:
            own: on this node's own data, its test split held out of it; `shared`: on the declared one.
            turns: whoever uses the model waits for one of these; the protocol's work stands in the same queue.
        """
        self.losses: dict[str, float] = {}
        """Held-out losses [nats/token] at the newest refinement: own and declared, base and mixed."""
        self.round: Round | None = None
        """Of the newest refinement."""
        self._config = config
        self._path = home / FILE_NAME
        self._own, self._shared = own, shared
        self._gateway = gateway
        self._turns = turns
        self._private: Tensors = zeros(own.shapes())
        self._rounds_in, self._rounds = trio.open_memory_channel[Round](1)

    async def restore(self) -> None:
        """Serve what the last run kept, or the base as it is. A file that cannot be read is told, and made anew."""
        try:
            data = await trio.to_thread.run_sync(self._path.read_bytes)
            self._private = decode_private(data, self._own.shapes())
        except FileNotFoundError:
            pass
        except (OSError, OperatorError) as error:
            log.warning("%s: %s; training it anew", self._path, error)
        await self._gateway.adopt_private(self._private, self._config.weight)

    def on_trained(self, round: Round) -> None:
        """This round's shared training is done: the model is free until updates are to be scored."""
        try:
            self._rounds_in.send_nowait(round)
        except trio.WouldBlock:
            log.info("round %d: the private adapter is still refined for an earlier one", round)

    async def run(self) -> None:
        """Refine once for each round told, until cancelled. What fails here never ends the node."""
        async for round in self._rounds:
            base = self._gateway.base_tensors
            if base is None:
                continue
            try:
                await self._refine(base, round)
            except (P2PFMError, OSError) as error:
                log.warning("round %d: the private adapter stays as it was: %s", round, error)

    async def _refine(self, base: Tensors, round: Round) -> None:
        weight = self._config.weight
        refined = await trio.to_thread.run_sync(
            refine, self._own, base, self._private, weight, round, limiter=self._turns
        )
        await trio.to_thread.run_sync(write_durably, self._path, encode_private(refined.private))
        self._private = refined.private
        await self._gateway.adopt_private(refined.private, weight)
        mixed = mix(base, refined.private, weight)
        # A turn each: the protocol may come between.
        declared = [
            await trio.to_thread.run_sync(self._shared.evaluate, at, limiter=self._turns) for at in (base, mixed)
        ]
        losses = {
            "own_base": refined.base_nats,
            "own_mixed": refined.mixed_nats,
            "declared_base": declared[0],
            "declared_mixed": declared[1],
        }
        self.losses = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
        self.round = round
        log.info("round %d: private adapter refined, %s", round, self.losses)
