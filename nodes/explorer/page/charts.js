// Inline SVG, drawn to the width at hand. Every chart has a name in words; numbers stand in the tables beside them.

import { s } from "./dom.js";

const SERIES_MAX = 6;
const LABEL_PX = 14;

// A bar from zero to `value` on a scale from `low` (at most 0) to `high`; fills its cell.
export function bar(value, low, high, kind) {
  const span = high - low || 1;
  const zero = (-low / span) * 100;
  const width = (Math.abs(value) / span) * 100;
  return s("svg", { class: `bar ${kind}`, width: "100%", height: 10, "aria-hidden": "true", focusable: "false" },
    s("rect", {
      x: `${value < 0 ? zero - width : zero}%`, y: 1, height: 8, width: `${width}%`, class: value < 0 ? "minus" : "plus",
    }),
    s("line", { x1: `${zero}%`, x2: `${zero}%`, y1: 0, y2: 10, class: "zero" }));
}

// Round steps for an axis of 0 to `high`: 1, 2 or 5 times a power of ten.
export function ticks(high, about = 4) {
  if (!(high > 0)) return [0];
  const raw = high / about;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= raw);
  const marks = [];
  for (let i = 0; i * step <= high * 1.0001; i += 1) marks.push(Number((i * step).toPrecision(12)));
  return marks;
}

// Lines that rise in steps: series [{label, told, values: [number|null]}], highest first; names: one a value.
export function steps(width, series, names, options) {
  const height = 260, left = 52, right = width < 480 ? 84 : 112, top = 12, bottom = 34;
  const high = Math.max(...series.flatMap((one) => one.values.map((value) => value ?? 0)), 0);
  const marks = ticks(high);
  const ceiling = Math.max(high, marks.at(-1)) || 1;
  const last = Math.max(1, names.length - 1);
  const x = (i) => left + ((width - left - right) * i) / last;
  const y = (value) => height - bottom - ((height - top - bottom) * value) / ceiling;
  const grid = marks.map((mark) => [
    s("line", { class: "grid", x1: left, x2: width - right, y1: y(mark), y2: y(mark) }),
    s("text", { class: "tick end", x: left - 8, y: y(mark) + 4 }, options.write(mark)),
  ]);
  const every = Math.ceil((names.length * 34) / Math.max(1, width - left - right));
  const axis = names.map((name, i) =>
    (names.length - 1 - i) % every === 0
      ? s("text", { class: "tick middle", x: x(i), y: height - bottom + 16 }, name) : null);
  const lines = series.map((one, rank) => ({ one, rank, ...path(one.values, x, y) })).filter((line) => line.d);
  const labelled = lines.slice(0, SERIES_MAX);
  place(labelled, top + 4, height - bottom);
  return s("svg", { class: "chart", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": options.label },
    grid, axis,
    s("text", { class: "tick middle", x: left + (width - left - right) / 2, y: height - 4 }, options.xName),
    [...lines].reverse().map(({ one, rank, d, end }) => s("g", { class: rank < SERIES_MAX ? `series c${rank}` : "series other" },
      s("path", { d }, s("title", {}, `${one.label}: ${one.told}`)), s("circle", { cx: end[0], cy: end[1], r: 2.5 }))),
    labelled.map(({ one, rank, end, labelY }) => s("g", { class: `series c${rank}` },
      s("path", { class: "leader", d: `M${end[0] + 4} ${end[1]}L${width - right + 12} ${labelY}` }),
      s("text", { class: "name", x: width - right + 16, y: labelY + 4 }, one.label))));
}

function path(values, x, y) {
  let d = "", end = null;
  values.forEach((value, i) => {
    if (value === null) return;
    d += end ? `H${x(i).toFixed(1)}V${y(value).toFixed(1)}` : `M${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
    end = [x(i), y(value)];
  });
  return { d, end };
}

// Labels in the order of their lines' ends, at least a line apart, none outside.
function place(lines, top, bottom) {
  const order = [...lines].sort((a, b) => a.end[1] - b.end[1] || a.rank - b.rank);
  order.forEach((line, i) => {
    line.labelY = Math.max(line.end[1], i ? order[i - 1].labelY + LABEL_PX : top);
  });
  order.reverse().forEach((line, i) => {
    line.labelY = Math.min(line.labelY, i ? order[i - 1].labelY - LABEL_PX : bottom);
  });
}

// The Lorenz curve: shares [0..1] of the k poorest together.
export function lorenz(width, shares, label) {
  const height = 260, left = 44, right = 12, top = 12, bottom = 34;
  const size = Math.min(width - left - right, height - top - bottom);
  const x = (part) => left + size * part;
  const y = (part) => height - bottom - size * part;
  const points = shares.map((share, k) => `${x(k / (shares.length - 1)).toFixed(1)} ${y(share).toFixed(1)}`);
  const total = left + size + right;
  return s("svg", { class: "chart", width: total, height, viewBox: `0 0 ${total} ${height}`, role: "img", "aria-label": label },
    [0, 0.5, 1].map((mark) => [
      s("line", { class: "grid", x1: x(0), x2: x(1), y1: y(mark), y2: y(mark) }),
      s("text", { class: "tick end", x: x(0) - 8, y: y(mark) + 4 }, `${mark * 100}%`),
      s("text", { class: mark === 1 ? "tick end" : mark ? "tick middle" : "tick", x: x(mark), y: y(0) + 16 }, `${mark * 100}%`),
    ]),
    s("path", { class: "gap", d: `M${points.join("L")}Z` }),
    s("path", { class: "equal", d: `M${x(0)} ${y(0)}L${x(1)} ${y(1)}` }),
    s("path", { class: "curve", d: `M${points.join("L")}` }),
    s("text", { class: "tick middle", x: x(0.5), y: height - 4 }, "share of peers, lowest paid first"));
}
