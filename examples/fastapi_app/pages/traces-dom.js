// Small parts of the traces page. Whatever comes from a span goes in as text.
import { el } from "./common.js";

/** Set an attribute, or take it away where the value is null; touches the page only where something changes. */
export function attribute(element, name, value) {
  if (value === null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

/** Words that say a thing went well, came near to trouble, or is in it. */
export const badge = (words, mood = "bad", title = null) => el("span", { class: `badge ${mood}`, title }, words);

const MILD = /^(retried|slow|running|settled later|recovered)/;

export const isMild = word => MILD.test(word);

/** The badge of a trouble word. */
export const trouble = word => badge(word, isMild(word) ? "warn" : "bad");

export const statusMood = status => (status >= 500 ? "bad" : status >= 400 ? "warn" : "good");

/** A button that copies an id. */
export function copyButton(value, what) {
  const button = el("button", { class: "copy", type: "button", "aria-label": `copy the ${what}`, title: "copy" }, "copy");
  button.addEventListener("click", async () => {
    const done = await copied(value);
    button.textContent = done ? "copied" : "not allowed";
    setTimeout(() => (button.textContent = "copy"), 1500);
  });
  return button;
}

async function copied(value) {
  try {
    await navigator.clipboard.writeText(value);
    return true;
  } catch {
    // No clipboard outside a secure context (another host than localhost): the old way.
    const field = el("textarea", { class: "offscreen", readOnly: true });
    field.value = value;
    document.body.append(field);
    const focused = document.activeElement;
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    focused?.focus();
    return done;
  }
}
