// The map: land, regions, this gateway, and what flows from it to them.

import { get, h, keep, s, say, set, shape, glyph } from "./dom.js";
import { ASPECT, dots, place, unpack } from "./projection.js";
import { HEALTH, healthOf, rate, time } from "./words.js";

const DOT_SHARE = 1 / 165; // dots across the map, unless that would be less or more than ...
const LEAST_STEP = 4.4, MOST_STEP = 8;
const NARROW = 560; // below this width labels are names only
const NEAR = 26; // pixels within which an arc would be a dot
const LEGEND = ["up", "ejected", "down", "unknown"];

export class World {
  #svg = get("world");
  #land = s("path", { class: "land" });
  #arcs = s("g", { class: "arcs" });
  #marks = s("g");
  #rings = [];
  #width = 0;
  #state = null;
  #select;

  /** select: called with a region's name when it is clicked. */
  constructor(select) {
    this.#select = select;
    this.#svg.append(this.#land, this.#arcs, this.#marks);
    get("legend").append(
      ...LEGEND.map((health) => h("li", {}, glyph(health), HEALTH[health])),
      h("li", {}, s("svg", { viewBox: "0 0 30 14", class: "key", "aria-hidden": "true" },
        s("path", { class: "arc", d: "M2 11Q15 0 28 11" })), "traffic from this gateway"),
    );
    new ResizeObserver(() => this.#resize()).observe(this.#svg.parentElement);
  }

  /** The map is right without land, only poorer. */
  async load(url) {
    const answer = await fetch(url);
    this.#rings = unpack((await answer.json()).rings);
    this.#width = 0;
    this.#resize();
  }

  update(state, selected) {
    this.#state = { ...state, selected };
    if (this.#width > 0) this.#draw();
  }

  clear() {
    this.#state = null;
    for (const group of [this.#arcs, this.#marks]) keep(group, [], String, h, h);
  }

  #resize() {
    const width = Math.round(this.#svg.parentElement.clientWidth);
    if (width === this.#width || width === 0) return;
    this.#width = width;
    const step = Math.max(LEAST_STEP, Math.min(MOST_STEP, width * DOT_SHARE));
    set(this.#svg, "viewBox", `0 0 ${width} ${Math.round(width * ASPECT)}`);
    set(this.#land, "d", dots(this.#rings, width, step));
    set(this.#land, "stroke-width", (step * 0.46).toFixed(2));
    if (this.#state !== null) this.#draw();
  }

  #draw() {
    const { gateway, regions, selected } = this.#state;
    const here = this.#here(gateway);
    const spots = regions.map((region) => ({
      region,
      at: place(region.latitude, region.longitude, this.#width),
    }));
    const flows = spots.filter(({ at }) => Math.hypot(at[0] - here.at[0], at[1] - here.at[1]) > NEAR);
    keep(this.#arcs, flows, ({ region }) => region.name, makeArc, (arc, flow) => updateArc(arc, here.at, flow));
    const marks = spots.map(({ region, at }) => ({
      key: region.name,
      at,
      health: healthOf(region),
      title: region.name,
      words: this.#words(region),
      // Its own region's traffic has no way to go: it rings.
      ring: region.home,
      rps: Math.hypot(at[0] - here.at[0], at[1] - here.at[1]) > NEAR ? 0 : region.rps,
      selected: region.name === selected,
      region: region.name,
    }));
    if (gateway.region === null) {
      marks.push({ key: "gateway/", at: here.at, health: null, title: gateway.name, words: here.words, ring: false, rps: 0, selected: false, region: null });
    }
    keep(this.#marks, marks, (mark) => mark.key, () => this.#makeMark(), updateMark);
    arrange(this.#marks, marks, this.#width, this.#width * ASPECT);
  }

  #here(gateway) {
    if (gateway.latitude === null) {
      return { at: [24, this.#width * ASPECT - 24], words: "this gateway; its place is not in its file" };
    }
    return { at: place(gateway.latitude, gateway.longitude, this.#width), words: "this gateway" };
  }

  #words(region) {
    if (this.#width < NARROW) return "";
    const health = healthOf(region);
    if (health === "down" || health === "unknown") return HEALTH[health];
    const away = region.home ? "home" : time(region.rtt_s);
    return `${away} · ${rate(region.rps)}/s${health === "up" ? "" : ` · ${HEALTH[health]}`}`;
  }

  #makeMark() {
    const mark = s("g", { class: "mark" },
      s("circle", { class: "pulse", r: 9 }),
      s("circle", { class: "home", r: 10 }),
      s("g", { class: "shape" }),
      s("circle", { class: "hit", r: 18 }),
      s("text", { class: "label" }, s("tspan", { class: "name" }), s("tspan", { class: "words" })),
    );
    mark.addEventListener("click", () => mark.dataset.region && this.#select(mark.dataset.region));
    return mark;
  }
}

function makeArc() {
  return s("g", {}, s("path", { class: "arc" }), s("path", { class: "flow" }));
}

/** Thicker where more flows; its dots are as close as requests are frequent. */
function updateArc(group, from, { region, at }) {
  const reach = Math.hypot(at[0] - from[0], at[1] - from[1]);
  const middle = [(from[0] + at[0]) / 2, (from[1] + at[1]) / 2 - reach * 0.22];
  const d = `M${from.map(round)}Q${middle.map(round)} ${at.map(round)}`;
  const busy = region.rps >= 0.05;
  const weight = busy ? 1.6 + Math.min(4.4, 0.55 * Math.log2(1 + region.rps)) : 1;
  const [line, flow] = group.children;
  for (const path of [line, flow]) set(path, "d", d);
  set(line, "stroke-width", weight.toFixed(1));
  set(group, "class", `${busy ? "busy" : "idle"} is-${healthOf(region)}`);
  const level = region.rps < 1 ? 1 : region.rps < 10 ? 2 : region.rps < 100 ? 3 : 4;
  set(flow, "class", `flow level-${level}`);
  set(flow, "stroke-width", (weight + 1).toFixed(1));
}

const round = (number) => number.toFixed(1);

function updateMark(mark, { at, health, title, words, ring, rps, selected, region }) {
  set(mark, "transform", `translate(${round(at[0])} ${round(at[1])})`);
  set(mark, "class", `mark ${health === null ? "is-gateway" : `is-${health}`}${selected ? " selected" : ""}${ring ? " ringed" : ""}${rps >= 0.05 ? " busy" : ""}`);
  if (region !== null) mark.dataset.region = region;
  const [, , holder, , label] = mark.children;
  if (holder.dataset.health !== String(health)) {
    holder.dataset.health = String(health);
    const inside = health === null ? s("path", { d: "M7 1 13 7 7 13 1 7Z" }) : shape(health);
    holder.replaceChildren(s("g", { transform: "translate(-7 -7)" }, inside));
  }
  say(label.children[0], title);
  say(label.children[1], words);
}

/** Put each label where it covers no other: right, left, below or above of its mark. */
function arrange(parent, marks, width, height) {
  const taken = marks.map(({ at }) => [at[0] - 8, at[1] - 8, at[0] + 8, at[1] + 8]);
  marks.forEach((mark, index) => {
    const label = parent.kept.get(mark.key).children[4];
    const [title, words] = label.children;
    const wide = Math.max(title.getComputedTextLength(), words.getComputedTextLength());
    const lines = mark.words === "" ? 1 : 2;
    const tall = lines * 15;
    const gap = 15;
    const choices = [
      ["start", gap, -tall / 2],
      ["end", -gap, -tall / 2],
      ["middle", 0, gap - 3],
      ["middle", 0, -gap - tall + 3],
    ].map(([anchor, dx, dy]) => {
      const left = mark.at[0] + dx - (anchor === "start" ? 0 : anchor === "end" ? wide : wide / 2);
      const top = mark.at[1] + dy;
      const box = [left, top, left + wide, top + tall];
      const out = left < 2 || box[2] > width - 2 || top < 2 || box[3] > height - 2;
      const covered = taken.reduce((sum, other, i) => sum + (i === index ? 0 : overlap(box, other)), 0);
      return { anchor, dx, dy, box, cost: covered + (out ? 1e6 : 0) };
    });
    const best = choices.reduce((a, b) => (b.cost < a.cost ? b : a));
    taken.push(best.box);
    set(label, "text-anchor", best.anchor);
    set(title, "x", best.dx);
    set(title, "y", best.dy + 12);
    set(words, "x", best.dx);
    set(words, "y", best.dy + 27);
  });
}

function overlap(a, b) {
  const wide = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
  const tall = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  return wide > 0 && tall > 0 ? wide * tall : 0;
}
