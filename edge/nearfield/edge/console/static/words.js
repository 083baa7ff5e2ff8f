// Numbers and states in words.

export const NONE = "–";

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const one = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const two = new Intl.NumberFormat("en", { maximumFractionDigits: 2 });
const clock = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });
const day = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });

/** A duration of a request: three figures at most. */
export function time(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  const ms = seconds * 1000;
  if (ms < 0.95) return `${two.format(ms)} ms`;
  if (ms < 9.95) return `${one.format(ms)} ms`;
  if (ms < 999.5) return `${whole.format(ms)} ms`;
  if (seconds < 9.95) return `${two.format(seconds)} s`;
  if (seconds < 120) return `${one.format(seconds)} s`;
  return age(seconds);
}

/** How long something lasts already, in one unit. */
export function age(seconds) {
  if (seconds < 90) return `${whole.format(seconds)} s`;
  if (seconds < 90 * 60) return `${whole.format(seconds / 60)} min`;
  if (seconds < 36 * 3600) return `${whole.format(seconds / 3600)} h`;
  return `${whole.format(seconds / 86400)} days`;
}

/** Requests per second, without the unit. */
export function rate(perSecond) {
  if (perSecond < 0.05) return "0";
  if (perSecond < 9.95) return one.format(perSecond);
  if (perSecond < 9999.5) return whole.format(perSecond);
  return `${one.format(perSecond / 1000)}k`;
}

export function share(part, all) {
  const percent = all > 0 ? (100 * part) / all : 0;
  return percent > 0 && percent < 0.1 ? "< 0.1 %" : `${one.format(percent)} %`;
}

export function usd(amount) {
  if (!amount) return NONE;
  return `$${amount < 0.995 ? Number(amount.toPrecision(2)) : amount.toFixed(2)}`;
}

export function bytes(count) {
  if (count < 1000) return `${count} B`;
  return count < 1e6 ? `${one.format(count / 1e3)} kB` : `${one.format(count / 1e6)} MB`;
}

export const count = (number) => whole.format(number);
export const at = (unixSeconds) => clock.format(unixSeconds * 1000);
export const moment = (unixSeconds) => day.format(unixSeconds * 1000);

/** What a health means, in a word. */
export const HEALTH = {
  up: "answers",
  ejected: "ejected",
  down: "down",
  unknown: "not probed yet",
  draining: "draining",
};

/** A region's or endpoint's health, with draining as one of its kind. */
export const healthOf = (what) => (what.draining && what.health === "up" ? "draining" : what.health);

export function list(names) {
  if (names.length < 2) return names.join("");
  return `${names.slice(0, -1).join(", ")} and ${names[names.length - 1]}`;
}

/** The state of the world in one sentence, and what to make of it in another. */
export function headline(state) {
  const { regions, endpoints } = state;
  if (regions.length === 0) return ["No regions are known", "The gateway's file names none."];
  const of = (health) => regions.filter((region) => region.health === health);
  const [up, down, ejected] = [of("up"), of("down"), of("ejected")];
  const bad = [...down, ...ejected];
  const lost = endpoints.filter((e) => e.health !== "up" && up.some((r) => r.name === e.region));
  if (up.length === regions.length) {
    const all = regions.length === 1 ? "The region answers" : `All ${regions.length} regions answer`;
    if (lost.length === 0) return [all, `${plural(endpoints.length, "endpoint")} of ${plural(modelsOf(endpoints), "model")}.`];
    return [`${all}, not all endpoints do`, `${list(lost.map((e) => e.name))} ${lost.length === 1 ? "does" : "do"} not.`];
  }
  if (up.length === 0 && bad.length === 0) return ["Probing the regions", "None has answered yet."];
  if (up.length === 0) {
    return ["No region is well", ejected.length ? "Requests are still tried where probes are answered." : "Requests are refused until one is back."];
  }
  if (bad.length === 0) return [`${up.length} of ${regions.length} regions answer`, `${list(of("unknown").map((r) => r.name))} ${of("unknown").length === 1 ? "has" : "have"} not been probed yet.`];
  const said = down.length ? `${list(down.map((r) => r.name))} ${down.length === 1 ? "is" : "are"} down` : `${list(ejected.map((r) => r.name))} ${ejected.length === 1 ? "is" : "are"} ejected`;
  return [said, `Requests go to ${list(up.map((r) => r.name))}.`];
}

export const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
const modelsOf = (endpoints) => new Set(endpoints.map((e) => e.model)).size;
