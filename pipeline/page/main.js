// The page: what the panel says goes to the map, what is clicked goes to the chart. All addresses are relative, so the
// page works behind a proxy.
import { $, ask, escape, options, small } from "./dom.js";
import { SlippyMap } from "./map.js";
import { PixelPanel, inside } from "./pixel.js";

const state = { store: 0, slot: 0, layer: "", cut: "1", gamma: 1.3, compare: "off", swipe: 0.5 };
let facts, map, pixel, turn = 0, drawn = 0; // turn: the last picture asked for, drawn: the last one on the map

const store = () => facts.stores[state.store];
const period = () => store().periods.find((p) => p.slot === state.slot) ?? store().periods.at(-1);

function say(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

// -- the panel -------------------------------------------------------------------------------------------------

function chips(box, name, entries) {
  box.innerHTML = "";
  for (const [value, title] of entries) {
    const label = document.createElement("label"), input = document.createElement("input"), span = document.createElement("span");
    Object.assign(input, { type: "radio", name, value });
    span.textContent = title;
    label.append(input, span);
    box.append(label);
  }
}

const combos = () => Object.entries(store().combos).map(([title, names]) => [`rgb:${names.join(",")}`, title]);

function fillPanel() {
  const { bands, periods, uncertainty, layers, indices } = store();
  document.title = `${store().title}: cloudgate`;
  $("title").textContent = store().title;
  options($("store"), facts.stores.map((s) => [String(s.id), `${s.title} (${s.name})`]), state.store);
  $("store-row").hidden = facts.stores.length < 2;
  $("time-row").hidden = periods.length < 2;
  $("time").max = periods.length - 1;
  chips($("combos"), "layer", [...combos(), ...(bands.length > 1 ? [["own", "Own"]] : [])]);
  for (const i of [0, 1, 2]) options($(`own-${i}`), bands.map((b) => [b, b]), combos()[0][0].slice(4).split(",")[i]);
  chips($("indices"), "layer", Object.entries(indices).map(([name]) => [`index:${name}`, name.toUpperCase()]));
  for (const input of $("indices").querySelectorAll("input")) input.title = indices[input.value.slice(6)];
  $("indices-set").hidden = !Object.keys(indices).length;
  const titles = { source_date: "Source date", clear_count: "Clear looks", flags: "Flags" };
  chips($("layers"), "layer", [...layers.map((name) => [name, titles[name]]), ...(uncertainty.length ? [["uncertainty", "Uncertainty"]] : [])]);
  options($("sigma-band"), uncertainty.map((b) => [b, b]), "red");
  $("notes").innerHTML = "";
  for (const note of store().notes) $("notes").append(Object.assign(document.createElement("p"), { textContent: note }));
  if (!periods.some((p) => p.slot === state.slot)) state.slot = periods.at(-1).slot;
  if (!known(state.layer)) state.layer = combos()[0][0];
}

function known(layer) {
  const [kind, rest = ""] = layer.split(":");
  const s = store(), names = rest.split(",");
  return { rgb: names.length === 3 && names.every((n) => s.bands.includes(n)), index: rest in s.indices, uncertainty: s.uncertainty.includes(rest) }[kind] ?? s.layers.includes(layer);
}

// What the picture can be compared with: [key, title].
function comparisons() {
  const out = [["off", "nothing"]];
  if (period().before) out.push(["before", `before: ${period().before.label}`]);
  for (const other of facts.stores) if (other.id !== state.store) out.push([`store:${other.id}`, `${other.title} (${other.name})`]);
  for (const p of store().periods) if (p.slot !== state.slot) out.push([`slot:${p.slot}`, `date ${p.target}`]);
  for (const [layer, title] of [...combos(), ...Object.keys(store().indices).map((n) => [`index:${n}`, n.toUpperCase()]), ...store().layers.map((n) => [n, titleOf(n)])]) {
    if (layer !== state.layer) out.push([`layer:${layer}`, title]);
  }
  return out;
}

function titleOf(layer) {
  const [kind, rest] = layer.split(":");
  if (kind === "rgb") return combos().find(([value]) => value === layer)?.[1] ?? rest.split(",").join(", ");
  return { index: rest?.toUpperCase(), source_date: "Source date", clear_count: "Clear looks", flags: "Flags", uncertainty: `Uncertainty of ${rest}` }[kind];
}

function syncPanel() {
  const p = period(), [kind, rest] = state.layer.split(":");
  const own = kind === "rgb" && !combos().some(([value]) => value === state.layer);
  const chip = own || $("own").dataset.open ? "own" : kind === "uncertainty" ? "uncertainty" : state.layer;
  for (const input of document.querySelectorAll("input[name=layer]")) input.checked = input.value === chip;
  $("own").hidden = chip !== "own";
  if (own) rest.split(",").forEach((name, i) => ($(`own-${i}`).value = name));
  $("sigma").hidden = kind !== "uncertainty";
  if (kind === "uncertainty") $("sigma-band").value = rest;
  $("stretch-row").hidden = ["flags", "clear_count", "source_date"].includes(kind);
  $("gamma-row").hidden = kind !== "rgb";
  $("cut").value = state.cut;
  $("gamma").value = state.gamma;
  $("time").value = store().periods.indexOf(p);
  $("time").setAttribute("aria-valuetext", p.target);
  $("time-name").textContent = p.target;
  const span = p.start && p.end ? `looks of ${p.start} to ${p.end}` : "";
  $("subtitle").textContent = [`${p.target}, ${p.method}`, span].filter(Boolean).join(" · ").replaceAll("-", "\u2011"); // dates stay whole
  const choices = comparisons();
  if (!choices.some(([key]) => key === state.compare)) state.compare = "off";
  options($("compare"), choices, state.compare);
}

// -- what is drawn ---------------------------------------------------------------------------------------------

async function layerOf(s, slot, layer) {
  const told = await ask(`api/layer/${s.id}/${slot}?layer=${layer}&cut=${state.cut}&t=${s.token}`);
  const query = `layer=${layer}&range=${told.range.join(",")}${layer.startsWith("rgb") ? `&gamma=${state.gamma}` : ""}&t=${s.token}`;
  return { store: s, legend: told.legend, range: told.range, key: `${s.id}/${slot}?${query}`, url: (level, row, col) => `tile/${s.id}/${slot}/${level}/${row}/${col}.png?${query}` };
}

async function otherPane(main) {
  const [what, rest] = [state.compare.split(":")[0], state.compare.slice(state.compare.indexOf(":") + 1)];
  if (what === "off") return null;
  if (what === "before") {
    const { bands, bounds, label } = period().before;
    const same = await layerOf(store(), state.slot, `rgb:${bands.join(",")}`);
    const colours = bands.join() === "red,green,blue" ? "" : ` (${bands.join(", ")})`;
    return { image: `before/${store().id}/${state.slot}.png?range=${same.range.join(",")}&gamma=${state.gamma}&t=${store().token}`, bounds, name: `before: ${label}${colours}` };
  }
  if (what === "layer") return { ...(await layerOf(store(), state.slot, rest)), name: titleOf(rest) };
  if (what === "slot") return { ...(await layerOf(store(), +rest, state.layer)), name: store().periods.find((p) => p.slot === +rest).target };
  const other = facts.stores[+rest];
  const there = other.periods.find((p) => p.target === period().target) ?? other.periods.at(-1);
  const pane = await layerOf(other, there.slot, state.layer);
  // one stretch for both, the legend's: or the eye compares stretches, and one colour means two dates
  const query = main.key.split("?")[1].replace(/&t=.*/, `&t=${other.token}`);
  pane.url = (level, row, col) => `tile/${other.id}/${there.slot}/${level}/${row}/${col}.png?${query}`;
  return { ...pane, name: `${there.method} (${other.name}), ${there.target}` };
}

// Whether the run kept a picture before is asked once a period: its place and date lie in the picture's own file.
async function knowBefore() {
  const [s, p] = [store(), period()];
  if (p.before === undefined) p.before = (await ask(`api/before/${s.id}/${p.slot}?t=${s.token}`)).before;
}

async function redraw() {
  const mine = ++turn;
  map.on.busy(map.loading);
  map.forgetFailed();
  const asked = knowBefore().catch(() => {}); // what cannot be read there cannot be read below, which says so
  if (state.compare === "before") await asked;
  if (mine !== turn) return;
  syncPanel();
  asked.then(() => mine === turn && syncPanel());
  remember();
  try {
    const main = await layerOf(store(), state.slot, state.layer);
    const other = await otherPane(main);
    if (mine !== turn) return;
    main.old = map.panes[1]?.store === main.store ? map.panes[1].url : undefined;
    map.panes = [other, main];
    map.finest = store().resolution_m;
    drawLegend(main.legend);
    showSwipe(other, main);
    say("");
  } catch (error) {
    if (mine === turn) say(error.message);
  }
  if (mine !== turn) return;
  drawn = turn;
  map.draw();
}

function showSwipe(other) {
  const on = Boolean(other);
  $("swipe").hidden = $("left-name").hidden = $("right-name").hidden = !on;
  if (on) {
    $("left-name").textContent = other.name;
    $("right-name").textContent = state.compare.startsWith("layer") ? titleOf(state.layer) : `${period().method}, ${period().target}`;
  }
  setSwipe(state.swipe);
}

function setSwipe(share) {
  const inset = map.inset();
  const low = (inset.left + 24) / map.width, high = (map.width - inset.right - 24) / map.width;
  state.swipe = Math.min(Math.max(share, low), high);
  map.swipe = $("swipe").hidden ? null : state.swipe;
  const x = state.swipe * map.width;
  $("swipe").style.left = `${x}px`;
  $("swipe").setAttribute("aria-valuenow", Math.round(100 * (state.swipe - low) / (high - low)));
  $("left-name").style.right = `${map.width - x + 12}px`;
  $("right-name").style.left = `${x + 12}px`;
  map.draw();
}

function drawLegend(legend) {
  const entries = (legend.entries ?? []).map((e) => `<li><span class="swatch" style="background:${e.colour}"></span>${escape(e.label)}<b>${e.percent < 0.1 ? "< 0.1" : e.percent.toFixed(1)} %</b></li>`).join("");
  const list = entries && `<ul>${entries}</ul>`, unit = legend.unit ? `<div>${escape(legend.unit)}</div>` : "";
  if (legend.kind === "ramp") {
    $("legend").innerHTML = `${unit}<div class="ramp" style="background:linear-gradient(90deg,${legend.colours.join(",")})"></div><div class="ticks">${legend.ticks.map((t) => `<span>${escape(t)}</span>`).join("")}</div>${list}`;
  } else if (legend.kind === "classes") {
    $("legend").innerHTML = unit + list;
  } else {
    const colours = ["#d33a2c", "#2f9e44", "#2b6fd6"];
    $("legend").innerHTML = `<ul>${legend.names.map((name, i) => `<li><span class="swatch" style="background:${colours[i]}"></span>${escape(name)}</li>`).join("")}</ul>`;
    $("legend").firstChild.style.cssText = "display:flex;gap:14px;margin:0";
  }
}

// -- where -----------------------------------------------------------------------------------------------------

function lonlat(x, y) {
  const { nodes, lon, lat } = facts.lonlat, [left, bottom, right, top] = facts.bounds;
  const u = ((x - left) / (right - left)) * (nodes - 1), v = ((top - y) / (top - bottom)) * (nodes - 1);
  const i = Math.min(Math.max(Math.floor(v), 0), nodes - 2), j = Math.min(Math.max(Math.floor(u), 0), nodes - 2);
  const at = (a) => {
    const [p, q] = [a[i * nodes + j] * (1 - u + j) + a[i * nodes + j + 1] * (u - j), a[(i + 1) * nodes + j] * (1 - u + j) + a[(i + 1) * nodes + j + 1] * (u - j)];
    return p * (1 - v + i) + q * (v - i);
  };
  return [((at(lon) + 540) % 360) - 180, at(lat)];
}

const degrees = (x, y) => lonlat(x, y).map((v) => v.toFixed(5)).join(", ");

function showPlace(x, y) {
  $("where").innerHTML = inside(x, y, store()) ? `<b>${degrees(x, y)}</b><span> · ${Math.round(x)} E ${Math.round(y)} N · ${escape(facts.crs)}</span>` : "outside the mosaic";
}

function showScale() {
  const rough = map.view.mpp * (small.matches ? 80 : 110), unit = 10 ** Math.floor(Math.log10(rough));
  const metres = [5, 2, 1].map((n) => n * unit).find((n) => n <= rough);
  $("scale-name").textContent = metres >= 1000 ? `${metres / 1000} km` : `${metres} m`;
  $("scale-bar").style.width = `${metres / map.view.mpp}px`;
}

function remember() {
  if (!map) return;
  const { x, y, mpp } = map.view;
  const parts = { c: `${Math.round(x)},${Math.round(y)}`, m: mpp.toPrecision(4), s: state.store, p: state.slot, l: state.layer, v: state.compare, k: state.cut };
  clearTimeout(remember.timer);
  remember.timer = setTimeout(() => history.replaceState(null, "", `#${new URLSearchParams(parts)}`), 250);
}

function recall() {
  const said = new URLSearchParams(location.hash.slice(1));
  if (facts.stores[+said.get("s")]) state.store = +said.get("s") || 0;
  state.slot = said.has("p") ? +said.get("p") : store().periods.at(-1).slot;
  state.layer = said.get("l") ?? "";
  state.compare = said.get("v") ?? "off";
  state.cut = [...$("cut").options].some((o) => o.value === said.get("k")) ? said.get("k") : "1";
  const [x, y] = (said.get("c") ?? "").split(",").map(Number), mpp = Number(said.get("m"));
  return mpp > 0 && Number.isFinite(x) && Number.isFinite(y) ? { x, y, mpp } : null;
}

function pick(x, y) {
  const there = inside(x, y, store());
  $("place-said").textContent = there ? "" : "That place lies outside the mosaic.";
  if (there) pixel.show(x, y, degrees(x, y), store(), state.slot);
  else if (small.matches) showPlace(x, y);
}

// -- hands -----------------------------------------------------------------------------------------------------

function move(step) {
  const all = store().periods, next = all[(all.indexOf(period()) + step + all.length) % all.length];
  state.slot = next.slot;
  redraw();
  if (pixel.shown) pick(pixel.shown.x, pixel.shown.y);
}

function play(on) {
  clearInterval(play.timer);
  $("play").setAttribute("aria-pressed", on);
  if (on) play.timer = setInterval(() => move(1), 1200);
}

function listen() {
  $("settings").addEventListener("change", (event) => {
    const { target } = event;
    if (target.name === "layer") {
      delete $("own").dataset.open;
      if (target.value === "own") $("own").dataset.open = "1";
      state.layer = { own: `rgb:${[0, 1, 2].map((i) => $(`own-${i}`).value).join(",")}`, uncertainty: `uncertainty:${$("sigma-band").value}` }[target.value] ?? target.value;
    } else if (target.id.startsWith("own-")) state.layer = `rgb:${[0, 1, 2].map((i) => $(`own-${i}`).value).join(",")}`;
    else if (target.id === "sigma-band") state.layer = `uncertainty:${target.value}`;
    else if (target.id === "store") {
      state.store = +target.value;
      fillPanel();
      pixel.close();
    } else if (target.id === "time") {
      play(false);
      state.slot = store().periods[+target.value].slot;
      if (pixel.shown) pick(pixel.shown.x, pixel.shown.y);
    } else state[target.id] = target.id === "gamma" ? +target.value : target.value;
    redraw();
  });
  $("time").addEventListener("input", () => ($("time-name").textContent = store().periods[+$("time").value].target));
  $("play").addEventListener("click", () => play($("play").getAttribute("aria-pressed") !== "true"));
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("goto").addEventListener("submit", async (event) => {
    event.preventDefault();
    const [lon, lat] = ($("place").value.match(/[-+]?\d+(\.\d+)?/g) ?? []).map(Number);
    try {
      if (lat === undefined) throw new Error("Write longitude and latitude in degrees, such as 15.06, 46.03");
      const { x, y } = await ask(`api/place?lon=${lon}&lat=${lat}`);
      $("place-said").textContent = "";
      map.show({ x, y, mpp: Math.min(map.view.mpp, store().resolution_m) });
      pick(x, y);
    } catch (error) {
      $("place-said").textContent = error.message;
    }
  });
  $("zoom-in").addEventListener("click", () => map.zoom(0.5, map.middle(), true));
  $("zoom-out").addEventListener("click", () => map.zoom(2, map.middle(), true));
  $("zoom-all").addEventListener("click", () => map.fit());
  $("fold").addEventListener("click", () => {
    const folded = $("panel").classList.toggle("folded");
    $("fold").setAttribute("aria-expanded", !folded);
  });
  $("swipe").addEventListener("pointerdown", (event) => $("swipe").setPointerCapture(event.pointerId));
  $("swipe").addEventListener("pointermove", (event) => $("swipe").hasPointerCapture(event.pointerId) && setSwipe(event.clientX / map.width));
  $("swipe").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -0.02, ArrowDown: -0.02, ArrowRight: 0.02, ArrowUp: 0.02, PageDown: -0.1, PageUp: 0.1, Home: -1, End: 1 }[event.key];
    if (step) {
      event.preventDefault();
      setSwipe(state.swipe + step);
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.target.matches("input:not([type=range]):not([type=radio]), select")) return;
    if (event.key === "Escape") pixel.close();
    if (event.key === "[") move(-1);
    if (event.key === "]") move(1);
  });
  addEventListener("resize", () => setTimeout(() => setSwipe(state.swipe), 50));
}

async function begin() {
  try {
    facts = await ask("api/mosaics");
  } catch (error) {
    return say(error.message);
  }
  const view = recall();
  fillPanel();
  if (small.matches) $("panel").classList.add("folded");
  $("fold").setAttribute("aria-expanded", !small.matches);
  map = new SlippyMap($("map"), $("canvas"), facts.bounds);
  map.finest = store().resolution_m;
  pixel = new PixelPanel(map, facts.stores);
  map.inset = () => {
    const panel = $("panel").getBoundingClientRect();
    return small.matches ? { left: 0, right: 0, top: 64, bottom: Math.min(map.height - panel.top, map.height * 0.5) } : { left: panel.right, right: 0, top: 0, bottom: 56 };
  };
  $("cross").style.left = `${map.middle()[0]}px`;
  $("cross").style.top = `${map.middle()[1]}px`;
  Object.assign(map.on, {
    move: () => { showScale(); remember(); if (document.activeElement === $("map")) showPlace(...map.ground(...map.middle())); $("cross").style.left = `${map.middle()[0]}px`; $("cross").style.top = `${map.middle()[1]}px`; },
    hover: showPlace,
    pick,
    busy: (n) => { $("busy").classList.toggle("on", n > 0); $("busy").style.width = n ? `${100 - Math.min(n, 8) * 10}%` : "100%"; document.documentElement.dataset.map = "loading"; },
    idle: () => { if (drawn !== turn) return; document.documentElement.dataset.map = "ready"; if (!begin.done) performance.mark("first-picture"); begin.done = true; },
    failed: () => say("Some of the picture cannot be read: what stands there is coarser, or missing."),
  });
  listen();
  const inset = map.inset();
  state.swipe = (inset.left + map.width - inset.right) / 2 / map.width;
  if (view) map.show({ ...view, mpp: map.limit(view.mpp) });
  else map.fit();
  showScale();
  showPlace(...map.ground(...map.middle()));
  await redraw();
}

begin();
