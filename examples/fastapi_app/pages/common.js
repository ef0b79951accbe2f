// What both pages share: building elements, asking the app, and saying numbers and times.

/**
 * Make an element. Text goes in as text nodes, never as HTML.
 *
 * @param {string} tag
 * @param {object} properties `class`, `data` (a mapping), `on` (listeners by event), attributes with a dash or
 *   `role`, `for`, …; the rest are properties. What is null or undefined is left out.
 */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name === "class") made.className = value;
    else if (name === "data") Object.assign(made.dataset, value);
    else if (name === "on") for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else if (name in made && !name.includes("-")) made[name] = value;
    else made.setAttribute(name, String(value));
  }
  made.append(...children.flat().filter(child => child !== null && child !== undefined));
  return made;
}

export const byId = id => document.getElementById(id);

export const sleep = ms => new Promise(resolve => setTimeout(resolve, ms));

/**
 * Ask the app. Never throws: an app that is down is an answer, too.
 *
 * @returns {Promise<{status: number, ok: boolean, down: boolean, headers: Headers, body: any}>} `status` 0 and `down`
 *   where there was no answer at all; `body` is parsed JSON, or null.
 */
export async function ask(path, { method = "GET", headers = {}, json, signal } = {}) {
  const options = { method, headers: { ...headers }, signal, cache: "no-store" };
  if (json !== undefined) {
    options.body = JSON.stringify(json);
    options.headers["Content-Type"] = "application/json";
  }
  // Without this header the desk presses no switch: no other site can send it.
  if (method !== "GET" && path.startsWith("/desk/")) options.headers["X-Demo"] = "1";
  try {
    const answer = await fetch(path, options);
    const text = await answer.text();
    return { status: answer.status, ok: answer.ok, down: false, headers: answer.headers, body: parsed(text) };
  } catch {
    return { status: 0, ok: false, down: true, headers: new Headers(), body: null };
  }
}

function parsed(text) {
  try { return JSON.parse(text); }
  catch { return null; }
}

/** Random bytes in lower-case hex, never all zeros (which trace ids must not be). */
export function randomHex(bytes) {
  const made = [...crypto.getRandomValues(new Uint8Array(bytes))].map(byte => byte.toString(16).padStart(2, "0")).join("");
  return /[^0]/.test(made) ? made : randomHex(bytes);
}

const numbers = new Intl.NumberFormat("en");

export const number = value => numbers.format(value);

/** "1 credit", "10 credits". */
export const plural = (count, one, many = `${one}s`) => `${number(count)} ${count === 1 ? one : many}`;

export const credits = count => plural(count, "credit");

/** "+2", "−10": with a real minus. */
export const signed = amount => (amount < 0 ? `−${number(-amount)}` : `+${number(amount)}`);

/** A duration as people say it: "0.42 ms", "18 ms", "1.24 s". */
export function duration(ms) {
  if (ms < 1) return `${ms.toFixed(2)} ms`;
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(2)} s`;
  return `${Math.floor(ms / 60_000)} min ${Math.round((ms % 60_000) / 1000)} s`;
}

/** The time of day of an RFC 3339 time, on the reader's clock. */
export function clock(time) {
  const date = new Date(time);
  return Number.isNaN(date.getTime()) ? String(time) : date.toLocaleTimeString("en-GB");
}

/** A <time> that shows the time of day, and all of it on hover. */
export const when = time => el("time", { dateTime: time, title: time }, clock(time));

/** The last characters of a long id: those that differ. */
export const shortId = id => (id && id.length > 12 ? `…${id.slice(-8)}` : (id ?? ""));

/** A badge for an HTTP status; 0 is no answer. */
export function statusBadge(status) {
  const kind = status === 0 || status >= 500 ? "bad" : status >= 400 ? "warn" : "good";
  return el("span", { class: `badge ${kind}`, data: { status: String(status) } }, status === 0 ? "no answer" : String(status));
}

/** Where a request's spans are to be seen. */
export const traceLink = (traceId, words = "See its trace") =>
  el("a", { href: `/traces#${traceId}`, data: { testid: "trace-link", trace: traceId } }, words);

/** Put new content into a place, only where it differs: nothing flickers, and what has the focus keeps it. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
