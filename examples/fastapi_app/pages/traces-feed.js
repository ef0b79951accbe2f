// What the desk says: a long poll for the list, single calls for a trace. The app is killed for sport here, so every
// call may fail, and none may be the last.

import { ask } from "./common.js";

const RETRY_MS = 700;
const NOBODY_MS = 5000; // nothing restarts where there is no desk
const PATIENCE_MS = 20_000; // twice what the desk waits
const PACE_MS = 250; // a busy app changes its list with every span

export const RESTARTING = "The app is restarting; the traces are safe.";

/** Something to tell people instead of an answer. */
export class Silence extends Error {
  constructor(words, status = null) {
    super(words);
    this.status = status;
  }
}

/** The JSON at a path; throws `Silence` where there is none, and what `signal` was aborted with. */
export async function get(path, signal) {
  const patience = new AbortController();
  const stop = () => patience.abort();
  signal.addEventListener("abort", stop);
  const timer = setTimeout(stop, PATIENCE_MS);
  try {
    const answer = await ask(path, { signal: patience.signal });
    signal.throwIfAborted();
    if (answer.down || (answer.ok && answer.body === null)) throw new Silence(RESTARTING);
    if (!answer.ok) throw silence(answer.status);
    return answer.body;
  } finally {
    clearTimeout(timer);
    signal.removeEventListener("abort", stop);
  }
}

function silence(status) {
  if (status === 404) return new Silence("Nothing collects traces here: start the app with “make demo”.", 404);
  if (status >= 502) return new Silence("The desk, which keeps the traces, does not answer; trying again.", status);
  return new Silence(`The desk answered ${status}; trying again.`, status);
}

/**
 * Follow the list until `signal` aborts.
 *
 * `path(since)` is asked before each call; `heard(answer, changed)` and `silent(words)` are told what came of it.
 */
export async function follow(path, { heard, silent, signal }) {
  let version = null;
  while (!signal.aborted) {
    try {
      await shown();
      const answer = await get(path(version), signal);
      const changed = answer.version !== version;
      version = answer.version;
      heard(answer, changed);
      await pause(PACE_MS, signal);
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof Silence)) throw error;
      version = null; // ask for all of it, at once, as soon as it is there again
      silent(error.message);
      await pause(error.status === 404 ? NOBODY_MS : RETRY_MS, signal);
    }
  }
}

/** Nobody looks at a hidden tab. */
function shown() {
  if (!document.hidden) return undefined;
  return new Promise(resolve => document.addEventListener("visibilitychange", resolve, { once: true }));
}

export const pause = (ms, signal) =>
  new Promise(resolve => {
    const done = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    signal.addEventListener("abort", done);
  });
