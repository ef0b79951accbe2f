// What the page sends, as any client would, and what it can see of it while it runs: the spans.

import { ask, randomHex, sleep } from "./common.js";

/** Who may pay: the demo's users and their tokens. */
export const PAYERS = [
  { user: "alice", token: "demo" },
  { user: "tour", token: "tour" },
  { user: "poor", token: "poor" },
];

const FOLLOW_EVERY_MS = 250;

let desk = true; // until it turns out that the app runs without one
const CIRCUIT = "circuit open until";

const traces = new Map();

/** Until when (ms) the app's circuit to the credits service may be open, by the last answer; 0 where it is closed. */
export const circuitOpenUntil = () => Number(sessionStorage.getItem(CIRCUIT) ?? 0);

function learnOfCircuit({ status, down, headers }) {
  // A 402 is an answer of the service's, too. An app that starts again starts with a closed circuit.
  if (down || status === 200 || status === 402) sessionStorage.removeItem(CIRCUIT);
  if (status === 503) sessionStorage.setItem(CIRCUIT, String(Date.now() + 1000 * Number(headers.get("Retry-After") ?? 0)));
}

/** The trace of a request that this page has sent, by its request id. */
export const traceOf = requestId => traces.get(requestId);

export const authorization = payer => ({ Authorization: `Bearer ${payer.token}` });

/**
 * Send pictures. The trace id is ours, so that it is known before there is an answer.
 *
 * @returns {{traceId: string, requestId: string, answer: Promise}} `answer` never rejects: what `ask` gives, with
 *   `tookMs`, `traceId` and `requestId`.
 */
export function createProducts(order, payer) {
  const traceId = randomHex(16);
  const requestId = `page-${randomHex(6)}`;
  const began = performance.now();
  traces.set(requestId, traceId);
  const headers = {
    ...authorization(payer),
    "X-Request-ID": requestId,
    traceparent: `00-${traceId}-${randomHex(8)}-01`,
  };
  const answer = ask("/create-products", { method: "POST", headers, json: order })
    .then(got => {
      learnOfCircuit(got);
      return { ...got, traceId, requestId, tookMs: performance.now() - began };
    });
  return { traceId, requestId, answer };
}

/**
 * Tell of a trace's spans as they come, until `done` is resolved.
 *
 * @param {(trace: object) => void} tell Gets `GET /desk/traces/{trace_id}` each time it has grown.
 */
export async function follow(traceId, done, tell) {
  let over = false;
  let seen = 0;
  done.then(() => { over = true; });
  while (!over) {
    await sleep(FOLLOW_EVERY_MS);
    // By the list first: asking for a trace that is not here yet would be a 404 in the console.
    const list = desk ? await ask(`/desk/traces?q=${traceId}&limit=5`) : { status: 404 };
    desk = list.status !== 404;
    if (!desk) return;
    const summary = list.body?.traces?.find(trace => trace.trace_id === traceId);
    if (over || !summary || summary.spans === seen) continue;
    const trace = await ask(`/desk/traces/${traceId}`);
    if (!over && trace.ok) {
      seen = trace.body.spans.length;
      tell(trace.body);
    }
  }
}

/** The pictures that are done so far, by id: "succeeded" or "failed", and the error. */
export function picturesIn(trace) {
  const found = new Map();
  for (const { name, attributes } of trace.spans) {
    const status = name === "cut out" && attributes["demo.image.status"];
    if (status) found.set(attributes["demo.image.id"], { status, error: attributes["demo.image.error"] ?? null });
  }
  return found;
}

/** The credits that are known to be deducted; null as long as that is not. */
export function deductedIn(trace) {
  const deduct = trace.spans.find(span => span.name === "metered_billing.deduct");
  const amount = deduct?.attributes["metered_billing.amount"] ?? trace.summary.amount;
  return deduct?.attributes["metered_billing.outcome"] === "ok" ? amount : null;
}

/** Every entry of a user's account, the newest first; null where it cannot be read now. */
export async function entriesOf(payer) {
  if (desk) {
    const whole = await ask(`/desk/statement?user_id=${encodeURIComponent(payer.user)}`);
    if (whole.ok) return whole.body.entries;
    desk = whole.status !== 404;
    if (desk) return null;
  }
  const latest = await ask("/me", { headers: authorization(payer) });
  return latest.ok ? latest.body.transactions : null;
}

/** What an answer that is no success says, in its own words. */
export function problemText({ status, body }) {
  const detail = body?.detail;
  if (typeof detail === "string") return detail;
  if (Array.isArray(detail)) return `${status}: ${detail.map(fault => fault.msg).join("; ")}`;
  return `The app answered ${status}.`;
}

let samplesAsked = null;

/** The body of `GET /samples`, asked for once; null where there is no answer. */
export async function samples() {
  samplesAsked ??= ask("/samples");
  const answer = await samplesAsked;
  if (!answer.ok) samplesAsked = null;
  return answer.body;
}
