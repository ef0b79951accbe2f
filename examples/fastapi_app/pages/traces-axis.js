// The time axis: which part of a trace is shown, and the round times on it. In milliseconds from the trace's start.

const SMALLEST_MS = 0.01; // 10 µs across: spans are exact to 1 µs

export class View {
  constructor(total) {
    this.total = total;
    this.whole();
  }

  get range() {
    return this.to - this.from;
  }

  get zoomed() {
    return this.from > 0 || this.to < this.total;
  }

  /** Where a time is, from 0 (left) to 1 (right); beyond, where it is not in view. */
  place(ms) {
    return (ms - this.from) / this.range;
  }

  /** The time at a place. */
  time(place) {
    return this.from + place * this.range;
  }

  whole() {
    this.from = 0;
    this.to = this.total;
  }

  /** The trace has grown. Whoever saw all of it still does. */
  grow(total) {
    const all = !this.zoomed;
    this.total = total;
    if (all) this.whole();
    else this.show(this.from, this.to);
  }

  /** Show a range, as much of it as there is. */
  show(from, to) {
    const range = Math.min(Math.max(to - from, SMALLEST_MS), this.total);
    const middle = (from + to) / 2;
    this.from = Math.min(Math.max(middle - range / 2, 0), this.total - range);
    this.to = this.from + range;
  }

  /** Show `factor` times as much (less than 1: zoom in), with the time at `around` staying where it is. */
  zoom(factor, around = this.from + this.range / 2) {
    const range = Math.min(Math.max(this.range * factor, SMALLEST_MS), this.total);
    const from = around - Math.min(Math.max(this.place(around), 0), 1) * range;
    this.show(from, from + range);
  }

  /** Move by a part of what is shown. */
  pan(part) {
    const by = Math.min(Math.max(this.range * part, -this.from), this.total - this.to);
    this.from += by;
    this.to += by;
  }
}

/** Round times in view: `[{ms, label}]`, as many as fit into so many pixels. */
export function ticks(view, width) {
  const most = Math.max(Math.floor(width / (view.to >= 1000 && view.range < 100 ? 104 : 76)), 1);
  const step = roundStep(view.range / most);
  const [unit, size] = view.to >= 1000 ? ["s", 1000] : view.to >= 1 ? ["ms", 1] : ["µs", 0.001];
  const decimals = Math.max(0, -Math.floor(Math.log10(step / size) + 1e-9));
  const found = [];
  // Counted in steps: adding up fractions would drift.
  for (let n = Math.ceil(view.from / step - 1e-9); n * step <= view.to + step * 1e-9; n++) {
    found.push({ ms: n * step, label: n === 0 ? "0" : `${((n * step) / size).toFixed(decimals)} ${unit}` });
  }
  return found;
}

/** The smallest of 1, 2, 5 × 10ⁿ that is not below. */
function roundStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  const found = [1, 2, 5, 10].find(times => times * power >= least * (1 - 1e-9)) * power;
  return Math.max(found, 0.001);
}
