// What stands in the address: the filters in the query, the open trace (and span) in the hash. So a link can be sent.

export const FILTERS = ["q", "tenant", "user", "status", "outcome", "slow_ms", "trouble"];

/** `{filters: {name: value}, trace, span}`; what is not there is "" or null. */
export function read() {
  const query = new URLSearchParams(location.search);
  const filters = cleaned(name => query.get(name));
  const [, trace = null, span = null] = /^#([0-9a-f]{32})(?:\/([0-9a-f]{16}))?$/.exec(location.hash) ?? [];
  return { filters, trace, span };
}

/** The filters of which `value(name)` may be anything: what the desk would refuse is as good as empty. */
export function cleaned(value) {
  const filters = Object.fromEntries(FILTERS.map(name => [name, String(value(name) ?? "").trim().slice(0, 200)]));
  if (!/^\d{1,9}$/.test(filters.slow_ms)) filters.slow_ms = "";
  filters.trouble = filters.trouble === "1" ? "1" : "";
  return filters;
}

/** The filters as a query, without those that are empty. */
export function query(filters) {
  return new URLSearchParams(FILTERS.filter(name => filters[name]).map(name => [name, filters[name]])).toString();
}

/** Put filters into the address; `push` makes it a step that "back" undoes. */
export function writeFilters(filters, push) {
  const search = query(filters);
  const address = `${location.pathname}${search ? `?${search}` : ""}${location.hash}`;
  if (push) history.pushState(null, "", address);
  else history.replaceState(null, "", address);
}

/** A selected span is no step of its own. */
export function writeSpan(trace, span) {
  history.replaceState(null, "", `${location.pathname}${location.search}${at(trace, span)}`);
}

/** Close the open trace. */
export function close() {
  history.pushState(null, "", location.pathname + location.search);
}

/** The hash of a trace or of one of its spans: an `href`. */
export const at = (trace, span = null) => `#${trace}${span ? `/${span}` : ""}`;
