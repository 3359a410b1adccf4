// The page: what is shown, what is chosen, and what comes in. All content is built from /api/networks.

import { bar, lorenz, steps } from "./charts.js";
import { empty, fact, h, mark, paint, table } from "./dom.js";
import {
  amount, amounts, clock, contributions, count, duration, ends, exact, iso, percent, plain, plural, tail,
} from "./format.js";

const RETRY_MS = 4000;

const query = new URLSearchParams(location.search);
const state = {
  networks: [],
  network: query.get("network"),
  round: query.get("round"), // null: the newest, whichever that is
  view: null,
  sort: { key: "allotted", down: true },
  isReachable: true,
};
let stream = null;
let retry = 0;

// --- what comes in --------------------------------------------------------------------------------------------------

async function get(path) {
  const response = await fetch(path, { cache: "no-cache" });
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  return response.json();
}

async function start() {
  clearTimeout(retry);
  try {
    state.networks = (await get("api/networks")).networks;
  } catch {
    return lose();
  }
  if (!state.networks.some((one) => one.id === state.network)) state.network = state.networks[0].id;
  return listen();
}

function listen() {
  stream?.close();
  stream = new EventSource(`api/networks/${state.network}/events`);
  stream.addEventListener("view", load);
  stream.addEventListener("open", () => {
    state.isReachable = true;
    render();
  });
  stream.addEventListener("error", lose);
}

function lose() {
  state.isReachable = false;
  render();
  if (stream === null || stream.readyState === EventSource.CLOSED) { // else the browser tries again by itself
    clearTimeout(retry);
    retry = setTimeout(start, RETRY_MS);
  }
}

async function load() {
  const id = state.network;
  try {
    const view = await get(`api/networks/${id}`);
    if (id !== state.network) return;
    announce(state.view, view);
    state.view = view;
    render();
  } catch {
    lose();
  }
}

function announce(before, now) {
  if (!before || before.id !== now.id) return;
  const known = new Set(before.rounds.map((round) => round.key));
  const fresh = now.rounds.filter((round) => !known.has(round.key));
  const said = fresh.map((round) => `Round ${round.round} was accepted.`);
  if (now.problem && !before.problem) said.push("The chain does not answer.");
  if (said.length) document.getElementById("said").textContent = said.join(" ");
}

// --- what is chosen -------------------------------------------------------------------------------------------------

function remember() {
  const chosen = new URLSearchParams();
  if (state.networks.length > 1) chosen.set("network", state.network);
  if (state.round) chosen.set("round", state.round);
  const text = chosen.toString();
  history.replaceState(null, "", (text ? `?${text}` : location.pathname) + location.hash);
}

function chooseNetwork(id) {
  Object.assign(state, { network: id, round: null, view: null });
  remember();
  render();
  listen();
}

function chooseRound(key) {
  const newest = newestFirst()[0];
  state.round = newest && newest.key === key ? null : key;
  remember();
  render();
}

function newestFirst() {
  return [...state.view.rounds].reverse();
}

function chosenRound() {
  const rounds = newestFirst();
  return rounds.find((round) => round.key === state.round) ?? rounds[0];
}

function onRoundKey(event) {
  const buttons = [...document.querySelectorAll("#round-list tbody button")];
  const at = buttons.indexOf(event.target);
  const next = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (at < 0 || next === undefined) return;
  event.preventDefault();
  const target = buttons[Math.max(0, Math.min(buttons.length - 1, next))];
  target.focus();
  chooseRound(target.dataset.key);
}

// --- small parts ----------------------------------------------------------------------------------------------------

// Local time; the day only where it is another than that of `beside` (seconds since 1970), or than today.
function when(seconds, beside = Date.now() / 1000) {
  return h("time", { datetime: iso(seconds), title: iso(seconds) }, clock(seconds, new Date(beside * 1000)));
}

function peerName(index, member) {
  return h("span", { class: "peer", title: member ? plain(member.peer) : null },
    h("span", { class: "index" }, `#${index}`), " ", h("bdi", {}, member ? tail(member.peer) : "unknown"));
}

function peer(index) {
  return peerName(index, state.view.members[index]);
}

// The whole text for who copies, cut at its end where it does not fit.
function copyable(id, name, text, shown = text) {
  const button = h("button", { type: "button", id: `copy-${id}`, class: "copy", "aria-label": `Copy ${name}` }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch { // not allowed here: mark it, for the keyboard
      getSelection().selectAllChildren(document.getElementById(`text-${id}`));
      button.textContent = "Marked";
    }
    document.getElementById("said").textContent = `${name}: ${button.textContent.toLowerCase()}`;
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return [h("code", { id: `text-${id}`, title: text }, shown), button];
}

// --- network --------------------------------------------------------------------------------------------------------

function pick() {
  if (state.networks.length < 2) return [];
  const select = h("select", { id: "networks", on: { change: (event) => chooseNetwork(event.target.value) } },
    state.networks.map((one) => h("option", { value: one.id, selected: one.id === state.network }, plain(one.name))));
  return [h("label", { for: "networks" }, "Network"), " ", select];
}

function live() {
  const view = state.view;
  if (!state.isReachable) return mark("bad", "no connection");
  if (!view) return mark("none", "loading");
  return view.problem ? mark("bad", view.is_known ? "stale" : "no chain") : mark("good", "live");
}

function banner() {
  const view = state.view;
  if (!state.isReachable) {
    return h("p", { class: "banner" }, h("strong", {}, "The explorer does not answer. "),
      "Is ", h("code", {}, "p2pfm explorer"), " still running? This page connects again by itself",
      view ? "; what it shows is of before." : ".");
  }
  if (!view?.problem) return [];
  const since = view.stale_since_s === null ? [] : [" What is shown is of ", when(view.stale_since_s), "."];
  return h("p", { class: "banner" }, h("strong", {}, "The chain does not answer. "),
    `${plain(view.problem)}.`.replace("..", "."), since, " It is asked again every few seconds.");
}

function network() {
  const view = state.view;
  if (!view) return h("h1", { id: "network-title" }, state.isReachable ? "Loading\u2026" : "No network");
  const title = h("h1", { id: "network-title" }, h("bdi", {}, plain(view.name)));
  const fixed = [
    fact("Contract", copyable("contract", "contract address", view.contract, ends(view.contract))),
    fact("Chain id", String(view.chain_id)),
    fact("Backbone", h("bdi", {}, plain(view.backbone))),
  ];
  if (!view.is_known) return [title, h("dl", { class: "facts" }, fixed)];
  const epochsLeft = BigInt(view.pool_per_epoch_wei) > 0n ? BigInt(view.pool_wei) / BigInt(view.pool_per_epoch_wei) : 0n;
  const seated = view.committee.length;
  return [
    title,
    h("dl", { class: "facts" },
      fixed,
      fact("Committee epoch", count(view.epoch), view.nonce ? ` \u00B7 restart ${view.nonce}` : ""),
      fact("Committee", seated ? `${plural(seated, "member")} \u00B7 ${view.quorum} must sign` : "not drawn yet"),
      fact("Members", `${count(view.members.length)} \u00B7 ${count(view.num_active)} active`),
      fact("Stakes", h("span", { title: exact(view.stakes_wei) }, amount(view.stakes_wei))),
      fact("Pool left", h("span", { title: exact(view.pool_wei) }, amount(view.pool_wei)),
        ` \u00B7 ${plural(Number(epochsLeft), "full payment")}`),
      fact("Pays", `${amount(view.pool_per_epoch_wei)} every ${plural(view.rounds_per_epoch, "round")}`),
      fact("Challenge window", duration(view.challenge_window_s))),
  ];
}

// --- rounds ---------------------------------------------------------------------------------------------------------

function standing(round) {
  if (round.standing === "final") return mark("good", "final");
  if (round.standing === "void") return mark("bad", "void");
  return h("span", {}, mark("wait", round.is_held ? "held" : "open"), h("span", { class: "until" }, " until ", when(round.contestable_until_s, round.accepted_s)));
}

function roundList() {
  const rounds = newestFirst();
  const chosen = chosenRound();
  if (!rounds.length) return [];
  const rewards = amounts(rounds.map((round) => round.reward_wei));
  const sums = contributions(rounds.map((round) => round.contribution));
  const rows = rounds.map((round) => {
    const isChosen = round.key === chosen.key;
    return {
      attributes: { class: [isChosen && "chosen", round.standing === "void" && "void"].filter(Boolean).join(" ") || null },
      cells: [
        h("button", {
          type: "button", id: `round-${round.key}`, "data-key": round.key, class: "choose",
          "aria-label": `Round ${round.round}${round.standing === "void" ? ", void" : ""}`,
          "aria-current": isChosen ? "true" : null, tabindex: isChosen ? 0 : -1,
          on: { click: () => chooseRound(round.key), keydown: onRoundKey },
        }, String(round.round)),
        when(round.accepted_s),
        h("span", { title: exact(round.reward_wei) }, BigInt(round.reward_wei) ? rewards.write(round.reward_wei) : "\u2013"),
        sums.write(round.contribution),
        standing(round),
      ],
    };
  });
  const list = table("round-rows", "Rounds, newest first", [
    { name: "Round", class: "pickcell" }, { name: "Accepted" },
    { name: `Reward, ${rewards.unit}`, num: true },
    { name: "Contributed", num: true, minor: true, title: "Sum of the positive contributions over the payment period so far, millinats a token" },
    { name: "State" },
  ], rows, { rowHeads: true, class: "rounds" });
  const more = state.view.num_rounds > rounds.length
    ? h("p", { class: "note" }, `The newest ${count(rounds.length)} of ${count(state.view.num_rounds)}.`) : null;
  return [list, h("p", { class: "note" }, "Arrow keys choose a round."), more];
}

function noRounds() {
  const view = state.view;
  if (!view.is_known) {
    return empty("Nothing is known of this network yet.", "Its chain has not answered. Check that it runs, and the ",
      h("code", {}, "rpc"), " of the TOML that this explorer was started with.");
  }
  if (!view.members.length) {
    return empty("Nobody has joined yet.", "A peer joins by itself when it starts: ",
      h("code", {}, "p2pfm node run --config FILE"), ". It appears here when the chain has its stake.");
  }
  return empty("No round yet.", "The first appears here by itself when a committee has certified it",
    view.committee.length ? "" : " (no committee is drawn yet)", ". If none comes: ",
    h("code", {}, "p2pfm node status"), " tells what a peer waits for.");
}

function round() {
  const view = state.view;
  if (!view) return [];
  const it = chosenRound();
  if (!it) return [h("h3", { id: "round-title", class: "unseen" }, "No round"), noRounds()];
  const signed = it.committee.length - it.absent.length;
  const quorum = Math.floor((2 * it.committee.length) / 3) + 1;
  return [
    h("h3", { id: "round-title" }, `Round ${it.round}`, " ", standing(it)),
    h("p", { class: "under" }, "Accepted ", when(it.accepted_s), ` in block ${count(it.block)}`,
      it.standing === "void" ? ", and voided by a contest: it pays nobody." : "",
      it.is_held ? ". A demand for a leaf holds it." : ""),
    evidence(it),
    it.shares.length ? shares(it) : null,
    h("h4", {}, `Certificate: ${signed} of ${it.committee.length} signed, ${quorum} needed`),
    signers(it),
    h("dl", { class: "digests" },
      [["Root", it.root], ["Data", it.data_digest], ["Base", it.base], ...(it.transaction ? [["Transaction", it.transaction]] : [])]
        .map(([name, text]) => fact(name, copyable(`${name.toLowerCase()}`, name.toLowerCase(), text))),
      fact("Signed for", `committee epoch ${it.epoch}, restart ${it.nonce}, ${plural(it.num_leaves, "leaf", "leaves")}`)),
  ];
}

function evidence(it) {
  if (it.evidence === "verified") {
    return h("p", {}, mark("good", "Recomputed here"), ": medians, weights, rewards and root follow from the revealed scores.");
  }
  if (it.evidence === "matched") {
    return h("p", {}, mark("wait", "Matches the chain"),
      ": these rewards are those of the root. They cannot be recomputed while the data of the round before is missing.");
  }
  if (it.evidence === "wrong") {
    return h("div", { class: "wrong" }, h("p", {}, mark("bad", "Does not recompute"),
      it.shares.length ? ": the root is of these rewards, but they are not what the rules give." : ": what its committee signed is not what its root is of."),
    h("ul", {}, it.findings.map((finding) => h("li", {}, plain(finding)))));
  }
  return h("div", { class: "empty" },
    h("p", {}, h("strong", {}, "Nobody serves this round\u2019s data."),
      " The chain alone tells the sums and the certificate; who got what stands in the data. ", plain(state.view.evidence_problem)),
    h("p", {}, "It appears here when a node that you named has it. If nobody ever serves it: ",
      h("code", {}, `p2pfm rewards challenge --round ${it.round} --demand PEER`),
      " demands a peer\u2019s leaf on chain, with a bond, while the round is open; shown by nobody, it voids the round."));
}

function shares(it) {
  const rewards = amounts(it.shares.map((share) => share.reward_wei));
  const measured = contributions(it.shares.map((share) => share.contribution));
  const totals = contributions(it.shares.map((share) => share.total));
  const values = it.shares.map((share) => share.contribution ?? 0);
  const low = Math.min(0, ...values), high = Math.max(0, ...values);
  const most = Math.max(...it.shares.map((share) => rewards.toNumber(share.reward_wei)));
  const pays = most > 0;
  const order = [...it.shares].sort((a, b) =>
    rewards.toNumber(b.reward_wei) - rewards.toNumber(a.reward_wei) || (b.contribution ?? -Infinity) - (a.contribution ?? -Infinity) || a.member - b.member);
  const rows = order.map((share) => ({
    cells: [
      peer(share.member),
      measured.write(share.contribution),
      share.contribution === null ? h("span", { class: "quiet" }, "no update") : bar(share.contribution, low, high, "contribution"),
      share.contribution === null ? "\u2013" : percent(share.weight / 1e9),
      totals.write(share.total),
      h("span", { title: exact(share.reward_wei) }, rewards.write(share.reward_wei)),
      pays ? bar(rewards.toNumber(share.reward_wei), 0, most, "reward") : "",
    ],
  }));
  const total = BigInt(it.reward_wei);
  const chart = table("share-rows", `Contributions and rewards of round ${it.round} by peer`, [
    { name: "Peer" },
    { name: "Contribution", num: true, title: "Of this round\u2019s update, millinats a token: how much it lowers the held-out loss" },
    { name: "Bar chart of contributions", class: "barcell", head: h("span", { class: "axis" }, "mnat/token") },
    { name: "Weight", num: true, minor: true, title: "Of this update in the merge" },
    { name: "Period", num: true, minor: true, title: "Contributions since the last payment, this round's included, millinats a token: what the reward follows" },
    { name: "Reward", num: true },
    { name: "Bar chart of rewards", class: "barcell", head: h("span", { class: "axis" }, rewards.unit) },
  ], rows, { rowHeads: true, class: "shares" });
  return [chart, h("p", { class: "note" }, total
    ? "Rewards follow the contributions of the whole period, not of this round alone. Negative sums are paid nothing."
    : `This round pays nobody: contributions add up until the payment, every ${plural(state.view.rounds_per_epoch, "round")}.`)];
}

function signers(it) {
  if (!it.committee.length) return h("p", { class: "quiet" }, "The chain does not tell this committee.");
  const absent = new Set(it.absent);
  return h("ol", { class: "signers", "aria-label": "Committee in the order of its draw" }, it.committee.map((index) =>
    h("li", { class: absent.has(index) ? "gone" : null }, peer(index), " ",
      absent.has(index) ? mark("bad", "absent") : mark("good", "signed"),
      index === it.proposer ? h("span", { class: "quiet" }, " proposed") : null)));
}

// --- charts ---------------------------------------------------------------------------------------------------------

const LORENZ_PX = 290; // as in style.css

function chartWidth(part) {
  const room = document.getElementById("charts").clientWidth;
  if (room < 760) return part === "steps" ? room : Math.min(room, LORENZ_PX);
  return part === "steps" ? room - LORENZ_PX - 40 : LORENZ_PX;
}

function charts() {
  const view = state.view;
  const told = view ? view.rounds.filter((round) => round.standing !== "void" && round.shares.length) : [];
  if (!told.length || !view.distribution) {
    return empty("No reward is known yet.", view?.rounds.length
      ? `Rewards are divided every ${plural(view.rounds_per_epoch, "round")}; the charts need a paying round whose data somebody serves.`
      : "Charts appear with the first round that pays.");
  }
  const all = told.flatMap((round) => round.shares.map((share) => share.cumulative_wei));
  const { unit, toNumber, write } = amounts(all);
  const series = view.members.map((member) => {
    const own = told.map((round) => round.shares[member.index]);
    const begin = own[0] ? toNumber(String(BigInt(own[0].cumulative_wei) - BigInt(own[0].reward_wei))) : null;
    const values = [begin, ...own.map((share) => (share ? toNumber(share.cumulative_wei) : null))];
    return { label: `#${member.index} ${tail(member.peer, 6)}`, values, last: values.at(-1) ?? 0,
      told: `${write(told.at(-1).shares[member.index]?.cumulative_wei ?? "0")} ${unit}` };
  }).filter((one) => one.last > 0).sort((a, b) => b.last - a.last);
  const gini = view.distribution.gini.toFixed(2);
  const top = series[0];
  const rest = series.length > 6 ? ` The ${count(series.length - 6)} others are drawn in grey.` : "";
  return [
    h("figure", {},
      h("figcaption", {}, h("strong", {}, `Allotted so far, ${unit}`), ` by peer and round.${rest}`),
      steps(chartWidth("steps"), series, ["", ...told.map((round) => String(round.round))], {
        write: (value) => Number(value.toPrecision(3)).toLocaleString("en-GB"),
        xName: "round",
        label: `Line chart of rewards allotted so far by peer, rounds ${told[0].round} to ${told.at(-1).round}; most has ${top.label} with ${top.told}.`,
      })),
    h("figure", {},
      h("figcaption", {}, h("strong", {}, `Gini ${gini}`), `, ${plural(view.members.length, "peer")}; dotted: all alike`),
      lorenz(chartWidth("lorenz"), view.distribution.lorenz,
        `Lorenz curve of rewards after round ${view.distribution.round}: Gini coefficient ${gini}; the best paid peer has ${percent(1 - view.distribution.lorenz.at(-2))} of all.`)),
  ];
}

// --- peers, claims, contests ----------------------------------------------------------------------------------------

const STATES = { active: ["good", "active"], leaving: ["wait", "leaving"], left: ["none", "left"], slashed: ["bad", "slashed"] };

function unclaimed(member) {
  const left = BigInt(member.allotted_wei ?? 0) - BigInt(member.claimed_wei);
  return member.allotted_wei === null ? null : String(left > 0n ? left : 0n);
}

const PEER_COLUMNS = [
  { key: "index", name: "Peer", of: (member) => member.index },
  { key: "state", name: "State", of: (member) => member.state },
  { key: "stake", name: "Stake", num: true, of: (member) => BigInt(member.stake_wei) },
  { key: "contribution", name: "Contribution", num: true, of: (member) => member.contribution,
    title: "Sum over the rounds shown, millinats a token" },
  { key: "updates", name: "Updates", num: true, of: (member) => member.num_updates, title: "Merged, in the rounds shown" },
  { key: "allotted", name: "Allotted", num: true, of: (member) => BigInt(member.allotted_wei ?? -1) },
  { key: "claimed", name: "Claimed", num: true, of: (member) => BigInt(member.claimed_wei) },
  { key: "unclaimed", name: "Unclaimed", num: true, of: (member) => BigInt(unclaimed(member) ?? -1) },
];

function sortBy(key) {
  state.sort = { key, down: state.sort.key === key ? !state.sort.down : key !== "index" && key !== "state" };
  render();
}

function peers() {
  const view = state.view;
  if (!view?.members.length) return empty("Nobody has joined yet.", "Members appear here when the chain has their stake.");
  const { key, down } = state.sort;
  const column = PEER_COLUMNS.find((one) => one.key === key);
  const order = [...view.members].sort((a, b) => {
    const [x, y] = [column.of(a), column.of(b)];
    return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1) || a.index - b.index;
  });
  const stakes = amounts(view.members.map((member) => member.stake_wei));
  const paid = amounts(view.members.flatMap((member) => [member.allotted_wei ?? "0", member.claimed_wei]));
  const measured = contributions(view.members.map((member) => member.contribution));
  const money = (wei) => (wei === null ? "\u2013" : h("span", { title: exact(wei) }, paid.write(wei)));
  const units = { stake: stakes.unit, contribution: "mnat/token", allotted: paid.unit, claimed: paid.unit, unclaimed: paid.unit };
  const arrow = (one) => (one.key === key ? h("span", { class: "arrow", "aria-hidden": "true" }, down ? " \u2193 " : " \u2191 ") : null);
  const columns = PEER_COLUMNS.map((one) => ({
    ...one,
    sorted: one.key === key ? (down ? "descending" : "ascending") : "none",
    head: h("button", { type: "button", id: `sort-${one.key}`, class: "sort", on: { click: () => sortBy(one.key) } },
      h("span", {}, one.num ? [arrow(one), one.name] : [one.name, arrow(one)]),
      units[one.key] ? h("span", { class: "unit" }, units[one.key]) : null),
  }));
  const rows = order.map((member) => ({
    attributes: { class: member.state === "slashed" || member.state === "left" ? "void" : null },
    cells: [
      peerName(member.index, member),
      h("span", {}, mark(...STATES[member.state]), member.is_seated ? h("span", { class: "quiet" }, " \u00B7 seated") : null),
      h("span", { title: exact(member.stake_wei) }, stakes.write(member.stake_wei)),
      member.num_updates ? measured.write(member.contribution) : "\u2013",
      count(member.num_updates), money(member.allotted_wei), money(member.claimed_wei), money(unclaimed(member)),
    ],
  }));
  return table("peer-rows", "Peers; a column\u2019s button sorts by it", columns, rows, { rowHeads: true, class: "peers" });
}

function claims() {
  const view = state.view;
  if (!view?.claims.length) {
    return empty("No claim yet.", "Peers claim when a paying round is final; ", h("code", {}, "p2pfm rewards claim"), " does it by hand.");
  }
  const paid = amounts(view.claims.map((claim) => claim.amount_wei));
  return [
    table("claim-rows", "Claims, newest first", [
      { name: "Time" }, { name: "Peer" }, { name: "Round", num: true, title: "Against whose root" }, { name: `Amount, ${paid.unit}`, num: true },
    ], view.claims.map((claim) => ({
      attributes: { title: claim.transaction || null },
      cells: [when(claim.time_s), peer(claim.member), String(claim.round), h("span", { title: exact(claim.amount_wei) }, paid.write(claim.amount_wei))],
    }))),
    view.num_claims > view.claims.length
      ? h("p", { class: "note" }, `The newest ${count(view.claims.length)} of ${count(view.num_claims)}.`) : null,
  ];
}

const FAULTS = { reward: "wrong reward", transition: "wrong sum", leaf: "leaf withheld", equivocation: "two statements signed" };

function contestStep(step) {
  if (step.kind === "demand") {
    return [mark("wait", "leaf demanded"), step.is_open ? [", to be shown by ", when(step.until_s)] : ""];
  }
  if (step.kind === "shown") return mark("good", "leaf shown");
  if (step.kind === "unanswered") return mark("none", "demand closed, bond returned");
  if (step.kind === "fault") return [mark("bad", "proven"), `: ${FAULTS[step.fault] ?? plain(step.fault)}`];
  if (step.kind === "void") return [mark("bad", "voided"), ", with all after it"];
  if (step.kind === "slashed") return mark("bad", "slashed");
  return [mark("none", "restarted"), ": outstanding signatures are dead"];
}

function contests() {
  const view = state.view;
  if (!view?.contests.length) {
    return empty("No contest.", "Nobody demanded a leaf, proved a fault or was slashed. ",
      h("code", {}, "p2pfm rewards verify"), " looks for one.");
  }
  const money = { fault: "bounty ", slashed: "lost " };
  return [
    table("contest-rows", "Contests, newest first", [
      { name: "Time" }, { name: "What", class: "wide" }, { name: "Round", num: true }, { name: "Peer" }, { name: "Amount", num: true }, { name: "By" },
    ], view.contests.map((step) => ({
      attributes: { title: step.transaction || null },
      cells: [
        when(step.time_s), h("span", {}, contestStep(step)), step.round === null ? "" : String(step.round),
        step.member === null ? "" : peer(step.member),
        step.amount_wei === null ? "" : h("span", { title: exact(step.amount_wei) }, (money[step.kind] ?? "") + amount(step.amount_wei)),
        step.account ? h("code", { title: step.account }, ends(step.account)) : "",
      ],
    }))),
    view.num_contests > view.contests.length
      ? h("p", { class: "note" }, `The newest ${count(view.contests.length)} of ${count(view.num_contests)}.`) : null,
  ];
}

// --- all of it ------------------------------------------------------------------------------------------------------

function render() {
  const view = state.view;
  const today = new Date().toDateString();
  paint("pick", [state.networks, state.network], pick);
  paint("live", [state.isReachable, view && [view.problem, view.is_known]], live);
  paint("banner", [state.isReachable, view && [view.problem, view.stale_since_s]], banner);
  paint("network", [state.isReachable, { ...view, rounds: 0, claims: 0, contests: 0 }], network);
  paint("round-list", [view && [view.rounds.map((one) => ({ ...one, shares: 0 })), view.num_rounds], state.round, today], () => (view ? roundList() : []));
  paint("round", [view && [chosenRound(), view.members, view.evidence_problem, view.is_known], today], round);
  paint("charts", [view && [view.rounds, view.members, view.distribution], document.getElementById("charts").clientWidth], charts);
  paint("peer-table", [view?.members, state.sort], peers);
  paint("claim-table", [view?.claims, view?.members, today], claims);
  paint("contest-table", [view?.contests, view?.members, today], contests);
  document.body.classList.toggle("no-rounds", !view?.rounds.length);
  document.title = view ? `${plain(view.name)} \u00B7 p2pfm explorer` : "p2pfm explorer";
}

// A browser opens six connections to a host: a page that nobody sees gives its own back.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) stream?.close();
  else start();
});
new ResizeObserver(render).observe(document.getElementById("charts"));
render();
start();
