// The node's API as this page uses it: JSON, and an answer as it streams. Knows nothing of what is shown.

const KEY = "p2pfm-api-key"; // in sessionStorage: of this tab, until it is closed
const RESUMES_MAX = 5; // in a row, without a new character
const PAUSE_MS = 400;

export class ApiError extends Error {
  constructor(status, message, code) {
    super(message);
    Object.assign(this, { status, code });
  }
}

export function setKey(text) {
  if (text) sessionStorage.setItem(KEY, text);
  else sessionStorage.removeItem(KEY);
}

async function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  const error = told?.error ?? {};
  throw new ApiError(response.status, String(error.message ?? `${path}: HTTP ${response.status}`), error.code);
}

export async function get(path) {
  return (await ask(path)).json();
}

// The same adapter version whatever is certified meanwhile; a private one has no name elsewhere.
function pin(model, version) {
  return model.endsWith("+private") ? model : `${model.split("@")[0]}@${version.slice(0, 16)}`;
}

async function* readEvents(response) {
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  let rest = "";
  while (true) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
  }
}

// Pieces of an answer: {text, replica, version, replaced}; {isBroken: true} where the connection broke and is tried
// again; {isAnew: true} where text shown so far is void. The same question with the same seed and version gives the same
// text, so after a break what was shown already is left out.
export async function* stream(body, signal) {
  const seed = crypto.getRandomValues(new Uint32Array(1))[0];
  let shown = "";
  let version = "";
  let tries = 0;
  while (true) {
    try {
      let seen = "";
      const model = version ? pin(body.model, version) : body.model;
      const response = await ask("v1/chat/completions", {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ ...body, model, seed, stream: true }),
        signal,
      });
      for await (const data of readEvents(response)) {
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(0, String(event.error.message), event.error.code);
        version = event.p2pfm.version;
        seen += event.choices.map((choice) => choice.delta.content ?? "").join("");
        const common = Math.min(seen.length, shown.length);
        if (seen.slice(0, common) !== shown.slice(0, common)) {
          shown = "";
          yield { isAnew: true };
        }
        const text = seen.slice(shown.length);
        if (text) tries = 0;
        shown += text;
        yield { text, ...event.p2pfm, finish: event.choices[0]?.finish_reason ?? "" };
      }
      throw new TypeError("the connection closed before the answer's end");
    } catch (error) {
      const isPassing = error instanceof TypeError; // what fetch and its streams call a broken connection
      tries += 1;
      if (signal.aborted || !isPassing || !shown || tries > RESUMES_MAX) throw error;
      yield { isBroken: true };
      await new Promise((done) => setTimeout(done, PAUSE_MS * tries));
    }
  }
}
