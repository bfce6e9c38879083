// The page of a map: it asks the server what there is, shows it, and keeps what is shown in the address.

import { make, part, row } from "./elements.js";
import { hasFlagged } from "./flagged.js";
import { listLayers } from "./layers.js";
import { legendOf } from "./legend.js";
import { read, write } from "./link.js";
import { number, percent, UNKNOWN } from "./numbers.js";
import { printable } from "./print.js";
import { mapInfo, ServerError } from "./server.js";
import { isPhone, openPanel, startPanel, togglePanel } from "./sheet.js";
import { showStatistics } from "./statistics.js";

const SAY_MS = 6000;

start().catch((error) => fail(error));

async function start() {
  const asked = mapInfo(); // on its way while MapLibre is read
  const drawing = Promise.all([import("./map.js"), import("./swipe.js"), import("./polygon.js"), import("./place.js")]).catch(() => {
    throw new ServerError("MapLibre GL, which draws the map, is missing; put it in place with: python -m canopy.view.maplibre");
  });
  drawing.catch(() => {}); // if the map is missing too, that is what is told
  const info = await asked;
  new Page(info, await drawing);
}

/** Nothing can be shown: say why. */
function fail(error) {
  document.body.dataset.state = "failed";
  const text = error instanceof ServerError ? error.message : /webgl/i.test(error.message) ? "This browser offers no WebGL 2, with which the map is drawn. Switch hardware acceleration on, use another browser, or open the rasters in QGIS." : `The page failed: ${error.message}`;
  part("veil-text").textContent = text;
}

class Page {
  constructor(info, [{ createMap, fit, showStack }, { alone, Swipe }, { PolygonTool }, { Place }]) {
    this.info = info;
    this.showStack = showStack;
    this.alone = alone;
    this.stack = [...info.layers].reverse().map(({ id, title, opacity, visible }) => ({ id, title, opacity, visible }));
    this.sides = null;
    this.hatched = true;
    this.describe();

    const wanted = read(location.hash, info.layers.map((layer) => layer.id));
    this.reorder(wanted);
    startPanel(() => this.map?.resize());
    this.map = createMap(part("map"), info, { camera: wanted.view, lead: true });
    this.place = new Place(this.map, info);
    this.swipe = new Swipe(this.map, info, () => this.remember(), (over) => this.watch(over));
    this.polygon = new PolygonTool(this.map, (corners) => this.measure(corners, true), (on) => part("draw").setAttribute("aria-pressed", String(on)));
    this.fit = () => fit(this.map, info);
    this.watch(this.map);
    this.map.on("load", () => {
      document.body.dataset.state = "shown";
      this.restore(wanted);
      this.map.on("moveend", () => this.remember());
    });
    this.map.once("idle", () => {
      performance.mark("painted");
      document.body.dataset.state = "ready";
    });
    this.listen();
    printable(() => [this.map, this.swipe.over].filter(Boolean));
  }

  // --- what is told ---------------------------------------------------------------------------------------------------

  describe() {
    const { info } = this;
    document.title = `${info.name} · canopy`;
    part("name").textContent = info.name;
    const about = ["canopy height", `${number(info.gsd_m, info.gsd_m < 1 ? 2 : 1)}\u00a0m pixels`, info.date].filter(Boolean);
    part("about").replaceChildren(...about.flatMap((text, i) => [i ? " · " : "", make("span", { class: "whole" }, text)]));
    part("notices").hidden = info.notices.length === 0;
    part("notices").replaceChildren(...info.notices.map((text) => make("li", {}, text)));
    part("facts").replaceChildren(
      row("Imagery of", info.date ?? UNKNOWN),
      row("Model", info.model ?? UNKNOWN),
      row("Intervals", info.calibration || (info.calibrated ? "calibrated" : "uncalibrated")),
      ...(info.coverage === null || info.coverage === undefined ? [] : [row("Held in tests", `${percent(info.coverage)} of true heights`)]),
      row("Pixel", `${number(info.gsd_m, 3).replace(/\.?0+$/, "")}\u00a0m`),
      row("CRS", info.crs),
    );
  }

  say(text, lasting = false) {
    clearTimeout(this.silence);
    part("status").textContent = text;
    if (!lasting) this.silence = setTimeout(() => (part("status").textContent = ""), SAY_MS);
  }

  /** Show that a map is still loading, and say what it could not load. */
  watch(map) {
    this.loading ??= new Set();
    const tell = () => (document.body.dataset.busy = String(this.loading.size > 0));
    map.on("dataloading", () => tell(this.loading.add(map)));
    for (const end of ["idle", "remove"]) map.on(end, () => tell(this.loading.delete(map)));
    map.on("error", ({ error }) => {
      const status = error?.status;
      this.say(status ? `Some of the map could not be read: the server says ${status}.` : /fetch/i.test(error?.message) ? "The server does not answer; is canopy view still running?" : `The map could not be drawn: ${error?.message}`);
    });
  }

  // --- what is shown --------------------------------------------------------------------------------------------------

  /** Take order, opacity and visibility from a link; what it does not name lies below, hidden. */
  reorder({ layers }) {
    if (layers === null) return;
    const named = layers.map(({ id, visible, opacity }) => {
      const known = this.stack.find((one) => one.id === id);
      return { ...known, visible, opacity: opacity ?? known.opacity };
    });
    const rest = this.stack.filter((one) => !layers.some(({ id }) => id === one.id)).map((one) => ({ ...one, visible: false }));
    this.stack = [...named, ...rest];
  }

  /** Show what a link asks for, but for the camera. */
  restore({ swipe, polygon, hatched, strange }) {
    this.sides = swipe;
    this.hatched = hatched;
    if (this.polygon.drawing) this.polygon.cancel();
    this.polygon.set(polygon);
    this.measure(polygon);
    if (strange.length) this.say(`The link names what this map does not have: ${[...new Set(strange)].join(", ")}`);
    this.show();
  }

  show() {
    const { hatched, sides, stack } = this;
    const flagged = hasFlagged(this.info.flagged);
    const entry = (id) => this.info.layers.find((layer) => layer.id === id);
    this.showStack(this.map, sides ? this.alone(stack, sides.left) : stack, hatched);
    this.swipe.show(sides && { left: entry(sides.left), right: entry(sides.right), at: sides.at, stack, hatched });
    listLayers(stack, { swiping: sides !== null, hatched: flagged ? hatched : null }, {
      show: (id, visible) => this.change(id, { visible }),
      fade: (id, opacity) => this.fade(id, opacity),
      move: (id, by) => this.move(id, by),
      hatch: (on) => {
        this.hatched = on;
        this.show();
      },
    });
    part("swipe").setAttribute("aria-pressed", String(sides !== null));
    part("sides").hidden = sides === null;
    if (sides) this.choose(sides);
    const shown = sides ? [...new Set([sides.left, sides.right])] : stack.filter((one) => one.visible).map((one) => one.id);
    part("legend").replaceChildren(...legendOf(shown.map(entry), flagged && hatched));
    this.remember();
  }

  choose(sides) {
    for (const side of ["left", "right"]) {
      part(side).replaceChildren(...this.stack.map(({ id, title }) => make("option", { value: id, selected: id === sides[side] }, title)));
    }
  }

  change(id, values) {
    this.stack = this.stack.map((one) => (one.id === id ? { ...one, ...values } : one));
    this.show();
  }

  /** As `change`, while a slider is dragged: the list stays as it is, or the slider would be lost. */
  fade(id, opacity) {
    this.stack = this.stack.map((one) => (one.id === id ? { ...one, opacity } : one));
    for (const map of [this.map, this.swipe.over].filter(Boolean)) map.setPaintProperty(id, "raster-opacity", opacity);
    if (this.sides) this.swipe.sides.stack = this.stack;
    this.remember();
  }

  move(id, by) {
    const at = this.stack.findIndex((one) => one.id === id);
    const stack = [...this.stack];
    stack.splice(at + by, 0, ...stack.splice(at, 1));
    this.stack = stack;
    this.show();
  }

  toggleSwipe() {
    this.sides = this.sides ? null : this.someSides();
    this.show();
    if (this.sides) part("divider").focus({ focusVisible: false });
  }

  /** What to swipe between unless told: what is shown, and what one compares that with first. */
  someSides() {
    const kinds = ["reference", "image", "error"];
    const shown = this.stack.filter((one) => one.visible && one.id !== "hillshade").map((one) => one.id);
    const compared = kinds.flatMap((kind) => this.info.layers.filter((layer) => layer.kind === kind).map((layer) => layer.id));
    const all = [...new Set([...shown, ...compared, ...this.info.layers.map((layer) => layer.id)])];
    return { left: all[0], right: all[1] ?? all[0], at: 50 };
  }

  /** Ask for the statistics of a polygon; `open` when somebody waits for them. */
  measure(corners, open = false) {
    showStatistics(corners, this.info.flagged, () => {
      this.polygon.set(null);
      this.measure(null);
      this.map.getCanvas().focus();
    });
    if (corners && open) {
      openPanel(true);
      part("statistics").scrollIntoView({ block: "start" });
    }
    this.remember();
  }

  /** Keep what is shown in the address; the browser's history gains no entry by it. */
  remember() {
    if (!this.map || document.body.dataset.state === "loading") return;
    const { lng, lat } = this.map.getCenter();
    const polygon = this.polygon.finished;
    const swipe = this.sides && { ...this.sides, at: this.swipe.sides?.at ?? this.sides.at };
    if (swipe) this.sides = swipe;
    history.replaceState(null, "", write({ view: { lon: lng, lat, zoom: this.map.getZoom() }, layers: this.stack, swipe, polygon, hatched: this.hatched }));
  }

  // --- what people do -------------------------------------------------------------------------------------------------

  listen() {
    const { map } = this;
    const does = (id, act) => part(id).addEventListener("click", act);
    does("zoom-in", () => map.zoomIn());
    does("zoom-out", () => map.zoomOut());
    does("fit", this.fit);
    does("swipe", () => this.toggleSwipe());
    does("draw", () => this.draw());
    does("link", () => this.copy());
    does("ask", () => part("help").showModal());
    for (const side of ["left", "right"]) {
      part(side).addEventListener("change", (event) => {
        this.sides = { ...this.sides, [side]: event.target.value };
        this.show();
      });
    }
    map.on("click", (event) => (this.polygon.drawing ? this.polygon.add(event.lngLat) : this.place.show(event.lngLat)));
    map.on("dblclick", () => this.place.close());
    document.addEventListener("keydown", (event) => this.key(event));
    window.addEventListener("hashchange", () => {
      const wanted = read(location.hash, this.info.layers.map((layer) => layer.id));
      this.reorder(wanted);
      if (wanted.view) map.jumpTo({ center: [wanted.view.lon, wanted.view.lat], zoom: wanted.view.zoom });
      this.restore(wanted);
    });
  }

  draw() {
    if (this.polygon.drawing) return this.polygon.cancel();
    this.place.close();
    if (isPhone()) openPanel(false);
    this.polygon.begin();
    return this.map.getCanvas().focus({ focusVisible: false });
  }

  async copy() {
    this.remember();
    try {
      await navigator.clipboard.writeText(location.href);
      this.say("The link to this view is copied.");
    } catch {
      this.say("The browser does not let the page copy; the link is in its address bar.");
    }
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || part("help").open) return;
    if (event.target.closest("select, textarea, input:not([type=checkbox], [type=range])")) return;
    if (this.act(event)) event.preventDefault();
  }

  /** Do what a key means; whether it means anything. */
  act({ key, target }) {
    const { map, polygon } = this;
    const onMap = target === map.getCanvas() || target === document.body;
    const middle = map.getCenter();
    if (polygon.drawing) {
      if (key === "Escape") return polygon.cancel() ?? true;
      if (key === "Backspace") return polygon.back() ?? true;
      if (key === "Enter" && onMap) return polygon.close() ?? true;
      if (key === " " && onMap) return polygon.add(middle) ?? true;
    } else if (key === "Escape") return this.place.close();
    else if (key === "Enter" && onMap) return this.place.show(middle) && true;
    const layer = /^[1-9]$/.test(key) && !this.sides ? this.stack[key - 1] : undefined;
    if (layer) return this.change(layer.id, { visible: !layer.visible }) ?? true;
    const acts = {
      "?": () => part("help").showModal(),
      d: () => this.draw(),
      f: () => this.fit(),
      l: () => this.copy(),
      p: () => togglePanel(),
      s: () => this.toggleSwipe(),
      ...(target === map.getCanvas() ? {} : { "+": () => map.zoomIn(), "-": () => map.zoomOut() }),
    };
    acts[key]?.();
    return key in acts;
  }
}
