// The panel: beside the map where there is room, a sheet at the bottom of a phone.

import { part } from "./elements.js";

const TAP_PX = 6; // a finger that moves less than this has tapped

const phone = window.matchMedia("(max-width: 46rem)");

export const isPhone = () => phone.matches;

/** Open or close the panel; on a wide screen a closed panel leaves the whole room to the map. */
export function openPanel(open) {
  document.body.classList.toggle("panel-open", open);
  part("sheet").setAttribute("aria-expanded", String(open));
  part("sheet").querySelector(".label").textContent = open ? "Hide the layers and legend" : "Show the layers and legend";
  part("panel").style.removeProperty("height");
  // What is out of sight is out of the way of the Tab key too.
  part("content").inert = !open;
}

export const togglePanel = () => openPanel(!document.body.classList.contains("panel-open"));

/** Make the sheet's handle work, by tap, drag and key; `changed` is called when the room for the map is another. */
export function startPanel(changed) {
  const handle = part("sheet");
  let start = null;
  let dragged = false; // the click that ends a drag is none
  handle.addEventListener("pointerdown", (event) => {
    if (!isPhone()) return;
    start = { y: event.clientY, height: part("panel").offsetHeight, moved: false };
    handle.setPointerCapture(event.pointerId);
  });
  handle.addEventListener("pointermove", (event) => {
    if (start === null) return;
    const by = start.y - event.clientY;
    if (Math.abs(by) > TAP_PX) start.moved = true;
    if (start.moved) part("panel").style.height = `${start.height + by}px`;
  });
  handle.addEventListener("pointerup", (event) => {
    const [was, by] = [start, start ? start.y - event.clientY : 0];
    start = null;
    if (!was?.moved) return;
    const stay = part("panel").offsetHeight;
    openPanel(by > 0);
    if (by > 0) part("panel").style.height = `${stay}px`;
    dragged = true;
    setTimeout(() => (dragged = false));
  });
  handle.addEventListener("pointercancel", () => {
    start = null;
    part("panel").style.removeProperty("height");
  });
  handle.addEventListener("click", () => dragged || togglePanel());
  phone.addEventListener("change", () => openPanel(!phone.matches));
  new ResizeObserver(changed).observe(part("stage"));
  openPanel(!phone.matches);
}
