// The list of requests: rows that stay in place and are changed where they stand.
import { el, setText } from "./common.js";
import { attribute, isMild, statusMood, trouble } from "./traces-dom.js";
import { clock, count, moment, short } from "./traces-format.js";
import { at } from "./traces-url.js";

export class List {
  #rows = new Map();
  #body;
  #open = null;

  constructor(body) {
    this.#body = body;
    body.addEventListener("click", event => this.#clicked(event));
    body.addEventListener("keydown", event => this.#moved(event));
  }

  /** Show these summaries, newest first. */
  show(summaries) {
    const longest = Math.max(...summaries.map(one => one.duration_ms), 0.001);
    const wanted = new Set(summaries.map(one => one.trace_id));
    for (const [id, row] of this.#rows) {
      if (wanted.has(id)) continue;
      row.element.remove();
      this.#rows.delete(id);
    }
    let next = this.#body.firstElementChild;
    for (const summary of summaries) {
      const row = this.#row(summary.trace_id);
      row.update(summary, longest);
      // Rows that stand right are not moved: moving one would take its focus away.
      if (row.element === next) next = next.nextElementSibling;
      else this.#body.insertBefore(row.element, next);
    }
    this.mark(this.#open);
  }

  /** Mark the row of the open trace. */
  mark(id) {
    this.#open = id;
    for (const [key, row] of this.#rows) attribute(row.link, "aria-current", key === id ? "true" : null);
  }

  /** Put the focus on a trace's row, where it is in the list. */
  focus(id) {
    this.#rows.get(id)?.link.focus();
  }

  #row(id) {
    let row = this.#rows.get(id);
    if (!row) this.#rows.set(id, (row = new Row(id)));
    return row;
  }

  #clicked(event) {
    const row = event.target.closest("tr");
    if (!row || event.target.closest("a") || String(getSelection())) return;
    location.hash = at(row.dataset.trace);
  }

  #moved(event) {
    const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
    event.target.closest("tr")?.[step]?.querySelector("a").focus();
    event.preventDefault();
  }
}

class Row {
  constructor(id) {
    this.shown = "";
    this.link = el("a", { href: at(id) });
    this.time = el("time");
    this.bar = el("span", { class: "small-bar", "aria-hidden": "true" });
    this.took = el("span", { class: "ms" });
    const cell = (name, ...children) => el("td", { class: name, role: "cell" }, ...children);
    this.cells = {
      time: cell("time", this.time),
      name: cell("name", this.link),
      status: cell("status"),
      took: cell("took number", this.bar, this.took),
      price: cell("price number"),
      kept: cell("kept number"),
      back: cell("back number"),
      who: cell("who"),
      calls: cell("calls number"),
      trouble: cell("troubles"),
    };
    this.element = el("tr", { role: "row", "data-trace": id, "data-testid": "trace-row" }, ...Object.values(this.cells));
  }

  update(summary, longest) {
    this.bar.style.setProperty("--part", Math.min(summary.duration_ms / longest, 1).toFixed(4));
    const signature = JSON.stringify(summary);
    if (signature === this.shown) return;
    this.shown = signature;
    const { cells } = this;
    attribute(this.time, "datetime", summary.started_at);
    attribute(this.time, "title", moment(summary.started_at));
    setText(this.time, clock(summary.started_at));
    setText(this.link, summary.name);
    cells.status.replaceChildren(...status(summary));
    setText(this.took, short(summary.duration_ms));
    setText(cells.price, count(summary.amount));
    setText(cells.kept, count(summary.kept));
    setText(cells.back, count(back(summary)));
    setText(cells.who, who(summary));
    setText(cells.calls, summary.attempts ? calls(summary) : "–");
    cells.trouble.replaceChildren(...summary.trouble.map(trouble));
    this.element.classList.toggle("in-trouble", summary.trouble.length > 0);
    this.element.classList.toggle("mild", summary.trouble.every(isMild));
    this.element.classList.toggle("free", summary.amount === null);
  }
}

/** What a trace was answered, as badges. */
export function status(summary) {
  if (summary.status !== null) return [el("span", { class: `code ${statusMood(summary.status)}` }, String(summary.status))];
  return [el("span", { class: "code none" }, summary.ended ? "–" : summary.trouble.includes("process died") ? "no end" : "running")];
}

/** Credits that came back, however they did. */
export const back = ({ refunded, voided }) =>
  refunded === null && voided === null ? null : (refunded ?? 0) + (voided ?? 0);

export const who = ({ tenant_id, user_id }) =>
  tenant_id === null ? "–" : user_id === null ? `${tenant_id} (pool)` : `${tenant_id}/${user_id}`;

const calls = ({ attempts, retries }) => (retries ? `${attempts} (${retries}↻)` : `${attempts}`);
