// Numbers as people read them: a sensible number of digits, a real minus, and words where there is no number.

export const UNKNOWN = "unknown";

/** A number with a fixed number of decimals, thousands parted by narrow spaces; null and NaN are "unknown". */
export function number(value, digits = 1) {
  if (value === null || value === undefined || !Number.isFinite(value)) return UNKNOWN;
  const [whole, part] = Math.abs(value).toFixed(digits).split(".");
  const grouped = whole.replace(/\B(?=(\d{3})+$)/g, "\u202f") + (part ? `.${part}` : "");
  return value < 0 && Number(grouped.replaceAll("\u202f", "")) !== 0 ? `\u2212${grouped}` : grouped;
}

/** Metres to a decimetre, which is finer than any map of heights is right. */
export function metres(value) {
  const text = number(value, 1);
  return text === UNKNOWN ? text : `${text}\u00a0m`;
}

/** The ends of an interval in metres, or "unknown" where one of them is. */
export function interval(lower, upper) {
  const ends = [number(lower, 1), number(upper, 1)];
  return ends.includes(UNKNOWN) ? UNKNOWN : `${ends[0]} to ${ends[1]}\u00a0m`;
}

/** Square metres as m², ha or km², three digits or so. */
export function area(value_m2) {
  if (value_m2 === null || value_m2 === undefined || !Number.isFinite(value_m2)) return UNKNOWN;
  const [scaled, unit] =
    value_m2 < 1e4 ? [value_m2, "m²"] : value_m2 < 1e6 ? [value_m2 / 1e4, "ha"] : [value_m2 / 1e6, "km²"];
  return `${number(scaled, unit === "m²" || scaled >= 100 ? 0 : scaled >= 10 ? 1 : 2)}\u00a0${unit}`;
}

const ALL = 1 - 1e-6; // nearer to one is the rounding of sums

/** A fraction of one as per cent; what is not quite nothing or not quite all is not rounded to it. */
export function percent(fraction) {
  if (fraction === null || fraction === undefined || !Number.isFinite(fraction)) return UNKNOWN;
  if (fraction > 0 && fraction < 0.001) return "under 0.1\u00a0%";
  if (fraction > 0.999 && fraction < ALL) return "over 99.9\u00a0%";
  return `${number(100 * fraction, fraction === 0 || fraction >= ALL ? 0 : 1)}\u00a0%`;
}

/** The ends of a range of fractions as per cent, or "unknown" where one of them is. */
export function percents(lower, upper) {
  const ends = [percent(lower), percent(upper)];
  return ends.includes(UNKNOWN) ? UNKNOWN : `${ends[0].replace("\u00a0%", "")} to ${ends[1]}`;
}
