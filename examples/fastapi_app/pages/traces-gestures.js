// Mouse, pen and finger on the time axis.

const SLACK_PX = 5; // a click that trembles is a click

/**
 * Drag sideways over `area` to choose a range of `scale` (the element whose width is the axis);
 * `done(from, to)` gets two places, from 0 to 1. `band` shows what is being chosen.
 */
export function draggable(area, scale, band, done) {
  let from = null;
  let dragging = false;

  const place = event => {
    const box = scale.getBoundingClientRect();
    return Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
  };
  const inside = event => {
    const box = scale.getBoundingClientRect();
    return event.clientX >= box.left && event.clientX <= box.right && !event.target.closest(".fold");
  };
  const stop = () => {
    from = null;
    if (band) band.hidden = true;
    area.classList.remove("dragging");
  };

  area.addEventListener("pointerdown", event => {
    dragging = false;
    // On a phone the names stand above the bars, over the axis's whole width: only the bars' cells count.
    if (event.button === 0 && event.isPrimary && inside(event) && !event.target.closest(".name")) {
      from = { x: event.clientX, place: place(event) };
    }
  });
  area.addEventListener("pointermove", event => {
    if (from === null) return;
    if (!dragging && Math.abs(event.clientX - from.x) < SLACK_PX) return;
    if (!dragging) area.setPointerCapture(event.pointerId);
    dragging = true;
    area.classList.add("dragging");
    if (!band) return;
    const to = place(event);
    band.hidden = false;
    band.style.setProperty("--from", Math.min(from.place, to).toFixed(6));
    band.style.setProperty("--to", Math.max(from.place, to).toFixed(6));
  });
  area.addEventListener("pointerup", event => {
    if (from !== null && dragging) {
      const [left, right] = [from.place, place(event)].sort((a, b) => a - b);
      if (right > left) done(left, right);
    }
    stop();
  });
  area.addEventListener("pointercancel", stop);
  // The click that ends a drag selects nothing.
  area.addEventListener("click", event => dragging && ((dragging = false), event.stopPropagation()), { capture: true });
}

/** Ctrl and wheel zooms at the pointer, a sideways wheel pans; the plain wheel scrolls the page, as everywhere. */
export function wheeled(area, scale, view, drawn) {
  area.addEventListener(
    "wheel",
    event => {
      const sideways = event.deltaX || (event.shiftKey ? event.deltaY : 0);
      const box = scale.getBoundingClientRect();
      if (event.ctrlKey) view.zoom(Math.exp(Math.sign(event.deltaY) * 0.25), view.time((event.clientX - box.left) / box.width));
      else if (sideways && view.zoomed) view.pan(sideways / box.width);
      else return;
      event.preventDefault();
      drawn();
    },
    { passive: false },
  );
}
