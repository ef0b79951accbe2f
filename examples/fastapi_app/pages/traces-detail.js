// One trace: its story in plain words, its ids, its waterfall, and the span that is read closely.
import { el, plural, setText } from "./common.js";
import { attribute, copyButton, trouble } from "./traces-dom.js";
import { count, exact, moment } from "./traces-format.js";
import { back, status, who } from "./traces-list.js";
import { linkTo, panel, related } from "./traces-panel.js";
import { at, writeSpan } from "./traces-url.js";
import { ORPHAN, ORPHANS, Waterfall } from "./traces-waterfall.js";

const IDS = { trace_id: "trace", request_id: "request", charge_id: "charge", transaction_id: "transaction" };

export class Detail {
  #trace = null;
  #shown = "";

  /** `element` is filled; `closed()` is told when the reader closes it. */
  constructor(element, { closed }) {
    this.element = element;
    this.closed = closed;
    this.id = null;
  }

  /** Begin with a trace that is still to be asked for. */
  open(id) {
    this.id = id;
    this.#trace = null;
    this.#shown = "";
    this.title = el("h2", { id: "trace-title", tabindex: "-1" }, "…");
    this.status = el("span", { class: "status-now" });
    this.note = el("p", { class: "notice", "data-testid": "trace-note", role: "status", hidden: true });
    this.facts = el("p", { class: "facts-line", "data-testid": "trace-facts" });
    this.story = el("dl", { class: "story", "data-testid": "story", "aria-label": "The story" });
    this.related = el("ul", { class: "related", "data-testid": "related", "aria-label": "Other traces of the same charge" });
    this.ids = el("dl", { class: "ids", "data-testid": "ids" });
    this.orphans = el("p", { class: "orphan-note", "data-testid": "orphans", hidden: true });
    this.waterfall = new Waterfall({
      chosen: span => (writeSpan(this.id, span), this.#panel()),
      entered: () => this.panel.querySelector("h3")?.focus(),
    });
    this.panel = el("aside", { class: "panel", "aria-labelledby": "panel-title", "data-testid": "panel", hidden: true });
    this.panel.addEventListener("keydown", event => event.key === "Escape" && this.#backToRow());
    this.content = el("div", { class: "trace-content", hidden: true },
      this.facts, this.story, this.related, this.ids, this.orphans,
      el("div", { class: "read" }, this.waterfall.element, this.panel));
    const close = el("button", { class: "button little", type: "button", "aria-label": "close the trace", "data-testid": "close-trace", onclick: this.closed }, "✕ Close");
    this.element.replaceChildren(
      el("header", { class: "trace-head" }, this.title, this.status, el("span", { class: "grow" }), close), this.note, this.content);
    this.element.hidden = false;
    this.element.scrollTop = 0;
  }

  close() {
    this.id = null;
    this.#trace = null;
    this.element.hidden = true;
    this.element.replaceChildren();
  }

  /** Show what the desk says of the trace; `span` is the one to select at first. */
  show(trace, span = null) {
    const words = JSON.stringify(trace);
    const first = this.#trace === null;
    this.#trace = trace;
    this.note.hidden = true;
    if (words !== this.#shown) {
      this.#shown = words;
      this.content.hidden = false;
      this.#head(trace);
      this.#story(trace);
      this.#ids(trace.summary);
      this.waterfall.show(trace.spans);
      this.#panel();
    }
    if (first && span) this.select(span);
  }

  /** Select a span because the address says so. */
  select(span) {
    if (!this.#trace || this.waterfall.selected === span) return;
    if (!span) return;
    if (!this.waterfall.select(span, { focus: true })) {
      this.#say(`Span ${span} has not arrived in this trace, or never will.`);
      return;
    }
    this.#panel();
  }

  /** The trace is not there, or not now. */
  missing(words, gone) {
    if (this.#trace === null) {
      setText(this.title, gone ? "Not here any more" : "…");
      this.#say(words);
    } else if (gone) this.#say("This trace has just fallen out of the ring: this is the last that was known of it.");
  }

  #say(words) {
    this.note.hidden = false;
    setText(this.note, words);
  }

  #head({ summary, spans }) {
    setText(this.title, summary.name);
    this.status.replaceChildren(...status(summary), ...summary.trouble.map(trouble));
    if (!summary.ended && summary.status !== null) this.status.append(el("span", { class: "soft" }, " still running"));
    const facts = [
      moment(summary.started_at), exact(summary.duration_ms), plural(summary.spans, "span"), who(summary),
      summary.amount === null ? null : `price ${count(summary.amount)}, kept ${count(summary.kept)}, back ${count(back(summary))}`,
      summary.attempts ? `${plural(summary.attempts, "call")}, ${plural(summary.retries, "retry", "retries")}` : null,
      summary.errors ? plural(summary.errors, "error") : null,
      summary.outcome ? `outcome ${summary.outcome}` : null,
    ];
    this.facts.replaceChildren(...facts.filter(fact => fact !== null).map(fact => el("span", {}, fact)));
    const orphans = spans.filter(span => span.orphan).length;
    this.orphans.hidden = orphans === 0;
    setText(this.orphans, orphans ? `${plural(orphans, "span is an orphan", "spans are orphans")}: ${orphans === 1 ? ORPHAN : ORPHANS}.` : "");
  }

  #story({ story, spans, summary }) {
    this.story.replaceChildren(...story.flatMap(({ question, answer }) =>
      [el("dt", {}, question), el("dd", {}, ...linked(answer, summary.trace_id))]));
    const seen = new Set();
    const others = [];
    for (const span of spans) {
      for (const [words, link] of related(span, summary.trace_id)) {
        if (link.trace_id === summary.trace_id || seen.has(link.trace_id)) continue; // one link leads there
        seen.add(link.trace_id);
        others.push(el("li", {}, words, linkTo(link, summary.trace_id)));
      }
    }
    this.related.replaceChildren(...others);
    this.related.hidden = others.length === 0;
  }

  #ids(summary) {
    this.ids.replaceChildren(...Object.entries(IDS).filter(([name]) => summary[name]).map(([name, words]) =>
      el("div", {}, el("dt", {}, words), el("dd", {}, el("code", {}, summary[name]), " ", copyButton(summary[name], `${words} id`), " ", find(name, summary)))));
  }

  #panel() {
    const span = this.#trace?.spans.find(one => one.span_id === this.waterfall.selected);
    const signature = span ? JSON.stringify(span) : "";
    if (this.panel.dataset.shown === signature) return;
    attribute(this.panel, "data-shown", signature);
    this.panel.hidden = !span;
    this.panel.replaceChildren(...(span ? panel(span, this.#trace, { closed: () => this.#closePanel() }) : []));
    this.panel.scrollTop = 0;
  }

  #closePanel() {
    this.#backToRow();
    this.waterfall.unselect();
    writeSpan(this.id, null);
    this.#panel();
  }

  #backToRow() {
    this.waterfall.select(this.waterfall.selected, { focus: true });
  }
}

/** A link to all traces that name an id: a charge's request, and whoever settled it later. */
function find(name, summary) {
  if (name === "trace_id") return null;
  const href = `?q=${encodeURIComponent(summary[name])}${at(summary.trace_id)}`;
  return el("a", { href, "aria-label": `find all traces of this ${IDS[name]}` }, "find all");
}

/** An answer in plain words, with the traces that it names as links. */
function linked(answer, here) {
  return answer.split(/\b([0-9a-f]{32})\b/).map((part, index) =>
    index % 2 && part !== here ? el("a", { href: at(part) }, part) : part);
}

