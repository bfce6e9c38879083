// What the page asks of the server that it came from; errors are one line that a reader can act on.

/** The server said no, or nothing; `message` is for the reader. */
export class ServerError extends Error {}

/** A picture of the map as JSON: layers, bounds, notices. */
export const mapInfo = () => ask("map.json");

/** The values under a place in degrees. */
export const pointAt = (lon, lat, signal) => ask(`point?${new URLSearchParams({ lon, lat })}`, { signal });

/** Statistics of a polygon, given as corners in degrees without the first one again. */
export const statisticsOf = (corners, signal) =>
  ask("statistics", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ type: "Polygon", coordinates: [[...corners, corners[0]]] }),
    signal,
  });

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer; is canopy view still running?");
  }
  if (answer.ok) return answer.json();
  let detail = null;
  try {
    detail = (await answer.json()).detail;
  } catch {
    // no JSON: a proxy in between, say
  }
  throw new ServerError(typeof detail === "string" ? detail : `The server says ${answer.status} to ${path.split("?")[0]}`);
}
