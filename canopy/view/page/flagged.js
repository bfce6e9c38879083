// Sheets for which nothing is promised, as the server tells them: GeoJSON of polygons in degrees, or null.

const ringsOf = ({ type, coordinates }) => (type === "Polygon" ? coordinates : coordinates.flat());

export const hasFlagged = (flagged) => Boolean(flagged?.features?.length);

/** Whether a place lies in one of them: a line from it to the east then crosses an odd number of sides. */
export const isFlagged = (flagged, { lng, lat }) =>
  hasFlagged(flagged) && flagged.features.some(({ geometry }) => ringsOf(geometry).map((ring) => crossings(ring, lng, lat)).reduce((a, b) => a + b) % 2 === 1);

/** Whether a polygon, given as corners, may reach into one of them: their boxes meet. */
export const mayBeFlagged = (flagged, corners) =>
  hasFlagged(flagged) && flagged.features.some(({ geometry }) => meet(boxOf(corners), boxOf(ringsOf(geometry).flat())));

function crossings(ring, lng, lat) {
  let count = 0;
  for (let i = 0; i + 1 < ring.length; i++) {
    const [[x0, y0], [x1, y1]] = [ring[i], ring[i + 1]];
    if (y0 > lat !== y1 > lat && x0 + ((lat - y0) / (y1 - y0)) * (x1 - x0) > lng) count++;
  }
  return count;
}

function boxOf(corners) {
  const [xs, ys] = [corners.map(([x]) => x), corners.map(([, y]) => y)];
  return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
}

const meet = (a, b) => a[0] <= b[2] && b[0] <= a[2] && a[1] <= b[3] && b[1] <= a[3];
