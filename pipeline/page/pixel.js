// One pixel through time: in comes a place that was picked, out come its chart, its numbers and where they are from.
import { drawChart, drawTable, nameOf, quantities, valueOf } from "./chart.js";
import { $, ask, escape, options, small } from "./dom.js";

export class PixelPanel {
  constructor(map, stores) {
    this.map = map;
    this.stores = stores;
    this.shown = null; // { x, y, store, slot, looks, composites }
    $("quantity").addEventListener("change", () => this.draw());
    $("pixel-close").addEventListener("click", () => this.close());
  }

  // Shows the pixel of store s at (x, y), whose name on the page is place, in one of its periods.
  async show(x, y, place, s, slot) {
    const asked = (this.shown = { x, y, store: s, slot, looks: null });
    const row = Math.floor((s.bounds[3] - y) / s.resolution_m), col = Math.floor((x - s.bounds[0]) / s.resolution_m);
    this.map.mark = [s.bounds[0] + col * s.resolution_m, s.bounds[3] - (row + 1) * s.resolution_m, s.bounds[0] + (col + 1) * s.resolution_m, s.bounds[3] - row * s.resolution_m];
    this.map.draw();
    $("pixel").hidden = false;
    $("pixel").dataset.looks = "reading";
    document.body.classList.add("asked");
    this.reveal(x, y);
    options($("quantity"), quantities(s).map((q) => [q, nameOf(q)]), $("quantity").value || undefined);
    $("pixel-title").textContent = `Row ${row}, column ${col}`;
    $("pixel-place").textContent = place;
    $("pixel-said").textContent = "Reading the looks from their sources…";
    $("chart").innerHTML = $("composite").innerHTML = $("numbers").innerHTML = "";
    try {
      asked.composites = await this.composites(x, y, s);
      if (asked !== this.shown) return;
      this.draw();
      const told = await ask(`api/looks/${s.id}/${slot}?x=${x}&y=${y}`);
      if (asked !== this.shown) return;
      asked.looks = told.looks;
      let said = told.failed ? `${told.failed} scenes could not be read, so their looks are missing: ${told.failures[0]}` : told.looks.length ? "" : "No scene of this period covers the pixel.";
      if (told.gated && !said) {
        $("pixel-said").textContent = "Asking the network what each date adds…";
        this.draw();
        said = await addShares(asked);
        if (asked !== this.shown) return;
      }
      $("pixel-said").textContent = said;
      this.draw();
      $("pixel").dataset.looks = "read";
    } catch (error) {
      if (asked !== this.shown) return;
      $("pixel-said").textContent = `${error.message[0].toUpperCase()}${error.message.slice(1)}. ${asked.composites ? "Only the composites are shown." : ""}`;
      this.draw();
      $("pixel").dataset.looks = "failed";
    }
  }

  // What every store that covers the place says there; only those of store s belong to one of its periods.
  async composites(x, y, s) {
    const all = this.stores.filter((o) => inside(x, y, o)).map(async (o) => {
      const told = await ask(`api/pixel/${o.id}?x=${x}&y=${y}`);
      return told.composites.map((c) => ({ ...c, store: o.id, slot: o.id === s.id ? c.slot : -1, name: this.stores.length > 1 ? `${c.method} (${o.name})` : c.method }));
    });
    return (await Promise.all(all)).flat();
  }

  // Moves the map where the chart would cover the pixel that it is about.
  reveal(x, y) {
    const { map } = this;
    const [px, py] = map.device(x, y).map((v) => v / map.ratio);
    const bottom = small.matches ? map.height * 0.34 : map.height - 420;
    const covered = small.matches ? py > bottom - 30 : px > map.width - 490 && py > bottom;
    if (covered) map.pan(small.matches ? 0 : Math.max(map.inset().left + 80, map.width - 560) - px, small.matches ? bottom * 0.6 - py : 0);
  }

  draw() {
    if (!this.shown?.composites) return;
    const quantity = $("quantity").value, { looks, composites, slot, store } = this.shown;
    drawChart($("chart"), { looks, composites, quantity, chosen: slot });
    drawTable($("numbers"), { looks, composites, bands: store.bands, quantity });
    const c = composites.find((one) => one.slot === slot);
    const value = c && valueOf(c.values, quantity), sigma = c?.sigma?.[quantity];
    $("composite").innerHTML = !c ? "" : value === null ? `<b>No data</b> in the composite of ${c.target}.`
      : `Composite ${c.target}: <b>${nameOf(quantity)} ${value.toFixed(3)}${sigma ? ` ± ${sigma.toFixed(3)}` : ""}</b> · ${c.clear_count} clear looks${c.source_date ? ` · source ${c.source_date}` : ""}${c.flags.length ? ` · ${escape(c.flags.join(", "))}` : ""}`;
  }

  close() {
    if ($("pixel").hidden) return;
    const within = $("pixel").contains(document.activeElement);
    $("pixel").hidden = true;
    document.body.classList.remove("asked");
    this.shown = this.map.mark = null;
    this.map.draw();
    if (within) $("map").focus();
  }
}

export const inside = (x, y, s) => x >= s.bounds[0] && x < s.bounds[2] && y > s.bounds[1] && y <= s.bounds[3];

// What each date adds, as the network itself says; the looks get their shares, and what is left to say comes back.
async function addShares({ x, y, store, slot, looks }) {
  try {
    const told = await ask(`api/shares/${store.id}/${slot}?x=${x}&y=${y}`);
    for (const look of looks) look.share = told.shares[look.id] ?? (told.said ? null : 0);
    const rest = Math.round(100 * told.rest);
    if (told.said || rest < 1) return told.said;
    return `${rest} % of this pixel comes from estimates fitted to all dates; the bars show what single looks add.`;
  } catch (error) {
    return `What each date adds is not known: ${error.message}`;
  }
}
