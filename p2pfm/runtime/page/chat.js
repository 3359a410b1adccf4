// One conversation: turns, and the answer that is being written. All text becomes text nodes.

import { ApiError, stream } from "./api.js";
import { empty, h, paint } from "./dom.js";
import { plain, plural, tail } from "./format.js";

const byId = (id) => document.getElementById(id);

const messages = []; // {role, content}: what the model is told of before
let abort = null; // of the answer that is being written
let isReady = false;
let own = ""; // this node's peer id
let onRefused = () => {};

function say(text) {
  byId("said").textContent = text;
}

export function start(refused) {
  onRefused = refused;
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!abort) send();
  });
  byId("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("ask").requestSubmit();
    }
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
  });
  byId("stop").addEventListener("click", stop);
  byId("new").addEventListener("click", () => {
    stop();
    messages.length = 0;
    byId("log").replaceChildren(byId("hint"));
    byId("hint").hidden = false;
    byId("message").focus();
    say("A new chat began.");
  });
}

function stop() {
  abort?.abort();
}

// What the log says before the first turn; `problem`: why nothing can be asked now.
export function setReady(ready, problem) {
  isReady = ready;
  byId("send").disabled = !isReady;
  paint("hint", [ready, problem], () => isReady
    ? empty("Ask anything.", "Whichever peer has the model answers; if it fails, another goes on at the same word.")
    : empty("No answers yet.", problem));
}

export function setPeer(peer) {
  own = peer;
}

function nameOf(replica) {
  return replica === own ? "this node" : tail(replica);
}

// The names that /v1/models lists; the choice stays while it exists.
export function setModels(names) {
  const select = byId("model");
  if (names.join("\n") === [...select.options].map((option) => option.value).join("\n")) return; // an open list stays open
  const chosen = names.includes(select.value) ? select.value : names[0];
  select.replaceChildren(...names.map((name) => h("option", { value: name, selected: name === chosen }, plain(name))));
}

function addTurn(who, name) {
  const text = h("p", { class: "text", dir: "auto" });
  const turn = h("article", { class: `turn ${who}` }, h("h3", {}, name), text);
  byId("hint").hidden = true;
  byId("log").append(turn);
  return { turn, text };
}

function follow() { // the newest line stays in sight, unless the reader has scrolled up
  const log = byId("log");
  if (log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
}

function setBusy(turn, busy) {
  turn.classList.toggle("busy", busy);
  byId("log").setAttribute("aria-busy", String(busy)); // an answer is read out once, whole
  byId("stop").hidden = !busy;
  byId("send").hidden = busy;
}

async function send() {
  const question = byId("message").value.trim();
  if (!question || !isReady) return;
  byId("message").value = "";
  const asked = addTurn("you", "You");
  asked.text.textContent = question;
  const { turn, text } = addTurn("them", "Network");
  byId("log").scrollTop = byId("log").scrollHeight;
  messages.push({ role: "user", content: question });
  abort = new AbortController();
  setBusy(turn, true);
  const answer = { content: "", last: null };
  const began = performance.now();
  try {
    await write(answer, text);
    say("The answer is complete.");
  } catch (error) {
    const isStopped = abort.signal.aborted;
    const problem = isStopped ? "Stopped." : describe(error);
    turn.append(h("p", { class: isStopped ? "by" : "failed" }, problem));
    say(problem);
    if (error.status === 401) onRefused();
    if (!isStopped && !byId("message").value) byId("message").value = question; // to ask again
  }
  setBusy(turn, false);
  abort = null;
  if (answer.content) messages.push({ role: "assistant", content: answer.content });
  else messages.pop();
  if (answer.last) turn.append(credits(answer.last, performance.now() - began));
  follow();
}

async function write(answer, text) {
  while (true) {
    try {
      return await pour(answer, text);
    } catch (error) {
      // the oldest turns give way to the newest
      if (error.code !== "context_length_exceeded" || messages.length < 3) throw error;
      messages.splice(0, 2);
      text.replaceChildren(h("span", { class: "moved" }, "The oldest turns no longer fit into the model\u2019s context and are left out."));
    }
  }
}

async function pour(answer, text) {
  const body = {
    model: byId("model").value,
    messages,
    max_tokens: Number(byId("tokens").value),
    temperature: Number(byId("temperature").value),
  };
  let previous = null; // over the same connection
  for await (const piece of stream(body, abort.signal)) {
    if (piece.isBroken) {
      if (previous) text.append(note("The connection broke; the node is asked for the rest."));
      previous = null;
      continue;
    }
    if (piece.isAnew) {
      text.append(note("This node came back with another answer, from its beginning:"));
      answer.content = "";
      continue;
    }
    if (previous && previous.replica !== piece.replica) {
      text.append(note(`Replica ${nameOf(previous.replica)} failed; ${nameOf(piece.replica)} goes on from here.`));
      say("A replica failed; another goes on.");
    }
    text.append(answer.content ? piece.text : piece.text.trimStart());
    answer.content += answer.content ? piece.text : piece.text.trimStart();
    answer.last = previous = piece;
    follow();
  }
}

function note(words) {
  return h("span", { class: "moved" }, words);
}

function describe(error) {
  if (error instanceof ApiError) return plain(error.message);
  if (error instanceof TypeError) return "The node broke off and does not answer. Is it still running? Your question is below, to ask again.";
  return plain(String(error));
}

function credits(last, ms) {
  const parts = [
    h("span", { title: plain(last.replica) }, "replica ", h("b", { class: "replica" }, nameOf(last.replica))),
    h("span", { title: plain(last.version) }, "version ", h("b", { class: "version" }, plain(last.version).slice(0, 10))),
    last.replaced ? `${plural(last.replaced, "replica")} replaced` : null,
    last.finish === "length" ? "cut at its longest" : null,
    `${(ms / 1000).toFixed(1)} s`,
  ].filter(Boolean);
  return h("p", { class: "by" }, parts.flatMap((part, i) => (i ? [" \u00B7 ", part] : [part])));
}
