// What the map says of a place, in a small window beside it.

import { Popup } from "./maplibre-gl.mjs";
import { make, row } from "./elements.js";
import { isFlagged } from "./flagged.js";
import { interval, metres, number, UNKNOWN } from "./numbers.js";
import { pointAt } from "./server.js";

export class Place {
  /** @param {object} map MapLibre's; info: the server's map.json */
  constructor(map, info) {
    this.map = map;
    this.info = info;
    this.request = null;
    this.popup = null;
  }

  /** Ask for a place and show what is there. */
  async show(lngLat) {
    this.close();
    this.request = new AbortController();
    const { signal } = this.request;
    const flagged = isFlagged(this.info.flagged, lngLat);
    const content = make("div", { class: "place", role: "status" }, make("p", { class: "soft" }, "Reading …"));
    this.popup = new Popup({ maxWidth: "20rem", focusAfterOpen: false, closeOnClick: false }).setLngLat(lngLat).setDOMContent(content).addTo(this.map);
    try {
      const values = await pointAt(lngLat.lng, lngLat.lat, signal);
      content.replaceChildren(...this.#describe(values, flagged));
    } catch (error) {
      if (error.name === "AbortError") return;
      content.replaceChildren(make("p", { class: "error" }, error.message));
    }
    this.popup.setDOMContent(content); // its size is another now, and so may be the side on which there is room
  }

  /** Close the window; whether there was one. */
  close() {
    this.request?.abort();
    this.request = null;
    const open = this.popup?.isOpen() ?? false;
    this.popup?.remove();
    this.popup = null;
    return open;
  }

  #describe(values, flagged) {
    const where = `${number(values.lat, 5)}°, ${number(values.lon, 5)}°`;
    if (values.state === "outside") return [make("p", { class: "value" }, "Outside of the map"), make("p", { class: "soft" }, where)];
    const { calibrated } = this.info;
    const known = values.state === "known";
    const rows = [];
    if (known) {
      rows.push(row(calibrated ? "90\u00a0% interval" : "Interval", interval(values.lower_90_m, values.upper_90_m)));
    }
    if (values.reference_m !== null && values.reference_m !== undefined) {
      rows.push(row("Reference", metres(values.reference_m)));
      if (known) rows.push(row("Map − reference", metres(values.height_m - values.reference_m)));
    }
    rows.push(row("Imagery of", values.date ?? UNKNOWN));
    rows.push(row("Pixel", `row ${values.row}, column ${values.col}`));
    rows.push(row("x, y", `${number(values.x, 1)}, ${number(values.y, 1)}\u00a0m`));
    rows.push(row("Lat, lon", where));
    return [
      known
        ? make("p", { class: "value" }, metres(values.height_m), make("span", { class: "pm" }, ` ± ${metres(values.error_90_m)}`))
        : make("p", { class: "value" }, "Height unknown"),
      known && !calibrated ? make("p", { class: "warning" }, "Uncalibrated: the interval promises nothing.") : null,
      flagged ? make("p", { class: "warning" }, "Flagged sheet: the 90\u00a0% is not promised here.") : null,
      make("dl", {}, ...rows),
    ].filter(Boolean);
  }
}
