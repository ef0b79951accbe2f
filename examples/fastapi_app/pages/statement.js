// The account's statement: every entry of the ledger, what came back under what was taken.

import { balanceOf, onAccount, payer } from "./account.js";
import { accountOf, onBooks, readable } from "./books.js";
import { entriesOf, traceOf } from "./client.js";
import { byId, credits, el, number, setText, signed, traceLink, when } from "./common.js";
import { grouped } from "./ledger.js";

const SHOWN_AT_FIRST = 8;

let shown = null;
let asking = false;
let again = false;
let whole = false;

async function refresh() {
  if (asking) {
    again = true;
    return;
  }
  asking = true;
  do {
    again = false;
    const who = payer();
    const entries = await entriesOf(who);
    if (entries !== null && who === payer()) draw(who, entries);
  } while (again);
  asking = false;
}

function draw(who, entries) {
  setText(byId("statement-title"), `Statement of ${who.user}`);
  const groups = grouped(entries);
  const visible = whole ? groups : groups.slice(0, SHOWN_AT_FIRST);
  const rows = visible.flatMap(({ entry, returns }) => [row(entry, returns), ...returns.map(back => row(back))]);
  const more = groups.length - visible.length;
  byId("statement-body").replaceChildren(
    el("table", { class: "statement" },
      el("caption", { class: "visually-hidden" }, `Entries of ${who.user}'s account, the newest first`),
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "entry"), el("th", { scope: "col", class: "number" }, "credits"), el("th", { scope: "col", class: "number" }, "balance"))),
      el("tbody", {}, rows)),
    more > 0 ? el("p", { class: "statement-more" }, el("button", {
      type: "button", class: "button quiet", data: { testid: "statement-more" }, on: { click: () => { whole = true; draw(who, entries); } },
    }, `Show ${number(more)} earlier`)) : "");
}

const KINDS = { grant: "Granted", deduction: "Deducted", refund: "Refunded", void: "Voided" };

function row(entry, returns = []) {
  const isBack = entry.kind === "refund" || entry.kind === "void";
  const trace = entry.request_id && traceOf(entry.request_id);
  const details = [when(entry.created_at), entry.reason, entry.request_id].filter(Boolean);
  return el("tr", { class: isBack ? "back" : "", data: { testid: "entry", kind: entry.kind, id: entry.id, transaction: entry.transaction_id ?? "" } },
    el("td", {},
      el("div", { class: "what" }, el("strong", {}, KINDS[entry.kind] ?? entry.kind),
        entry.items?.length > 0 ? el("span", {}, entry.items.join(", ")) : null, outcome(entry, returns)),
      el("div", { class: "small soft details" }, details.flatMap((detail, at) => (at > 0 ? [" · ", detail] : [detail])),
        trace ? [" · ", traceLink(trace, "trace")] : null)),
    el("td", { class: `number ${entry.amount > 0 ? "good" : ""}` }, signed(entry.amount)),
    el("td", { class: "number" }, number(entry.balance)));
}

function outcome(entry, returns) {
  if (entry.kind !== "deduction") return null;
  const back = returns.reduce((sum, one) => sum + one.amount, 0);
  const kept = -entry.amount - back;
  return back === 0 ? null : el("span", { class: `badge ${kept === 0 ? "" : "info"}` }, kept === 0 ? "all of it came back" : `cost ${credits(kept)}`);
}

export function start() {
  const look = () => {
    const account = accountOf(payer().user);
    const seen = `${payer().user} ${account?.granted} ${account?.deducted} ${account?.returned} ${balanceOf(payer().user)}`;
    if (seen !== shown && readable()) {
      shown = seen;
      refresh();
    }
  };
  onBooks(look);
  onAccount(look);
}
