// Two layers side by side, parted by a divider that is dragged or moved by keys.

import { createMap, showStack } from "./map.js";
import { part } from "./elements.js";

const STEP = 2; // per cent of the width, by an arrow key
const LEAP = 10; // by a page key

/** The second map, which lies over the first and is cut off at the divider; it follows the first. */
export class Swipe {
  /**
   * @param {import("./maplibre-gl.mjs").Map} map the first one, which shows the left side
   * @param {object} info the server's map.json
   * @param {(at: number) => void} moved called with the divider's place in per cent of the width
   * @param {(map: object) => void} made called with the second map whenever there is a new one
   */
  constructor(map, info, moved, made) {
    this.map = map;
    this.info = info;
    this.moved = moved;
    this.made = made;
    this.over = null;
    this.divider = part("divider");
    this.follow = () => this.over?.jumpTo({ center: map.getCenter(), zoom: map.getZoom() });
    this.divider.addEventListener("keydown", (event) => this.#key(event));
    this.divider.addEventListener("pointerdown", (event) => this.#drag(event));
  }

  /**
   * Show two layers, or end it.
   * @param {{left: object, right: object, at: number, stack: object[], hatched: boolean}|null} sides the layers by their
   *   entries in map.json
   */
  show(sides) {
    for (const name of ["over", "divider", "left-name", "right-name"]) part(name).hidden = sides === null;
    document.body.classList.toggle("swiping", sides !== null);
    if (sides === null) {
      this.map.off("move", this.follow);
      this.over?.remove();
      this.over = null;
      return;
    }
    if (this.over === null) {
      const { lng, lat } = this.map.getCenter();
      this.over = createMap(part("over"), this.info, { camera: { lon: lng, lat, zoom: this.map.getZoom() }, lead: false });
      this.over.getCanvas().setAttribute("tabindex", "-1");
      this.made(this.over);
      this.ready = false;
      this.over.once("load", () => {
        this.ready = true;
        this.#right();
      });
      this.map.on("move", this.follow);
    }
    this.sides = sides;
    this.#right();
    part("left-name").textContent = sides.left.title;
    part("right-name").textContent = sides.right.title;
    this.#place(sides.at);
  }

  #right() {
    if (this.ready) showStack(this.over, alone(this.sides.stack, this.sides.right.id), this.sides.hatched);
  }

  #place(at) {
    const { divider, sides } = this;
    part("stage").style.setProperty("--at", `${at}%`);
    divider.setAttribute("aria-valuenow", Math.round(at));
    divider.setAttribute("aria-valuetext", `${Math.round(at)} per cent ${sides.left.title}, ${100 - Math.round(at)} per cent ${sides.right.title}`);
  }

  #move(at) {
    this.sides.at = Math.min(100, Math.max(0, at));
    this.#place(this.sides.at);
    this.moved(this.sides.at);
  }

  #key(event) {
    const now = this.sides.at;
    const to = {
      ArrowLeft: now - STEP, ArrowDown: now - STEP, ArrowRight: now + STEP, ArrowUp: now + STEP,
      PageDown: now - LEAP, PageUp: now + LEAP, Home: 0, End: 100,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.#move(to);
  }

  #drag(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    this.divider.focus({ focusVisible: false });
    this.divider.setPointerCapture(event.pointerId);
    const box = part("stage").getBoundingClientRect();
    const move = (at) => this.#move((100 * (at.clientX - box.left)) / box.width);
    this.divider.addEventListener("pointermove", move);
    for (const end of ["pointerup", "pointercancel"]) {
      this.divider.addEventListener(end, () => this.divider.removeEventListener("pointermove", move), { once: true });
    }
  }
}

/** The stack with one layer visible; opacity and order stay as they are. */
export const alone = (stack, id) => stack.map((one) => ({ ...one, visible: one.id === id }));
