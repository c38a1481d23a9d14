// One pixel through time: looks by their state and the composites, as SVG and as a table.

const DAY = 864e5;
export const STATES = {
  clear: "clear", cloud: "cloud", shadow: "cloud shadow", changed: "unlike the other dates", rejected: "whole scene rejected", unread: "could not be read",
};
const PAIRS = { ndvi: ["nir", "red"], ndwi: ["green", "nir"], nbr: ["nir", "swir22"] };

export const quantities = (store) => [...Object.keys(store.indices), ...store.bands];
export const nameOf = (quantity) => (PAIRS[quantity] ? quantity.toUpperCase() : quantity);

export function valueOf(values, quantity) {
  const pair = PAIRS[quantity];
  if (!pair) return values[quantity] ?? null;
  const [a, b] = pair.map((band) => values[band]);
  return a == null || b == null || a + b <= 0.001 ? null : Math.max(-1, Math.min(1, (a - b) / (a + b)));
}

// Shapes tell the states apart without colour.
function shape(state, x, y, r = 4.5) {
  const paint = `fill="none" stroke="var(--${state})" stroke-width="1.8"`;
  const path = (d, more = paint) => `<path d="${d}" ${more}/>`;
  switch (state) {
    case "clear": return `<circle cx="${x}" cy="${y}" r="${r}" fill="var(--clear)"/>`;
    case "cloud": return `<circle cx="${x}" cy="${y}" r="${r - 0.5}" ${paint}/>`;
    case "shadow": return path(`M${x - r} ${y - r * 0.8}h${2 * r}l${-r} ${1.8 * r}z`);
    case "changed": return path(`M${x} ${y - r - 1}l${r + 1} ${r + 1}l${-r - 1} ${r + 1}l${-r - 1} ${-r - 1}z`);
    case "composite": return path(`M${x} ${y - r - 3}l${r + 3} ${r + 3}l${-r - 3} ${r + 3}l${-r - 3} ${-r - 3}z`, `fill="var(--composite)" stroke="var(--paper)" stroke-width="1.5"`);
    default: return path(`M${x - r * 0.8} ${y - r * 0.8}l${1.6 * r} ${1.6 * r}m0 ${-1.6 * r}l${-1.6 * r} ${1.6 * r}`);
  }
}

const swatch = (state) => `<svg viewBox="0 0 14 14" aria-hidden="true">${shape(state, 7, 7, state === "composite" ? 3 : 4.5)}</svg>`;

function steps(low, high, count) {
  const rough = (high - low) / count, unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * unit).find((n) => n >= rough);
  const out = [];
  for (let v = Math.ceil(low / step) * step; v <= high + 1e-9; v += step) out.push(v);
  return { ticks: out, digits: Math.min(4, (String(+step.toPrecision(3)).split(".")[1] ?? "").length) };
}

function months(from, to) {
  const out = [], first = new Date(from);
  const span = (to - from) / DAY;
  const by = span > 900 ? 6 : span > 400 ? 3 : 1;
  const day = new Date(Date.UTC(first.getUTCFullYear(), first.getUTCMonth(), 1));
  while (+day <= to) {
    if (+day >= from && day.getUTCMonth() % by === 0) out.push(+day);
    day.setUTCMonth(day.getUTCMonth() + 1);
  }
  if (out.length < 2) for (let t = from; t <= to; t += Math.max(1, Math.round(span / 4)) * DAY) out.push(t);
  return [...new Set(out)].sort((a, b) => a - b);
}

const label = (time, span) => new Date(time).toLocaleDateString("en-GB", span > 200 * DAY ? { month: "short", year: "2-digit", timeZone: "UTC" } : { day: "numeric", month: "short", timeZone: "UTC" });
const escape = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

// looks: [{date, state, values, share}] or null while they are read; composites: [{target, values, sigma, name}].
export function drawChart(element, { looks, composites, quantity, chosen }) {
  const W = 430, H = 190, L = 40, R = 12, T = 12, B = 24;
  const seen = (looks ?? []).map((look) => ({ ...look, time: Date.parse(look.date), value: valueOf(look.values, quantity) }));
  const made = composites.map((c) => ({ ...c, time: Date.parse(c.target), value: valueOf(c.values, quantity) }));
  const times = [...seen, ...made].map((p) => p.time);
  if (!times.length) return void (element.innerHTML = "");
  let from = Math.min(...times), to = Math.max(...times);
  const pad = Math.max((to - from) * 0.04, 2 * DAY);
  from -= pad;
  to += pad;
  const counted = [...seen.filter((p) => p.state === "clear"), ...made].map((p) => p.value).filter((v) => v !== null);
  const all = counted.length ? counted : seen.map((p) => p.value).filter((v) => v !== null);
  let low = Math.min(...all, PAIRS[quantity] ? 1 : 0.02), high = Math.max(...all, PAIRS[quantity] ? -1 : 0.06);
  const room = Math.max((high - low) * 0.25, 0.03);
  low -= room;
  high += room;
  const px = (t) => +(L + ((t - from) / (to - from)) * (W - L - R)).toFixed(1);
  const py = (v) => +(T + (1 - (v - low) / (high - low)) * (H - T - B)).toFixed(1);
  const { ticks, digits } = steps(low, high, 5);
  const parts = ticks.map((v) => `<path d="M${L} ${py(v)}H${W - R}" stroke="var(--line)"/><text x="${L - 6}" y="${py(v) + 4}" text-anchor="end">${v.toFixed(digits)}</text>`);
  parts.push(...months(from, to).map((t) => `<path d="M${px(t)} ${H - B}v4" stroke="var(--faint)"/><text x="${px(t)}" y="${H - 7}" text-anchor="middle">${label(t, to - from)}</text>`));
  const heaviest = Math.max(...seen.map((p) => p.share ?? 0));
  for (const p of seen) {
    if (p.share && heaviest) parts.push(`<rect x="${px(p.time) - 3}" width="6" y="${H - B - (p.share / heaviest) * 44}" height="${(p.share / heaviest) * 44}" fill="var(--composite)" opacity=".28"><title>${p.date}: ${(100 * p.share).toFixed(1)} % of the composite</title></rect>`);
  }
  const line = seen.filter((p) => p.state === "clear" && p.value !== null).map((p) => `${px(p.time)} ${py(p.value)}`);
  if (line.length > 1) parts.push(`<path d="M${line.join("L")}" fill="none" stroke="var(--clear)" opacity=".35" stroke-width="1.5"/>`);
  for (const p of seen) {
    const value = p.value ?? low;
    const out = value > high || value < low;
    const y = py(Math.min(Math.max(value, low), high));
    parts.push(`<g${out ? ' opacity=".55"' : ""}>${shape(p.state, px(p.time), y)}<title>${p.date}: ${p.value === null ? "" : nameOf(quantity) + " " + p.value.toFixed(3) + ", "}${STATES[p.state]}${out && p.value !== null ? " (beyond the scale)" : ""}</title></g>`);
  }
  for (const c of made) {
    if (c.value === null) continue;
    const sigma = c.sigma?.[quantity];
    if (sigma) parts.push(`<path d="M${px(c.time)} ${py(Math.min(c.value + sigma, high))}V${py(Math.max(c.value - sigma, low))}" stroke="var(--composite)" stroke-width="2"/>`);
    parts.push(`<g${c.slot === chosen ? "" : ' opacity=".6"'}>${shape("composite", px(c.time), py(c.value), c.slot === chosen ? 4.5 : 2.5)}<title>${escape(c.name)}, ${c.target}: ${nameOf(quantity)} ${c.value.toFixed(3)}${sigma ? ` ± ${sigma.toFixed(3)}` : ""}</title></g>`);
  }
  const present = Object.keys(STATES).filter((state) => seen.some((p) => p.state === state));
  const clear = seen.filter((p) => p.state === "clear").length;
  const told = `${nameOf(quantity)} through time: ${seen.length} looks, ${clear} of them clear; ${made.filter((c) => c.value !== null).map((c) => `composite ${c.target} ${c.value.toFixed(2)}`).join(", ")}`;
  element.innerHTML = `<svg viewBox="0 0 ${W} ${H}" role="img" aria-label="${escape(told)}">${parts.join("")}</svg>
    <ul class="key">${present.map((state) => `<li>${swatch(state)}${STATES[state]}</li>`).join("")}<li>${swatch("composite")}composite</li>${heaviest ? '<li><svg viewBox="0 0 14 14" aria-hidden="true"><rect x="4" width="6" height="14" fill="var(--composite)" opacity=".35"/></svg>share of the composite</li>' : ""}</ul>`;
}

export function drawTable(element, { looks, composites, bands, quantity }) {
  const index = PAIRS[quantity] ? [quantity] : [];
  const columns = [...index, ...bands];
  const shares = (looks ?? []).some((look) => look.share !== null);
  const cells = (values) => columns.map((name) => { const v = valueOf(values, name); return `<td>${v === null ? "–" : v.toFixed(3)}</td>`; }).join("");
  const rows = [
    ...composites.map((c) => ({ date: c.target, what: escape(c.name), values: c.values, share: null, composite: true })),
    ...(looks ?? []).map((look) => ({ date: look.date, what: STATES[look.state], values: look.values, share: look.share })),
  ].sort((a, b) => a.date.localeCompare(b.date));
  element.innerHTML = `<thead><tr><th scope="col">Date</th><th scope="col">What</th>${columns.map((name) => `<th scope="col">${nameOf(name)}</th>`).join("")}${shares ? '<th scope="col">Share</th>' : ""}</tr></thead>
    <tbody>${rows.map((row) => `<tr><td>${row.date}</td><td>${row.composite ? `<b>${row.what}</b>` : row.what}</td>${cells(row.values)}${shares ? `<td>${row.share === null ? "–" : (100 * row.share).toFixed(1) + " %"}</td>` : ""}</tr>`).join("")}</tbody>`;
}
