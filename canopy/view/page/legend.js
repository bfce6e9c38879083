// What the colours of the visible layers mean.

import { make } from "./elements.js";

/**
 * The legend of layers, from the top; layers with the same classes share one.
 * @param {{title: string, legend: {colour: string, label: string}[], note: string|null}[]} layers
 * @param {boolean} hatched whether sheets are hatched
 */
export function legendOf(layers, hatched) {
  const groups = new Map();
  for (const layer of layers.filter(({ legend, note }) => legend.length > 0 || note)) {
    const key = JSON.stringify([layer.legend, layer.note]);
    groups.set(key, [...(groups.get(key) ?? []), layer]);
  }
  const blocks = [...groups.values()].map((group) => {
    const [{ legend, note }] = group;
    return make("div", { class: "legend" },
      make("h3", {}, group.map((layer) => layer.title).join(", ")),
      legend.length ? make("ul", {}, ...legend.map(({ colour, label }) => make("li", {}, swatch(colour), label))) : null,
      note ? make("p", { class: "soft small" }, note) : null,
    );
  });
  if (hatched) blocks.push(make("div", { class: "legend" }, make("ul", {}, make("li", {}, make("span", { class: "swatch hatched" }), "flagged sheet: the 90\u00a0% is not promised"))));
  if (!layers.length) blocks.unshift(make("p", { class: "soft" }, "No layer is shown."));
  else if (!groups.size) blocks.unshift(make("p", { class: "soft" }, `${layers.map((layer) => layer.title).join(", ")}: nothing to explain.`));
  return blocks;
}

function swatch(colour) {
  const square = make("span", { class: "swatch" });
  square.style.backgroundColor = colour;
  return square;
}
