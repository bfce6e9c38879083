// The numbers of a polygon, each with its interval, and a histogram of its heights.

import { make, part, row } from "./elements.js";
import { mayBeFlagged } from "./flagged.js";
import { area, interval, metres, number, percent, percents, UNKNOWN } from "./numbers.js";
import { statisticsOf } from "./server.js";

const WIDTH = 300;
const HEIGHT = 130;
const MARGIN = { left: 34, right: 6, top: 8, bottom: 32 };

/**
 * What is shown, in this order; what the server does not tell is left out. The ends of the mean hold it nine times out of ten;
 * the bounds of the others are what they would be if all heights were at their lower or upper ends.
 */
const ROWS = [
  ["area_m2", "Area", area],
  ["known_fraction", "Heights known", percent],
  ["mean_m", "Mean height", metres],
  ["p50_m", "Median", metres],
  ["p95_m", "95th percentile", metres],
  ["max_m", "Highest", metres],
  ["cover_2m", "Cover above 2\u00a0m", percent],
  ["cover_5m", "Cover above 5\u00a0m", percent],
  ["gap_fraction", "Gaps", percent],
];

let request = null;

/**
 * Ask for the statistics of a polygon and show them; null takes them away.
 * @param {number[][]|null} corners in degrees
 * @param {object|null} flagged as the server tells it
 * @param {() => void} clear called when the polygon is to go
 */
export async function showStatistics(corners, flagged, clear) {
  request?.abort();
  const section = part("statistics");
  section.hidden = corners === null;
  if (corners === null) return;
  request = new AbortController();
  const { signal } = request;
  const numbers = part("numbers");
  numbers.replaceChildren(make("p", { class: "soft" }, "Reading the heights …"));
  numbers.setAttribute("aria-busy", "true");
  const remove = make("button", { type: "button" }, "Remove");
  remove.addEventListener("click", clear);
  try {
    const found = await statisticsOf(corners, signal);
    const doubt = mayBeFlagged(flagged, corners) ? [make("p", { class: "warning" }, "In or beside a flagged sheet, where the 90\u00a0% is not promised.")] : [];
    numbers.replaceChildren(...doubt, ...describe(found), make("div", { class: "row" }, saving(found, corners), remove));
  } catch (error) {
    if (error.name === "AbortError") return;
    numbers.replaceChildren(make("p", { class: "error" }, error.message), make("div", { class: "row" }, remove));
  }
  numbers.removeAttribute("aria-busy");
}

function describe(found) {
  const rows = ROWS.filter(([key]) => key in found).map(([key, title, text]) => row(title, text(found[key]), between(found, key)));
  return [make("dl", { class: "numbers" }, ...rows), found.histogram ? histogram(found) : null].filter(Boolean);
}

/** The ends that the server tells for a number, if it tells any. */
function between(found, key) {
  if (found[key] === null) return null;
  const stem = key.replace(/_m$/, "");
  const names = [`${stem}_lower_90`, `${stem}_upper_90`].map((name) => (key.endsWith("_m") ? `${name}_m` : name));
  if (!names.every((name) => name in found)) return null;
  const [lower, upper] = names.map((name) => found[name]);
  const text = key.endsWith("_m") ? interval(lower, upper) : percents(lower, upper);
  return make("span", { class: "between" }, text === UNKNOWN ? "error unknown" : `${key === "mean_m" ? "90\u00a0%" : "bounds"}: ${text}`);
}

/** A link that saves the polygon with its numbers, for a GIS. */
function saving(found, corners) {
  const { histogram: _, ...properties } = found;
  const feature = { type: "Feature", properties, geometry: { type: "Polygon", coordinates: [[...corners, corners[0]]] } };
  const save = make("button", { type: "button" }, "Save as GeoJSON");
  save.addEventListener("click", () => {
    const href = URL.createObjectURL(new Blob([JSON.stringify(feature)], { type: "application/geo+json" }));
    make("a", { href, download: "polygon.geojson" }).click();
    URL.revokeObjectURL(href);
  });
  return save;
}

/** Round steps of an axis: 1, 2 or 5 times a power of ten, at most `most` of them. */
function ticks(top, most) {
  const rough = top / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  return Array.from({ length: Math.floor(top / step + 1e-9) + 1 }, (_, i) => i * step);
}

function histogram(found) {
  const { edges_m: edges, area_m2: areas } = found.histogram;
  const total = areas.reduce((sum, value) => sum + value, 0);
  if (total <= 0) return make("p", { class: "soft" }, "No height is known in the polygon.");
  const shares = areas.map((value) => value / total);
  const filled = shares.findLastIndex((share) => share > 0);
  const [low, high] = [edges[0], edges[Math.max(filled + 1, 1)]];
  const top = Math.max(...shares);
  const x = (value) => MARGIN.left + ((WIDTH - MARGIN.left - MARGIN.right) * (value - low)) / (high - low);
  const y = (share) => HEIGHT - MARGIN.bottom - ((HEIGHT - MARGIN.top - MARGIN.bottom) * share) / top;
  const base = y(0);
  const bars = shares.slice(0, filled + 1).map((share, i) =>
    make("svg:rect", { class: "bar", x: x(edges[i]) + 0.5, y: y(share), width: Math.max(x(edges[i + 1]) - x(edges[i]) - 1, 0.5), height: base - y(share) },
      make("svg:title", {}, `${number(edges[i], 0)} to ${number(edges[i + 1], 0)} m: ${percent(share)}, ${area(areas[i])}`)),
  );
  const across = ticks(high - low, 6).map((step) => low + step).flatMap((value) => [
    make("svg:line", { class: "axis", x1: x(value), x2: x(value), y1: base, y2: base + 4 }),
    make("svg:text", { x: x(value), y: base + 15, "text-anchor": "middle" }, `${Math.round(value)}`),
  ]);
  const up = ticks(100 * top, 3).flatMap((value) => [
    make("svg:line", { class: "grid", x1: MARGIN.left, x2: WIDTH - MARGIN.right, y1: y(value / 100), y2: y(value / 100) }),
    make("svg:text", { x: MARGIN.left - 4, y: y(value / 100) + 3.5, "text-anchor": "end" }, `${Number(value.toPrecision(2))}\u00a0%`),
  ]);
  const mean = found.mean_m >= low && found.mean_m <= high ? [make("svg:line", { class: "mean", x1: x(found.mean_m), x2: x(found.mean_m), y1: MARGIN.top, y2: base })] : [];
  const drawn = make("svg:svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `Histogram of the heights, ${number(low, 0)} to ${number(high, 0)} metres; most ground, ${percent(top)}, is in the class that begins at ${number(edges[shares.indexOf(top)], 0)} metres` },
    ...up, ...bars, make("svg:line", { class: "axis", x1: MARGIN.left, x2: WIDTH - MARGIN.right, y1: base, y2: base }), ...across, ...mean,
    make("svg:text", { x: (MARGIN.left + WIDTH - MARGIN.right) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, "height, m"));
  return make("figure", {}, make("figcaption", {}, "Share of the ground by height", mean.length ? "; the line is the mean" : ""), drawn);
}
