// One map of MapLibre: the layers of the server as a stack, the sheets for which nothing is promised, and a camera.

import { hasFlagged } from "./flagged.js";
import { AttributionControl, Map as GlMap, ScaleControl } from "./maplibre-gl.mjs";

const BEYOND_FINEST = 4; // zooms that a pixel may be enlarged by
const BESIDE_PX = 28; // room around the whole map
const HATCH_PX = 16;

/** Smooth only what is a picture: a pixel of classes has one colour, which is in the legend. */
const smooth = (layer) => layer.kind === "image" || layer.kind === "hillshade";

/**
 * A map in an element.
 * @param {HTMLElement} container
 * @param {object} info the server's map.json
 * @param {{camera: object|null, lead: boolean}} options camera: {lon, lat, zoom}, or null for the whole map;
 *   lead: whether people move it, or another map does
 */
export function createMap(container, info, { camera, lead }) {
  const finest = Math.max(...info.layers.map((layer) => layer.max_zoom));
  const map = new GlMap({
    container,
    style: styleOf(info),
    ...(camera ? { center: [camera.lon, camera.lat], zoom: camera.zoom } : { bounds: info.bounds_deg, fitBoundsOptions: { padding: BESIDE_PX } }),
    maxZoom: Math.min(24, finest + BEYOND_FINEST),
    maxPitch: 0,
    renderWorldCopies: false,
    dragRotate: false,
    touchPitch: false,
    pitchWithRotate: false,
    attributionControl: false,
    interactive: lead,
    fadeDuration: 0,
    locale: { "Map.Title": `Map of ${info.name}: arrow keys move it, Enter tells the height at its middle, ? lists all keys` },
  });
  if (lead) {
    map.keyboard.disableRotation();
    map.touchZoomRotate.disableRotation();
    map.addControl(new ScaleControl({ maxWidth: 120, unit: "metric" }), "bottom-left");
    if (info.basemap && info.attribution) {
      const text = document.createElement("span");
      text.textContent = info.attribution;
      map.addControl(new AttributionControl({ compact: false, customAttribution: text.innerHTML }), "bottom-right");
    }
  }
  map.on("load", () => hatch(map, info.flagged));
  return map;
}

/** Show the whole map. */
export const fit = (map, info) => map.fitBounds(info.bounds_deg, { padding: BESIDE_PX });

/**
 * Show layers of the stack.
 * @param {{id: string, opacity: number, visible: boolean}[]} stack from the top
 * @param {boolean} hatched whether to hatch the flagged sheets
 */
export function showStack(map, stack, hatched) {
  let above = map.getLayer("flagged") ? "flagged" : undefined;
  for (const one of stack) {
    map.setLayoutProperty(one.id, "visibility", one.visible ? "visible" : "none");
    map.setPaintProperty(one.id, "raster-opacity", one.opacity);
    map.moveLayer(one.id, above);
    above = one.id;
  }
  for (const id of ["flagged", "flagged-edge"]) if (map.getLayer(id)) map.setLayoutProperty(id, "visibility", hatched ? "visible" : "none");
}

function styleOf(info) {
  const here = new URL(".", document.baseURI).href; // with its braces, the address of a tile is no URL yet
  const sources = {};
  const layers = [];
  if (info.basemap) {
    sources.basemap = { type: "raster", tiles: [info.basemap], tileSize: 256, maxzoom: 19 };
    layers.push({ id: "basemap", type: "raster", source: "basemap" });
  }
  for (const layer of info.layers) {
    sources[layer.id] = {
      type: "raster",
      tiles: [here + layer.tiles],
      tileSize: layer.tile_px,
      minzoom: layer.min_zoom,
      maxzoom: layer.max_zoom,
      bounds: info.bounds_deg,
    };
    layers.push({
      id: layer.id,
      type: "raster",
      source: layer.id,
      layout: { visibility: layer.visible ? "visible" : "none" },
      paint: { "raster-opacity": layer.opacity, "raster-resampling": smooth(layer) ? "linear" : "nearest", "raster-fade-duration": 0 },
    });
  }
  return { version: 8, sources, layers };
}

function hatch(map, flagged) {
  if (!hasFlagged(flagged)) return;
  map.addImage("hatch", stripes(), { pixelRatio: 2 });
  map.addSource("flagged", { type: "geojson", data: flagged });
  map.addLayer({ id: "flagged", type: "fill", source: "flagged", paint: { "fill-pattern": "hatch" } });
  map.addLayer({ id: "flagged-edge", type: "line", source: "flagged", paint: { "line-color": "#fff", "line-width": 1.5 } });
}

/** Diagonal stripes, white beside black so that they show on any colour. */
function stripes() {
  const side = 2 * HATCH_PX;
  const canvas = Object.assign(document.createElement("canvas"), { width: side, height: side });
  const pen = canvas.getContext("2d", { willReadFrequently: true }); // or the graphics card is waited for
  for (const [colour, shift] of [["rgba(0,0,0,.6)", 0], ["rgba(255,255,255,.75)", 3]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = 2;
    for (const start of [-side, 0, side]) {
      pen.beginPath();
      pen.moveTo(start + shift - 2, side + 2);
      pen.lineTo(start + shift + side + 2, -2);
      pen.stroke();
    }
  }
  return pen.getImageData(0, 0, side, side);
}
