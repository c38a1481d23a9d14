// A map of tiles in the mosaics' own CRS, on one canvas: pan, zoom, pinch, keys, and two pictures parted by a swipe.
// A "pane" says what to draw: {store, url(level, row, col)} for tiles, {image, bounds} for one picture, or null.

const TILE = 256;
const LOADING = 8;

export class SlippyMap {
  constructor(element, canvas, bounds) {
    this.element = element;
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.bounds = bounds;
    this.view = { x: 0, y: 0, mpp: 10 };
    this.panes = [null, null];
    this.swipe = null; // share of the width that shows the first pane
    this.mark = null; // bounds of the chosen pixel
    this.inset = () => ({ left: 0, top: 0, right: 0, bottom: 0 });
    this.tiles = new Map();
    this.loading = 0;
    this.wanted = [];
    this.on = { move: () => {}, pick: () => {}, hover: () => {}, idle: () => {}, busy: () => {}, failed: () => {} };
    this.pointers = new Map();
    this.listen();
    new ResizeObserver(() => this.resize()).observe(element);
    this.resize();
  }

  // -- the view --------------------------------------------------------------------------------------------

  resize() {
    const { clientWidth: w, clientHeight: h } = this.element;
    this.ratio = Math.min(window.devicePixelRatio || 1, 3);
    this.canvas.width = Math.max(1, Math.round(w * this.ratio));
    this.canvas.height = Math.max(1, Math.round(h * this.ratio));
    this.width = w;
    this.height = h;
    this.draw();
  }

  fit(bounds = this.bounds) {
    const [left, bottom, right, top] = bounds;
    const inset = this.inset();
    const w = Math.max(this.width - inset.left - inset.right, 60), h = Math.max(this.height - inset.top - inset.bottom, 60);
    const mpp = this.limit(Math.max((right - left) / w, (top - bottom) / h) * 1.04);
    const x = (left + right) / 2 - ((inset.left - inset.right) / 2) * mpp;
    const y = (top + bottom) / 2 + ((inset.top - inset.bottom) / 2) * mpp;
    this.show({ x, y, mpp });
  }

  limit(mpp) {
    const [left, bottom, right, top] = this.bounds;
    const widest = Math.max(right - left, top - bottom) / Math.max(Math.min(this.width, this.height), 100) * 4;
    return Math.min(Math.max(mpp, (this.finest || 10) / 24), widest);
  }

  show(view) {
    const [left, bottom, right, top] = this.bounds;
    this.view = {
      mpp: view.mpp,
      x: Math.min(Math.max(view.x, left), right),
      y: Math.min(Math.max(view.y, bottom), top),
    };
    this.draw();
    this.on.move(this.view);
  }

  ground(px, py) {
    return [this.view.x + (px - this.width / 2) * this.view.mpp, this.view.y - (py - this.height / 2) * this.view.mpp];
  }

  // The middle of what no panel covers: where keys zoom and Enter picks.
  middle() {
    const inset = this.inset();
    return [(this.width + inset.left - inset.right) / 2, (this.height + inset.top - inset.bottom) / 2];
  }

  zoom(factor, at = this.middle(), slowly = false) {
    if (slowly && !matchMedia("(prefers-reduced-motion: reduce)").matches) {
      const target = this.limit((this.goal ?? this.view.mpp) * factor);
      this.goal = target;
      cancelAnimationFrame(this.motion);
      const step = () => {
        const left = this.goal / this.view.mpp;
        const last = Math.abs(Math.log(left)) < 0.01;
        this.zoomNow(last ? left : left ** 0.28, at);
        if (last) this.goal = null;
        else this.motion = requestAnimationFrame(step);
      };
      this.motion = requestAnimationFrame(step);
    } else {
      cancelAnimationFrame(this.motion);
      this.goal = null;
      this.zoomNow(factor, at);
    }
  }

  zoomNow(factor, [px, py]) {
    const mpp = this.limit(this.view.mpp * factor);
    const [x, y] = this.ground(px, py);
    this.show({ mpp, x: x - (px - this.width / 2) * mpp, y: y + (py - this.height / 2) * mpp });
  }

  pan(dx, dy) {
    this.show({ ...this.view, x: this.view.x - dx * this.view.mpp, y: this.view.y + dy * this.view.mpp });
  }

  // -- drawing ---------------------------------------------------------------------------------------------

  draw() {
    this.on.busy(this.loading);
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.paint();
    });
  }

  paint() {
    const { context: c, ratio, canvas } = this;
    c.setTransform(1, 0, 0, 1, 0, 0);
    c.clearRect(0, 0, canvas.width, canvas.height);
    this.wanted = [];
    this.missing = 0;
    const parted = this.swipe !== null && this.panes[0];
    const edge = parted ? Math.round(canvas.width * this.swipe) : 0;
    if (parted) this.paintPane(this.panes[0], 0, edge);
    this.paintPane(this.panes[1], edge, canvas.width);
    if (this.mark) {
      const [left, bottom, right, top] = this.mark;
      const [x0, y0] = this.device(left, top), [x1, y1] = this.device(right, bottom);
      const grow = Math.max(0, (9 * ratio - (x1 - x0)) / 2);
      for (const [width, colour] of [[4 * ratio, "#000a"], [2 * ratio, "#fff"]]) {
        c.lineWidth = width;
        c.strokeStyle = colour;
        c.strokeRect(x0 - grow, y0 - grow, x1 - x0 + 2 * grow, y1 - y0 + 2 * grow);
      }
    }
    this.load();
  }

  device(x, y) {
    const { mpp } = this.view;
    return [((x - this.view.x) / mpp + this.width / 2) * this.ratio, ((this.view.y - y) / mpp + this.height / 2) * this.ratio];
  }

  paintPane(pane, from, to) {
    if (!pane || to <= from) return;
    const { context: c, canvas } = this;
    c.save();
    c.beginPath();
    c.rect(from, 0, to - from, canvas.height);
    c.clip();
    if (pane.image) this.paintImage(pane);
    else this.paintTiles(pane, from, to);
    c.restore();
  }

  paintImage(pane) {
    const image = this.tiles.get(pane.image);
    if (image?.ready) {
      const [x0, y0] = this.device(pane.bounds[0], pane.bounds[3]), [x1, y1] = this.device(pane.bounds[2], pane.bounds[1]);
      this.context.imageSmoothingEnabled = true;
      this.context.drawImage(image.picture, x0, y0, x1 - x0, y1 - y0);
    } else if (!image?.failed) {
      this.want(pane.image, 0);
    }
  }

  paintTiles(pane, from, to) {
    const { store } = pane;
    const [left, , , top] = store.bounds;
    const fine = this.view.mpp / this.ratio / store.resolution_m;
    const level = Math.min(Math.max(Math.floor(Math.log2(fine) + 0.3), 0), store.levels - 1);
    const side = store.resolution_m * 2 ** level * TILE;
    const rows = Math.ceil(Math.ceil(store.shape[0] / 2 ** level) / TILE), cols = Math.ceil(Math.ceil(store.shape[1] / 2 ** level) / TILE);
    const [x0, y0] = this.ground(from / this.ratio, 0), [x1, y1] = this.ground(to / this.ratio, this.height);
    const first = [Math.max(Math.floor((top - y0) / side), 0), Math.max(Math.floor((x0 - left) / side), 0)];
    const last = [Math.min(Math.floor((top - y1) / side), rows - 1), Math.min(Math.floor((x1 - left) / side), cols - 1)];
    const middle = [(first[0] + last[0]) / 2, (first[1] + last[1]) / 2];
    for (let row = first[0]; row <= last[0]; row++) {
      for (let col = first[1]; col <= last[1]; col++) {
        const url = pane.url(level, row, col);
        const tile = this.tiles.get(url);
        const box = [...this.device(left + col * side, top - row * side), ...this.device(left + (col + 1) * side, top - (row + 1) * side)].map(Math.round);
        if (tile?.ready) {
          this.tiles.delete(url);
          this.tiles.set(url, tile); // the longest unused come first
          this.put(tile.picture, [0, 0, TILE, TILE], box);
        } else {
          if (!tile?.failed) this.want(url, Math.hypot(row - middle[0], col - middle[1]));
          this.substitute(pane, level, row, col, box, tile?.failed);
        }
      }
    }
  }

  // While a tile is on its way a part of a coarser one stands in, or those the pane showed before; where it cannot be
  // read only its own coarser one, since another date's would stay under this date's name.
  substitute(pane, level, row, col, box, failed) {
    for (const url of [pane.url, failed ? null : pane.old].filter(Boolean)) {
      for (let up = url === pane.url ? 1 : 0; level + up < pane.store.levels; up++) {
        const tile = this.tiles.get(url(level + up, row >> up, col >> up));
        if (tile?.ready) {
          const part = TILE >> up;
          if (part < 1) return;
          this.put(tile.picture, [(col & ((1 << up) - 1)) * part, (row & ((1 << up) - 1)) * part, part, part], box);
          return;
        }
      }
    }
  }

  put(picture, [sx, sy, sw, sh], [x0, y0, x1, y1]) {
    this.context.imageSmoothingEnabled = x1 - x0 < sw * 1.6; // single pixels are shown as what they are
    this.context.drawImage(picture, sx, sy, sw, sh, x0, y0, x1 - x0, y1 - y0);
  }

  // -- loading ---------------------------------------------------------------------------------------------

  want(url, far) {
    this.missing++;
    if (!this.tiles.has(url)) this.wanted.push([far, url]);
  }

  // Tiles that could not be read are asked for again.
  forgetFailed() {
    for (const [url, tile] of this.tiles) if (tile.failed) this.tiles.delete(url);
  }

  load() {
    this.wanted.sort((a, b) => a[0] - b[0]);
    while (this.loading < LOADING && this.wanted.length) {
      const [, url] = this.wanted.shift();
      const picture = new Image();
      const tile = { picture, ready: false, failed: false };
      this.tiles.set(url, tile);
      this.loading++;
      const done = (ok) => {
        this.loading--;
        tile.ready = ok;
        tile.failed = !ok;
        if (!ok) this.on.failed();
        this.draw();
      };
      picture.onload = () => done(true);
      picture.onerror = () => done(false);
      picture.src = url;
    }
    for (const [url, tile] of this.tiles) {
      if (this.tiles.size <= 700) break;
      if (tile.ready) this.tiles.delete(url);
    }
    this.on.busy(this.loading);
    if (!this.missing && !this.loading && this.panes[1]) this.on.idle();
  }

  // -- hands and keys --------------------------------------------------------------------------------------

  place(event) {
    const box = this.element.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  listen() {
    const { element, pointers } = this;
    let moved = 0, last = null;
    const gesture = () => {
      const all = [...pointers.values()];
      const x = all.reduce((sum, p) => sum + p[0], 0) / all.length, y = all.reduce((sum, p) => sum + p[1], 0) / all.length;
      return { x, y, spread: all.length > 1 ? Math.hypot(all[0][0] - all[1][0], all[0][1] - all[1][1]) : 0 };
    };
    element.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      element.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, this.place(event));
      if (pointers.size === 1) moved = 0;
      else moved = 99;
      last = gesture();
    });
    element.addEventListener("pointermove", (event) => {
      this.on.hover(...this.ground(...this.place(event)));
      if (!pointers.has(event.pointerId)) return;
      pointers.set(event.pointerId, this.place(event));
      const now = gesture();
      moved += Math.hypot(now.x - last.x, now.y - last.y);
      if (moved > 4) {
        element.classList.add("moving");
        this.pan(now.x - last.x, now.y - last.y);
        if (now.spread && last.spread) this.zoom(last.spread / now.spread, [now.x, now.y]);
      }
      last = now;
    });
    const lift = (event) => {
      const known = pointers.delete(event.pointerId);
      element.classList.remove("moving");
      if (pointers.size) last = gesture();
      else if (known && event.type === "pointerup" && moved <= 4) this.on.pick(...this.ground(...this.place(event)));
    };
    element.addEventListener("pointerup", lift);
    element.addEventListener("pointercancel", lift);
    element.addEventListener("wheel", (event) => {
      event.preventDefault();
      const amount = event.deltaY * (event.deltaMode === 1 ? 18 : 1);
      this.zoom(Math.exp(Math.max(Math.min(amount, 240), -240) * 0.0022), this.place(event));
    }, { passive: false });
    element.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const step = event.shiftKey ? 240 : 80;
      const acts = {
        ArrowLeft: () => this.pan(step, 0), ArrowRight: () => this.pan(-step, 0),
        ArrowUp: () => this.pan(0, step), ArrowDown: () => this.pan(0, -step),
        "+": () => this.zoom(0.5, this.middle(), true), "=": () => this.zoom(0.5, this.middle(), true),
        "-": () => this.zoom(2, this.middle(), true), "0": () => this.fit(), Home: () => this.fit(),
        Enter: () => this.on.pick(...this.ground(...this.middle())),
      };
      if (acts[event.key]) {
        event.preventDefault();
        acts[event.key]();
      }
    });
  }
}
