// The list of layers: shown or not, how opaque, and which lies above which.

import { make, part } from "./elements.js";

/**
 * Build the list anew; it is short, and the element in focus keeps the focus.
 * @param {{id: string, title: string, opacity: number, visible: boolean}[]} stack from the top
 * @param {{swiping: boolean, hatched: boolean|null}} how swiping: two layers are shown side by side, and which, is chosen
 *   elsewhere; hatched: whether flagged sheets are, null where there are none
 * @param {{show: Function, fade: Function, move: Function, hatch: Function}} act called with an id and a value, `hatch` with a
 *   value
 */
export function listLayers(stack, { swiping, hatched }, act) {
  const focused = document.activeElement?.dataset?.control;
  const entries = stack.map((one, i) => entry(one, i, stack.length, swiping, act));
  part("layers").replaceChildren(...(hatched === null ? [] : [hatching(hatched, act)]), ...entries);
  if (focused) {
    const again = part("layers").querySelector(`[data-control="${CSS.escape(focused)}"]`);
    // A button at the end of the list is disabled there: its sibling takes the focus.
    (again?.disabled ? again.parentElement.querySelector("button:not(:disabled)") : again)?.focus();
  }
}

function entry(one, i, count, swiping, act) {
  const box = make("input", { type: "checkbox", id: `show-${one.id}`, "data-control": `show ${one.id}`, disabled: swiping });
  box.checked = one.visible;
  box.addEventListener("change", () => act.show(one.id, box.checked));
  const up = mover(one, "up", "above", i === 0 || swiping, () => act.move(one.id, -1));
  const down = mover(one, "down", "below", i === count - 1 || swiping, () => act.move(one.id, 1));
  const shown = make("output", {}, `${Math.round(100 * one.opacity)}\u00a0%`);
  const slider = make("input", { type: "range", min: 0, max: 100, step: 5, "aria-label": `Opacity of ${one.title}`, "data-control": `fade ${one.id}` });
  slider.value = Math.round(100 * one.opacity);
  slider.addEventListener("input", () => {
    shown.value = `${slider.value}\u00a0%`;
    act.fade(one.id, slider.value / 100);
  });
  return make("li", { "data-layer": one.id },
    make("div", { class: "head" }, box, make("label", { for: `show-${one.id}` }, one.title), up, down),
    one.visible ? make("div", { class: "fade" }, slider, shown) : null,
  );
}

function hatching(hatched, act) {
  const box = make("input", { type: "checkbox", id: "hatch", "data-control": "hatch" });
  box.checked = hatched;
  box.addEventListener("change", () => act.hatch(box.checked));
  return make("li", {}, make("div", { class: "head" }, box, make("label", { for: "hatch" }, "Hatching of flagged sheets")));
}

function mover(one, name, where, disabled, act) {
  const button = make("button", { type: "button", class: "icon", title: `One ${where}`, "aria-label": `Move ${one.title} ${name}`, "data-control": `${name} ${one.id}`, disabled },
    make("svg:svg", { viewBox: "0 0 24 24", "aria-hidden": "true" }, make("svg:path", { d: name === "up" ? "m6 14 6-6 6 6" : "m6 10 6 6 6-6" })));
  button.addEventListener("click", act);
  return button;
}
