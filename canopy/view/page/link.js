// What is shown as the part of the address after #, so that a link leads to the same view.
//
//   #view=LON,LAT,ZOOM & layers=ID:PERCENT,-ID:PERCENT (from the top; - is hidden) & swipe=LEFT,RIGHT,PERCENT
//    & polygon=LON,LAT;LON,LAT;… & hatch=no

const DEGREES = 7; // decimals: a centimetre

/**
 * What an address asks for; a part that is missing or makes no sense is null.
 * @param {string} hash with or without its #
 * @param {string[]} ids of the layers that there are
 */
export function read(hash, ids) {
  const parts = new Map(
    hash.replace(/^#/, "").split("&").filter(Boolean).map((text) => {
      const at = text.indexOf("=");
      return at < 0 ? [text, ""] : [text.slice(0, at), text.slice(at + 1)];
    }),
  );
  const strange = [];
  const known = (text) => {
    const id = decode(text);
    if (!ids.includes(id)) strange.push(id);
    return ids.includes(id) ? id : null;
  };
  return {
    view: readView(parts.get("view")),
    layers: parts.has("layers") ? readLayers(parts.get("layers"), known) : null,
    swipe: readSwipe(parts.get("swipe"), known),
    polygon: readPolygon(parts.get("polygon")),
    hatched: parts.get("hatch") !== "no",
    strange,
  };
}

/** The address of what is shown, as `read` takes it. */
export function write({ view, layers, swipe, polygon, hatched }) {
  const parts = [
    `view=${view.lon.toFixed(DEGREES)},${view.lat.toFixed(DEGREES)},${view.zoom.toFixed(2)}`,
    `layers=${layers.map((one) => `${one.visible ? "" : "-"}${encodeURIComponent(one.id)}:${Math.round(100 * one.opacity)}`).join(",")}`,
  ];
  if (swipe) parts.push(`swipe=${encodeURIComponent(swipe.left)},${encodeURIComponent(swipe.right)},${Math.round(swipe.at)}`);
  if (polygon) parts.push(`polygon=${polygon.map(([lon, lat]) => `${lon.toFixed(DEGREES)},${lat.toFixed(DEGREES)}`).join(";")}`);
  if (!hatched) parts.push("hatch=no");
  return `#${parts.join("&")}`;
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // a stray % is no escape: the id is then simply not known
  }
}

const place = (lon, lat) => Math.abs(lon) <= 180 && Math.abs(lat) <= 85.06;

function readView(text) {
  const [lon, lat, zoom] = (text ?? "").split(",").map(Number.parseFloat);
  return place(lon, lat) && zoom >= 0 && zoom <= 24 ? { lon, lat, zoom } : null;
}

function readLayers(text, known) {
  const found = [];
  for (const one of text.split(",").filter(Boolean)) {
    const visible = !one.startsWith("-");
    const [name, percent] = (visible ? one : one.slice(1)).split(":");
    const id = known(name);
    const opacity = Number.parseFloat(percent) / 100;
    if (id !== null && !found.some((other) => other.id === id)) {
      found.push({ id, visible, opacity: opacity >= 0 && opacity <= 1 ? opacity : null });
    }
  }
  return found;
}

function readSwipe(text, known) {
  if (!text) return null;
  const [left, right, at] = text.split(",");
  const ids = [known(left), known(right ?? "")];
  const percent = Number.parseFloat(at);
  return ids.includes(null) ? null : { left: ids[0], right: ids[1], at: percent >= 0 && percent <= 100 ? percent : 50 };
}

function readPolygon(text) {
  const corners = (text ?? "").split(";").filter(Boolean).map((corner) => corner.split(",").map(Number.parseFloat));
  return corners.length >= 3 && corners.every(([lon, lat]) => place(lon, lat)) ? corners.map(([lon, lat]) => [lon, lat]) : null;
}
