// On paper the map is a picture: a canvas of WebGL is empty by the time it is printed.

import { make, part } from "./elements.js";

/** Put a picture of what is shown in place of the map while the page is printed. */
export function printable(maps) {
  window.addEventListener("beforeprint", () => {
    part("printed")?.remove();
    part("stage").append(make("img", { id: "printed", alt: "The map", src: picture(maps()).toDataURL("image/png") }));
  });
  window.addEventListener("afterprint", () => part("printed")?.remove());
}

function picture([map, over]) {
  map.redraw(); // what a canvas of WebGL holds is gone after the frame in which it was drawn
  const { width, height } = map.getCanvas();
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, width, height);
  pen.drawImage(map.getCanvas(), 0, 0);
  if (over) {
    over.redraw();
    const left = Math.round((width * Number.parseFloat(part("stage").style.getPropertyValue("--at"))) / 100);
    pen.fillRect(left, 0, width - left, height);
    if (left < width) pen.drawImage(over.getCanvas(), left, 0, width - left, height, left, 0, width - left, height);
    pen.fillRect(left - 1, 0, 3, height);
  }
  const scale = width / map.getContainer().clientWidth;
  pen.scale(scale, scale);
  for (const polygon of part("drawing").querySelectorAll("polygon")) {
    const points = polygon.getAttribute("points").split(" ").map((text) => text.split(",").map(Number));
    pen.beginPath();
    for (const [x, y] of points) pen.lineTo(x, y);
    pen.closePath();
    const { stroke, strokeWidth } = getComputedStyle(polygon);
    pen.strokeStyle = stroke;
    pen.lineWidth = Number.parseFloat(strokeWidth);
    pen.stroke();
  }
  drawScale(pen, map.getContainer());
  return canvas;
}

/** The scale bar as it stands on the screen, in the lower left corner. */
function drawScale(pen, container) {
  const bar = container.querySelector(".maplibregl-ctrl-scale");
  if (!bar) return;
  const [left, bottom, width] = [12, container.clientHeight - 12, bar.clientWidth];
  pen.fillStyle = "rgb(255 255 255 / 85%)";
  pen.fillRect(left, bottom - 18, width, 18);
  pen.strokeStyle = pen.fillStyle = "#1b1f23";
  pen.lineWidth = 2;
  pen.beginPath();
  for (const [x, y] of [[0, -18], [0, 0], [width, 0], [width, -18]]) pen.lineTo(left + x, bottom + y);
  pen.stroke();
  pen.font = "12px system-ui, sans-serif";
  pen.fillText(bar.textContent, left + 6, bottom - 5);
}
