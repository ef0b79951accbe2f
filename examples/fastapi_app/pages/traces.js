// The traces page: the address says what is shown, the desk says what there is.
import { el, plural, setText } from "./common.js";
import { attribute } from "./traces-dom.js";
import { Detail } from "./traces-detail.js";
import { Silence, follow, get, pause } from "./traces-feed.js";
import { count } from "./traces-format.js";
import { List } from "./traces-list.js";
import { FILTERS, cleaned, close, query, read, writeFilters } from "./traces-url.js";

const $ = id => document.getElementById(id);
const PAGE = 100;
const OUTCOMES = ["settled", "refunding", "disputed", "not run", "declined", "unknown", "notsent", "ok", "journal", "ownership_lost"];
const DETAIL_PACE_MS = 400;

const form = $("filters");
const list = new List($("rows"));
const detail = new Detail($("trace"), { closed: () => (close(), addressChanged()) });
let filters = {};
let limit = PAGE;
let paused = false;
let latest = null; // the newest answer of the desk, also while paused
let held = null; // the answer that is shown while paused
let following = new AbortController();
let reading = new AbortController();

// The list.

function refollow() {
  following.abort();
  following = new AbortController();
  held = null;
  const { signal } = following;
  const path = since => {
    const asked = new URLSearchParams(query(filters));
    asked.set("limit", limit);
    if (since !== null) asked.set("since", since);
    return `/desk/traces?${asked}`;
  };
  follow(path, {
    signal,
    heard: (answer, changed) => {
      latest = answer;
      if (paused) held ??= answer;
      notice(null);
      if (changed) {
        showList();
        wake();
      }
    },
    silent: words => {
      notice(words);
      showLive();
    },
  });
}

function showList() {
  showLive();
  const answer = paused ? held : latest;
  if (!answer) return;
  list.show(answer.traces);
  suggest(answer.traces);
  $("empty").hidden = answer.traces.length > 0;
  setText($("empty"), query(filters) ? "No request here matches these filters." : "No request yet. Send one from the other page.");
  const dropped = answer.dropped ? `; ${count(answer.dropped)} older ones have fallen out of the ring` : "";
  setText($("counts"), `${count(answer.traces.length)} shown, ${plural(answer.kept, "trace")} kept${dropped}`);
  $("more").hidden = answer.traces.length < limit;
}

/** What has been seen can be chosen. */
function suggest(summaries) {
  const fill = (element, values, words = value => value) => {
    const known = new Set([...element.children].map(option => option.value));
    for (const value of new Set(values)) {
      if (value !== null && !known.has(value)) element.append(el("option", { value }, words(value)));
    }
  };
  fill($("tenants"), summaries.map(one => one.tenant_id));
  fill($("users"), summaries.map(one => one.user_id));
  fill(form.outcome, [...OUTCOMES, filters.outcome, ...summaries.map(one => one.outcome)].filter(Boolean));
  form.outcome.value = filters.outcome;
}

// What is said above the list.

function notice(words) {
  $("notice").hidden = words === null;
  setText($("notice"), words ?? "");
}

function showLive() {
  const trouble = !$("notice").hidden;
  $("live").classList.toggle("off", trouble || paused);
  if (trouble) setText($("live"), "waiting …");
  else if (paused) setText($("live"), newer() ? `paused: ${newer()} newer` : "paused");
  else setText($("live"), "live");
}

function newer() {
  if (!held) return 0;
  const seen = new Set(held.traces.map(one => one.trace_id));
  return latest.traces.filter(one => !seen.has(one.trace_id)).length;
}

$("pause").addEventListener("click", () => {
  paused = !paused && latest !== null;
  held = paused ? latest : null;
  attribute($("pause"), "aria-pressed", String(paused));
  showList();
});

$("more").addEventListener("click", () => {
  limit += PAGE;
  refollow();
});

// The open trace: asked for again whenever anything has changed, but not too often.

let woken = () => {};
const wake = () => woken();

async function readTrace(id, span) {
  stopReading();
  reading = new AbortController();
  const { signal } = reading;
  let first = span;
  while (!signal.aborted) {
    const change = new Promise(resolve => (woken = resolve));
    try {
      const trace = await get(`/desk/traces/${id}`, signal);
      detail.show(trace, first);
      document.title = `${trace.summary.name} · Traces`;
      first = null;
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof Silence)) throw error;
      const gone = error.status === 404;
      detail.missing(gone ? fallenOut(id) : error.message, gone);
    }
    await change;
    await pause(DETAIL_PACE_MS, signal);
  }
}

function stopReading() {
  reading.abort();
  wake();
}

const fallenOut = id => `Trace ${id} is not kept here: it has fallen out of the ring, which keeps the newest only, or was never there.`;

// The address.

function addressChanged() {
  const wanted = read();
  const changed = query(wanted.filters) !== query(filters);
  filters = wanted.filters;
  if (changed || latest === null) {
    limit = PAGE;
    fillForm();
    refollow();
  }
  showOpen(wanted);
}

function showOpen({ trace, span }) {
  if (trace === detail.id) {
    if (trace) detail.select(span);
    return;
  }
  const before = detail.id;
  document.body.classList.toggle("reading", trace !== null);
  list.mark(trace);
  if (trace) {
    detail.open(trace);
    detail.title.focus({ preventScroll: true });
    readTrace(trace, span);
  } else {
    stopReading();
    detail.close();
    document.title = "Traces";
    list.focus(before);
  }
}

function fillForm() {
  suggest([]);
  for (const name of FILTERS) {
    const field = form.elements[name];
    if (field.type === "checkbox") field.checked = filters[name] !== "";
    else if (field !== document.activeElement) field.value = filters[name];
  }
  showFiltered();
}

function showFiltered() {
  const number = FILTERS.filter(name => filters[name]).length;
  $("clear").hidden = number === 0;
  setText($("show-filters"), number ? `Filters (${number})` : "Filters");
}

function filtersChanged(push) {
  const values = new FormData(form);
  const wanted = cleaned(name => values.get(name));
  if (query(wanted) === query(filters)) return;
  filters = wanted;
  limit = PAGE;
  writeFilters(filters, push);
  showFiltered();
  refollow();
}

// While something is typed the list follows, and all of the typing is one step for "back".
let typed = null;
let typing = null;
form.addEventListener("input", event => {
  clearTimeout(typing);
  const push = typed !== event.target;
  typing = setTimeout(() => {
    typed = event.target;
    filtersChanged(push);
  }, event.target.matches("select, [type=checkbox]") ? 0 : 250);
});
form.addEventListener("focusout", () => (typed = null));
form.addEventListener("submit", event => {
  event.preventDefault();
  filtersChanged(true);
});
$("clear").addEventListener("click", () => {
  form.reset();
  filtersChanged(true);
  form.q.focus();
});
$("show-filters").addEventListener("click", event => {
  const open = form.classList.toggle("open");
  attribute(event.target, "aria-expanded", String(open));
});
document.querySelector(".skip").addEventListener("click", event => {
  event.preventDefault(); // the hash is the open trace's
  $("list-pane").focus();
});
addEventListener("popstate", addressChanged);
document.addEventListener("keydown", event => {
  if (event.key !== "Escape" || event.defaultPrevented || !detail.id || !detail.element.contains(event.target)) return;
  if (!event.target.closest(".panel")) detail.closed();
});

addressChanged();
