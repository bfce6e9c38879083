// A polygon drawn by clicks or keys, shown over the map as SVG so that it is one drawing even where two maps lie side by side.

import { make, part } from "./elements.js";

const SAME_PX = 5; // two clicks of a double click are not further apart
const CLOSE_PX = 12; // a click this near to the first corner closes

export class PolygonTool {
  /**
   * @param {object} map MapLibre's
   * @param {(corners: number[][]|null) => void} done called with the corners of a closed polygon in degrees, or null when
   *   there is none any more
   * @param {(drawing: boolean) => void} turned called when drawing begins and ends
   */
  constructor(map, done, turned) {
    this.map = map;
    this.done = done;
    this.turned = turned;
    this.corners = []; // of the one being drawn
    this.finished = null; // of the one that stands
    this.pointer = null; // where the next corner would be, in pixels
    this.drawing = false;
    map.on("move", () => this.draw());
    map.on("resize", () => this.draw());
    map.on("mousemove", (event) => this.#hover(event.point));
    map.on("dblclick", (event) => this.#doubled(event));
    part("hint-close").addEventListener("click", () => this.close());
    part("hint-back").addEventListener("click", () => this.back());
    part("hint-cancel").addEventListener("click", () => this.cancel());
  }

  /** Begin a new one; what stood is gone. */
  begin() {
    this.finished = null;
    this.corners = [];
    this.pointer = null;
    this.#turn(true);
    this.done(null);
  }

  /** Set a corner; near the first one it closes the polygon. */
  add(lngLat) {
    const at = this.map.project(lngLat);
    if (this.corners.length >= 3 && at.dist(this.map.project(this.corners[0])) < CLOSE_PX) return this.close();
    this.corners.push([lngLat.lng, lngLat.lat]);
    return this.draw();
  }

  /** Take the last corner back. */
  back() {
    this.corners.pop();
    this.draw();
  }

  /** Give up what is being drawn. */
  cancel() {
    this.corners = [];
    this.#turn(false);
  }

  /** Close the polygon, if it has three corners. */
  close() {
    if (this.corners.length < 3) return this.draw();
    this.finished = this.corners;
    this.corners = [];
    this.#turn(false);
    return this.done(this.finished);
  }

  /** Show one that was drawn elsewhere, or none. */
  set(corners) {
    this.finished = corners;
    this.draw();
  }

  #turn(drawing) {
    this.drawing = drawing;
    for (const handler of [this.map.doubleClickZoom, this.map.boxZoom]) drawing ? handler.disable() : handler.enable();
    document.body.classList.toggle("drawing", drawing);
    part("hint").hidden = !drawing;
    this.turned(drawing);
    this.draw();
  }

  #hover(point) {
    if (!this.drawing) return;
    this.pointer = point;
    this.draw();
  }

  #doubled(event) {
    if (!this.drawing) return;
    event.preventDefault();
    // Its two clicks have set a corner each.
    const [last, before] = [this.corners.at(-1), this.corners.at(-2)];
    if (before && this.map.project(last).dist(this.map.project(before)) < SAME_PX) this.corners.pop();
    this.close();
  }

  /** Draw what there is. */
  draw() {
    const pixels = (corners) => corners.map((corner) => this.map.project(corner));
    const text = (points) => points.map(({ x, y }) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
    const shapes = [];
    if (this.drawing) {
      const points = pixels(this.corners);
      const reach = this.pointer && points.length ? [...points, this.pointer] : points;
      for (const style of ["under", "over"]) shapes.push(make(reach.length > 2 ? "svg:polygon" : "svg:polyline", { points: text(reach), class: `open ${style}` }));
      shapes.push(...points.map(({ x, y }, i) => make("svg:circle", { cx: x, cy: y, r: i === 0 ? 6 : 4.5 })));
      const missing = 3 - points.length;
      part("hint-text").textContent =
        missing > 0 ? `Click ${missing === 3 ? "the corners of a polygon" : `${missing} more corner${missing > 1 ? "s" : ""} at least`}.` : "Double click, or Enter, closes the polygon.";
      part("hint-close").disabled = missing > 0;
      part("hint-back").disabled = points.length === 0;
    } else if (this.finished) {
      const points = text(pixels(this.finished));
      for (const style of ["under", "over"]) shapes.push(make("svg:polygon", { points, class: style }));
    }
    part("drawing").replaceChildren(...shapes);
  }
}
