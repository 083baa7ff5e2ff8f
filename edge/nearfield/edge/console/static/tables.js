// The table of regions, which says what the map shows, and that of endpoints, by model.

import { changeGlyph, get, h, keep, name, say, set, sparkline, updateSparkline } from "./dom.js";
import { age, count, HEALTH, healthOf, list, NONE, plural, rate, time, usd } from "./words.js";

const MINUTE = 60;
const PARTS = [
  ["way", "way", "rtt_s"],
  ["wait", "wait", "wait_s"],
  ["engine", "engine", "first_byte_s"],
  ["cold", "cold start", "cold_start_s"],
];

export class Regions {
  #body = get("regions").tBodies[0];
  #past = new Map(); // rates of the last minute, by region
  #select;

  /** select: called with a region's name when it is chosen, null when it no longer is. */
  constructor(select) {
    this.#select = select;
  }

  update(state, selected) {
    const past = new Map();
    if (state.traffic.seconds === 0) return this.draw(state, selected); // nothing is counted yet
    for (const { name, rps } of state.regions) {
      past.set(name, [...(this.#past.get(name) ?? []), rps].slice(-MINUTE));
    }
    this.#past = past;
    this.draw(state, selected);
  }

  draw(state, selected) {
    keep(this.#body, state.regions, (region) => region.name, (region) => this.#make(region), (row, region) =>
      this.#update(row, region, selected));
  }

  #make(region) {
    const choose = h("button", { type: "button", class: "plain" }, name(region.name));
    const row = h("tr", {},
      h("th", { scope: "row" }, h("div", { class: "of" },
        h("span", { class: "glyph-at" }),
        h("span", { class: "two" },
          h("span", {}, choose, h("span", { class: "tag" }, "home")),
          h("span", { class: "soft small about" })),
        h("span", { class: "small why" }))),
      h("td", {}, h("span", { class: "flowing" }, sparkline([], MINUTE), h("span", { class: "value" }))),
      h("td", { class: "number" }));
    choose.addEventListener("click", () =>
      this.#select(choose.getAttribute("aria-pressed") === "true" ? null : region.name));
    return row;
  }

  #update(row, region, selected) {
    const health = healthOf(region);
    const [head, traffic, away] = row.children;
    set(row, "class", `is-${health}`);
    changeGlyph(head.querySelector(".glyph-at"), health);
    set(head.querySelector("button"), "aria-pressed", String(region.name === selected));
    set(head.querySelector(".tag"), "hidden", !region.home);
    say(head.querySelector(".about"), `${region.city}, ${region.jurisdiction} · ${HEALTH[health]}`);
    const why = head.querySelector(".why");
    const wrong = region.health !== "up";
    set(why, "hidden", !wrong);
    say(why, wrong ? `for ${age(region.for_s)}: ${region.reason}` : "");
    updateSparkline(traffic.querySelector("svg"), this.#past.get(region.name) ?? [], MINUTE);
    say(traffic.querySelector(".value"), `${rate(region.rps)}/s`);
    say(away, region.home ? "here" : time(region.rtt_s));
  }
}

export class Endpoints {
  #table = get("endpoints-table");
  #note = get("endpoints-note");

  constructor() {
    get("parts").append(...PARTS.map(([kind, words]) => h("li", {}, h("span", { class: `swatch part-${kind}` }), words)));
  }

  update(state, selected) {
    const full = state.viewer.tenant === null;
    set(this.#table, "class", full ? null : "partial");
    set(get("parts"), "hidden", !full);
    const shown = state.endpoints.filter((endpoint) => selected === null || endpoint.region === selected);
    const models = new Map();
    for (const endpoint of shown) {
      if (!models.has(endpoint.model)) models.set(endpoint.model, []);
      models.get(endpoint.model).push(endpoint);
    }
    const groups = [...models].sort(([a], [b]) => (a < b ? -1 : 1)).map(([model, endpoints]) => ({ model, endpoints }));
    this.#bodies(groups);
    const hidden = state.endpoints.length - shown.length;
    say(this.#note, state.endpoints.length === 0 ? "None is known yet." : hidden > 0 ? `Only those of ${selected}: ${plural(hidden, "other")} not shown.` : "");
  }

  #bodies(groups) {
    keep(this.#table, groups, (group) => group.model, makeGroup, updateGroup, this.#table.tHead);
  }
}

function makeGroup({ model }) {
  return h("tbody", {},
    h("tr", { class: "group" },
      h("th", { scope: "rowgroup", colspan: 10 }, name(model, { class: "model" }), h("span", { class: "soft kind" }))));
}

function updateGroup(body, { endpoints }) {
  const title = body.firstElementChild;
  const kinds = [...new Set(endpoints.map((e) => e.kind))].filter((kind) => kind !== "other");
  const total = endpoints.reduce((sum, e) => sum + e.rps, 0);
  say(title.querySelector(".kind"), [list(kinds), `${rate(total)}/s`].filter(Boolean).join(" · "));
  // A cold start takes so much longer that beside it nothing else would show.
  const warm = endpoints.filter((e) => e.replicas > 0);
  const most = Math.max(0.001, ...(warm.length ? warm : endpoints).map((e) => e.predicted_s ?? 0));
  const order = [...endpoints].sort((a, b) => (a.name < b.name ? -1 : 1));
  keep(body, order, (endpoint) => endpoint.name, makeEndpoint, (row, endpoint) => updateEndpoint(row, endpoint, most), title);
}

function makeEndpoint(endpoint) {
  return h("tr", {},
    h("th", { scope: "row" }, name(endpoint.region), h("span", { class: "soft small narrow" })),
    h("td", { class: "wide" }, name(endpoint.version)),
    h("td", { class: "wide" }, name(endpoint.pool), h("span", { class: "soft small products" })),
    h("td", { class: "health" }, h("span", { class: "glyph-at" }), h("span", { class: "word" })),
    h("td", { class: "number full" }),
    h("td", { class: "full" }, h("span", { class: "load" },
      h("span", { class: "meter", "aria-hidden": "true" }, h("span", { class: "running" }), h("span", { class: "queued" })),
      h("span", { class: "value" }))),
    h("td", { class: "number" }),
    h("td", { class: "full predicted" }, h("span", { class: "prediction" },
      h("span", { class: "bar", "aria-hidden": "true" }, ...PARTS.map(([kind]) => h("span", { class: `part-${kind}` }))),
      h("span", { class: "value" }), h("span", { class: "next" })), h("span", { class: "soft small instead" })),
    h("td", { class: "number" }),
    h("td", { class: "number" }));
}

function updateEndpoint(row, endpoint, most) {
  const cells = row.children;
  const health = healthOf(endpoint);
  set(row, "class", `is-${health}${endpoint.verdict === "chosen" ? " chosen" : ""}`);
  const aside = [endpoint.current ? null : "not current", endpoint.products ? `for ${list(endpoint.products)}` : null];
  say(cells[0].querySelector(".narrow"), `@${endpoint.version} · ${endpoint.pool}`);
  say(cells[2].querySelector(".products"), aside.filter(Boolean).join(", "));
  changeGlyph(cells[3].querySelector(".glyph-at"), health);
  const returning = endpoint.health === "up" && endpoint.weight < 0.995;
  say(cells[3].querySelector(".word"), returning ? `returning, ${Math.round(endpoint.weight * 100)} %` : HEALTH[health]);
  say(cells[4], endpoint.replicas === null ? NONE : count(endpoint.replicas));
  set(cells[4], "title", endpoint.scaling);
  updateLoad(cells[5], endpoint);
  say(cells[6], time(endpoint.rtt_s));
  updatePrediction(cells[7], endpoint, most);
  say(cells[8], usd(endpoint.unit_usd));
  say(cells[9], `${rate(endpoint.rps)}/s`);
}

function updateLoad(cell, { load, slots, max_queued }) {
  if (load === null) return;
  const running = Math.min(load, slots);
  const queued = Math.max(0, load - slots);
  const [bar, value] = cell.firstElementChild.children;
  set(bar, "class", `meter${slots === 0 ? " none" : ""}`);
  bar.children[0].style.width = `${slots ? (100 * running) / slots : 0}%`;
  bar.children[1].style.width = `${max_queued ? Math.min(100, (100 * queued) / max_queued) : queued ? 100 : 0}%`;
  say(value, queued ? `${running} of ${slots}, ${queued} wait` : `${running} of ${slots}`);
}

function updatePrediction(cell, endpoint, most) {
  const [line, instead] = cell.children;
  const [bar, value, next] = line.children;
  const predicted = endpoint.predicted_s;
  set(line, "hidden", predicted === null);
  say(instead, predicted === null ? endpoint.reason || NONE : "");
  if (predicted === null) return;
  const words = [];
  set(bar, "class", predicted > most * 1.001 ? "bar over" : "bar");
  const scale = Math.max(most, predicted);
  PARTS.forEach(([, label, field], i) => {
    const seconds = endpoint[field] ?? 0;
    bar.children[i].style.width = `${(100 * seconds) / scale}%`;
    if (seconds > 0) words.push(`${time(seconds)} ${label}`);
  });
  set(line, "title", words.join(" + "));
  say(value, time(predicted));
  say(next, endpoint.verdict === "chosen" ? "next" : "");
  set(line, "data-why", endpoint.reason || null);
}
