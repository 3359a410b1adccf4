// Elements from plain values. Text becomes text nodes only: there is no way from here to HTML.

const SVG = "http://www.w3.org/2000/svg";

// An HTML element. Attributes: null and false are left out; `on` holds event handlers.
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

// An SVG element.
export function s(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") {
      for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
    } else if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const painted = new Map();

// Replace what is inside #id if `key` differs from the last time; focus and scroll stay where they were.
export function paint(id, key, build) {
  const text = JSON.stringify(key);
  if (painted.get(id) === text) return;
  painted.set(id, text);
  const place = document.getElementById(id);
  const focused = place.contains(document.activeElement) ? document.activeElement.id : "";
  const scrolls = [...place.querySelectorAll(".scroll[id]")].map((box) => [box.id, box.scrollLeft, box.scrollTop]);
  place.replaceChildren(...[build()].flat(Infinity).filter(Boolean));
  for (const [box, left, top] of scrolls) document.getElementById(box)?.scrollTo(left, top);
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

// A table in a box that scrolls by keyboard too. Columns: {name, head?, title?, num?, minor?, class?, sorted?}: minor
// ones give way on a narrow screen. Rows: {cells, attributes?}.
export function table(id, caption, columns, rows, options = {}) {
  const classes = columns.map((one) => [one.num && "num", one.minor && "minor", one.class].filter(Boolean).join(" ") || null);
  const head = columns.map((column, i) =>
    h("th", { scope: "col", class: classes[i], title: column.title, "aria-sort": column.sorted }, column.head ?? column.name),
  );
  const body = rows.map((row) =>
    h("tr", row.attributes ?? {}, row.cells.map((cell, i) =>
      h(i === 0 && options.rowHeads ? "th" : "td",
        { scope: i === 0 && options.rowHeads ? "row" : null, class: classes[i] }, cell))),
  );
  return h("div", { class: "scroll", id, role: "region", "aria-label": caption, tabindex: 0 },
    h("table", { class: options.class },
      h("caption", { class: "unseen" }, caption), h("thead", {}, h("tr", {}, head)), h("tbody", {}, body)));
}

// --- small parts ---

const GLYPHS = { good: "\u2713", wait: "\u25D4", bad: "\u2715", none: "\u25CB" };

// A state in a word, with a sign that does not need colour: good, wait, bad or none.
export function mark(kind, text) {
  return h("span", { class: `mark ${kind}` }, h("span", { "aria-hidden": "true" }, GLYPHS[kind]), ` ${text}`);
}

// One line of a list of facts (dl).
export function fact(name, ...value) {
  return h("div", {}, h("dt", {}, name), h("dd", {}, value));
}

// What stands where there is nothing yet: what is missing, and what to do.
export function empty(title, ...text) {
  return h("div", { class: "empty" }, h("p", {}, h("strong", {}, title)), h("p", {}, text));
}
