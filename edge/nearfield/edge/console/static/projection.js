// Where places are on the map, and which of its dots are land.
//
// Natural Earth's projection (Patterson, Šavrič and Jenny), around 11° east: so the Bering Strait
// is the edge, and no continent is cut.

const MIDDLE = 11;
const NORTH = 78;
const SOUTH = -56;
const RADIANS = Math.PI / 180;

const across = (phi) => {
  const p2 = phi * phi, p4 = p2 * p2;
  return 0.8707 - 0.131979 * p2 + p4 * (-0.013791 + p4 * (0.003971 * p2 - 0.001529 * p4));
};
const up = (phi) => {
  const p2 = phi * phi, p4 = p2 * p2;
  return phi * (1.007226 + p2 * (0.015085 + p4 * (-0.044475 + 0.028874 * p2 - 0.005916 * p4)));
};

const HALF = Math.PI * across(0);
const TOP = up(NORTH * RADIANS);
const BOTTOM = up(SOUTH * RADIANS);

/** Height over width. */
export const ASPECT = (TOP - BOTTOM) / (2 * HALF);

const turned = (longitude) => ((longitude - MIDDLE + 540) % 360) - 180;

/** Degrees to pixels on a map of this width. */
export function place(latitude, longitude, width) {
  const phi = Math.max(SOUTH, Math.min(NORTH, latitude)) * RADIANS;
  const scale = width / (2 * HALF);
  return [
    (HALF + turned(longitude) * RADIANS * across(phi)) * scale,
    (TOP - up(phi)) * scale,
  ];
}

/** The latitude, in degrees, of a height on a map of this width. */
function latitudeOf(y, width) {
  const wanted = TOP - (y * 2 * HALF) / width;
  let [low, high] = [SOUTH * RADIANS, NORTH * RADIANS];
  for (let i = 0; i < 24; i++) {
    const middle = (low + high) / 2;
    if (up(middle) < wanted) low = middle;
    else high = middle;
  }
  return ((low + high) / 2) / RADIANS;
}

/** Rings as they are kept: tenths of degrees, each point as its distance from the one before.
 * Shores beyond 180° go on there. */
export function unpack(rings) {
  return rings.map((flat) => {
    const points = [];
    let x = 0, y = 0;
    for (let i = 0; i < flat.length; i += 2) {
      x += flat[i];
      y += flat[i + 1];
      points.push([x / 10, y / 10]);
    }
    return points;
  });
}

/** Land as dots, `step` pixels apart: the data of one path, to be stroked with round caps. */
export function dots(rings, width, step) {
  const rise = step * 0.866; // rows of a hexagonal grid
  const path = [];
  for (let row = 0; (row + 0.5) * rise < width * ASPECT; row++) {
    const y = (row + 0.5) * rise;
    const latitude = latitudeOf(y, width);
    const shores = crossings(rings, latitude);
    const half = Math.PI * across(latitude * RADIANS) * (width / (2 * HALF));
    const perDegree = half / 180;
    const offset = row % 2 ? step / 2 : 0;
    for (let x = offset; x < width; x += step) {
      const degrees = (x - width / 2) / perDegree;
      if (Math.abs(degrees) > 180) continue;
      const longitude = ((degrees + MIDDLE + 540) % 360) - 180;
      if (isLand(shores, longitude)) path.push(`M${x.toFixed(1)} ${y.toFixed(1)}h.01`);
    }
  }
  return path.join("");
}

/** Where a parallel meets the shores, from west to east. */
function crossings(rings, latitude) {
  const found = [];
  for (const ring of rings) {
    for (let i = 0, j = ring.length - 1; i < ring.length; j = i++) {
      const [x0, y0] = ring[j], [x1, y1] = ring[i];
      if (y0 > latitude !== y1 > latitude) found.push(x0 + ((latitude - y0) / (y1 - y0)) * (x1 - x0));
    }
  }
  return found.sort((a, b) => a - b);
}

/** Lakes are rings too, and may be kept a turn apart from their land: all are counted together. */
function isLand(shores, longitude) {
  let crossed = 0;
  for (const turn of [-360, 0, 360]) {
    for (let i = 0; i < shores.length && shores[i] < longitude + turn; i++) crossed++;
  }
  return crossed % 2 === 1;
}
