// A run: send what is in the tray, show each picture's fate as its span comes, then the receipt.

import { balanceOf, drawQuote, markSending, payer, refresh, runTo } from "./account.js";
import { hurry } from "./books.js";
import { createProducts, deductedIn, entriesOf, follow, picturesIn } from "./client.js";
import { byId, credits, duration, el, plural, setText, shortId, sleep, statusBadge, traceLink } from "./common.js";
import { lock, order, pictures, resetOutcomes, setOutcome } from "./tray.js";

const REFUND_WITHIN_MS = 60_000;

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
  receipt.answered(got);
  const fate = failed.length === 0 ? "None failed, so nothing comes back." : `${failed.map(image => image.id).join(", ")} failed: ${credits(failed.length)} ${failed.length === 1 ? "comes" : "come"} back.`;
  say(`${images.length - failed.length} of ${plural(images.length, "picture")} cut out. ${fate}`);
  if (failed.length > 0) receipt.awaitRefund(got);
  else refresh();
}

function refused(got, receipt) {
  for (const one of pictures()) setOutcome(one.id, { status: got.down ? "unknown" : "untouched" });
  receipt.answered(got);
  say(got.down
    ? "No answer: the connection broke. What was taken comes back by itself, see the statement."
    : got.body?.detail && typeof got.body.detail === "string" ? got.body.detail : `The app answered ${got.status}.`);
  refresh();
}

function say(text) {
  setText(byId("says"), text);
}

/** What a request has taken, kept and given back, as far as that is known. */
class Receipt {
  constructor(who, turn) {
    this.payer = who;
    this.turn = turn;
    this.before = balanceOf(who.user);
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
    this.count = count;
    this.traceId = traceId;
    this.show(0, 0, 0);
    setText(this.note, "Nothing runs before the deduction is confirmed.");
    byId("receipt").replaceChildren(this.element);
    byId("receipt").hidden = false;
  }

  progress(deducted, done) {
    if (deducted === null) return;
    const kept = done.filter(one => one.status === "succeeded").length;
    this.show(deducted, kept, 0, done.length - kept);
    setText(this.note, `Deducted before the work began. ${done.length - kept > 0 ? `${credits(done.length - kept)} will come back.` : ""}`);
  }

  answered(got) {
    const deducted = Number(got.headers.get("Credits-Deducted") ?? 0);
    this.due = Number(got.headers.get("Credits-Refunded") ?? 0);
    this.show(deducted, deducted - this.due, 0, this.due);
    setText(this.note, this.due > 0 ? `${credits(this.due)} on the way back …` : "");
    const transaction = got.headers.get("Credits-Transaction-Id");
    const retry = got.headers.get("Retry-After");
    const rows = [
      ["answer", [statusBadge(got.status), ` after ${duration(got.tookMs)}`]],
      retry && ["Retry-After", `${retry} s`],
      this.before !== undefined && ["balance", el("span", { data: { testid: "receipt-balance" } }, this.moved = el("span", {}, String(this.before)))],
      transaction && ["transaction", el("code", { title: transaction }, shortId(transaction))],
      ["request", el("code", {}, got.requestId)],
    ].filter(Boolean);
    this.facts.replaceChildren(...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));
    this.element.append(el("p", { class: "more" }, traceLink(got.traceId)));
    const told = got.headers.get("Credits-Balance");
    if (this.moved && deducted > 0 && told !== null) setText(this.moved, `${this.before} → ${this.before - deducted} → ${told}`);
  }

  /** The refund goes out off the response's path: wait until the ledger has it. */
  async awaitRefund(got) {
    const transaction = got.headers.get("Credits-Transaction-Id");
    const until = Date.now() + REFUND_WITHIN_MS;
    while (Date.now() < until && this.turn === last) {
      const entries = await entriesOf(this.payer) ?? [];
      const back = entries.filter(entry => entry.kind !== "deduction" && entry.transaction_id === transaction);
      const returned = back.reduce((sum, entry) => sum + entry.amount, 0);
      if (returned >= this.due) {
        const deducted = Number(got.headers.get("Credits-Deducted"));
        this.show(deducted, deducted - returned, returned);
        setText(this.note, `Given back: ${back.flatMap(entry => entry.items).join(", ") || credits(returned)}. It stands in the ledger.`);
        hurry();
        refresh();
        return;
      }
      setText(this.note, `${credits(this.due)} on the way back. The refund is on record, and tried until it is through.`);
      await sleep(300);
    }
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
