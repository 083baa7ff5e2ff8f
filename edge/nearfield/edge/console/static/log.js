// The feed of decisions: requests as they end, and changes of health and scale.

import { get, glyph, h, name, say, set } from "./dom.js";
import { at, count, HEALTH, rate, time } from "./words.js";

const MOST_ROWS = 150;
const KINDS = {
  all: () => true,
  problems: (row) => row.problem,
  changes: (row) => row.change,
};

export class Log {
  #rows = get("rows");
  #note = get("log-note");
  #pause = get("pause");
  #shown = "all";
  #paused = false; // by the button
  #pointed = false; // somebody points at a row
  #held = []; // what came meanwhile, oldest first

  constructor() {
    this.#pause.addEventListener("click", () => {
      this.#paused = !this.#paused;
      set(this.#pause, "aria-pressed", String(this.#paused));
      this.#release();
    });
    get("choice").addEventListener("change", (event) => {
      this.#shown = event.target.value;
      for (const element of this.#rows.children) element.hidden = !KINDS[this.#shown](element.row);
    });
    for (const [event, pointed] of [["pointerenter", true], ["pointerleave", false]]) {
      this.#rows.addEventListener(event, () => {
        this.#pointed = pointed;
        this.#release();
      });
    }
    // Who has read: once the focus has moved on, or the sheet is closed and has given it back.
    this.#rows.addEventListener("focusout", () => setTimeout(() => this.#release()));
    document.addEventListener("close", () => setTimeout(() => this.#release()), true);
  }

  /** What happened before this page came, in place of all that is shown. */
  past({ requests, changes }) {
    this.#held = [];
    this.#rows.replaceChildren();
    const rows = [...requests.map(ofRequest), ...changes.map(ofChange)].sort((a, b) => a.at_s - b.at_s);
    this.#add(rows);
    this.#words();
  }

  news({ requests, changes }) {
    this.#held.push(...requests.map(ofRequest), ...changes.map(ofChange));
    this.#held.splice(0, this.#held.length - MOST_ROWS);
    this.#release();
  }

  state({ traffic }) {
    this.#words(traffic.rps);
  }

  #rate = 0;

  /** Rows must not run away under a pointer, under the keyboard's focus, or behind an open sheet. */
  get #read() {
    return this.#pointed || this.#rows.querySelector(":focus-visible") !== null || document.querySelector("dialog[open]") !== null;
  }

  #words(rps = this.#rate) {
    this.#rate = rps;
    const waiting = this.#held.length;
    if (this.#paused || (this.#read && waiting > 0)) say(this.#note, `${this.#paused ? "Paused" : "Held while you read"}: ${count(waiting)} new`);
    else say(this.#note, rps > 12 ? `Some of ${rate(rps)}/s` : "");
  }

  #release() {
    if (!this.#paused && !this.#read) this.#add(this.#held.splice(0));
    say(this.#pause, this.#paused ? "Go on" : "Pause");
    this.#words();
  }

  #add(rows) {
    const elements = rows.map((row) => {
      const element = row.change ? changeRow(row) : requestRow(row);
      element.row = row;
      element.hidden = !KINDS[this.#shown](row);
      return element;
    });
    this.#rows.prepend(...elements.reverse());
    while (this.#rows.childElementCount > MOST_ROWS) this.#rows.lastElementChild.remove();
  }
}

const ofRequest = (row) => ({ ...row, change: false, problem: row.failed || row.tries > 1 });
const ofChange = (row) => ({ ...row, change: true, problem: row.kind === "health" && row.after !== "up" });

function requestRow(row) {
  const outcome = row.failed ? `${row.status} ${row.error ?? ""}`.trim() : `${row.status}`;
  const tried = row.tries > 1 ? `${row.tries} tries, ` : "";
  const reason = (row.reason ?? "").replaceAll(/ \+ 0\.0 (way|wait)/g, "");
  return h("li", { class: row.failed ? "failed" : row.tries > 1 ? "retried" : null },
    h("a", { href: `#request=${encodeURIComponent(row.id)}` },
      h("time", {}, at(row.at_s + row.duration_s)),
      h("span", { class: "what" },
        name(row.model || row.operation, { class: "model" }),
        h("span", { class: "to", "aria-label": row.region ? "to" : null }, row.region ? " → " : ""),
        name(row.region)),
      h("span", { class: "outcome" }, outcome),
      h("span", { class: "took" }, row.failed ? time(row.duration_s) : time(row.first_byte_s)),
      h("span", { class: "soft small because", title: reason || null }, tried + (reason || (row.failed ? "refused here" : "")))));
}

function changeRow(row) {
  const health = row.kind === "health" ? row.after : "scaling";
  const words = row.kind === "health" ? [HEALTH[row.before] ?? row.before, HEALTH[row.after] ?? row.after] : [row.before, row.after];
  return h("li", { class: `change is-${health}` },
    h("div", {},
      h("time", {}, at(row.at_s)),
      h("span", { class: "what" }, glyph(health), name(row.subject, { class: "model" })),
      h("span", { class: "small turn" }, `${words[0]} → ${words[1]}`),
      h("span", { class: "soft small because" }, row.reason)));
}
