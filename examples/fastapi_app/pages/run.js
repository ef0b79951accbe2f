// A run: send what is in the tray, show each picture's fate as its span comes, then the receipt.

import { balanceOf, drawQuote, markSending, payer, refresh, runTo } from "./account.js";
import { hurry, next, now, readable, unsettled } from "./books.js";
import { createProducts, deductedIn, entriesOf, follow, picturesIn, problemText } from "./client.js";
import { byId, credits, duration, el, number, plural, setText, shortId, sleep, statusBadge, traceLink } from "./common.js";
import { isAsTold, ofRequest, sumsOf } from "./ledger.js";
import { lock, markRefunded, order, pictures, resetOutcomes, setOutcome } from "./tray.js";

const HURRY_FOR_MS = 30_000;
// The desk may show what it read this long ago.
const SURE_AFTER_MS = 750;

let running = false;
let last = 0;

export async function run() {
  const count = pictures().length;
  if (running || count === 0) return;
  running = true;
  last += 1;
  const receipt = new Receipt(payer(), last);
  lock(true);
  markSending(true);
  resetOutcomes();
  say(`Cutting out ${plural(count, "picture")} …`);
  try {
    for (const one of pictures()) setOutcome(one.id, { status: "waiting" });
    await send(receipt, count);
  } catch (error) {
    // A file that can no longer be read; the network never throws here.
    resetOutcomes();
    say(`That did not work: ${error.message}`);
  } finally {
    running = false;
    lock(false);
    markSending(false);
  }
}

async function send(receipt, count) {
  const body = await order();
  hurry();
  const { traceId, answer } = createProducts(body, receipt.payer);
  receipt.begin(count, traceId);
  follow(traceId, answer, trace => {
    const done = picturesIn(trace);
    for (const [id, { status, error }] of done) setOutcome(id, { status: status === "succeeded" ? "done" : "failed", error });
    receipt.progress(deductedIn(trace), [...done.values()]);
    if (done.size > 0) say(`${done.size} of ${plural(count, "picture")} done.`);
  });
  const got = await answer;
  hurry();
  if (got.ok) succeeded(got, receipt);
  else refused(got, receipt);
}

function succeeded(got, receipt) {
  const images = got.body.products.flatMap(product => product.images);
  for (const image of images) setOutcome(image.id, image);
  const failed = images.filter(image => image.status !== "succeeded");
  const fate = failed.length === 0
    ? "None failed, so nothing comes back."
    : `${failed.map(image => image.id).join(", ")} failed: ${credits(failed.length)} ${failed.length === 1 ? "comes" : "come"} back.`;
  say(`${images.length - failed.length} of ${plural(images.length, "picture")} cut out. ${fate}`);
  receipt.answered(got);
}

function refused(got, receipt) {
  for (const one of pictures()) setOutcome(one.id, { status: got.down ? "unknown" : "untouched" });
  say(got.down ? "No answer: the connection broke. What was taken comes back by itself." : problemText(got));
  receipt.answered(got);
}

function say(text) {
  setText(byId("says"), text);
}

/** What a request has taken, kept and given back, as far as that is known. */
class Receipt {
  constructor(who, turn) {
    this.payer = who;
    this.turn = turn;
    this.figures = {};
    const figure = (name, title) => {
      this.figures[name] = el("dd", { class: "number", data: { testid: `receipt-${name}`, value: "0" } }, "0");
      return el("div", { class: `figure ${name}` }, el("dt", {}, title), this.figures[name]);
    };
    this.bar = { kept: el("span", { class: "kept" }), returned: el("span", { class: "returned" }), pending: el("span", { class: "pending" }) };
    this.note = el("p", { class: "small soft", role: "status", data: { testid: "receipt-note" } });
    this.facts = el("dl", { class: "facts" });
    this.element = el("div", { class: "receipt" },
      el("dl", { class: "figures" }, figure("deducted", "deducted"), figure("kept", "kept"), figure("refunded", "refunded")),
      el("div", { class: "bar", "aria-hidden": "true" }, Object.values(this.bar)), this.note, this.facts);
  }

  begin(count, traceId) {
    this.began = Date.now();
    this.count = count;
    this.traceId = traceId;
    this.show(0, 0, 0);
    setText(this.note, "Nothing runs before the deduction is confirmed.");
    byId("receipt").replaceChildren(this.element);
    byId("receipt").hidden = false;
  }

  progress(deducted, done) {
    if (deducted === null) return;
    this.deducted = deducted;
    const kept = done.filter(one => one.status === "succeeded").length;
    this.show(deducted, kept, 0, done.length - kept);
    setText(this.note, `Deducted before the work began. ${done.length - kept > 0 ? `${credits(done.length - kept)} will come back.` : ""}`);
  }

  answered(got) {
    const transaction = got.headers.get("Credits-Transaction-Id");
    const retry = got.headers.get("Retry-After");
    this.moved = el("span", { data: { testid: "receipt-balance" } }, "…");
    const rows = [
      ["answer", [statusBadge(got.status), ` after ${duration(got.tookMs)}`]],
      retry && ["Retry-After", `${retry} s`],
      ["balance", this.moved],
      transaction && ["transaction", el("code", { title: transaction }, shortId(transaction))],
      ["request", el("code", {}, got.requestId)],
    ].filter(Boolean);
    this.facts.replaceChildren(...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
    this.element.append(el("p", { class: "more" }, traceLink(got.traceId)));
    if (got.ok) {
      const deducted = Number(got.headers.get("Credits-Deducted"));
      const due = Number(got.headers.get("Credits-Refunded"));
      this.show(deducted, deducted - due, 0, due);
      setText(this.note, due > 0 ? `${credits(due)} on the way back …` : "");
    }
    if (got.down) this.show(this.deducted ?? 0, 0, 0); // what it was kept for is not known any more
    if (got.down) setText(this.note, "What was taken is on record in the app's journal. It comes back when the app is up again.");
    this.untilFinal(got);
  }

  /** Refunds and voids go out off the response's path: wait until the ledger has them, and show what it has. */
  async untilFinal(got) {
    while (this.turn === last) {
      await (now.missing ? sleep(500) : next(Date.now() - this.began < HURRY_FOR_MS));
      if (!readable()) continue;
      const calm = now.missing || unsettled() === 0;
      const entries = await entriesOf(this.payer);
      if (entries === null) continue;
      const found = ofRequest(entries, got.requestId);
      const final = calm && isAsTold({ requestId: got.requestId, got }, entries);
      this.inLedger(found, final, got);
      if (final && (got.ok || Date.now() > this.began + got.tookMs + SURE_AFTER_MS)) break;
    }
    refresh();
  }

  inLedger(found, final, got) {
    const { taken, returned } = sumsOf(found);
    const due = final ? 0 : (got.ok ? Number(got.headers.get("Credits-Refunded")) : taken) - returned;
    this.show(taken, taken - returned - due, returned, due);
    const items = (found?.returns ?? []).flatMap(back => back.items);
    if (got.ok) markRefunded(items);
    setText(this.note, !final
      ? `${due > 0 ? `${credits(due)} on the way back: on record` : "On record"}, and tried until it is through.`
      : returned > 0 ? `Given back: ${items.join(", ") || credits(returned)}. It stands in the ledger.`
        : taken > 0 ? "It stands in the ledger." : "No entry in the ledger: nothing was taken.");
    const steps = found ? [found.entry.balance + taken, found.entry.balance, ...found.returns.map(back => back.balance)] : [balanceOf(this.payer.user)];
    setText(this.moved, steps.map(step => (step === undefined ? "–" : number(step))).join(" → "));
  }

  show(deducted, kept, refunded, coming = 0) {
    runTo(this.figures.deducted, deducted);
    runTo(this.figures.kept, kept);
    runTo(this.figures.refunded, refunded);
    const whole = Math.max(deducted, this.count ?? 1);
    const share = { kept, returned: refunded + coming, pending: Math.max(0, deducted - kept - refunded - coming) };
    for (const [name, part] of Object.entries(share)) this.bar[name].style.width = `${(100 * part) / whole}%`;
    this.bar.returned.classList.toggle("coming", coming > 0);
  }
}

export function start() {
  byId("send").addEventListener("click", event => {
    if (event.currentTarget.getAttribute("aria-disabled") !== "true") run();
  });
  drawQuote();
}
