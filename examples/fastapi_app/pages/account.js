// Who pays, and what they have.

import { accountOf, now, onBooks } from "./books.js";
import { authorization, PAYERS } from "./client.js";
import { ask, byId, credits, el, number, plural, setText } from "./common.js";
import { pictures } from "./tray.js";

const TWEEN_MS = 500;

let chosen = PAYERS[0];
let sending = false;
const balances = new Map();
const listeners = [];

/** Who pays now. */
export const payer = () => chosen;

/** Be told when somebody else is to pay, or a balance has moved. */
export const onAccount = listener => listeners.push(listener);

/** What a user has, as known last; undefined before that. */
export const balanceOf = user => balances.get(user);

/** Who pays for a lesson: who is chosen, unless they have too little and another has enough. */
export function payerFor(cost) {
  const able = PAYERS.filter(one => (balances.get(one.user) ?? cost) >= cost);
  return able.includes(chosen) || able.length === 0 ? chosen : able[0];
}

/** Take a balance that the service has just told. */
function learn(user, balance) {
  if (balances.get(user) === balance) return;
  balances.set(user, balance);
  tell();
}

/** Ask for the balance by the public API, where there is no desk to say it. */
export async function refresh() {
  if (!now.missing) return;
  const answer = await ask("/me", { headers: authorization(chosen) });
  if (answer.ok) learn(chosen.user, answer.body.balance);
}

export function markSending(whether) {
  sending = whether;
  draw();
}

function tell() {
  draw();
  for (const listener of listeners) listener();
}

/** Let a number run to its new value, unless motion is not wanted. */
export function runTo(element, value) {
  const from = Number(element.dataset.value ?? NaN);
  if (from === value) return;
  element.dataset.value = String(value);
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches || Number.isNaN(from) || document.hidden;
  if (still) {
    setText(element, number(value));
    return;
  }
  const began = performance.now();
  const step = at => {
    if (element.dataset.value !== String(value)) return; // it runs elsewhere by now
    const part = Math.min(1, (at - began) / TWEEN_MS);
    setText(element, number(Math.round(from + (value - from) * (1 - (1 - part) ** 3))));
    if (part < 1) requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
}

const options = new Map();

function makePayers() {
  const made = PAYERS.map(one => {
    const balance = el("span", { class: "number payer-balance", data: { testid: `balance-${one.user}` } }, "–");
    const input = el("input", {
      type: "radio", name: "payer", value: one.user, checked: one === chosen, data: { testid: `payer-${one.user}` },
      on: { change: () => { chosen = one; tell(); refresh(); } },
    });
    options.set(one.user, { input, balance });
    return el("label", { class: "payer" }, input, el("span", { class: "payer-name" }, one.user), balance);
  });
  byId("payers").append(...made);
}

function draw() {
  for (const [user, { balance }] of options) if (balances.has(user)) runTo(balance, balances.get(user));
  drawButton(pictures().length);
  if (sending) return; // what was said beforehand stands, until there is an answer
  const count = pictures().length;
  const have = balances.get(chosen.user);
  const short = have !== undefined && count > have;
  setText(byId("quote-what"), count === 0 ? "No pictures yet" : `${plural(count, "picture")} × 1 credit`);
  setText(byId("quote-cost"), number(count));
  setText(byId("quote-have"), have === undefined ? "–" : number(have));
  setText(byId("quote-left"), have === undefined || short ? "–" : number(have - count));
  byId("short").hidden = !short;
  setText(byId("short"), short ? `${chosen.user} has ${credits(have)}, and this costs ${number(count)}. Send it all the same, and see: a 402, and nothing runs.${chosen.user === "poor" ? "" : " (Starting the demo again fills the accounts.)"}` : "");
}

function drawButton(count) {
  const button = byId("send");
  button.setAttribute("aria-disabled", String(sending || count === 0));
  setText(button, sending ? "Cutting out …" : count === 0 ? "Cut out" : `Cut out ${plural(count, "picture")}`);
}

export function start() {
  makePayers();
  draw();
  onBooks(() => {
    for (const { user } of PAYERS) {
      const account = accountOf(user);
      if (account) learn(user, account.balance);
    }
    if (now.missing && !balances.has(chosen.user)) refresh();
  });
}

export { draw as drawQuote };
