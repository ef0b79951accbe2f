// One span, read closely: what it is, its attributes, its events, and its links both ways.
import { el } from "./common.js";
import { badge, copyButton } from "./traces-dom.js";
import { brief, exact, moment } from "./traces-format.js";
import { at } from "./traces-url.js";
import { ORPHAN } from "./traces-waterfall.js";

/** The panel's content for a span of a trace (`{summary, spans}`). */
export function panel(span, { summary, spans }, { closed }) {
  const parent = spans.find(one => one.span_id === span.parent_id);
  return [
    el("header", { class: "panel-head" },
      el("h3", { id: "panel-title", tabindex: "-1" }, span.name),
      el("button", { class: "button quiet little", type: "button", "aria-label": "close the attributes", onclick: closed }, "✕")),
    el("dl", { class: "facts" },
      ...fact("status", status(span)),
      ...(span.message ? fact("message", span.message) : []),
      ...fact("process", `${span.process}`, el("span", { class: "soft" }, ` ${span.kind}`)),
      ...fact("start", `+${exact(span.start_ms)}`, el("span", { class: "soft" }, ` ${moment(summary.started_at, span.start_ms)}`)),
      ...fact("duration", exact(span.duration_ms)),
      ...fact("parent", parentOf(span, parent, summary)),
      ...fact("span id", span.span_id, " ", copyButton(span.span_id, "span id"))),
    ...links(span, summary),
    el("h4", {}, "Attributes"),
    attributes(span.attributes),
    ...(span.events.length ? [el("h4", {}, "Events"), ...span.events.map(event => happened(event, span))] : []),
  ];
}

const fact = (name, ...value) => [el("dt", {}, name), el("dd", {}, ...value)];

function status(span) {
  if (span.status === "error") return badge(`✕ error${span.attributes["error.type"] ? `: ${span.attributes["error.type"]}` : ""}`);
  return span.status === "ok" ? badge("ok", "good") : "unset";
}

function parentOf(span, parent, summary) {
  if (parent) return el("a", { href: at(summary.trace_id, parent.span_id) }, parent.name);
  if (span.orphan) return badge(ORPHAN, "warn");
  return span.parent_id ? el("span", { class: "soft" }, `${span.parent_id} (the caller's)`) : el("span", { class: "soft" }, "none: it is the root");
}

function attributes(values) {
  const names = Object.keys(values).sort();
  if (!names.length) return el("p", { class: "soft" }, "none");
  return el("dl", { class: "attributes", "data-testid": "attributes" }, ...names.flatMap(name => fact(name, written(values[name]))));
}

const written = value => (typeof value === "string" ? value : Array.isArray(value) ? value.join(", ") : JSON.stringify(value));

function happened(event, span) {
  const stack = event.attributes["exception.stacktrace"];
  const rest = Object.fromEntries(Object.entries(event.attributes).filter(([name]) => name !== "exception.stacktrace"));
  return el("div", { class: "event-box", "data-testid": "event" },
    el("p", {}, el("b", {}, event.name), el("span", { class: "soft" }, ` +${exact(event.at_ms)} (${exact(event.at_ms - span.start_ms)} into the span)`)),
    Object.keys(rest).length ? attributes(rest) : null,
    stack ? el("details", {}, el("summary", {}, "stack trace"), el("pre", {}, stack)) : null);
}

const DOES = { refund: "refund of", void: "void of", recover: "recovery of" };

/** A span's links both ways, each with the words that stand before it. */
export function related(span, here) {
  const does = DOES[span.name.split(".").at(-1)] ?? "linked to";
  return [
    ...span.links_to.map(link => [`${does} `, link]),
    ...span.linked_from.map(link => [link.trace_id === here ? "settled by " : "settled later by ", link]),
  ];
}

function links(span, summary) {
  const found = related(span, summary.trace_id);
  if (!found.length) return [];
  return [el("h4", {}, "Links"), el("ul", { class: "links", "data-testid": "links" },
    ...found.map(([words, link]) => el("li", {}, words, linkTo(link, summary.trace_id))))];
}

/** A link to a span, here or in another trace. */
export function linkTo(link, here) {
  const name = link.name === "metered_billing.deduct" ? "the deduction" : (link.name ?? `span ${link.span_id}`);
  const place = link.trace_id === here ? "in this trace" : `in trace ${brief(link.trace_id)}`;
  return el("a", { href: at(link.trace_id, link.span_id), title: `trace ${link.trace_id}, span ${link.span_id}` }, `${name} ${place}`);
}
