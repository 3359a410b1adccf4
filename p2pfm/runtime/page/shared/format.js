// Numbers, times and names as text. Wei come as decimal strings and stay exact (BigInt) until they are drawn.

const PFM = 10n ** 18n;
const THIN = "\u2009";
const MINUS = "\u2212";

// Thousands are set apart by thin spaces; a real minus sign.
function group(digits) {
  return digits.replace(/\B(?=(\d{3})+(?!\d))/g, THIN);
}

export function count(value) {
  return (value < 0 ? MINUS : "") + group(String(Math.abs(value)));
}

export function plural(value, one, many = `${one}s`) {
  return `${count(value)} ${value === 1 ? one : many}`;
}

// How to write amounts that stand below one another: unit and decimals by the largest.
export function amounts(all) {
  const largest = all.reduce((most, wei) => (BigInt(wei) > most ? BigInt(wei) : most), 0n);
  const inWei = largest > 0n && largest < 10n ** 12n;
  const whole = String(largest / PFM).length;
  const decimals = inWei ? 0 : largest >= PFM ? Math.max(0, 5 - whole) : 6;
  return {
    unit: inWei ? "wei" : "PFM",
    write: (wei) => (BigInt(wei) === 0n ? "0" : inWei ? group(String(BigInt(wei))) : toDecimals(BigInt(wei), decimals)),
    toNumber: (wei) => (inWei ? Number(BigInt(wei)) : Number(BigInt(wei)) / 1e18),
  };
}

function toDecimals(wei, decimals) {
  const step = 10n ** BigInt(18 - decimals);
  const rounded = (wei + step / 2n) / step;
  const scale = 10n ** BigInt(decimals);
  const fraction = decimals ? "." + String(rounded % scale).padStart(decimals, "0") : "";
  return group(String(rounded / scale)) + fraction;
}

// One amount by itself, in its unit; few digits.
export function amount(wei) {
  const value = amounts([wei]);
  return `${value.write(wei).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "")} ${value.unit}`;
}

// All of its digits.
export function exact(wei) {
  const value = BigInt(wei);
  const fraction = String(value % PFM).padStart(18, "0").replace(/0+$/, "");
  return `${value / PFM}${fraction ? "." + fraction : ""} PFM = ${value} wei`;
}

// Contributions that stand below one another: millinats a token, decimals by the largest.
export function contributions(all) {
  const largest = Math.max(0, ...all.map((nano) => Math.abs(nano ?? 0))) / 1e6;
  const decimals = largest > 0 ? Math.min(6, Math.max(0, 2 - Math.floor(Math.log10(largest)))) : 0;
  return {
    write: (nano) => {
      if (nano === null || nano === undefined) return "\u2013";
      const text = (Math.abs(nano) / 1e6).toFixed(decimals);
      if (nano === 0) return "0";
      const sign = Number(text) === 0 ? "" : nano < 0 ? MINUS : "+";
      const [whole, fraction] = text.split(".");
      return sign + group(whole) + (fraction ? "." + fraction : "");
    },
  };
}

export function percent(part) {
  if (part === 0) return "0";
  return part < 0.001 ? "<0.1%" : `${(part * 100).toFixed(1)}%`;
}

export function duration(seconds) {
  const units = [["day", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const [name, size] = units.find(([, size]) => seconds >= size && seconds % size === 0) ?? ["s", 1];
  const value = seconds / size;
  return name === "day" ? plural(value, "day") : `${count(value)} ${name}`;
}

// The day is told if it is another than that of `beside`; the seconds only of today.
export function clock(seconds, beside = new Date()) {
  const date = new Date(seconds * 1000);
  const today = new Date();
  const isToday = date.toDateString() === today.toDateString();
  const parts = { hour: "2-digit", minute: "2-digit", ...(isToday ? { second: "2-digit" } : {}) };
  const time = date.toLocaleTimeString("en-GB", parts);
  if (date.toDateString() === beside.toDateString()) return time;
  const year = date.getFullYear() === today.getFullYear() ? {} : { year: "numeric" };
  return `${date.toLocaleDateString("en-GB", { day: "numeric", month: "short", ...year })} ${time}`;
}

export function iso(seconds) {
  return new Date(seconds * 1000).toISOString();
}

// A stranger's string without what would disturb the line: control, bidirectional and zero-width characters.
export function plain(text) {
  return text.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\p{Cs}]/gu, "\uFFFD");
}

// The end of a peer id: all begin alike.
export function tail(text, length = 8) {
  const letters = [...plain(text)];
  return letters.length > length + 1 ? "\u2026" + letters.slice(-length).join("") : letters.join("");
}

// An address or hash by both its ends.
export function ends(text) {
  return text.length > 14 ? `${text.slice(0, 8)}\u2026${text.slice(-4)}` : text;
}
