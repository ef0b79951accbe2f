// Questions to the ledger's entries, the newest first, as `GET /v1/transactions` gives them. Pure.

/** Deductions and grants, the newest first, each with what came back for it, the oldest first. */
export function grouped(entries) {
  const back = new Map();
  for (const entry of entries) {
    if (entry.kind !== "refund" && entry.kind !== "void") continue;
    back.set(entry.transaction_id, [entry, ...(back.get(entry.transaction_id) ?? [])]);
  }
  return entries.filter(entry => entry.kind === "deduction" || entry.kind === "grant")
    .map(entry => ({ entry, returns: entry.kind === "deduction" ? back.get(entry.id) ?? [] : [] }));
}

/** What was taken for a request of ours, and what came back; null where nothing was taken. */
export function ofRequest(entries, requestId) {
  return grouped(entries).find(({ entry }) => entry.request_id === requestId) ?? null;
}

/** Credits of it. */
export function sumsOf(found) {
  return { taken: found ? -found.entry.amount : 0, returned: (found?.returns ?? []).reduce((sum, one) => sum + one.amount, 0) };
}

/** Whether the ledger has what the client was told: an answer in the 200s says so itself, an error costs nothing. */
export function isAsTold({ requestId, got }, entries) {
  const { taken, returned } = sumsOf(ofRequest(entries, requestId));
  if (got.down) return true; // nothing was told
  if (!got.ok) return taken === returned;
  return taken === Number(got.headers.get("Credits-Deducted")) && returned === Number(got.headers.get("Credits-Refunded"));
}
