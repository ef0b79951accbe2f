// A lesson's card: what will happen, its buttons, and then what did: the client's answer, the ledger, the books.

import { payerFor } from "./account.js";
import { accountOf, equation, hurry, inStates, learn, next, now, onBooks, readable, unsettled, until } from "./books.js";
import { circuitOpenUntil, createProducts, entriesOf, PAYERS, problemText, samples } from "./client.js";
import { ask, credits, duration, el, plural, setText, shortId, signed, sleep, statusBadge, traceLink } from "./common.js";
import { isAsTold, ofRequest, sumsOf } from "./ledger.js";

// The desk may show what it read this long ago.
const SURE_AFTER_MS = 750;
const BROKEN = "shopping-list"; // a sample that is no picture at all
const CALM_WITHIN_MS = 15_000;
const HURRY_FOR_MS = 30_000;
const SHOWN_HEADERS = ["Credits-Deducted", "Credits-Refunded", "Credits-Balance", "Credits-Transaction-Id", "Retry-After"];

const lessons = [];
let busy = false;

/** Press a switch of the desk's. */
export async function press(path, json) {
  const answer = await ask(path, { method: "POST", json });
  if (!answer.ok) throw new Error(answer.down ? "the app is down" : answer.body?.detail ?? `the desk answered ${answer.status}`);
  if (answer.body?.fault) learn(answer.body);
  hurry();
}

export const switchOff = () => press("/desk/fault", { kind: "none", calls: "every" }).catch(() => {});

export class Lesson {
  /**
   * @param {object} told `id`; `title`; `tells`, a sentence of what will happen; `kind`, the fault it switches on;
   *   `actions`, each with a `name`, a `label` and what to `run`.
   */
  constructor({ id, title, tells, kind = null, actions }) {
    this.id = id;
    this.kind = kind;
    this.turn = 0;
    this.sent = [];
    const testid = part => ({ testid: `lesson-${id}${part ? `-${part}` : ""}` });
    this.buttons = actions.map(({ name, label, run }) => el("button", {
      type: "button", class: "button", data: testid(name), on: { click: () => this.start(run) },
    }, label));
    this.says = el("p", { class: "lesson-says", role: "status", data: testid("says") });
    this.answers = el("div", { class: "answers", data: testid("answers") });
    this.ledger = el("div", { class: "lesson-ledger", data: testid("ledger") });
    this.off = el("button", { type: "button", class: "button danger little", hidden: true, data: testid("off"), on: { click: switchOff } }, "Switch it off");
    this.result = el("div", { class: "lesson-result", hidden: true, data: testid("result") }, this.says, this.answers, this.ledger, this.off);
    this.element = el("li", { class: "lesson card", data: { ...testid(""), phase: "ready" } },
      el("h4", { class: "lesson-title" }, title), el("p", { class: "tells" }, tells), el("div", { class: "lesson-buttons" }, this.buttons), this.result);
    lessons.push(this);
  }

  async start(run) {
    if (busy || now.missing) return;
    busy = true;
    this.turn += 1;
    this.sent = [];
    this.answers.replaceChildren();
    this.ledger.replaceChildren();
    this.result.hidden = false;
    this.element.dataset.phase = "running";
    drawLessons();
    try {
      await this.calm();
      await run(this);
    } catch (error) {
      this.say(`That did not work: ${error.message}.`);
    } finally {
      busy = false;
      drawLessons();
    }
    await this.settle();
  }

  say(text) {
    setText(this.says, text);
  }

  /** What a lesson before has left must not disturb this one: its fault, its void, its open circuit. */
  async calm() {
    if ((now.state?.fault.kind ?? "none") !== "none") await switchOff();
    if (unsettled() !== 0) this.say("Waiting until the charges of the request before are final …");
    await until(() => unsettled() === 0 && readable(), CALM_WITHIN_MS);
    for (let round = 0; round < 3 && circuitOpenUntil() > 0; round++) await this.closeCircuit();
  }

  /** After failures the app asks the service nothing for a while; then one request may try, and closes the circuit. */
  async closeCircuit() {
    for (let left = circuitOpenUntil() - Date.now(); left > 0; left = circuitOpenUntil() - Date.now()) {
      this.say(`After so many failures the app asks the service nothing for a while (its circuit is open). ${Math.ceil(left / 1000)} s to go, as Retry-After said.`);
      await sleep(Math.min(left, 1000));
    }
    this.say("One request may try whether the service answers again: a broken picture, which costs nothing in the end …");
    const body = await samples();
    const images = body?.product_groups.flatMap(group => group.images).filter(image => image.id === BROKEN) ?? [];
    await createProducts({ product_groups: [{ name: "Is it back?", images }] }, payerFor(1)).answer;
    await until(() => unsettled() === 0 && readable(), CALM_WITHIN_MS);
  }

  /**
   * Send sample pictures, and show what the client got.
   *
   * @param {{group: ?string, user: ?string}} what The samples' group, or else all of them; who pays, or else who can.
   */
  async send({ group = null, user = null } = {}) {
    const body = await samples();
    if (body === null) throw new Error("the app gives no samples");
    const groups = body.product_groups.filter(one => group === null || one.name === group);
    const cost = groups.reduce((sum, one) => sum + one.images.length, 0);
    const payer = PAYERS.find(one => one.user === user) ?? payerFor(cost);
    const request = { ...createProducts({ product_groups: groups }, payer), payer, cost, got: null };
    const place = el("div", { class: "answer", data: { testid: `lesson-${this.id}-answer` } }, asked(request), el("p", { class: "soft" }, "waiting for an answer …"));
    this.answers.append(place);
    this.sent.push(request);
    hurry();
    request.got = await request.answer;
    request.answeredAt = Date.now();
    place.replaceChildren(asked(request), ...answered(request.got));
    place.dataset.status = String(request.got.status);
    return request.got;
  }

  /** Wait until all that it began is final; show the ledger's entries as they come. */
  async settle() {
    const { turn } = this;
    if (this.sent.length === 0) {
      this.element.dataset.phase = "settled";
      return;
    }
    this.element.dataset.phase = "settling";
    const began = Date.now();
    for (;;) {
      // In this order: what is read after nothing was under way any more is all there will be.
      await next(Date.now() - began < HURRY_FOR_MS);
      const calm = readable() && unsettled() === 0 && this.sent.every(request => Date.now() - request.answeredAt > SURE_AFTER_MS);
      const entries = readable() ? await entriesOf(this.sent[0].payer) : null;
      if (turn !== this.turn) return;
      const final = calm && entries !== null && this.sent.every(request => isAsTold(request, entries));
      this.drawLedger(entries, final);
      if (final) break;
    }
    this.element.dataset.phase = "settled";
  }

  drawLedger(entries, final) {
    const account = accountOf(this.sent[0].payer.user);
    const open = inStates(now.state?.books?.unsettled ?? {});
    const books = el("p", { class: "lesson-books" });
    if (entries === null) {
      books.append(now.down ? "The app is down; it restarts by itself." : "The ledger cannot be read now: its service is down. It restarts by itself.");
    } else {
      books.append(account ? equation(account) : "", " ",
        el("span", { class: `badge ${final ? "good" : "warn"}`, data: { testid: `lesson-${this.id}-final` } }, final ? "nothing left to do" : open ? `under way: ${open}` : "looking …"));
    }
    const movements = entries === null ? [] : this.sent.map(request => movementsOf(request, entries, final));
    const made = el("div", {}, el("h5", { class: "label" }, "What the ledger says"), movements, books);
    if (!made.isEqualNode(this.ledger.firstElementChild)) this.ledger.replaceChildren(made);
  }

  draw() {
    const on = now.state?.fault?.kind ?? "none";
    this.off.hidden = this.kind === null || on !== this.kind;
    this.element.classList.toggle("on", this.kind !== null && on === this.kind);
    for (const button of this.buttons) button.setAttribute("aria-disabled", String(busy || now.missing || now.down));
  }
}

export function drawLessons() {
  for (const lesson of lessons) lesson.draw();
}

onBooks(drawLessons);

// What the client sent, and got.

function asked({ cost, payer, got, traceId }) {
  return el("p", { class: "asked" }, el("span", { class: "soft" }, `${plural(cost, "picture")}, as ${payer.user}`),
    got ? traceLink(traceId, "trace") : null);
}

function answered(got) {
  const headers = SHOWN_HEADERS.filter(name => got.headers.has(name));
  return [
    el("p", { class: "status" }, statusBadge(got.status), el("span", { class: "soft number" }, `after ${duration(got.tookMs)}`)),
    headers.length > 0 ? el("dl", { class: "headers" }, headers.map(name => el("div", {}, el("dt", {}, name), el("dd", { title: got.headers.get(name) }, shortId(got.headers.get(name)))))) : null,
    el("p", { class: "small" }, inWords(got)),
  ].filter(Boolean);
}

function inWords(got) {
  if (got.down) return "The connection broke. The client has no answer, and cannot know what was charged.";
  if (!got.ok) return problemText(got);
  const images = got.body.products.flatMap(product => product.images);
  const good = images.filter(image => image.status === "succeeded").length;
  return `${good} of ${plural(images.length, "picture")} cut out.`;
}

// What the ledger has of it.

function movementsOf({ requestId, payer }, entries, final) {
  const found = ofRequest(entries, requestId);
  if (found === null) {
    return el("p", { class: "movements", data: { testid: "movements", cost: "0" } }, final ? `No entry: nothing was taken from ${payer.user}.` : "No entry so far.");
  }
  const { entry, returns } = found;
  const { taken, returned } = sumsOf(found);
  const kept = taken - returned;
  const line = (one, words) => el("li", { data: { kind: one.kind } },
    el("span", { class: `number ${one.amount > 0 ? "good" : ""}` }, signed(one.amount)), " ", words);
  return el("div", { class: "movements", data: { testid: "movements", cost: String(kept) } },
    el("ul", {}, line(entry, "deducted"),
      returns.map(one => line(one, one.kind === "void" ? "voided" : `refunded${one.items.length > 0 ? `: ${one.items.join(", ")}` : ""}`))),
    final ? el("p", {}, "In the end it cost ", el("strong", {}, credits(kept)), ".") : null);
}
