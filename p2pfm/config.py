"""What peers agree on (`NetworkConfig`) and what is local to one node (`NodeConfig`).

The digest of a NetworkConfig is the network's id: two nodes whose rules differ in anything never hear each other.
Knows no file: the command line reads the TOML text and passes it here.
"""

import ipaddress
import re
import tomllib
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from p2pfm.errors import ConfigError
from p2pfm.types import Digest, Millis, Wei, compute_digest

WEI_PER_PFM = 10**18
GOSSIP_BYTES_MAX = 1_000_000
"""py-libp2p 0.8.1 sends what is larger to nobody, and says nothing."""
FRAME_BYTES = 512
"""The parts of a proposal, a certificate and an envelope that are no lists (`messages`)."""
SEAT_BYTES = 72
"""A reveal without its lists, and a place among the absent."""
SCORE_BYTES = 44
SERVICES_BYTES = 128 * 11
"""`messages.SERVED_MAX` services in each reveal."""
UPDATE_BYTES = 108
"""With a peer id of 52 bytes; a shard's is shorter, and its proposal's digest of 34 fits in, too."""
LEAF_BYTES = 64
"""Three amounts of 18 bytes, and a contribution of up to 9."""
ALL_LINEAR = "all-linear"
"""As the only one of `AdapterConfig.targets`: all linear layers but the vocabulary's projection."""


class AdapterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The adapter on the frozen backbone; every peer starts from the same one, seeded (`lora.kinds` has the table).

    lora     dW = alpha / rank * B A (Hu et al. 2021). Averaging A and B is not averaging B A: the cross term is logged.
    ffa      the same with A frozen (Sun et al. 2024): merges exactly, at half the parameters.
    fed_sb   alpha / rank * B R A with only R (rank x rank) trained (Singhal et al. 2025): merges exactly; payloads do
             not grow with the backbone's width, so ranks of 32 and more are cheap.
    ia3      a learned scale for each output of a target, or input of a feed-forward one (Liu et al. 2022).
    prompt   `prompt_tokens` learned embeddings before every text (Lester et al. 2021).

    Learning rates differ (docs/LOG.md): ffa wants two to five times LoRA's, ia3 and prompt ten times.
    """

    kind: Literal["lora", "ffa", "fed_sb", "prompt", "ia3"] = "lora"
    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the backbone's layers, or whole module paths, or just "all-linear"; a prompt has no use for them."""
    seed: int = 0
    prompt_tokens: int = 8
    """Used by the kind "prompt" only."""

    @property
    def num_virtual(self) -> int:
        """Positions of the backbone's context that the adapter itself takes."""
        return self.prompt_tokens if self.kind == "prompt" else 0


class TrainingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Local work of a round: `steps` AdamW steps on `batch` samples of at most `tokens_max` tokens."""

    steps: int = 30
    batch: int = 4
    tokens_max: int = 64
    learning_rate: float = 1e-3


class CompressionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Chunked top-k with error feedback (ALGORITHMS, part 2): `keep` of every `chunk` values; residual decay `beta`."""

    chunk: int = 4096
    keep: int = 256
    beta: float = 0.95


class PhaseConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long each phase of a round lasts [ms], in the order in which they come."""

    train_ms: Millis = Millis(120_000)
    exchange_ms: Millis = Millis(30_000)
    score_ms: Millis = Millis(60_000)
    reveal_ms: Millis = Millis(10_000)
    attest_ms: Millis = Millis(20_000)
    merge_ms: Millis = Millis(10_000)


class ScoringConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How contributions are measured: the probe's draw and the committee's size (ALGORITHMS, part 4)."""

    committee_size: int = 9
    samples_per_stratum: int = 10
    stake_cap_pfm: int = 1_000_000
    duplicate_cosine: float = 0.9
    """Two updates of a round that are more alike count once, for whoever announced first; 1: never."""
    duplicate_overlap: float = 0.4
    """The same for the share of common positions, over chance; 1: never."""
    work_steps: int = 0
    """The last local steps of a round, taken on a public batch that is drawn for the peer from the probe's "work"
    split: an update that does not know its batch fails the proof of computation. 0: no such proof."""


class SettlementConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rewards: `pool_per_epoch_pfm` whole tokens are divided when an epoch's last round is certified."""

    rounds_per_epoch: int = 8
    pool_per_epoch_pfm: int = 100
    serving_per_epoch_pfm: int = 0
    """At most so many are allotted out of the serving pool then, by receipts; 0: there is no such pool."""


class ChainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which contract on which chain is this network's arbiter."""

    chain_id: int
    federation: str
    token: str
    serving_pool: str = ""
    """The contract that pays for serving; empty: nobody does."""


class LimitConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds that all peers enforce against any sender."""

    peers_max: int = 128
    """More than `shard_peers_max` makes rounds longer: room for the second level of a network of shards, whose contract
    may take no more members."""
    shard_peers_max: int = 128
    """More registered peers than this are dealt into shards (`protocol.shards`)."""
    payload_bytes_max: int = 64 * 1024 * 1024
    message_bytes_max: int = 512 * 1024


class NetworkConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that peers of one network agree on. Its digest is the network id."""

    name: str
    genesis_ms: Millis
    backbone: str
    probe: str
    """SHA-256 (hex) of the declared probe set's bytes."""
    chain: ChainConfig
    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()
    compression: CompressionConfig = CompressionConfig()
    phases: PhaseConfig = PhaseConfig()
    scoring: ScoringConfig = ScoringConfig()
    settlement: SettlementConfig = SettlementConfig()
    limits: LimitConfig = LimitConfig()

    @property
    def has_shards(self) -> bool:
        """The network may grow beyond one shard: its rounds have a second level."""
        return self.limits.peers_max > self.limits.shard_peers_max

    def network_id(self) -> Digest:
        """SHA-256 of the canonical MessagePack of this struct (fields in the order of declaration)."""
        return compute_digest(b"p2pfm network 2" + msgspec.msgpack.encode(self))

    def pool_per_epoch(self) -> Wei:
        """What an epoch divides [wei]."""
        return Wei(self.settlement.pool_per_epoch_pfm * WEI_PER_PFM)

    def serving_per_epoch(self) -> Wei:
        """Most that an epoch allots out of the serving pool [wei]."""
        return Wei(self.settlement.serving_per_epoch_pfm * WEI_PER_PFM)

    def stake_cap(self) -> Wei:
        """Stake above this gives no further weight in the scoring game [wei]."""
        return Wei(self.scoring.stake_cap_pfm * WEI_PER_PFM)


class HttpConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the OpenAI-compatible API, /metrics and /status listen, who may ask, and how much (guides/serving.md)."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys_file: str = ""
    """A file of mode 0600, a key a line: NAME SECRET. Empty: whoever reaches the port may ask."""
    body_bytes_max: int = 1 << 20
    prompt_tokens_max: int = 0
    """0: what the backbone's context holds."""
    requests_max: int = 64
    """Completions that run at once; a request with n = 3 counts as three."""
    queue_max: int = 64
    """Completions that wait for their turn; one more gets 429."""
    queue_s_max: float = 10
    """How long they wait before they get 429: for their turn, and then for a replica that is not full."""
    client_requests_max: int = 64
    """Completions that run or wait for one client: an API key, or an address where there are none."""
    request_s_max: float = 600
    """How long one answer may take in all."""
    read_s_max: float = 30
    """How long a client may take to send its body."""
    write_s_max: float = 30
    """How long a client may stop reading before it is cut."""
    idle_s_max: float = 5
    """How long a connection may be open without a whole request's headers."""
    origins: tuple[str, ...] = ()
    """Web pages besides the node's own that may ask it, as https://app.example; "*": any."""
    connections_max: int = 256
    """Beyond it the one that was idle for longest is closed; if all work, the new one gets 503."""


class ServingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """This node as a replica and gateway. `local`: prefer its own replica, avoid it, or use nothing else."""

    enabled: bool = True
    local: Literal["prefer", "avoid", "only"] = "prefer"
    backend: Literal["own", "vllm", "llama.cpp"] = "own"
    """What generates: our own engine, or a server of the operator's with the same model (docs/guides/serving.md)."""
    backend_url: str = "http://127.0.0.1:8080"
    """Where that server listens. It sees all prompts: let it be this machine, or one that is trusted as much."""
    backend_s: float = 60.0
    """It may take so long for a few tokens, the reading of a prompt included; then the stream goes elsewhere."""
    sessions_max: int = 16
    """Streams generated at once; one pass takes them all."""
    versions_kept: int = 3
    """The newest certified base and those of the rounds before it, so many in all."""
    dtype: Literal["stored", "bf16", "fp32"] = "stored"
    """Number format of the served backbone. bf16 halves the memory of one that is stored in float32, and on processors
    that multiply in bf16 the time as well."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where streams are generated; auto: on CUDA where torch finds one. Training always goes by auto."""
    train_share: float = 0.5
    """Of the time in which streams are served, so much at most is training's and scoring's, above 0 to 1. Too little,
    and a busy node's updates come late."""
    recheck_share: float = 0.05
    """Part of the answers by other nodes' replicas that is checked: on this node's engine, else by a third replica."""
    adapters_max: int = 8
    """Users' own LoRA in memory at once; 0: none are served (docs/guides/adapters.md)."""
    adapter_rank_max: int = 256
    adapter_bytes_max: int = 64 << 20
    """Of one of them, as float32."""
    adapters_bytes_max: int = 1 << 30
    """Disk that they may take; beyond it those go that have no name here and were not used for longest."""
    adapters_dir: str = ""
    """`POST /v1/adapters` may name peft folders below this one. Empty: it takes uploads only."""
    backups: int = 2
    """Other nodes that keep a copy of each streamed answer with its prompt, so that its client can go on reading there
    when this one dies; 0: nobody."""
    kept_s: float = 300.0
    """A stream, own or another node's, is forgotten so long after its last token."""


class PrivacyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Example-level DP-SGD of this node's training (ALGORITHMS, part 6): each peer's own choice.

    Give `noise_multiplier`, or `epsilon_max` and `rounds`: then the noise is the least with which so many rounds cost
    no more. With `epsilon_max` the node trains no more once a round would exceed it. The noise follows from the number
    of samples and network.training.steps; more samples cost less.
    """

    enabled: bool = False
    noise_multiplier: float = 0.0
    """Standard deviation of the noise over `max_grad_norm`; 0: chosen from `epsilon_max` and `rounds`."""
    epsilon_max: float = 0.0
    """Budget for this node's whole life; 0: none."""
    rounds: int = 0
    max_grad_norm: float = 1.0
    """Each sample's gradient of its mean loss is clipped to this norm, over all adapter tensors together."""
    delta: float = 1e-5
    """Chance with which the bound may fail: well below one over the number of samples."""
    batch: int = 0
    """Expected samples of a step; 0: network.training.batch. Large ones give the better model for the same epsilon."""


class PersonalConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A private adapter of this node: trained on its own data on top of the shared base, never sent to anyone.

    Served to this node's own clients only, as the model BACKBONE+private. Costs `steps` more local steps a round, and a
    part of the own data, which neither the shared nor the private adapter is trained on.
    """

    enabled: bool = False
    steps: int = 10
    """AdamW steps after each round's shared training, at network.training's other settings."""
    weight: float = 0.5
    """Served is base + weight * private: 1 knows the own data best, less forgets less of everybody else's."""
    held_out: float = 0.1
    """Part of the own prompts that decides whether a refinement is an improvement; the rest is trained on."""


class DiscoveryConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How this node finds others, beside its bootstrap addresses and what peers tell one another. Local to the node."""

    mdns: str = ""
    """This machine's address in the local network, e.g. 192.168.1.5: peers there find each other without a bootstrap,
    and everybody there can see that this node runs. Empty: off."""
    dht: bool = False
    """Look in a Kademlia table for peers of which no address works any more, and keep such records for others."""


class TransportLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Bounds of one node against any sender; all local, none agreed on. Times in seconds, sizes in bytes."""

    gossip_bytes_max: int = 512 * 1024
    gossip_queue_max: int = 2048
    """Messages that wait for the node; beyond it the oldest is dropped and counted."""
    gossip_burst_max: int = 30
    """Own messages published at once; the stock queues lose what exceeds 32."""
    gossip_per_s: float = 100.0
    author_burst_max: int = 400
    """Messages of one author at once, half as many a second: twice what an honest author can publish. The excess is
    dropped and blames nobody."""
    forwarder_burst_max: int = 2000
    """The same for one forwarder, counted before the signature is checked."""
    forwarder_bytes_max: int = 32 * 1024 * 1024
    """The same in bytes."""
    peer_queue_max: int = 256
    """RPCs that wait for one slow gossip peer."""
    peer_queue_bytes_max: int = 16 * 1024 * 1024
    """The same in bytes: a whole burst of the largest messages fits."""
    request_bytes_max: int = 1_000_000
    reply_bytes_max: int = 8_000_000
    frame_bytes_max: int = 1_000_000
    requests_served_max: int = 64
    requests_served_per_peer_max: int = 16
    streams_served_max: int = 64
    streams_served_per_peer_max: int = 32
    held_bytes_max: int = 24 * 1024 * 1024
    """Requests half read and replies half written, of all peers together; beyond it the oldest are dropped."""
    connections_max: int = 300
    connections_per_address_max: int = 128
    handshakes_per_address_max: int = 32
    """Beyond it the oldest unfinished handshake of the same address is cut, so silent sockets block nobody."""
    handshakes_max: int = 256
    """The same for all addresses together: the address that has most loses its oldest."""
    streams_per_connection_max: int = 512
    syn_per_s: float = 500.0
    syn_burst_max: int = 1500
    buffered_per_connection_max: int = 24 * 1024 * 1024
    buffered_max: int = 96 * 1024 * 1024
    """What lies unread in the streams of all connections together; beyond it the connection with most of it ends."""
    window_slack_bytes: int = 256 * 1024
    negotiate_s: float = 10.0
    """For each step of a handshake. Not short: a short one turns a busy machine into one that only retries; silent
    sockets are cut by number, not by time."""
    ping_s: float = 3.0
    silent_s: float = 9.0
    """A connection that sends nothing, not even pongs, for this long is closed."""
    write_stall_s: float = 30.0
    """A writer waits this long for window credit (back-pressure), then its stream is reset."""
    write_bytes_per_s_min: int = 16 * 1024
    """A write of n bytes has n / this many seconds beside `write_stall_s`: credit in drips holds nothing for ever."""
    dials_max: int = 3
    dial_s: float = 10.0
    explore_s: float = 20.0
    """A node that has connections enough dials one further peer this often, so that no group keeps to itself."""
    visit_s: float = 5.0
    """A connection beyond three quarters of the bound is kept this long at least: enough to exchange peers."""
    known_peers_max: int = 1024
    addresses_per_peer_max: int = 8

    @property
    def inbound_max(self) -> int:
        """Connections that others may open here: the last eighth is for those that this node dials itself."""
        return self.connections_max - max(1, self.connections_max // 8)


class NodeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One node: its folder, addresses, data, and the network that it joins."""

    home: str
    data: str
    """Private training samples: JSON lines of {"topic", "prompt", "completion"}."""
    rpc: str
    """URL of any Ethereum JSON-RPC endpoint of the network's chain."""
    network: NetworkConfig
    probe: str = ""
    """File with the network's probe set; empty: fetched from a peer by its digest."""
    listen: str = "/ip4/127.0.0.1/tcp/0"
    bootstrap: tuple[str, ...] = ()
    discovery: DiscoveryConfig = DiscoveryConfig()
    limits: TransportLimits = TransportLimits()
    """What strangers may take of this node; `p2pfm init` writes none, so that better defaults reach old nodes."""
    http: HttpConfig = HttpConfig()
    serving: ServingConfig = ServingConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    personal: PersonalConfig = PersonalConfig()
    rank: int = 0
    """Directions of the adapter that this node trains, the first of the network's; 0: all. For little data, of which
    a high rank learns the noise (docs/decisions/why-mixed-ranks-are-nested-in-the-round.md)."""
    stake_pfm: int = 100
    """What this node locks when it joins, in whole tokens."""
    auto_claim: bool = True
    """Draw rewards as soon as their round is final."""
    auto_challenge: bool = True
    """Contest what is provably false on chain, and show leaves that are asked for; costs gas, and may earn bounties."""
    confirmations: int = 1
    """Blocks, its own included, after which a transaction of this node counts as done."""
    rpc_witness: str = ""
    """URL of a second endpoint, of somebody else, that must tell the same rounds as `rpc`; empty: none."""
    log_json: bool = False
    adversary: Literal["", "zero", "replay", "overpay"] = ""
    """Tests and demonstrations only: announce a zero update, or the last aggregate again, instead of training; or, in
    a committee, give all of an epoch's reward to the proposer and sign whatever does."""


def parse_node_config(text: str) -> NodeConfig:
    """The validated configuration in the TOML `text`.

    Raises:
        ConfigError: not TOML, a wrong or unknown key, or values that cannot work together.
    """
    try:
        config = msgspec.convert(tomllib.loads(text), NodeConfig, strict=True)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"expected TOML, but {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{error}. See `p2pfm init --help` for the keys a node's TOML has") from error
    for key, text in (("home", config.home), ("data", config.data), ("probe", config.probe)):
        if "\0" in text:
            raise ConfigError(f"{key}: expected a path, got {text!r}")
    validate_network(config.network)
    validate_privacy(config.privacy)
    _validate_http(config.http)
    if not 0 < config.serving.train_share <= 1:
        raise ConfigError(f"serving.train_share: expected above 0, at most 1, got {config.serving.train_share:g}")
    for name in ("sessions_max", "versions_kept", "adapter_rank_max", "adapter_bytes_max"):
        if getattr(config.serving, name) < 1:
            raise ConfigError(f"serving.{name}: expected at least 1, got {getattr(config.serving, name)}")
    if not 0 <= config.serving.backups <= 16:
        raise ConfigError(f"serving.backups: expected 0 to 16, got {config.serving.backups}")
    if not 0 <= config.serving.kept_s <= 86_400:
        raise ConfigError(f"serving.kept_s: expected 0 to 86400, got {config.serving.kept_s:g}")
    if config.serving.adapters_max < 0:
        raise ConfigError(f"serving.adapters_max: expected at least 0, got {config.serving.adapters_max}")
    if config.serving.adapters_bytes_max < config.serving.adapter_bytes_max:
        raise ConfigError(
            "serving.adapters_bytes_max: expected at least serving.adapter_bytes_max "
            f"({config.serving.adapter_bytes_max}), got {config.serving.adapters_bytes_max}"
        )
    if not 0 <= config.serving.recheck_share <= 1:
        raise ConfigError(f"serving.recheck_share: expected 0 to 1, got {config.serving.recheck_share:g}")
    _validate_backend(config)
    _validate_personal(config)
    _validate_rank(config)
    _validate_discovery(config.discovery)
    _validate_limits(config.limits)
    if config.limits.gossip_bytes_max < config.network.limits.message_bytes_max:
        raise ConfigError(
            "limits.gossip_bytes_max: expected at least network.limits.message_bytes_max "
            f"({config.network.limits.message_bytes_max}), or this node hears no large proposals; got "
            f"{config.limits.gossip_bytes_max}"
        )
    return config


def _validate_backend(config: NodeConfig) -> None:
    serving = config.serving
    if not 0.1 <= serving.backend_s <= 3600:
        raise ConfigError(f"serving.backend_s: expected 0.1 to 3600, got {serving.backend_s:g}")
    if serving.backend == "own":
        return
    try:
        url = urlsplit(serving.backend_url)
        is_plain = bool(url.scheme in ("http", "https") and url.hostname) and url.port != 0
    except ValueError:
        is_plain = False
    if not is_plain or url.username or url.query or url.fragment:
        raise ConfigError(
            f"serving.backend_url: expected http://HOST:PORT of a {serving.backend} server, got {serving.backend_url!r}"
        )
    if config.personal.enabled:
        raise ConfigError(
            f"personal.enabled: a private adapter is served by our own engine only; with serving.backend = "
            f'"{serving.backend}" set it to false'
        )


def _validate_http(http: HttpConfig) -> None:
    checks: tuple[tuple[str, float, float, float], ...] = (
        ("port", http.port, 0, 65535),
        ("body_bytes_max", http.body_bytes_max, 1024, 2**30),
        ("prompt_tokens_max", http.prompt_tokens_max, 0, 2**31),
        ("requests_max", http.requests_max, 1, 100_000),
        ("queue_max", http.queue_max, 0, 100_000),
        ("queue_s_max", http.queue_s_max, 0, 3600),
        ("client_requests_max", http.client_requests_max, 1, 100_000),
        ("request_s_max", http.request_s_max, 0.1, 86_400),
        ("read_s_max", http.read_s_max, 0.1, 3600),
        ("write_s_max", http.write_s_max, 0.1, 3600),
        ("idle_s_max", http.idle_s_max, 0.1, 3600),
        ("connections_max", http.connections_max, 1, 100_000),
    )
    for key, value, low, high in checks:
        if not low <= value <= high:
            raise ConfigError(f"http.{key}: expected {low:g} to {high:g}, got {value:g}")
    if not re.fullmatch(r"[A-Za-z0-9._:-]+", http.host):
        raise ConfigError(
            f"http.host: expected an address or a name of this machine, such as 127.0.0.1, ::1, or 0.0.0.0 for all; "
            f"got {http.host!r}"
        )
    if "\0" in http.api_keys_file:
        raise ConfigError(f"http.api_keys_file: expected a path, got {http.api_keys_file!r}")
    for origin in http.origins:
        if origin != "*" and not re.fullmatch(r"https?://[a-z0-9.:\[\]-]+", origin):
            raise ConfigError(f'http.origins: expected "*", or pages like https://app.example, got {origin!r}')


def _validate_limits(limits: TransportLimits) -> None:
    for name in limits.__struct_fields__:
        if getattr(limits, name) <= 0:
            raise ConfigError(f"limits.{name}: expected a positive number, got {getattr(limits, name)}")
    if limits.gossip_bytes_max > GOSSIP_BYTES_MAX:
        raise ConfigError(
            f"limits.gossip_bytes_max: at most {GOSSIP_BYTES_MAX} (above it messages are lost without a word), "
            f"got {limits.gossip_bytes_max}"
        )
    if limits.negotiate_s < 1:
        raise ConfigError(f"limits.negotiate_s: expected at least 1 (whole seconds count), got {limits.negotiate_s:g}")
    if limits.silent_s < 2 * limits.ping_s:
        raise ConfigError(
            f"limits.silent_s: expected at least twice ping_s ({limits.ping_s:g} s), or peers that live are cut; got "
            f"{limits.silent_s:g}"
        )


def _validate_discovery(discovery: DiscoveryConfig) -> None:
    if discovery.mdns:
        try:
            ipaddress.IPv4Address(discovery.mdns)
        except ValueError as error:
            raise ConfigError(
                f"discovery.mdns: expected this machine's IPv4 address in the local network, got {discovery.mdns!r}"
            ) from error


def _validate_rank(config: NodeConfig) -> None:
    adapter = config.network.adapter
    if not 0 <= config.rank <= adapter.rank:
        raise ConfigError(f"rank: expected 0 (all) to network.adapter.rank, {adapter.rank}; got {config.rank}")
    if config.rank and adapter.kind in ("ia3", "prompt"):
        raise ConfigError(f"rank: adapters of kind {adapter.kind} have no rank; remove it")
    if config.rank and config.privacy.enabled:
        raise ConfigError("rank: privacy's noise falls on all directions; set rank to 0, or privacy.enabled to false")


def _validate_personal(config: NodeConfig) -> None:
    personal = config.personal
    if not personal.enabled:
        return
    checks: tuple[tuple[str, float, float, float], ...] = (
        ("steps", personal.steps, 1, 100_000),
        ("weight", personal.weight, 0.01, 1),
        ("held_out", personal.held_out, 0.01, 0.5),
    )
    for key, value, low, high in checks:
        if not low <= value <= high:
            raise ConfigError(f"personal.{key}: expected {low:g} to {high:g}, got {value}")
    if not config.serving.enabled:
        raise ConfigError("personal.enabled: only this node can serve its private adapter; set serving.enabled to true")
    if not is_loopback(config.http.host):
        raise ConfigError(
            f"personal.enabled: http.host {config.http.host} lets other machines ask this node's private model; set it "
            "to 127.0.0.1 (an SSH tunnel or a proxy with a password leads there), or personal.enabled to false"
        )


def make_transport_limits(network: NetworkConfig) -> TransportLimits:
    """The defaults, where they let all of the network's messages through."""
    limits = TransportLimits()
    bytes_max = max(limits.gossip_bytes_max, network.limits.message_bytes_max)
    return msgspec.structs.replace(limits, gossip_bytes_max=bytes_max)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`, a name or an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def validate_privacy(privacy: PrivacyConfig) -> None:
    """Refuse a privacy that guarantees nothing, or whose noise cannot be known.

    Raises:
        ConfigError: names the key, what is allowed, and what it was.
    """
    if not privacy.enabled:
        return
    checks: tuple[tuple[str, float, float, float], ...] = (
        ("noise_multiplier", privacy.noise_multiplier, 0, 1e6),
        ("epsilon_max", privacy.epsilon_max, 0, 1e6),
        ("rounds", privacy.rounds, 0, 1_000_000),
        ("max_grad_norm", privacy.max_grad_norm, 1e-9, 1e9),
        ("delta", privacy.delta, 1e-12, 0.1),
        ("batch", privacy.batch, 0, 1_000_000),
    )
    for key, value, low, high in checks:
        if not low <= value <= high:
            raise ConfigError(f"privacy.{key}: expected {low:g} to {high:g}, got {value}")
    if privacy.noise_multiplier == 0 and not (privacy.epsilon_max > 0 and privacy.rounds > 0):
        raise ConfigError(
            "privacy.noise_multiplier: without noise epsilon is infinite and nothing is private; "
            "give a noise_multiplier over 0, or epsilon_max and rounds, or set privacy.enabled to false"
        )


def validate_network(network: NetworkConfig) -> None:
    """Refuse rules that cannot work.

    Raises:
        ConfigError: names the key, what is allowed, and what it was.
    """
    checks: tuple[tuple[str, int | float, float, float], ...] = (
        ("adapter.rank", network.adapter.rank, 1, 1024),
        ("adapter.alpha", network.adapter.alpha, 1, 65536),
        ("adapter.seed", network.adapter.seed, -(2**63), 2**63 - 1),
        ("adapter.prompt_tokens", network.adapter.prompt_tokens, 1, 1024),
        ("training.steps", network.training.steps, 1, 100_000),
        ("training.batch", network.training.batch, 1, 4096),
        ("training.tokens_max", network.training.tokens_max, 8, 1_000_000),
        ("training.learning_rate", network.training.learning_rate, 1e-9, 10),
        ("compression.chunk", network.compression.chunk, 16, 65536),
        ("compression.keep", network.compression.keep, 1, network.compression.chunk),
        ("compression.beta", network.compression.beta, 0, 1),
        ("scoring.committee_size", network.scoring.committee_size, 1, min(network.limits.peers_max, 128)),
        ("scoring.samples_per_stratum", network.scoring.samples_per_stratum, 1, 10_000),
        ("scoring.stake_cap_pfm", network.scoring.stake_cap_pfm, 1, 2**63),
        ("scoring.duplicate_cosine", network.scoring.duplicate_cosine, 0, 1),
        ("scoring.duplicate_overlap", network.scoring.duplicate_overlap, 0, 1),
        ("scoring.work_steps", network.scoring.work_steps, 0, network.training.steps),
        ("settlement.rounds_per_epoch", network.settlement.rounds_per_epoch, 1, 1_000_000),
        ("settlement.pool_per_epoch_pfm", network.settlement.pool_per_epoch_pfm, 0, 10**12),
        ("settlement.serving_per_epoch_pfm", network.settlement.serving_per_epoch_pfm, 0, 10**12),
        ("limits.peers_max", network.limits.peers_max, 1, network.limits.shard_peers_max**2),
        ("limits.shard_peers_max", network.limits.shard_peers_max, 2, 128),
        ("limits.payload_bytes_max", network.limits.payload_bytes_max, 1024, 2**32),
        ("limits.message_bytes_max", network.limits.message_bytes_max, 4096, 1_000_000),
        *((f"phases.{name}", value, 50, 86_400_000) for name, value in msgspec.structs.asdict(network.phases).items()),
    )
    for key, value, low, high in checks:
        if not low <= value <= high:
            raise ConfigError(f"network.{key}: expected {low:g} to {high:g}, got {value}")
    _validate_targets(network.adapter)
    chain = network.chain
    addresses = [("federation", chain.federation), ("token", chain.token)]
    addresses += [("serving_pool", chain.serving_pool)] if chain.serving_pool else []
    for key, address in addresses:
        if not re.fullmatch(r"0x[0-9a-fA-F]{40}", address):
            raise ConfigError(f"network.chain.{key}: expected 0x and 40 hex digits, got {address!r}")
    limits = network.limits
    proposal_bytes = _compute_proposal_bytes(network, limits.peers_max)
    if proposal_bytes > limits.message_bytes_max:
        fits = (n for n in range(limits.peers_max) if _compute_proposal_bytes(network, n) <= limits.message_bytes_max)
        is_room = proposal_bytes <= GOSSIP_BYTES_MAX
        raise ConfigError(
            f"network.limits.peers_max: a proposal of {limits.peers_max} peers and a committee of "
            f"{network.scoring.committee_size} takes up to {proposal_bytes} bytes, and limits.message_bytes_max is "
            f"{limits.message_bytes_max}: at most {max(fits, default=0)} peers fit; lower peers_max or "
            + (f"raise message_bytes_max to {proposal_bytes}" if is_room else "scoring.committee_size")
        )
    if len(network.probe) != 64 or any(c not in "0123456789abcdef" for c in network.probe):
        raise ConfigError(f"network.probe: expected 64 lower-case hex digits (a SHA-256), got {network.probe!r}")


def _compute_proposal_bytes(network: NetworkConfig, peers_max: int) -> int:
    """At most what a certified proposal in its envelope takes, with so many registered peers [bytes]."""
    shard_peers_max, seats = network.limits.shard_peers_max, network.scoring.committee_size
    services = SERVICES_BYTES if network.settlement.serving_per_epoch_pfm else 0

    def compute(num_updates: int, num_leaves: int) -> int:
        reveals = seats * (SEAT_BYTES + services + num_updates * SCORE_BYTES)
        return FRAME_BYTES + reveals + num_updates * UPDATE_BYTES + num_leaves * LEAF_BYTES

    if peers_max <= shard_peers_max:
        return compute(peers_max, peers_max)
    return max(compute(shard_peers_max, 0), compute(-(-peers_max // shard_peers_max), peers_max))


def _validate_targets(adapter: AdapterConfig) -> None:
    targets = adapter.targets
    if not targets or any(not target.strip() for target in targets):
        raise ConfigError(f"network.adapter.targets: expected names of the backbone's layers, got {list(targets)}")
    if len(set(targets)) != len(targets):
        raise ConfigError(f"network.adapter.targets: expected each name once, got {list(targets)}")
    if ALL_LINEAR in targets and len(targets) > 1:
        raise ConfigError(f'network.adapter.targets: "{ALL_LINEAR}" stands alone, got {list(targets)}')
