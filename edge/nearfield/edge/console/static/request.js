// One request: what became of it, where its time went, and why it was sent where it was.

import { get, h, name, set } from "./dom.js";
import { bytes, count, moment, NONE, time, usd } from "./words.js";

const FAILURES = {
  refused: "no connection",
  connect_timeout: "no connection in time",
  closed: "closed before it answered",
  protocol: "answered no HTTP",
  status: "said: not here, not now",
  truncated: "broke off",
  abandoned: "given up: believed dead",
  deadline: "not in time",
  cancelled: "no longer wanted",
};

/** The sheet of one request. ask: gets a document from the gateway. */
export class Sheet {
  #dialog = get("request");
  #body = get("request-body");
  #ask;
  #id = null;
  #hash = "";

  constructor(ask) {
    this.#ask = ask;
    // Told a little later: meanwhile another one may have been asked for, or be shown.
    this.#dialog.addEventListener("close", () => {
      if (this.#dialog.open) return;
      this.#id = null;
      if (location.hash === this.#hash) history.replaceState(null, "", location.pathname + location.search);
    });
    this.#dialog.addEventListener("click", (event) => event.target === this.#dialog && this.#dialog.close());
  }

  async open(id) {
    this.#id = id;
    this.#hash = location.hash;
    this.#show(h("h2", { id: "request-title" }, "Request"), h("p", { class: "id" }, name(id)), h("p", { class: "soft" }, "Looking …"));
    if (!this.#dialog.open) this.#dialog.showModal();
    try {
      const found = await this.#ask(`requests/${encodeURIComponent(id)}`);
      if (this.#id === id) this.#show(...pages(found));
    } catch (error) {
      if (this.#id === id) {
        this.#show(h("h2", { id: "request-title" }, "Request"), h("p", { class: "id" }, name(id)), h("p", { class: "problem" }, error.message));
      }
    }
  }

  close() {
    if (this.#dialog.open) this.#dialog.close();
  }

  #show(...elements) {
    this.#body.replaceChildren(...elements);
    this.#dialog.scrollTop = 0;
  }
}

function pages(request) {
  const failed = request.error !== null || request.status >= 400;
  return [
    h("h2", { id: "request-title" },
      name(request.model || request.operation),
      request.region ? h("span", { class: "soft" }, " → ") : null,
      request.region ? name(request.region) : null),
    h("p", { class: "id" }, name(request.request_id)),
    h("p", { class: `verdict ${failed ? "failed" : "good"}` }, sentence(request, failed)),
    facts(request),
    h("h3", {}, "Where the time went"),
    waterfall(request),
    h("h3", {}, "Why there"),
    ...decision(request),
  ];
}

function sentence(request, failed) {
  const tries = request.attempts.length;
  const after = tries > 1 ? ` after ${tries} tries` : "";
  if (!failed) return `Answered ${request.status}${after}, first byte in ${time(request.first_byte_s)}.`;
  if (request.status === 499) return `Its client left after ${time(request.duration_s)}.`;
  if (tries === 0) return `Refused here: ${request.status} ${request.error ?? ""}.`;
  return `Failed${after}: ${request.status} ${request.error ?? ""}.`;
}

function facts(request) {
  const tokens = request.tokens;
  const rows = [
    ["When", moment(request.at_s)],
    ["Whole answer", time(request.duration_s)],
    ["Asked for", [request.operation, request.stream ? "streamed" : null, request.criticality === "default" ? null : request.criticality].filter(Boolean).join(", ")],
    ["Endpoint", request.endpoint || NONE, "long"],
    ["Tokens", tokens === null ? NONE : `${count(tokens.input)} in${tokens.cached ? ` (${count(tokens.cached)} cached)` : ""}, ${count(tokens.output)} out${tokens.guessed ? ", guessed" : ""}`],
    ["Size", `${bytes(request.body_bytes)} in, ${bytes(request.answer_bytes)} out`],
    ["Tenant", [request.tenant, request.product].filter(Boolean).join(" / ") || NONE],
    ["Key", request.key_id || NONE],
    ["Sent by", request.from_gateway ? "another gateway" : "a client"],
    ["Trace", request.trace_id, "long"],
  ];
  return h("dl", { class: "facts" }, ...rows.map(([term, value, kind]) => h("div", { class: kind ?? null }, h("dt", {}, term), h("dd", {}, name(value)))));
}

/** Bars on one scale: what happened here, then each try, its wait and its answer. */
function waterfall(request) {
  const whole = Math.max(request.duration_s, 1e-6);
  const tries = request.attempts;
  const began = tries.length ? tries[0].started_after_s : whole;
  const rows = [
    bar("Received and let in", [["here", 0, began]], whole, time(began), null),
    ...tries.map((tried, i) => {
      const first = tried.first_byte_after_s;
      const ended = tried.ended_after_s;
      const parts = first === null ? [["lost", tried.started_after_s, ended]] : [["waits", tried.started_after_s, first], ["flows", first, ended]];
      const spent = first === null ? `${time(ended - tried.started_after_s)}` : `${time(first - tried.started_after_s)} + ${time(ended - first)}`;
      return bar(tries.length > 1 ? `Try ${i + 1}` : "The try", parts, whole, spent, tried);
    }),
  ];
  return h("div", { class: "waterfall" },
    h("ul", { class: "legend" },
      ...[["here", "in the gateway"], ["waits", "until the first byte"], ["flows", "the answer flows"], ["lost", "in vain"]].map(([kind, words]) =>
        h("li", {}, h("span", { class: `swatch span-${kind}` }), words))),
    h("ol", {}, ...rows));
}

function bar(title, parts, whole, spent, tried) {
  const track = h("span", { class: "track", "aria-hidden": "true" }, ...parts.map(([kind, from, to]) => {
    const span = h("span", { class: `span-${kind}` });
    span.style.left = `${(100 * from) / whole}%`;
    span.style.width = `${(100 * Math.max(0, to - from)) / whole}%`;
    return span;
  }));
  if (tried === null) return h("li", {}, h("span", { class: "title" }, title), track, h("span", { class: "spent" }, spent));
  const outcome = tried.failure === null ? `answered ${tried.status}` : `${FAILURES[tried.failure] ?? tried.failure}${tried.status ? ` (${tried.status})` : ""}`;
  const where = tried.replica === null ? tried.endpoint : `${tried.endpoint}, replica ${tried.replica}`;
  return h("li", { class: tried.failure === null ? null : "in-vain" },
    h("span", { class: "title" }, title),
    track,
    h("span", { class: "spent" }, spent),
    h("span", { class: "small tried" }, h("span", { class: "strong" }, outcome), " at ", name(where || "an unnamed target"),
      h("span", { class: "soft" }, tried.predicted_s ? ` · predicted ${time(tried.predicted_s)}` : ""),
      h("span", { class: "soft because" }, tried.reason)));
}

function decision(request) {
  if (request.decision === undefined || request.decision === null) {
    const last = request.attempts.at(-1);
    const words = last === undefined ? "It was refused before it was routed." : last.reason || "Nothing more is known.";
    const note = "How full others' endpoints were is shown to keys of scope platform.";
    return [h("p", {}, words), last !== undefined && request.decision === undefined ? h("p", { class: "soft small" }, note) : h("p", { class: "soft small" }, "")];
  }
  const { outcome, lines } = request.decision;
  const head = ["Endpoint", "Verdict", "Away", "Wait", "Engine", "Cold start", "Predicted", "Load", "Price"];
  return [
    h("p", { class: "outcome" }, outcome),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Every endpoint's part in the decision" },
      h("table", { class: "decision" },
        h("thead", {}, h("tr", {}, ...head.map((words, i) => h("th", { scope: "col", class: i > 1 ? "number" : null }, words)))),
        h("tbody", {}, ...lines.map(decisionRow)))),
  ];
}

function decisionRow(line) {
  const cells = [
    time(line.rtt_s),
    time(line.wait_s),
    time(line.first_byte_s),
    line.cold_start_s ? time(line.cold_start_s) : NONE,
    time(line.predicted_s),
    line.load === null ? NONE : `${line.load} of ${line.slots}`,
    usd(line.unit_usd),
  ];
  const row = h("tr", {},
    h("th", { scope: "row" }, name(line.endpoint)),
    h("td", {}, h("span", { class: "strong" }, line.verdict), h("span", { class: "soft small because" }, line.reason)),
    ...cells.map((words) => h("td", { class: "number" }, words)));
  set(row, "class", line.verdict === "chosen" ? "chosen" : line.verdict === "eligible" ? null : "out");
  return row;
}
