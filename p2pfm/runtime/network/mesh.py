"""Who sends what to whom in gossip: a mesh of a few peers gets every message, all others hear that it exists.

GossipSub 1.1 for a few topics over py-libp2p 0.8.1's router, of which little is left: its mesh grows to all peers (a
message then comes once from each of them), it never tells mesh peers what it had to drop, answers one message as often
as it is asked, and keeps state for ever that strangers name. Knows no payloads and no rules of them.

Delivery does not rest on the mesh: every connected peer outside it that hears the topic is told of every message within
LAZY_BEATS seconds, and so is one that comes into the mesh or whose queue was full; what they lack they ask for.
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
        """Ids of one topic's messages to tell of, newest first, at most IDS_MAX."""
        found: list[bytes] = []
        for mid, (beat, message) in reversed(self._messages.items()):
            if beat <= self._beat - LAZY_BEATS or len(found) == IDS_MAX:
                break
            if topic in message.topicIDs:
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


@dataclass
class _Topic:
    """What is remembered of a topic that we hear, beside its mesh."""

    chosen: set[ID] = field(default_factory=set)
    behind: set[ID] = field(default_factory=set)
    lazy_turn: list[ID] = field(default_factory=list)


class GuardedRouter(GossipSub):  # type: ignore[misc]
    """GossipSub 1.1 for a few topics: bounded meshes, lazy gossip that reaches everyone, quotas on what peers ask."""

    def __init__(self, limits: TransportLimits, counters: Counter[str]) -> None:
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
        self._limits = limits
        self._counters = counters
        self._beat = _Beat()
        self._topics: dict[str, _Topic] = {}

    async def join(self, topic: str) -> None:
        """Hear a topic from now on; the next heartbeat finds peers for its mesh."""
        self.mesh.setdefault(topic, set())
        self._topics.setdefault(topic, _Topic())

    async def leave(self, topic: str) -> None:
        """Forget a topic. Who had us in its mesh has heard that we listen no more."""
        for state in (self.mesh, self._topics, self.back_off):
            state.pop(topic, None)

    async def publish(self, msg_forwarder: ID, pubsub_msg: rpc_pb2.Message) -> None:
        """Forward to the mesh; what this peer says in a topic that it does not hear, to some who do.

        The stock method adds a signed address record to every copy, which costs more than the message, and files state
        under topics that strangers choose.
        """
        self.mcache.put(pubsub_msg)
        rpc = rpc_pb2.RPC(publish=[pubsub_msg])
        topic = pubsub_msg.topicIDs[0]
        listeners = self.mesh.get(topic)
        if listeners is None:
            known = _sort(self.get_subscribers(topic))
            listeners = set(random.sample(known, min(len(known), DEGREE)))
        for peer_id in listeners - {msg_forwarder, ID(pubsub_msg.from_id)}:
            self.send_rpc(peer_id, rpc)

    def send_rpc(self, peer_id: ID, rpc: rpc_pb2.RPC, priority: bool = False) -> None:
        """Queue for a peer. When its queue is full, the peer is told later what it missed (the stock router counts and
        tells nothing), and is taken for no member of the mesh if a GRAFT was in it."""
        queue = self.pubsub.peer_queues.get(peer_id)
        if queue is None or queue.push(rpc, priority=priority):
            return
        self._counters["queue"] += 1
        for state in self._topics.values():
            state.behind.add(peer_id)
        for entry in rpc.control.graft:
            self.mesh.get(entry.topicID, set()).discard(peer_id)

    async def emit_control_message(self, control_msg: rpc_pb2.ControlMessage, to_peer: ID) -> None:
        """Without the address record that the stock method signs for each."""
        self.send_rpc(to_peer, rpc_pb2.RPC(control=control_msg), priority=True)

    # --- what peers ask ---

    async def handle_rpc(self, rpc: rpc_pb2.RPC, sender_peer_id: ID) -> None:
        """Control entries about our topics, within the sender's quotas. IDONTWANT and later ones are not spoken."""
        control, topics = rpc.control, self._topics
        told = [mid for entry in control.ihave if entry.topicID in topics for mid in entry.messageIDs[:IDS_MAX]]
        if told:
            self._ask_for(told, sender_peer_id)
        asked = [mid for entry in control.iwant[:16] for mid in entry.messageIDs[:IDS_MAX]]
        if asked:
            self._answer(asked, sender_peer_id)
        for topic in sorted(topics.keys() & {entry.topicID for entry in control.graft}):
            await self._on_graft(topic, sender_peer_id)
        # A PRUNE's list of peers to dial is a stranger's word, and goes unread.
        for topic, back_off_s in {entry.topicID: entry.backoff for entry in control.prune}.items():
            if topic in topics:
                self.mesh[topic].discard(sender_peer_id)
                self._add_back_off(sender_peer_id, topic, False, min(back_off_s, BACK_OFF_MAX_S))

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

    async def _on_graft(self, topic: str, sender: ID) -> None:
        self._beat.grafts[sender] += 1
        if sender in self.mesh[topic] or self._beat.grafts[sender] > GRAFTS_MAX:
            return
        if len(self.mesh[topic]) >= DEGREE_HIGH or self._check_back_off(sender, topic):
            await self.emit_prune(topic, sender, False, False)
        else:
            self._take(topic, sender)

    def _take(self, topic: str, peer: ID) -> None:
        """Into the mesh. What was said just before it hears of now: from now on it is not told in turn."""
        self.mesh[topic].add(peer)
        self._topics[topic].behind.add(peer)

    # --- heartbeat ---

    async def heartbeat(self) -> None:
        """Mend the meshes and tell the others what they may lack, once a second."""
        while True:
            await trio.sleep(BEAT_S * random.uniform(0.9, 1.1))  # so that not all peers do so at once
            self._beat = _Beat()
            for topic, state in tuple(self._topics.items()):
                await self._mend_mesh(topic, state)
                self._tell_others(topic, state)
            self.mcache.shift()

    async def _mend_mesh(self, topic: str, state: _Topic) -> None:
        known = self.get_subscribers(topic)
        mesh: set[ID] = self.mesh[topic]
        mesh &= known
        state.chosen &= mesh
        if len(mesh) < DEGREE_LOW:
            free = _sort(peer for peer in known - mesh if not self._check_back_off(peer, topic))
            for peer in random.sample(free, min(len(free), DEGREE - len(mesh))):
                self._take(topic, peer)
                await self.emit_graft(topic, peer)
        elif len(mesh) > DEGREE_HIGH:
            kept = set(random.sample(_sort(state.chosen), min(len(state.chosen), DEGREE_CHOSEN)))
            kept |= set(random.sample(_sort(mesh - kept), DEGREE - len(kept)))
            for peer in _sort(mesh - kept):
                mesh.discard(peer)
                self._add_back_off(peer, topic, False)
                await self.emit_prune(topic, peer, False, False)

    async def emit_graft(self, topic: str, id: ID) -> None:
        """Tell a peer that it is in our mesh now; it counts as chosen by us."""
        self._topics[topic].chosen.add(id)
        await super().emit_graft(topic, id)

    def _tell_others(self, topic: str, state: _Topic) -> None:
        """IHAVE to peers outside the mesh in turn, so that each comes by before a message is too old to be told of, and
        to those whose queue was full and has room again."""
        known = self.get_subscribers(topic)
        state.behind &= known
        told = self.mcache.window(topic)
        if not told:
            state.behind.clear()
            return
        queues = self.pubsub.peer_queues
        chosen = {peer for peer in state.behind if len(queues[peer]) * 2 < self._limits.peer_queue_max}
        state.behind -= chosen
        others = known - self.mesh[topic]
        state.lazy_turn = [peer for peer in state.lazy_turn if peer in others]
        fresh = _sort(others.difference(state.lazy_turn))
        random.shuffle(fresh)
        state.lazy_turn = fresh + state.lazy_turn
        count = max(LAZY_PEERS, -(-len(others) // (LAZY_BEATS - 1)))
        turn, state.lazy_turn = state.lazy_turn[:count], state.lazy_turn[count:]
        state.lazy_turn += turn
        for peer in _sort(chosen.union(turn)):
            self._tell(topic, peer, told)

    def _tell(self, topic: str, peer: ID, mids: list[bytes]) -> None:
        control = rpc_pb2.ControlMessage(ihave=[rpc_pb2.ControlIHave(topicID=topic, messageIDs=mids)])
        self.send_rpc(peer, rpc_pb2.RPC(control=control), priority=True)

    async def send_recent_messages(self, peer_id: ID, topic: str) -> None:
        """Tell a peer that came (back) what there was. The stock method writes all of it past the peer's queue: every
        peer sends everything to who joins, and two writers mix their bytes."""
        told = self.mcache.window(topic)
        if told:
            self._tell(topic, peer_id, told)

    # --- who is there ---

    @property
    def manager(self) -> Any:
        """The service's tasks, guarded."""
        return GuardedTasks(self._manager)

    def get_subscribers(self, topic: str) -> set[ID]:
        """Peers that hear a topic and can be written to."""
        return {peer for peer in self.pubsub.peer_topics.get(topic, ()) if peer in self.pubsub.peer_queues}

    def forget(self, peer_id: ID) -> None:
        """What the stock router keeps of every identity that ever came."""
        for state in self._topics.values():
            state.chosen.discard(peer_id)
            state.behind.discard(peer_id)
        for waiting in self.back_off.values():
            waiting.pop(peer_id, None)


def _sort(peers: Iterable[ID]) -> list[ID]:
    return sorted(peers, key=ID.to_bytes)
