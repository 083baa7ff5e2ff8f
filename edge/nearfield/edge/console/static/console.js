// The page: what has come is kept here, and drawn when there is somebody to see it.

import { get, h, name, say, set } from "./dom.js";
import { Link } from "./link.js";
import { Log } from "./log.js";
import { Sheet } from "./request.js";
import { Endpoints, Regions } from "./tables.js";
import { at, count, headline, rate, share, time } from "./words.js";
import { World } from "./world.js";

const KEY = "nearfield.key"; // of this tab's storage
const SAY_MS = 5000; // between two announcements

const data = new URL("data/", import.meta.url);
let state = null;
let selected = null;
let link = { kind: "connecting" };
let drawing = false;

const world = new World(select);
const regions = new Regions(select);
const endpoints = new Endpoints();
const log = new Log();
const line = new Link(data, {
  state(document) {
    if (document.at_s <= (state?.at_s ?? 0)) return;
    if (state === null) queueMicrotask(follow);
    state = document;
    if (selected !== null && !state.regions.some((region) => region.name === selected)) selected = null;
    draw();
  },
  past(document) {
    log.past(document);
  },
  news(document) {
    log.news(document);
    for (const change of document.changes) {
      if (change.kind === "health") announce(`${change.subject} is ${change.after}: ${change.reason}`);
    }
  },
  link(news) {
    const before = link.kind;
    link = news;
    if (before !== news.kind) {
      if (news.kind === "lost") announce("The gateway does not answer.");
      if (news.kind === "live" && before !== "connecting") announce("The feed is back.");
    }
    draw();
  },
  denied: askForKey,
});
const sheet = new Sheet((path) => line.ask(path));

// ---- drawing ------------------------------------------------------------------------------------

/** Soon, once for all that has come; a page that nobody sees is not drawn. */
function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    drawLink();
    if (state !== null) drawState();
  });
}

function drawState() {
  const [title, words] = headline(state);
  const lost = link.kind === "lost";
  say(get("headline"), lost ? "The gateway does not answer" : title);
  say(get("subline"), lost ? `This is what was known at ${at(state.at_s)}.` : words);
  set(document.body, "data-lost", lost);
  document.title = lost ? "✕ nearfield" : `${title} · nearfield`;
  drawWhere(state.gateway, state.viewer);
  drawFigures(state.traffic, state.viewer);
  world.update(state, selected);
  regions.update(state, selected);
  endpoints.update(state, selected);
  log.state(state);
}

function drawWhere(gateway, viewer) {
  const place = gateway.region === null ? `edge${gateway.city ? `, ${gateway.city}` : ""}` : (gateway.city ?? gateway.region);
  const of = gateway.workers > 1 ? `one of ${gateway.workers} processes` : null;
  const whose = viewer.tenant === null ? null : `requests of ${viewer.tenant}`;
  const words = [place, of, whose].filter(Boolean).join(" · ");
  const where = get("where");
  if (where.dataset.words === gateway.name + words) return;
  where.dataset.words = gateway.name + words;
  where.replaceChildren(name(gateway.name, { class: "strong" }), h("span", { class: "soft" }, ` ${words}`));
}

function drawFigures(traffic, viewer) {
  const figures = [
    ["requests a second", rate(traffic.rps), traffic.rps],
    ["first byte, median", time(traffic.first_byte_p50_s)],
    ["first byte, 99th percentile", time(traffic.first_byte_p99_s)],
    ["failed", share(traffic.failed_rps, traffic.rps)],
  ];
  if (viewer.tenant === null) figures.push(["in flight", count(traffic.in_flight)]);
  const list = get("figures");
  if (list.childElementCount !== figures.length) {
    list.replaceChildren(...figures.map(() => h("div", {}, h("dt", {}), h("dd", {}))));
  }
  figures.forEach(([words, value], i) => {
    say(list.children[i].children[0], words);
    say(list.children[i].children[1], value);
  });
  set(list.children[3], "class", traffic.failed_rps > traffic.rps / 100 ? "bad" : null);
}

function drawLink() {
  const seconds = link.untilMs === undefined ? 0 : Math.max(0, Math.ceil((link.untilMs - performance.now()) / 1000));
  const again = seconds > 0 ? `, again in ${seconds} s` : "";
  const words = { connecting: "Connecting", live: "Live", asking: `Feed lost${again}`, lost: `No answer${again}`, denied: "Waiting for a key" };
  set(get("link"), "data-link", link.kind);
  say(get("link-text"), words[link.kind]);
}

setInterval(() => link.untilMs !== undefined && drawLink(), 1000);

/** Choose a region: only its endpoints are shown. null, or the same again: all of them. */
function select(region) {
  selected = region === selected ? null : region;
  announce(selected === null ? "All endpoints are shown." : `Only endpoints of ${selected} are shown.`);
  draw();
}

// ---- saying ---------------------------------------------------------------------------------------

let toSay = [];
let said = -Infinity;
let saying = null;

/** For those who hear the page: what matters, never more often than every few seconds. */
function announce(words) {
  toSay = [...toSay, words].slice(-3);
  if (saying !== null) return;
  saying = setTimeout(() => {
    saying = null;
    said = performance.now();
    say(get("announce"), toSay.join(" "));
    toSay = [];
  }, Math.max(0, said + SAY_MS - performance.now()));
}

// ---- who looks ----------------------------------------------------------------------------------

function askForKey(message, status) {
  const key = sessionStorage.getItem(KEY);
  sessionStorage.removeItem(KEY);
  link = { kind: "denied" };
  sheet.close();
  forgetAll();
  drawLink();
  if (status === 403 && key === null) {
    set(get("forget"), "hidden", true);
    say(get("headline"), "Not for you to see");
    say(get("subline"), message);
    return;
  }
  set(get("forget"), "hidden", false);
  say(get("forget"), "Give a key");
  say(get("headline"), "This console asks for a key");
  say(get("subline"), "");
  say(get("ask-problem"), key === null ? "" : message);
  get("ask-key").value = "";
  if (!get("ask").open) get("ask").showModal();
}

/** Nothing that the last key has shown stays on the page. */
function forgetAll() {
  state = null;
  selected = null;
  const empty = { gateway: { name: "", region: null, city: null, latitude: null, longitude: null, workers: 1 }, viewer: { tenant: null }, regions: [], endpoints: [], traffic: { rps: 0 } };
  regions.update(empty, null);
  endpoints.update(empty, null);
  log.past({ requests: [], changes: [] });
  log.state(empty);
  get("figures").replaceChildren();
  get("where").replaceChildren();
  delete get("where").dataset.words;
  document.title = "nearfield";
  world.clear();
}

get("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = get("ask-key").value.trim();
  if (!/^[\x21-\x7e]{1,256}$/.test(key)) {
    say(get("ask-problem"), "A key has no blanks and no letters beyond ASCII.");
    return;
  }
  sessionStorage.setItem(KEY, key);
  get("ask").close();
  begin();
});

get("forget").addEventListener("click", () => {
  if (link.kind === "denied") return get("ask").showModal();
  line.close();
  sessionStorage.removeItem(KEY);
  askForKey("", 401);
});

function begin() {
  const key = sessionStorage.getItem(KEY);
  set(get("forget"), "hidden", key === null);
  say(get("forget"), "Forget key");
  link = { kind: "connecting" };
  drawLink();
  line.open(key);
}

// ---- one request --------------------------------------------------------------------------------

function follow() {
  const [, id] = /^#request=(.+)$/.exec(location.hash) ?? [];
  if (id === undefined) return sheet.close();
  if (state === null) return; // nobody may look yet
  try {
    sheet.open(decodeURIComponent(id));
  } catch {
    sheet.close(); // no id: a link that was cut
  }
}

get("find").addEventListener("submit", (event) => {
  event.preventDefault();
  const id = get("find-id").value.trim();
  if (id === "") return;
  const hash = `#request=${encodeURIComponent(id)}`;
  if (location.hash === hash) follow();
  else location.hash = hash;
});
addEventListener("hashchange", follow);
addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, dialog") !== null) return;
  event.preventDefault();
  get("find-id").focus();
});

world.load(new URL("land.json", import.meta.url)).catch(() => {});
begin();
