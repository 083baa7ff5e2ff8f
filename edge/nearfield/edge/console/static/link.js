// The line to the gateway: a feed that is listened to, and asked for again when it breaks. While
// there is none the state is asked for now and then.

const SILENT_MS = 4000; // the gateway speaks every second
const ASK_MS = 2000;
const LEAST_WAIT_MS = 500;
const MOST_WAIT_MS = 15_000;

/** A refusal that another key may change. */
class Denied extends Error {}

export class Link {
  #hear;
  #base;
  #key = null;
  #stop = new AbortController();
  #hurry = () => {};

  /**
   * hear: what is called, with what has come:
   *   state(document), past(document), news(document)
   *   link({kind: "live" | "asking" | "lost", untilMs}), denied(message, status)
   */
  constructor(base, hear) {
    this.#base = base;
    this.#hear = hear;
    addEventListener("online", () => this.#hurry());
    document.addEventListener("visibilitychange", () => document.hidden || this.#hurry());
  }

  /** Begin, with this key (null: none), in place of what went before. */
  open(key) {
    this.#stop.abort();
    this.#stop = new AbortController();
    this.#key = key;
    this.#stop.signal.addEventListener("abort", () => this.#hurry());
    this.#run(this.#stop.signal);
  }

  close() {
    this.#stop.abort();
  }

  /** One document. Throws an Error whose message is for people. */
  async ask(path, signal = AbortSignal.timeout(10_000)) {
    const answer = await this.#fetch(path, signal);
    return answer.json();
  }

  async #fetch(path, signal) {
    const headers = this.#key === null ? {} : { authorization: `Bearer ${this.#key}` };
    const answer = await fetch(new URL(path, this.#base), { headers, signal, cache: "no-store" });
    if (answer.ok) return answer;
    const body = await answer.json().catch(() => ({}));
    const message = body.error?.message ?? `The gateway answered ${answer.status}.`;
    if (answer.status === 401 || answer.status === 403) {
      throw Object.assign(new Denied(message), { status: answer.status });
    }
    throw Object.assign(new Error(message), { status: answer.status, code: body.error?.code });
  }

  async #run(stop) {
    let failures = 0;
    while (!stop.aborted) {
      let full = false;
      try {
        if (await this.#listen(stop)) failures = 0;
      } catch (error) {
        if (stop.aborted) return;
        if (error instanceof Denied) return this.#hear.denied(error.message, error.status);
        full = error.code === "too_many_feeds";
      }
      if (stop.aborted) return;
      failures += 1;
      const spread = 0.75 + Math.random() / 2; // many pages lose their gateway at once
      const waitMs = full ? MOST_WAIT_MS : Math.min(MOST_WAIT_MS, LEAST_WAIT_MS * 2 ** (failures - 1));
      await this.#meanwhile(stop, performance.now() + waitMs * spread);
    }
  }

  /** Listen until the feed ends or breaks; whether anything was heard. */
  async #listen(stop) {
    const silent = new AbortController();
    let watch = setTimeout(() => silent.abort(), SILENT_MS);
    try {
      const answer = await this.#fetch("feed", AbortSignal.any([stop, silent.signal]));
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let heard = false;
      let rest = "";
      for (;;) {
        const { value, done } = await reader.read().catch((error) => {
          if (heard && !stop.aborted) return { done: true };
          throw error;
        });
        if (done) return heard;
        clearTimeout(watch);
        watch = setTimeout(() => silent.abort(), SILENT_MS);
        const events = (rest + value).split("\n\n");
        rest = events.pop();
        for (const event of events) {
          if (stop.aborted) return heard;
          this.#take(event);
          heard = true;
        }
      }
    } finally {
      clearTimeout(watch);
      silent.abort();
    }
  }

  #take(event) {
    const [, kind, data] = /^event: (\w+)\ndata: (.*)$/.exec(event) ?? [];
    if (kind === "past") this.#hear.link({ kind: "live" });
    if (kind === "state" || kind === "past" || kind === "news") this.#hear[kind](JSON.parse(data));
  }

  /** Wait until the feed is worth another try, and ask for the state meanwhile. */
  async #meanwhile(stop, untilMs) {
    let hurried = false;
    while (!stop.aborted && !hurried && performance.now() < untilMs) {
      const due = Math.min(untilMs, performance.now() + ASK_MS);
      try {
        this.#hear.state(await this.ask("state", AbortSignal.any([stop, AbortSignal.timeout(ASK_MS)])));
        if (!stop.aborted) this.#hear.link({ kind: "asking", untilMs });
      } catch (error) {
        if (stop.aborted) return;
        if (error instanceof Denied) return; // the feed will say so, and be heard
        this.#hear.link({ kind: "lost", untilMs });
      }
      await new Promise((resolve) => {
        const timer = setTimeout(resolve, Math.max(0, due - performance.now()));
        this.#hurry = () => {
          hurried = true;
          clearTimeout(timer);
          resolve();
        };
      });
    }
    this.#hurry = () => {};
  }
}
