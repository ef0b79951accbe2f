// The tray: pictures in product groups, to be renamed, moved (by dragging or by a list) and removed.

import { byId, el, plural, setText } from "./common.js";
import { base64, cleanName, fromFiles, picture, showBefore } from "./pictures.js";

const NEW_GROUP = "new group";

let groups = [];
let madeGroups = 0;
let locked = false;
const cards = new Map();
const sections = new Map();
const listeners = [];

/** Be told whenever pictures come, go or move. */
export const onTray = listener => listeners.push(listener);

export const pictures = () => groups.flatMap(group => group.pictures);

/** The body for `POST /create-products`. Groups without pictures are left out. */
export async function order() {
  const filled = groups.filter(group => group.pictures.length > 0);
  const productGroups = [];
  for (const group of filled) {
    const images = [];
    for (const one of group.pictures) images.push({ id: one.id, data: await base64(one) });
    productGroups.push({ name: group.name, images });
  }
  return { product_groups: productGroups };
}

/** Put the samples in, in place of what is there. */
export function load(body) {
  groups = body.product_groups.map(({ name, images }) => newGroup(name, images.map(image => picture(image.id, { data: image.data }))));
  changed();
}

export function clear() {
  groups = [];
  byId("refused").hidden = true;
  changed();
}

/** Take in files, into this group, or else the last. */
export function add(files, group = null) {
  if (locked || files.length === 0) return;
  const bytes = pictures().reduce((sum, one) => sum + one.bytes, 0);
  const taken = fromFiles(files, pictures().map(one => one.id), bytes);
  if (taken.pictures.length > 0) {
    const into = group ?? groups.at(-1) ?? newGroup("Product 1");
    if (!groups.includes(into)) groups.push(into);
    into.pictures.push(...taken.pictures);
  }
  const refused = byId("refused");
  refused.hidden = taken.refused.length === 0;
  setText(refused, `Not taken: ${taken.refused.join("; ")}.`);
  changed();
}

/** While a request runs, what it is about stays as it is. */
export function lock(whether) {
  locked = whether;
  byId("tray").classList.toggle("locked", locked);
  for (const control of byId("groups").querySelectorAll("button, input, select")) control.disabled = locked;
  for (const card of cards.values()) card.element.draggable = !locked;
}

/** Show what became of a picture: "waiting", "done" (no result yet), "succeeded", "failed", or null. */
export function setOutcome(id, outcome) {
  const one = pictures().find(candidate => candidate.id === id);
  if (!one) return;
  one.outcome = outcome;
  drawOutcome(one);
}

/** Show that what was paid for these has come back, as the ledger says. */
export function markRefunded(ids) {
  for (const one of pictures()) {
    if (one.outcome?.status === "failed" && ids.includes(one.id)) setOutcome(one.id, { ...one.outcome, refunded: true });
  }
}

export function resetOutcomes() {
  for (const one of pictures()) setOutcome(one.id, null);
}

function newGroup(name, inside = []) {
  madeGroups += 1;
  return { key: `group-${madeGroups}`, name, pictures: inside };
}

function freeGroupName() {
  for (let number = groups.length + 1; ; number++) {
    if (!groups.some(group => group.name === `Product ${number}`)) return `Product ${number}`;
  }
}

function move(one, toKey) {
  const from = groups.find(group => group.pictures.includes(one));
  let to = groups.find(group => group.key === toKey);
  if (toKey === NEW_GROUP) {
    to = newGroup(freeGroupName());
    groups.push(to);
  }
  if (!to || to === from || locked) return;
  from.pictures.splice(from.pictures.indexOf(one), 1);
  to.pictures.push(one);
  // A group that the last picture has left goes; an empty one that was made on purpose stays until it is removed.
  if (from.pictures.length === 0) groups.splice(groups.indexOf(from), 1);
  changed();
}

function remove(one) {
  const group = groups.find(candidate => candidate.pictures.includes(one));
  const at = pictures().indexOf(one);
  group.pictures.splice(group.pictures.indexOf(one), 1);
  if (group.pictures.length === 0) groups.splice(groups.indexOf(group), 1);
  changed();
  // Whoever removes by keyboard goes on from the next one.
  const next = pictures()[Math.min(at, pictures().length - 1)];
  (next ? cards.get(next.key).element.querySelector("button") : byId("choose")).focus();
}

function changed() {
  draw();
  for (const listener of listeners) listener();
}

// Drawing. Elements are kept by key, so that thumbnails are drawn once and the focus can be given back.

function draw() {
  const focused = document.activeElement;
  const any = groups.length > 0;
  byId("dropzone").classList.toggle("slim", any);
  byId("clear").hidden = !any;
  byId("tray-foot").hidden = !any;
  forget(cards, pictures());
  forget(sections, groups);
  byId("groups").replaceChildren(...groups.map(drawGroup));
  if (focused?.isConnected && focused !== document.activeElement) focused.focus();
}

function forget(kept, present) {
  const keys = new Set(present.map(one => one.key));
  for (const key of kept.keys()) if (!keys.has(key)) kept.delete(key);
}

function drawGroup(group) {
  if (!sections.has(group.key)) sections.set(group.key, makeGroup(group));
  const { element, list, count } = sections.get(group.key);
  element.setAttribute("aria-label", group.name);
  setText(count, plural(group.pictures.length, "picture"));
  list.replaceChildren(...group.pictures.map(one => drawCard(one, group)));
  return element;
}

function makeGroup(group) {
  const name = el("input", {
    type: "text", class: "group-name", value: group.name, maxLength: 100, required: true, autocomplete: "off",
    "aria-label": "Name of the group", data: { testid: "group-name" },
    on: {
      change: () => {
        group.name = cleanName(name.value) || group.name;
        name.value = group.name;
        changed();
      },
      keydown: event => { if (event.key === "Enter") name.blur(); },
    },
  });
  const count = el("span", { class: "soft small number" });
  const list = el("ul", { class: "pictures" });
  const element = el("section", { class: "group", data: { testid: "group" } },
    el("div", { class: "group-head" }, name, count), list);
  acceptDrops(element, group);
  return { element, list, count };
}

function acceptDrops(element, group) {
  const over = whether => element.classList.toggle("over", whether);
  element.addEventListener("dragover", event => { if (!locked) { event.preventDefault(); over(true); } });
  element.addEventListener("dragleave", event => { if (!element.contains(event.relatedTarget)) over(false); });
  element.addEventListener("drop", event => {
    event.preventDefault();
    event.stopPropagation();
    over(false);
    byId("veil").hidden = true;
    const dragged = pictures().find(one => one.key === event.dataTransfer.getData("text/plain"));
    if (dragged) move(dragged, group.key);
    else add([...event.dataTransfer.files], group);
  });
}

function drawCard(one, group) {
  if (!cards.has(one.key)) cards.set(one.key, makeCard(one));
  const { element, choice } = cards.get(one.key);
  choice.replaceChildren(
    ...groups.map(({ key, name }) => el("option", { value: key, selected: key === group.key }, name)),
    el("option", { value: NEW_GROUP }, "New group"));
  return element;
}

function makeCard(one) {
  const before = el("div", { class: "before" });
  const after = el("div", { class: "after", hidden: true });
  const badge = el("span", { class: "badge", hidden: true, data: { testid: "picture-outcome" } });
  const choice = el("select", {
    "aria-label": `Group of ${one.id}`, data: { testid: "picture-group" },
    on: { change: () => { const to = choice.value; move(one, to); choice.focus(); } },
  });
  const element = el("li", { class: "picture", draggable: true, data: { testid: "picture", id: one.id, status: "ready" } },
    el("div", { class: "stage" }, before, after),
    el("div", { class: "caption" }, el("span", { class: "name", title: one.id }, one.id), badge),
    el("div", { class: "controls" }, choice,
      el("button", {
        type: "button", class: "button quiet little", "aria-label": `Remove ${one.id}`, title: "Remove",
        data: { testid: "picture-remove" }, on: { click: () => remove(one) },
      }, "✕")));
  element.addEventListener("dragstart", event => {
    event.dataTransfer.setData("text/plain", one.key);
    event.dataTransfer.effectAllowed = "move";
    element.classList.add("dragged");
  });
  element.addEventListener("dragend", () => element.classList.remove("dragged"));
  showBefore(one, before);
  return { element, choice, after, badge };
}

const BADGES = {
  waiting: ["", "waiting"],
  done: ["good", "done"],
  succeeded: ["good", "1 credit"],
  failed: ["bad", "failed"],
  refunded: ["", "refunded"],
  unknown: ["warn", "no answer"],
  untouched: ["", "not run"],
};

function drawOutcome(one) {
  const { element, after, badge } = cards.get(one.key);
  const { status, url, error, refunded } = one.outcome ?? { status: "ready" };
  element.dataset.status = status;
  const [kind, words] = BADGES[refunded ? "refunded" : status] ?? ["", ""];
  badge.hidden = words === "";
  badge.className = `badge ${kind}`;
  setText(badge, words);
  after.hidden = ["ready", "untouched", "unknown"].includes(status);
  if (refunded) return; // the rest is as it was
  if (url) after.replaceChildren(el("img", { src: url, alt: `${one.id}, cut out`, decoding: "async" }));
  else after.replaceChildren(el("span", { class: "nothing" }, status === "failed" ? error ?? "failed" : status === "done" ? "✓" : "…"));
}

// What is dropped anywhere, pasted, or chosen.

byId("choose").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", event => {
  add([...event.target.files]);
  event.target.value = "";
});
byId("clear").addEventListener("click", () => { if (!locked) { clear(); byId("choose").focus(); } });
byId("new-group").addEventListener("click", () => {
  if (locked) return;
  const group = newGroup(freeGroupName());
  groups.push(group);
  changed();
  const name = sections.get(group.key).element.querySelector("input");
  name.focus();
  name.select();
});

const carriesFiles = event => [...(event.dataTransfer?.types ?? [])].includes("Files");
document.addEventListener("dragover", event => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  byId("veil").hidden = locked;
});
document.addEventListener("dragleave", event => { if (event.relatedTarget === null) byId("veil").hidden = true; });
document.addEventListener("drop", event => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  byId("veil").hidden = true;
  add([...event.dataTransfer.files]);
});
document.addEventListener("paste", event => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length > 0) {
    event.preventDefault();
    add(files);
  }
});
