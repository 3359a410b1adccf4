"""Who sends what to whom in gossip: a mesh of a few peers gets every message, all others hear that it exists.

GossipSub 1.1 for one topic over py-libp2p 0.8.1's router, of which little is left: its mesh grows to all peers (a
message then comes once from each of them), it never tells mesh peers what it had to drop, answers one message as often
as it is asked, and keeps state for ever that strangers name. Knows no payloads and no rules of them.

Delivery does not rest on the mesh: every connected peer outside it is told of every message within LAZY_BEATS seconds,
and so is one that comes into the mesh or whose queue was full; what they lack they ask for.
"""

import random
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import trio
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2

from p2pfm.config import TransportLimits
from p2pfm.runtime.network.host import GuardedTasks

DEGREE, DEGREE_LOW, DEGREE_HIGH = 6, 4, 12  # GossipSub's own
DEGREE_CHOSEN = 3  # of the mesh are peers we chose ourselves: strangers that all graft us cannot have it alone
BEAT_S = 1.0
BACK_OFF_S = 5  # between a PRUNE and the next GRAFT
BACK_OFF_MAX_S = 60  # a stranger may ask for more
LAZY_BEATS = 5  # a message is told of in so many heartbeats, and kept for as many more, for late askers
LAZY_PEERS = 3  # told in each heartbeat at least
IDS_MAX = 1000  # in one IHAVE or IWANT, and from one peer in a heartbeat
ID_BYTES_MAX = 128
ASKED_MAX = 3  # peers that one message is asked of in a heartbeat: one of them may be lying
ANSWER_BYTES_MAX = 700_000  # of messages that one peer is sent again in a heartbeat; one RPC has at most 1 MiB
GRAFTS_MAX = 4  # GRAFTs of one peer that are answered in a heartbeat
RECENT_BYTES_MAX = 32 * 1024 * 1024


class RecentMessages:
    """Messages of the last heartbeats by id, bounded in bytes: the oldest go first."""

    def __init__(self, bytes_max: int = RECENT_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._num_bytes = 0
        self._beat = 0
        self._messages: OrderedDict[bytes, tuple[int, rpc_pb2.Message]] = OrderedDict()

    def put(self, message: rpc_pb2.Message) -> None:
        """Keep a message; one of an id already held is not kept again."""
        mid = message.from_id + message.seqno
        if mid in self._messages:
            return
        self._messages[mid] = (self._beat, message)
        self._num_bytes += message.ByteSize()
        while self._num_bytes > self._bytes_max:
            self._drop_oldest()

    def get(self, mid: bytes) -> rpc_pb2.Message | None:
        """The message, if it is still held."""
        found = self._messages.get(mid)
        return found[1] if found else None

    def window(self, topic: str) -> list[bytes]:
        """Ids to tell of, newest first, at most IDS_MAX. There is one topic."""
        found: list[bytes] = []
        for mid, (beat, _) in reversed(self._messages.items()):
            if beat <= self._beat - LAZY_BEATS or len(found) == IDS_MAX:
                break
            found.append(mid)
        return found

    def shift(self) -> None:
        """A heartbeat is over."""
        self._beat += 1
        while self._messages and next(iter(self._messages.values()))[0] <= self._beat - 2 * LAZY_BEATS:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, (_, message) = self._messages.popitem(last=False)
        self._num_bytes -= message.ByteSize()


@dataclass
class _Beat:
    """What was granted since the last heartbeat."""

    ids_taken: Counter[ID] = field(default_factory=Counter)
    ids_asked: Counter[bytes] = field(default_factory=Counter)
    bytes_answered: Counter[ID] = field(default_factory=Counter)
    grafts: Counter[ID] = field(default_factory=Counter)


class GuardedRouter(GossipSub):  # type: ignore[misc]
    """GossipSub 1.1 for one topic: a bounded mesh, lazy gossip that reaches everyone, quotas on what peers ask."""

    def __init__(self, topic: str, limits: TransportLimits, counters: Counter[str]) -> None:
        super().__init__(
            protocols=[TProtocol(PROTOCOL_ID_V11)],
            degree=DEGREE,
            degree_low=DEGREE_LOW,
            degree_high=DEGREE_HIGH,
            prune_back_off=BACK_OFF_S,
            adaptive_gossip_enabled=False,
            spam_protection_enabled=False,
            eclipse_protection_enabled=False,
        )
        self.scorer = None  # it punishes honest forwarders; who breaks a rule is blamed by the pubsub
        self.mcache = RecentMessages()
        self._topic = topic
        self._limits = limits
        self._counters = counters
        self._beat = _Beat()
        self._chosen: set[ID] = set()
        self._behind: set[ID] = set()
        self._lazy_turn: list[ID] = []

    async def publish(self, msg_forwarder: ID, pubsub_msg: rpc_pb2.Message) -> None:
        """Forward to the mesh. The stock method adds a signed address record to every copy, which costs more than
        the message, and files state under topics that strangers choose."""
        self.mcache.put(pubsub_msg)
        rpc = rpc_pb2.RPC(publish=[pubsub_msg])
        for peer_id in self._mesh - {msg_forwarder, ID(pubsub_msg.from_id)}:
            self.send_rpc(peer_id, rpc)

    def send_rpc(self, peer_id: ID, rpc: rpc_pb2.RPC, priority: bool = False) -> None:
        """Queue for a peer. When its queue is full, the peer is told later what it missed (the stock router counts and
        tells nothing), and is taken for no member of the mesh if a GRAFT was in it."""
        queue = self.pubsub.peer_queues.get(peer_id)
        if queue is None or queue.push(rpc, priority=priority):
            return
        self._counters["queue"] += 1
        self._behind.add(peer_id)
        if rpc.control.graft:
            self._mesh.discard(peer_id)

    async def emit_control_message(self, control_msg: rpc_pb2.ControlMessage, to_peer: ID) -> None:
        """Without the address record that the stock method signs for each."""
        self.send_rpc(to_peer, rpc_pb2.RPC(control=control_msg), priority=True)

    # --- what peers ask ---

    async def handle_rpc(self, rpc: rpc_pb2.RPC, sender_peer_id: ID) -> None:
        """Control entries about the topic, within the sender's quotas. IDONTWANT and later ones are not spoken."""
        control = rpc.control
        told = [mid for entry in control.ihave if entry.topicID == self._topic for mid in entry.messageIDs[:IDS_MAX]]
        if told:
            self._ask_for(told, sender_peer_id)
        asked = [mid for entry in control.iwant[:16] for mid in entry.messageIDs[:IDS_MAX]]
        if asked:
            self._answer(asked, sender_peer_id)
        if any(entry.topicID == self._topic for entry in control.graft):
            await self._on_graft(sender_peer_id)
        for entry in control.prune:
            if entry.topicID == self._topic:  # its list of peers to dial is a stranger's word, and goes unread
                self._mesh.discard(sender_peer_id)
                self._add_back_off(sender_peer_id, self._topic, False, min(entry.backoff, BACK_OFF_MAX_S))
                break

    def _ask_for(self, mids: Iterable[bytes], teller: ID) -> None:
        """Ask for what was never seen."""
        wanted = []
        for mid in dict.fromkeys(mids):
            if len(mid) > ID_BYTES_MAX or self._beat.ids_taken[teller] >= IDS_MAX:
                self._counters["told too much"] += 1
                continue
            self._beat.ids_taken[teller] += 1
            if not self.pubsub.seen_messages.has(mid) and self._beat.ids_asked[mid] < ASKED_MAX:
                self._beat.ids_asked[mid] += 1
                wanted.append(mid)
        if wanted:
            self._counters["asked for"] += len(wanted)
            control = rpc_pb2.ControlMessage(iwant=[rpc_pb2.ControlIWant(messageIDs=wanted)])
            self.send_rpc(teller, rpc_pb2.RPC(control=control), priority=True)

    def _answer(self, mids: Iterable[bytes], asker: ID) -> None:
        """Send again what is still held. What exceeds the quota is asked for again a heartbeat later."""
        answer = rpc_pb2.RPC()
        for mid in dict.fromkeys(mids):
            message = self.mcache.get(mid)
            if message is None:
                continue
            size = message.ByteSize()
            if self._beat.bytes_answered[asker] + size > ANSWER_BYTES_MAX:
                self._counters["asked too much"] += 1
                break
            self._beat.bytes_answered[asker] += size
            answer.publish.append(message)
        if answer.publish:
            self._counters["sent again"] += len(answer.publish)
            self.send_rpc(asker, answer)

    async def _on_graft(self, sender: ID) -> None:
        self._beat.grafts[sender] += 1
        if sender in self._mesh or self._beat.grafts[sender] > GRAFTS_MAX:
            return
        if len(self._mesh) >= DEGREE_HIGH or self._check_back_off(sender, self._topic):
            await self.emit_prune(self._topic, sender, False, False)
        else:
            self._take(sender)

    def _take(self, peer: ID) -> None:
        """Into the mesh. What was said just before it hears of now: from now on it is not told in turn."""
        self._mesh.add(peer)
        self._behind.add(peer)

    # --- heartbeat ---

    async def heartbeat(self) -> None:
        """Mend the mesh and tell the others what they may lack, once a second."""
        while True:
            await trio.sleep(BEAT_S * random.uniform(0.9, 1.1))  # so that not all peers do so at once
            self._beat = _Beat()
            await self._mend_mesh()
            self._tell_others()
            self.mcache.shift()

    async def _mend_mesh(self) -> None:
        known = self._get_subscribers()
        mesh = self._mesh
        mesh &= known
        self._chosen &= mesh
        if len(mesh) < DEGREE_LOW:
            free = _sort(peer for peer in known - mesh if not self._check_back_off(peer, self._topic))
            for peer in random.sample(free, min(len(free), DEGREE - len(mesh))):
                self._take(peer)
                await self.emit_graft(self._topic, peer)
        elif len(mesh) > DEGREE_HIGH:
            kept = set(random.sample(_sort(self._chosen), min(len(self._chosen), DEGREE_CHOSEN)))
            kept |= set(random.sample(_sort(mesh - kept), DEGREE - len(kept)))
            for peer in _sort(mesh - kept):
                mesh.discard(peer)
                self._add_back_off(peer, self._topic, False)
                await self.emit_prune(self._topic, peer, False, False)

    async def emit_graft(self, topic: str, id: ID) -> None:
        """Tell a peer that it is in our mesh now; it counts as chosen by us."""
        self._chosen.add(id)
        await super().emit_graft(topic, id)

    def _tell_others(self) -> None:
        """IHAVE to peers outside the mesh in turn, so that each comes by before a message is too old to be told of, and
        to those whose queue was full and has room again."""
        told = self.mcache.window(self._topic)
        if not told:
            self._behind.clear()
            return
        queues = self.pubsub.peer_queues
        chosen = {
            peer for peer in self._behind if peer in queues and len(queues[peer]) * 2 < self._limits.peer_queue_max
        }
        self._behind -= chosen
        others = self._get_subscribers() - self._mesh
        self._lazy_turn = [peer for peer in self._lazy_turn if peer in others]
        fresh = _sort(others.difference(self._lazy_turn))
        random.shuffle(fresh)
        self._lazy_turn = fresh + self._lazy_turn
        count = max(LAZY_PEERS, -(-len(others) // (LAZY_BEATS - 1)))
        turn, self._lazy_turn = self._lazy_turn[:count], self._lazy_turn[count:]
        self._lazy_turn += turn
        for peer in _sort(chosen.union(turn)):
            self._tell(peer, told)

    def _tell(self, peer: ID, mids: list[bytes]) -> None:
        control = rpc_pb2.ControlMessage(ihave=[rpc_pb2.ControlIHave(topicID=self._topic, messageIDs=mids)])
        self.send_rpc(peer, rpc_pb2.RPC(control=control), priority=True)

    async def send_recent_messages(self, peer_id: ID, topic: str) -> None:
        """Tell a peer that came (back) what there was. The stock method writes all of it past the peer's queue: every
        peer sends everything to who joins, and two writers mix their bytes."""
        told = self.mcache.window(topic)
        if told:
            self._tell(peer_id, told)

    # --- who is there ---

    @property
    def manager(self) -> Any:
        """The service's tasks, guarded."""
        return GuardedTasks(self._manager)

    @property
    def _mesh(self) -> set[ID]:
        mesh: set[ID] = self.mesh.setdefault(self._topic, set())
        return mesh

    def _get_subscribers(self) -> set[ID]:
        return {peer for peer in self.pubsub.peer_topics.get(self._topic, ()) if peer in self.pubsub.peer_queues}

    def forget(self, peer_id: ID) -> None:
        """What the stock router keeps of every identity that ever came."""
        self._chosen.discard(peer_id)
        self._behind.discard(peer_id)
        self.back_off.get(self._topic, {}).pop(peer_id, None)


def _sort(peers: Iterable[ID]) -> list[ID]:
    return sorted(peers, key=ID.to_bytes)
