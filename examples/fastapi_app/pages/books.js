// The books and the machinery, live: what the desk says, asked again and again.

import { ask, byId, el, number, plural, setText } from "./common.js";

const EVERY_MS = 1000;
const HURRIED_MS = 300;
const HIDDEN_MS = 5000;
const HURRY_LASTS_MS = 15_000;

/** What is known: `state` as `GET /desk/state` gave it last; `down`: the app does not answer; `missing`: no desk. */
export const now = { state: null, down: false, missing: false };

const events = new EventTarget();
let hurriedUntil = 0;
let asked = 0;
let wake = () => {};

/** Be told each time there is news. */
export const onBooks = listener => events.addEventListener("news", listener);

/** Look more often for a while: something is going on. */
export function hurry() {
  hurriedUntil = Date.now() + HURRY_LASTS_MS;
  wake();
}

/** Wait for news that was asked for after this call. One loop asks for all who wait. */
export function next(hurried = true) {
  const since = asked;
  if (hurried) hurry();
  return new Promise(resolve => {
    const look = ({ detail }) => {
      if (detail <= since) return;
      events.removeEventListener("news", look);
      resolve();
    };
    events.addEventListener("news", look);
  });
}

/** Wait until what is known is as wanted, but no longer than this. */
export async function until(wanted, withinMs) {
  const end = Date.now() + withinMs;
  while (!wanted() && Date.now() < end) await next();
}

/** Whether the ledger can be read: asking for it in vain would only fill the console. */
export const readable = () => now.missing
  || (!now.down && now.state !== null && !now.state.stale && now.state.processes.every(process => process.up));

/** The account of a user; null where it is not known. */
export const accountOf = user => now.state?.books?.users.find(account => account.user_id === user) ?? null;

/** Charges that are not final yet; null where that is not known. */
export function unsettled() {
  const books = now.down ? null : now.state?.books;
  return books ? Object.values(books.unsettled).reduce((sum, count) => sum + count, 0) : null;
}

/** Take in a state that came as the answer to something else. */
export function learn(state) {
  // While the service is away, what its books said last is still the best that is known: shown as such.
  const books = state.books ?? now.state?.books ?? null;
  Object.assign(now, { state: { ...state, books, stale: state.books === null }, down: false });
  tell(0);
}

function tell(turn) {
  events.dispatchEvent(new CustomEvent("news", { detail: turn }));
}

/** Keep looking, for as long as the page is open. */
export async function watch() {
  document.addEventListener("visibilitychange", () => wake());
  for (;;) {
    asked += 1;
    const answer = await ask("/desk/state");
    now.missing = answer.status === 404;
    now.down = answer.down;
    if (answer.ok) learn(answer.body);
    tell(asked);
    if (now.missing) return;
    await pause(now.down ? EVERY_MS : document.hidden ? HIDDEN_MS : Date.now() < hurriedUntil ? HURRIED_MS : EVERY_MS);
  }
}

function pause(ms) {
  return new Promise(resolve => {
    const timer = setTimeout(resolve, ms);
    // Hurry shortens a long pause; it does not hammer an app that is down.
    wake = () => { if (ms > HURRIED_MS && !now.down) { clearTimeout(timer); resolve(); } };
  });
}

// What is shown of it.

const NAMES = { app: "app", credits: "credits service" };

/** "2 refunding, 1 voiding" */
export const inStates = counts => Object.entries(counts).filter(([, count]) => count > 0)
  .map(([state, count]) => `${number(count)} ${state}`).join(", ");

const tick = () => el("span", { class: "good", role: "img", "aria-label": "it balances" }, "✓");

/** granted − deducted + returned = balance, in figures. */
export function equation({ user_id: user, granted, deducted, returned, balance, balanced }) {
  return el("span", { class: "equation number", title: "granted − deducted + returned = balance", data: { testid: "equation", balanced: String(balanced) } },
    `${user}: ${number(granted)} − ${number(deducted)} + ${number(returned)} = ${number(granted - deducted + returned)} `,
    balanced ? tick() : el("span", { class: "bad" }, `✗ the balance is ${number(balance)}`));
}

export function drawBooks() {
  drawBanner();
  drawMachinery();
  const { state, missing } = now;
  const body = byId("books-body");
  if (missing) {
    setText(byId("balanced"), "");
    body.replaceChildren(el("p", { class: "soft" }, "The books and the switches come with ", el("code", {}, "make demo"), ", which runs a desk beside the app."));
    return;
  }
  if (!state) return;
  const [kind, words] = verdict(state);
  byId("balanced").className = `badge ${kind}`;
  setText(byId("balanced"), words);
  body.classList.toggle("stale", now.down || state.stale);
  replaceIfNew(body, [state.books && table(state.books), machinery(state)].filter(Boolean));
}

// Only what has changed, so that what is being selected or read aloud is left alone.
function replaceIfNew(place, children) {
  const made = el("div", {}, children);
  if (!made.isEqualNode(place.firstElementChild)) place.replaceChildren(made);
}

function verdict(state) {
  if (now.down) return ["warn", "as last seen: the app is down"];
  if (state.stale) return ["warn", "as last seen: the credits service is down"];
  if (!state.books) return ["", "not known yet"];
  return state.books.balanced ? ["good", "they balance"] : ["bad", "they do not balance"];
}

function table({ users }) {
  const heads = ["granted", "deducted", "returned", "balance"];
  return el("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": "The books by user" },
    el("table", {},
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "user"),
        heads.map((head, at) => el("th", { scope: "col", class: "number" }, ["", "− ", "+ ", "= "][at] + head)), el("th", {}, el("span", { class: "visually-hidden" }, "balances")))),
      el("tbody", {}, users.map(user => el("tr", { data: { testid: "books-user", user: user.user_id, balanced: String(user.balanced) } },
        el("th", { scope: "row" }, user.user_id ?? "everybody"),
        heads.map(head => el("td", { class: "number" }, number(user[head]))),
        el("td", { class: "number" }, user.balanced ? tick() : el("span", { class: "bad" }, "✗ does not")))))));
}

function machinery(state) {
  const counts = state.books?.unsettled ?? {};
  const open = inStates(counts);
  const disputed = state.books?.disputed ?? 0;
  return el("dl", { class: "gauges" },
    el("div", {}, el("dt", {}, "Charges under way"),
      el("dd", { data: { testid: "unsettled", count: String(unsettled() ?? "") } }, state.books ? open || "none" : "not known")),
    disputed > 0 ? el("div", {}, el("dt", {}, "Disputed"), el("dd", { class: "bad", data: { testid: "disputed" } }, `${plural(disputed, "charge")}: a person looks`)) : null,
    state.processes.map(process => el("div", {},
      el("dt", {}, NAMES[process.name] ?? process.name),
      el("dd", { data: { testid: `process-${process.name}`, up: String(isUp(process)) } },
        el("span", { class: `dot ${isUp(process) ? "good" : "warn beating"}`, "aria-hidden": "true" }), " ", wordsOf(process)))));
}

const isUp = process => process.up && !(now.down && process.name === "app");

function wordsOf(process) {
  if (!isUp(process)) return process.ended ? `${process.ended}; starting again` : "starting";
  const since = process.restarts > 0 ? `, started again ${process.restarts === 1 ? "once" : `${number(process.restarts)} times`}` : "";
  return `up, pid ${process.pid}${since}`;
}

function drawMachinery() {
  const place = byId("machinery");
  const { state } = now;
  if (!state) return;
  const dot = (good, words) => el("span", { class: "light" },
    el("span", { class: `dot ${good ? "good" : "warn beating"}`, "aria-hidden": "true" }), words);
  const open = unsettled();
  const fault = state.fault.kind === "none" ? [] : [dot(false, `fault: ${state.fault.kind}`)];
  const children = [
    ...fault,
    ...state.processes.map(process => dot(isUp(process), isUp(process) ? process.name : `${process.name} restarts`)),
    dot(open === 0 && state.books?.balanced === true && !state.stale,
      open === null || state.stale ? "books out of sight" : open > 0 ? `${number(open)} under way` : state.books.balanced ? "books balance" : "books do not balance"),
  ];
  replaceIfNew(place, children);
}

function drawBanner() {
  const banner = byId("banner");
  banner.hidden = !now.down;
  setText(banner, now.down ? "The app is down. It restarts by itself; this page waits for it." : "");
}
