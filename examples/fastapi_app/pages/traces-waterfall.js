// The waterfall: an ARIA treegrid of spans beside their bars on one time axis.
import { View, ticks } from "./traces-axis.js";
import { el, setText } from "./common.js";
import { attribute, badge } from "./traces-dom.js";
import { exact, short } from "./traces-format.js";
import { draggable, wheeled } from "./traces-gestures.js";

const LETTER_PX = 7.5;

export const ORPHAN = "its parent never arrived: the process died or is still running";
export const ORPHANS = "their parents never arrived: the process died or is still running";

export class Waterfall {
  #rows = new Map();
  #spans = [];
  #colours = new Map([["app", 0], ["credits", 1]]);
  #collapsed = new Set();
  #view = new View(1);

  /** `chosen(spanId)` is told what is selected; `entered()` when Enter asks for its attributes. */
  constructor({ chosen, entered }) {
    this.chosen = chosen;
    this.entered = entered;
    this.selected = null;
    this.#build();
  }

  #build() {
    const button = (words, label, act) =>
      el("button", { class: "button little", type: "button", "aria-label": label, title: label, onclick: () => this.#zoomed(act) }, words);
    this.range = el("span", { class: "range", "data-testid": "range" });
    this.toSpan = button("Zoom to span", "zoom to the selected span", () => this.#toSelected());
    this.legend = el("span", { class: "legend" });
    const tools = el("div", { class: "tools" },
      this.legend, this.range,
      el("span", { class: "buttons" },
        button("◂", "earlier", () => this.#view.pan(-0.25)), button("▸", "later", () => this.#view.pan(0.25)),
        button("−", "zoom out", () => this.#view.zoom(2)), button("+", "zoom in", () => this.#view.zoom(0.5)),
        this.toSpan, button("Whole trace", "show the whole trace", () => this.#view.whole()),
      ),
    );
    this.overview = el("div", { class: "overview", "aria-hidden": "true", "data-testid": "overview" });
    this.axis = el("div", { class: "axis", role: "columnheader", "aria-label": "time", "data-testid": "axis" });
    this.head = el("div", { class: "span-row head", role: "row" },
      el("div", { class: "name", role: "columnheader" }, "span"), this.axis, el("div", { class: "took", role: "columnheader" }, "duration"));
    this.lines = el("div", { class: "lines", "aria-hidden": "true" });
    this.body = el("div", { class: "span-rows", role: "rowgroup" });
    this.band = el("div", { class: "band", "aria-hidden": "true", hidden: true });
    this.grid = el("div", { class: "grid", role: "treegrid", "aria-label": "Spans", "data-testid": "waterfall" },
      this.head, el("div", { class: "under" }, this.lines, this.body, this.band));
    this.hint = el("p", { class: "hint" }, "↑ ↓ select · ← → fold · Enter attributes · drag or + − zoom · z to the span · 0 whole trace · Shift ← → earlier, later");
    this.element = el("div", { class: "waterfall" }, tools, this.overview, this.grid, this.hint);

    this.body.addEventListener("click", event => this.#clicked(event));
    this.body.addEventListener("dblclick", event => event.target.closest(".bar-cell") && this.#zoomed(() => this.#toSelected()));
    this.grid.addEventListener("keydown", event => this.#key(event));
    draggable(this.grid, this.axis, this.band, (from, to) =>
      this.#zoomed(() => this.#view.show(this.#view.time(from), this.#view.time(to))));
    draggable(this.overview, this.overview, null, (from, to) =>
      this.#zoomed(() => this.#view.show(from * this.#view.total, to * this.#view.total)));
    wheeled(this.grid, this.axis, this.#view, () => this.#draw());
    new ResizeObserver(() => this.#draw()).observe(this.axis);
  }

  /** Show spans, in waterfall order: again, when more have arrived. What is selected, folded and in view stays so. */
  show(spans) {
    this.#spans = spans;
    this.#view.grow(Math.max(...spans.map(span => span.start_ms + span.duration_ms), 0.001));
    const parents = new Set(spans.map(span => span.parent_id));
    const ids = new Set(spans.map(span => span.span_id));
    for (const [id, row] of this.#rows) {
      if (ids.has(id)) continue;
      row.element.remove();
      this.#rows.delete(id);
    }
    spans.map(span => span.service).forEach(name => this.#colours.has(name) || this.#colours.set(name, this.#colours.size % 6));
    let next = this.body.firstElementChild;
    for (const span of spans) {
      let row = this.#rows.get(span.span_id);
      if (!row) this.#rows.set(span.span_id, (row = new Row(span.span_id)));
      row.update(span, parents.has(span.span_id), this.#colours.get(span.service));
      if (row.element === next) next = next.nextElementSibling;
      else this.body.insertBefore(row.element, next);
    }
    const services = new Set(spans.map(span => span.service));
    this.legend.replaceChildren(...[...this.#colours].filter(([name]) => services.has(name)).map(([name, number]) => el("span", { class: "key" }, el("i", { class: `swatch service-${number}` }), name)));
    this.#overview();
    if (!this.#rows.has(this.selected)) this.#mark(null);
    this.#fold();
    this.#draw();
  }

  /** Select a span, as a link to it does: unfold what hides it, bring it into view. */
  select(id, { focus = false, scroll = true } = {}) {
    if (!this.#rows.has(id)) return false;
    const before = this.#collapsed.size;
    for (let at = this.#span(id)?.parent_id; at; at = this.#span(at)?.parent_id) this.#collapsed.delete(at);
    if (this.#collapsed.size !== before) this.#fold();
    this.#mark(id);
    const { element } = this.#rows.get(id);
    if (scroll) this.reveal();
    if (focus) element.focus({ preventScroll: true });
    return true;
  }

  /** Bring the selected row into view; again, once its attributes have taken their place. */
  reveal() {
    this.#rows.get(this.selected)?.element.scrollIntoView({ block: "nearest" });
  }

  unselect() {
    this.#mark(null);
  }

  #span(id) {
    return this.#spans.find(span => span.span_id === id);
  }

  #mark(id) {
    this.selected = id;
    for (const [key, row] of this.#rows) attribute(row.element, "aria-selected", String(key === id));
    // One row takes the Tab key: the selected one, or the first.
    const stop = this.#shown().find(span => span.span_id === id) ?? this.#shown()[0];
    for (const [key, row] of this.#rows) row.element.tabIndex = key === stop?.span_id ? 0 : -1;
    this.toSpan.disabled = id === null;
  }

  /** The spans that no fold hides. */
  #shown() {
    const hidden = new Set();
    return this.#spans.filter(span => {
      const gone = hidden.has(span.parent_id) || this.#collapsed.has(span.parent_id);
      if (gone) hidden.add(span.span_id);
      return !gone;
    });
  }

  #fold() {
    const shown = new Set(this.#shown().map(span => span.span_id));
    for (const [id, row] of this.#rows) {
      row.element.hidden = !shown.has(id);
      if (row.parent) attribute(row.element, "aria-expanded", String(!this.#collapsed.has(id)));
    }
    this.#mark(this.selected);
  }

  #toggle(id, collapse) {
    if (!this.#rows.get(id)?.parent) return;
    if (collapse) this.#collapsed.add(id);
    else this.#collapsed.delete(id);
    this.#fold();
  }

  #choose(id) {
    this.select(id, { focus: true, scroll: false });
    this.chosen(id);
    this.reveal();
  }

  #clicked(event) {
    const id = event.target.closest(".span-row")?.dataset.span;
    if (!id) return;
    if (event.target.closest(".fold")) this.#toggle(id, !this.#collapsed.has(id));
    else this.#choose(id);
  }

  #key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const shown = this.#shown().map(span => span.span_id);
    const id = event.target.closest(".span-row")?.dataset.span;
    if (id === undefined || !this.#pressed(event, id, shown, shown.indexOf(id))) return;
    event.preventDefault();
  }

  /** Whether the key meant something here. */
  #pressed(event, id, shown, index) {
    const row = this.#rows.get(id);
    const folded = this.#collapsed.has(id);
    const view = this.#view;
    const middle = this.#span(id).start_ms + this.#span(id).duration_ms / 2;
    const move = to => to && this.#choose(to);
    if (event.shiftKey && event.key === "ArrowLeft") this.#zoomed(() => view.pan(-0.25));
    else if (event.shiftKey && event.key === "ArrowRight") this.#zoomed(() => view.pan(0.25));
    else if (event.key === "ArrowDown") move(shown[index + 1]);
    else if (event.key === "ArrowUp") move(shown[index - 1]);
    else if (event.key === "Home") move(shown[0]);
    else if (event.key === "End") move(shown.at(-1));
    else if (event.key === "ArrowRight") row.parent && folded ? this.#toggle(id, false) : row.parent && move(shown[index + 1]);
    else if (event.key === "ArrowLeft") row.parent && !folded ? this.#toggle(id, true) : move(this.#parent(id));
    else if (event.key === "Enter" || event.key === " ") (this.#choose(id), event.key === "Enter" && this.entered());
    else if (event.key === "+" || event.key === "=") this.#zoomed(() => view.zoom(0.5, middle));
    else if (event.key === "-") this.#zoomed(() => view.zoom(2, middle));
    else if (event.key === "0") this.#zoomed(() => view.whole());
    else if (event.key === "z") this.#zoomed(() => this.#toSelected());
    else return false;
    return true;
  }

  #parent(id) {
    const parent = this.#span(id).parent_id;
    return this.#rows.has(parent) ? parent : null;
  }

  #toSelected() {
    const span = this.#span(this.selected);
    if (!span) return;
    const room = Math.max(span.duration_ms * 0.05, 0.002);
    this.#view.show(span.start_ms - room, span.start_ms + span.duration_ms + room);
  }

  #zoomed(act) {
    act();
    this.#draw();
  }

  /** Everything that depends on which part of the trace is in view. */
  #draw() {
    const view = this.#view;
    const width = this.axis.clientWidth;
    if (!width) return;
    const marks = ticks(view, width);
    const place = (made, ms) => (made.style.setProperty("--at", view.place(ms).toFixed(6)), made);
    let taken = 0;
    this.axis.replaceChildren(...marks.map(({ ms, label }) => {
      const [left, wide] = [view.place(ms) * width, label.length * LETTER_PX];
      const flipped = left + wide > width; // no room on its right
      const tick = place(el("span", { class: flipped ? "tick last" : "tick" }, flipped && left - wide < taken ? "" : label), ms);
      taken = left + wide;
      return tick;
    }));
    this.lines.replaceChildren(...marks.map(({ ms }) => place(el("i"), ms)));
    for (const span of this.#spans) this.#rows.get(span.span_id).place(view);
    setText(this.range, view.zoomed ? `${exact(view.from)} to ${exact(view.to)}, ${short(view.range)} across` : `${short(view.total)} across`);
    this.overview.style.setProperty("--from", (view.from / view.total).toFixed(6));
    this.overview.style.setProperty("--to", (view.to / view.total).toFixed(6));
    this.overview.classList.toggle("zoomed", view.zoomed);
  }

  /** All spans as thin lines, whatever is in view. */
  #overview() {
    const bars = this.#spans.map((span, index) => {
      const bar = el("i", { class: `service-${this.#colours.get(span.service)}` });
      bar.classList.toggle("error", span.status === "error");
      bar.style.setProperty("--from", (span.start_ms / this.#view.total).toFixed(6));
      bar.style.setProperty("--long", (span.duration_ms / this.#view.total).toFixed(6));
      bar.style.setProperty("--down", (index / this.#spans.length).toFixed(6));
      return bar;
    });
    this.overview.replaceChildren(...bars, el("div", { class: "window" }));
  }
}

class Row {
  constructor(id) {
    this.shown = "";
    this.fold = el("span", { class: "fold", "aria-hidden": "true" });
    this.swatch = el("i", { class: "swatch", "aria-hidden": "true" });
    this.what = el("span", { class: "what" });
    this.of = el("span", { class: "of" });
    this.marks = el("span", { class: "marks" });
    this.bar = el("div", { class: "bar", "data-testid": "bar" });
    this.away = el("span", { class: "away", "aria-hidden": "true" });
    this.barCell = el("div", { class: "bar-cell", role: "gridcell" }, this.bar, this.away);
    this.took = el("div", { class: "took", role: "gridcell" });
    this.element = el("div", { class: "span-row", role: "row", tabindex: "-1", "data-span": id, "data-testid": "span-row" },
      el("div", { class: "name", role: "gridcell" }, this.fold, this.swatch, this.what, this.of, this.marks), this.barCell, this.took);
  }

  update(span, parent, colour) {
    this.span = span;
    this.parent = parent;
    const signature = JSON.stringify([span, parent, colour]);
    if (signature === this.shown) return;
    this.shown = signature;
    attribute(this.element, "aria-level", span.depth + 1);
    if (!parent) attribute(this.element, "aria-expanded", null);
    this.element.style.setProperty("--depth", Math.min(span.depth, 12));
    this.element.classList.toggle("parent", parent);
    this.element.classList.toggle("error", span.status === "error");
    this.element.classList.toggle("orphan", span.orphan);
    this.swatch.className = `swatch service-${colour}`;
    this.bar.className = `bar service-${colour}`;
    setText(this.what, span.name);
    setText(this.of, span.attributes["demo.image.id"] ?? "");
    attribute(this.what, "title", `${span.name} (${span.process})`);
    this.marks.replaceChildren(...marks(span));
    attribute(this.barCell, "aria-label", `${span.service}, starts at ${exact(span.start_ms)}`);
    setText(this.took, short(span.duration_ms));
    attribute(this.took, "title", exact(span.duration_ms));
    this.bar.replaceChildren(...span.events.map(event => {
      const mark = el("i", { class: "event", title: `${event.name} at ${exact(event.at_ms)}` });
      const part = span.duration_ms ? (event.at_ms - span.start_ms) / span.duration_ms : 0;
      mark.style.setProperty("--at", Math.min(Math.max(part, 0), 1).toFixed(4));
      return mark;
    }));
  }

  place(view) {
    const from = view.place(this.span.start_ms);
    const to = view.place(this.span.start_ms + this.span.duration_ms);
    const away = to < 0 ? "before" : from > 1 ? "after" : "";
    this.bar.hidden = away !== "";
    setText(this.away, { before: "◂", after: "▸", "": "" }[away]);
    this.away.classList.toggle("after", away === "after");
    // Cut to a little beyond what is in view: a bar of 10 s at 10 µs across would be a million times too wide.
    const left = Math.max(from, -0.01);
    this.bar.style.setProperty("--from", left.toFixed(6));
    this.bar.style.setProperty("--long", Math.max(Math.min(to, 1.01) - left, 0).toFixed(6));
  }
}

/** What to see at a glance, as badges. */
function marks(span) {
  const found = [];
  const attributes = span.attributes;
  const resent = attributes["http.request.resend_count"];
  const answered = attributes["http.response.status_code"];
  if (resent) found.push(badge(`↻ ${resent}`, "warn", `retry ${resent} of this call`));
  if (answered >= 400) found.push(badge(String(answered), answered >= 500 ? "bad" : "warn", `answered ${answered}`));
  if (span.status === "error") found.push(badge(`✕ ${attributes["error.type"] ?? "error"}`, "bad", span.message));
  if (attributes["demo.image.status"] === "failed" && span.status !== "error") found.push(badge("✕ failed", "bad", attributes["demo.image.error"]));
  if (span.orphan) found.push(badge("orphan", "warn", ORPHAN));
  if (span.links_to.length) found.push(el("span", { class: "link-mark", role: "img", title: "linked to another span", "aria-label": "linked to another span" }, "⇠"));
  if (span.linked_from.length) found.push(el("span", { class: "link-mark", role: "img", title: "another span is linked to this one", "aria-label": "another span is linked to this one" }, "⇢"));
  return found;
}
