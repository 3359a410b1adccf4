// The page: asks the node how it is, and shows it. The conversation is of chat.js.

import { ApiError, get, setKey } from "./api.js";
import { setModels, setPeer, setReady, start } from "./chat.js";
import { fact, h, mark, paint, s, table } from "./dom.js";
import { amount, contributions, count, exact, plain, plural, tail } from "./format.js";

const POLL_MS = 2000;
const TICK_MS = 250;

const PHASES = {
  TRAIN: "training", EXCHANGE: "exchanging updates", SCORE: "scoring", REVEAL: "revealing scores", ATTEST: "signing",
  MERGE: "merging",
};

const state = {
  status: null, // of /status, as it came last
  at: 0, // when [performance.now()]
  models: [],
  isReachable: true,
  isRefused: false, // a key is missing or wrong
};

const byId = (id) => document.getElementById(id);

// --- what comes in --------------------------------------------------------------------------------------------------

let isPolling = false;

async function poll() {
  if (document.hidden || isPolling) return;
  isPolling = true;
  try {
    Object.assign(state, { status: await get("status"), at: performance.now(), isReachable: true });
    const models = await get("v1/models"); // what a key may guard
    Object.assign(state, { models: models.data.map((one) => one.id), isRefused: false });
  } catch (error) {
    state.isReachable = error instanceof ApiError;
    if (state.isReachable) Object.assign(state, { models: [], isRefused: error.status === 401 });
  }
  isPolling = false;
  render();
}

// --- the parts ------------------------------------------------------------------------------------------------------

function live() {
  if (state.isRefused) return mark("wait", "needs a key");
  if (!state.isReachable) return mark("bad", "no connection");
  if (!state.status) return mark("none", "loading");
  return canServe() ? mark("good", "ready") : mark("wait", plain(state.status.stage));
}

function canServe() {
  return state.models.length > 0;
}

function banner() {
  if (!state.isReachable) {
    return h("p", { class: "banner" }, h("strong", {}, "The node does not answer. "), "Is ", h("code", {}, "p2pfm node run"),
      " still running? This page asks again by itself", state.status ? "; what it shows is of before." : ".");
  }
  const it = state.status;
  const problems = [];
  if (it?.chain?.error) problems.push(h("p", { class: "banner" }, h("strong", {}, "The chain does not answer. "), plain(it.chain.error)));
  if (it?.clock?.is_off) {
    problems.push(h("p", { class: "banner" }, h("strong", {}, "This machine\u2019s clock is off. "),
      `Its peers\u2019 median is ${count(Math.round(it.clock.offset_ms / 1000))} s away: set it (NTP), or nobody hears this node.`));
  }
  return problems;
}

function title() {
  const it = state.status;
  if (!it?.network) return h("h1", { id: "network-title" }, it ? "p2pfm node" : "Loading\u2026");
  return [
    h("h1", { id: "network-title" }, h("bdi", {}, plain(it.network.name))),
    h("p", { class: "under" }, h("bdi", {}, plain(it.network.backbone)), " \u00B7 peer ", h("code", {}, plain(it.peer))),
  ];
}

// Why nothing can be asked, and what helps.
function problem() {
  const it = state.status;
  if (state.isRefused) return "This node answers only with an API key: enter it above.";
  if (!it) return state.isReachable ? "Asking the node\u2026" : "The node does not answer.";
  if (it.stage !== "running") return `The node is ${plain(it.stage)}. This takes a moment, longer at the first start.`;
  return "The node runs, but holds no certified adapter and knows no replica of one. It gets one from its peers, or with the next round.";
}

function whole(name, ...value) { // a fact over the whole width
  const line = fact(name, ...value);
  line.className = "whole";
  return line;
}

// --- round ----------------------------------------------------------------------------------------------------------

// [ms] left of the phase: counted on here between two answers of the node.
function left() {
  return Math.max(0, state.status.phase_ends_in_ms - (performance.now() - state.at));
}

// "43 s", "2 min 5 s".
function span(ms) {
  const seconds = Math.ceil(ms / 1000);
  const [hours, minutes] = [Math.floor(seconds / 3600), Math.floor((seconds % 3600) / 60)];
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${seconds % 60} s` : `${seconds} s`;
}

function whereInRound() {
  const { round, phase, level, phases_ms: durations } = state.status;
  if (round < 0) return { words: `the first begins in ${span(left())}`, share: 0, ends: [] };
  const total = Object.values(durations).reduce((sum, ms) => sum + ms, 0);
  let end = 0;
  const ends = Object.entries(durations).map(([name, ms]) => [name, (end += ms) / total]);
  const now = ends.find(([name]) => name === phase);
  const share = Math.max(0, now[1] - left() / total);
  const of = { SHARD: ", in the shards", TOP: ", above the shards" }[level] ?? "";
  return { words: `${PHASES[phase] ?? plain(phase)}${of}, ${span(left())} left`, share, ends };
}

function progress() {
  const { words, share, ends } = whereInRound();
  const round = state.status.round;
  byId("round-title").textContent = round < 0 ? "Round" : `Round ${count(round)}`;
  const place = byId("progress");
  place.setAttribute("aria-valuenow", Math.round(share * 100));
  place.setAttribute("aria-valuetext", words);
  place.replaceChildren(s("svg", { "aria-hidden": "true", focusable: "false", width: "100%", height: 12 },
    s("rect", { class: "phase", width: "100%", height: 12, rx: 2 }),
    s("rect", { class: "done", width: `${share * 100}%`, height: 12, rx: 2 }),
    ends.slice(0, -1).map(([, at]) => s("line", { class: "gap", x1: `${at * 100}%`, x2: `${at * 100}%`, y1: 0, y2: 12 }))));
  byId("phase").textContent = words[0].toUpperCase() + words.slice(1);
}

function tick() {
  if (state.status?.phases_ms && !document.hidden) progress();
}

function roundFacts() {
  const { protocol } = state.status;
  if (!protocol) return h("p", { class: "quiet" }, "This node is not taking part yet.");
  const losses = Object.entries(protocol.losses_nats).map(([round, loss]) => [Number(round), loss]).sort((a, b) => a[0] - b[0]);
  const [first, newest] = [losses[0], losses.at(-1)];
  const note = protocol.notes.at(-1);
  const certified = protocol.certified_round;
  return h("dl", { class: "facts" },
    whole("Waits for", plain(protocol.waits_for)),
    fact("Newest base", certified === null ? "the initial adapter" : `certified in round ${count(certified)}`),
    newest ? fact("Held-out loss", `${newest[1].toFixed(3)} nats a token`,
      losses.length > 1 ? h("span", { class: "quiet" }, ` \u00B7 ${first[1].toFixed(3)} ${first[0] < 0 ? "before training" : `after round ${count(first[0])}`}`) : null) : null,
    note ? whole(`Last note, round ${count(note.round)}`, plain(note.text)) : null);
}

// --- this node ------------------------------------------------------------------------------------------------------

function coins(wei) {
  return h("span", { title: exact(wei) }, amount(wei));
}

function rewardFacts() {
  const { rewards, chain, peer, protocol } = state.status;
  const mine = (protocol?.updates ?? []).find((one) => one.peer === peer);
  const claimed = rewards?.claimed_wei ?? null;
  return [
    h("dl", { class: "facts" },
      fact("Allotted so far", rewards ? coins(rewards.allotted_wei) : "\u2013"),
      fact("Claimed", claimed === null ? "\u2013" : coins(claimed)),
      fact("For serving", ...(rewards ? [coins(rewards.served_wei), ", claimed ", rewards.claimed_served_wei === null ? "\u2013" : coins(rewards.claimed_served_wei)] : ["\u2013"])),
      fact("Contributed last", mine ? `${contributions([mine.contribution_nats * 1e9]).write(mine.contribution_nats * 1e9)} millinats a token` : "no update was merged"),
      fact("Member", chain.member === null ? "not registered" : `#${chain.member} of ${count(chain.members)}`,
        chain.committee.includes(chain.member) ? " \u00B7 in the committee" : "")),
    h("p", { class: "note" }, "Allotted by the newest certificate; paid when its round is final on the chain and claimed."),
  ];
}

function servingFacts() {
  const { serving } = state.status;
  if (!serving) return h("p", { class: "quiet" }, "This node serves nothing yet.");
  return h("dl", { class: "facts" },
    fact("Answers running here", serving.sessions_max ? `${count(serving.sessions)} of ${count(serving.sessions_max)}` : "none: it only routes"),
    fact("Replicas known", count(serving.replicas)),
    fact("Versions served", count(serving.versions.length)),
    fact("Tokens generated here", count(serving.generated_tokens)),
    fact("Replicas replaced", count(serving.replaced_replicas)));
}

// --- network --------------------------------------------------------------------------------------------------------

function networkFacts() {
  const { chain, peers, clock, account, addresses } = state.status;
  const settled = chain.settled_round === null ? "no round settled yet" : `round ${count(chain.settled_round)} settled`;
  return h("dl", { class: "facts" },
    fact("Connected to", plural(peers.length, "peer")),
    fact("Members", `${count(chain.members)} \u00B7 committee of ${count(chain.committee.length)}`),
    fact("Chain", chain.error ? mark("bad", "does not answer") : mark("good", "reachable"), ` \u00B7 ${settled}`),
    fact("Clock", clock.offset_ms === null ? "no peer has told its own yet"
      : clock.is_off ? mark("bad", "off") : `right, by ${plural(clock.num_peers, "peer")}`),
    whole("Account", h("code", {}, plain(account))),
    whole("Listens on", addresses.map((one) => h("div", {}, h("code", {}, plain(one))))));
}

function reachFacts() {
  const ways = Object.entries(state.status.reach ?? {});
  return h("dl", { class: "facts" }, ways.map(([name, way]) => fact(plain(name).replaceAll("_", " "), plain(way.found))));
}

function peerTable() {
  const { peers, protocol, peer } = state.status;
  const updates = new Map((protocol?.updates ?? []).map((one) => [one.peer, one.contribution_nats * 1e9]));
  const names = [...new Set([...peers, ...updates.keys()])].sort();
  if (!names.length) return h("div", { class: "empty" }, h("p", {}, h("strong", {}, "No peer is connected.")),
    h("p", {}, "Give this node the address of one (bootstrap in its TOML), or wait until one finds it."));
  const scale = contributions([...updates.values()]);
  return table("peer-rows", "Peers and what they contributed to the newest base", [
    { name: "Peer" }, { name: "Connection" },
    { name: "Contributed last", num: true, title: "To the newest certified base, in millinats a token" },
  ], names.map((name) => ({
    cells: [
      h("span", { class: "peer", title: plain(name) }, h("bdi", {}, tail(name, 12))),
      name === peer ? "this node" : peers.includes(name) ? mark("good", "connected") : mark("none", "none"),
      updates.has(name) ? scale.write(updates.get(name)) : "\u2013",
    ],
  })), { rowHeads: true });
}

// --- all of it ------------------------------------------------------------------------------------------------------

function render() {
  const it = state.status;
  paint("live", [state.isReachable, state.isRefused, it?.stage, canServe()], live);
  paint("banner", [state.isReachable, !it, it?.chain?.error, it?.clock], banner);
  paint("title", [it?.network, it?.peer, !it], title);
  byId("key-form").hidden = !state.isRefused;
  setReady(canServe() && !state.isRefused, problem());
  setModels(state.models);
  setPeer(it?.peer);
  if (!it) return;
  document.title = `${it.network ? plain(it.network.name) : "p2pfm"} \u00B7 node`;
  tick();
  paint("round-facts", !it.protocol ? null : [it.protocol.waits_for, it.protocol.certified_round, it.protocol.losses_nats, it.protocol.notes], roundFacts);
  paint("reward-facts", [it.rewards, it.chain, it.protocol?.updates], rewardFacts);
  paint("serving-facts", it.serving ?? null, servingFacts);
  paint("network-facts", [it.chain, it.peers, it.clock, it.addresses], networkFacts);
  paint("reach-facts", it.reach ?? null, reachFacts);
  paint("peer-table", [it.peers, it.protocol?.updates], peerTable);
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value.trim());
  byId("key").value = "";
  poll();
});
start(() => {
  state.isRefused = true;
  render();
});
document.addEventListener("visibilitychange", poll);
setInterval(poll, POLL_MS);
setInterval(tick, TICK_MS);
render();
poll();
