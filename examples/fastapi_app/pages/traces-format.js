// Numbers and times as this page writes them: short where rows are scanned, exact to the microsecond where one is read.
import { number } from "./common.js";

/** A duration in milliseconds, in three digits or so. */
export function short(ms) {
  if (ms < 0) return `−${short(-ms)}`;
  if (ms < 0.9995) return `${Math.round(ms * 1000)} µs`;
  if (ms < 9.995) return `${ms.toFixed(2)} ms`;
  if (ms < 99.95) return `${ms.toFixed(1)} ms`;
  if (ms < 999.5) return `${Math.round(ms)} ms`;
  if (ms < 59995) return `${(ms / 1000).toFixed(2)} s`;
  const seconds = Math.round(ms / 1000);
  return seconds < 3600
    ? `${Math.floor(seconds / 60)} min ${pad(seconds % 60)} s`
    : `${Math.floor(seconds / 3600)} h ${pad(Math.floor(seconds / 60) % 60)} min`;
}

/** The same, to the microsecond. */
export function exact(ms) {
  if (Math.abs(ms) < 1) return `${Math.round(ms * 1000)} µs`;
  if (Math.abs(ms) < 1000) return `${ms.toFixed(3)} ms`;
  return `${(ms / 1000).toFixed(6)} s`;
}

/** "13:51:46.123" of an RFC 3339 string, in UTC as the logs have it. */
export const clock = time => new Date(time).toISOString().slice(11, 23);

/** "2026-11-25 13:51:46.123456 UTC": an RFC 3339 string and milliseconds after it. */
export function moment(time, afterMs = 0) {
  const fraction = /\.(\d+)/.exec(time)?.[1] ?? "";
  const micros = Number(fraction.padEnd(6, "0").slice(0, 6)) + Math.round(afterMs * 1000);
  const second = Math.floor(Date.parse(time) / 1000) + Math.floor(micros / 1e6);
  const text = new Date(second * 1000).toISOString();
  return `${text.slice(0, 10)} ${text.slice(11, 19)}.${String(((micros % 1e6) + 1e6) % 1e6).padStart(6, "0")} UTC`;
}

/** A number or a dash. */
export const count = value => (value === null || value === undefined ? "–" : number(value));

/** The start of an id, enough to tell it from others by eye. */
export const brief = id => id.slice(0, 8);

const pad = value => String(value).padStart(2, "0");
