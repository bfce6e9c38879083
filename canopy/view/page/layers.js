// The list of layers: shown or not, how opaque, and which lies above which.

import { make, part } from "./elements.js";

/**
 * Build the list anew; it is short, and the element in focus keeps the focus.
 * @param {{id: string, title: string, opacity: number, visible: boolean}[]} stack from the top
 * @param {boolean} swiping two layers of it are shown side by side: which, is chosen elsewhere
 * @param {{show: Function, fade: Function, move: Function}} act called with an id and a value
 */
export function listLayers(stack, swiping, act) {
  const focused = document.activeElement?.dataset?.control;
  part("layers").replaceChildren(...stack.map((one, i) => entry(one, i, stack.length, swiping, act)));
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

function mover(one, name, where, disabled, act) {
  const button = make("button", { type: "button", class: "icon", title: `One ${where}`, "aria-label": `Move ${one.title} ${name}`, "data-control": `${name} ${one.id}`, disabled },
    make("svg:svg", { viewBox: "0 0 24 24", "aria-hidden": "true" }, make("svg:path", { d: name === "up" ? "m6 14 6-6 6 6" : "m6 10 6 6 6-6" })));
  button.addEventListener("click", act);
  return button;
}
