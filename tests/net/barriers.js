// What keeps somebody from using or reading the page: names, structure, contrast, room. Returns the findings.

const found = [];
const isSeen = (e) => e.checkVisibility({ visibilityProperty: true }) && e.getClientRects().length && !e.closest(".unseen");
const nameOf = (e) => (e.getAttribute("aria-label") || (e.getAttribute("aria-labelledby") || "").split(" ").filter(Boolean)
  .map((id) => document.getElementById(id)?.textContent ?? "").join(" ") || (e.labels && [...e.labels].map((l) => l.textContent).join(" "))
  || e.textContent || e.title || "").trim();
const tell = (e, what) => found.push(`${what}: ${e.outerHTML.slice(0, 120)}`);

// names and structure
for (const e of document.querySelectorAll("a, button, select, input, [tabindex='0'], [role=img], [role=region], nav, section, figure svg")) {
  if (e.tagName !== "FIGURE" && !nameOf(e)) tell(e, "no name");
}
for (const e of document.querySelectorAll("table")) if (!e.caption?.textContent.trim()) tell(e, "table without caption");
for (const e of document.querySelectorAll("th")) if (!e.scope) tell(e, "heading cell without scope");
for (const e of document.querySelectorAll("thead th")) if (!e.textContent.trim()) tell(e, "empty heading cell");
for (const e of document.querySelectorAll("img:not([alt])")) tell(e, "image without text");
for (const e of document.querySelectorAll("svg:not([role=img]):not([aria-hidden=true])")) tell(e, "drawing that is neither named nor hidden");
for (const e of document.querySelectorAll("[tabindex]")) if (e.tabIndex > 0) tell(e, "tabindex over 0");
const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
for (const id of new Set(ids)) if (ids.filter((one) => one === id).length > 1) found.push(`id ${id} stands twice`);
for (const e of document.querySelectorAll("[aria-labelledby]")) {
  if (!document.getElementById(e.getAttribute("aria-labelledby"))) tell(e, "named by what is not there");
}
if (!document.documentElement.lang) found.push("no language");
if (document.querySelectorAll("h1").length !== 1) found.push("not one h1");
if (document.querySelectorAll("main").length !== 1) found.push("not one main");
let level = 0;
for (const e of document.querySelectorAll("h1, h2, h3, h4")) {
  if (Number(e.tagName[1]) > level + 1) tell(e, "heading skips a level");
  level = Number(e.tagName[1]);
}

// contrast of every text that is seen, and room for it
const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
const parse = (colour) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const light = (rgb) => {
  const [r, g, b] = rgb.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const groundOf = (e) => {
  for (; e; e = e.parentElement) {
    const colour = parse(getComputedStyle(e).backgroundColor);
    if (colour[3] === 255) return colour;
  }
  return [255, 255, 255, 255];
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let num = 0;
while (walker.nextNode()) {
  const e = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || !isSeen(e) || e.closest("title, script, noscript, .skip")) continue;
  const style = getComputedStyle(e);
  const [a, b] = [light(parse(e.namespaceURI.endsWith("svg") ? style.fill : style.color).slice(0, 3)), light(groundOf(e).slice(0, 3))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) tell(e, `contrast ${ratio.toFixed(2)}`);
  if (parseFloat(style.fontSize) < 11) tell(e, `text of ${style.fontSize}`);
  num += 1;
}
if (num < 10) found.push(`only ${num} texts were looked at`);
if (document.documentElement.scrollWidth > innerWidth) found.push(`the page is ${document.documentElement.scrollWidth} px wide`);
return found;
