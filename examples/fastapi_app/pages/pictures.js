// Pictures before they are sent: read from files, named, drawn small.

import { el } from "./common.js";

export const MAX_PICTURES = 100;
export const MAX_BYTES = 10_500_000; // what 14,000,000 characters of base64 hold
const MAX_BYTES_IN_ALL = 250_000_000; // what a browser can put into one body
const MAX_NAME = 100;
const THUMBNAIL = 360;

let made = 0;

/** A picture of the tray, of a file or of base64. */
export function picture(id, { file = null, data = null }) {
  made += 1;
  return { key: `picture-${made}`, id, file, data, bytes: file ? file.size : Math.floor(data.length * 3 / 4), outcome: null };
}

/**
 * Take in files.
 *
 * @param {string[]} taken Ids that are in use.
 * @param {number} bytes Of the pictures that are there.
 * @returns {{pictures: object[], refused: string[]}} What was refused, in words.
 */
export function fromFiles(files, taken, bytes) {
  const ids = new Set(taken);
  const pictures = [];
  const refused = [];
  for (const file of files) {
    if (ids.size >= MAX_PICTURES) {
      refused.push(`${file.name}: at most ${MAX_PICTURES} pictures go into one request`);
    } else if (file.size > MAX_BYTES) {
      refused.push(`${file.name}: larger than 10 MB`);
    } else if (bytes + file.size > MAX_BYTES_IN_ALL) {
      refused.push(`${file.name}: more than 250 MB in all`);
    } else {
      const id = freeId(nameOf(file.name), ids);
      ids.add(id);
      bytes += file.size;
      pictures.push(picture(id, { file }));
    }
  }
  return { pictures, refused };
}

/** A name as the API takes it: 1 to 100 characters, none of them control characters. */
export const cleanName = name => [...name].filter(character => !/[\u0000-\u001f\u007f]/.test(character)).join("").slice(0, MAX_NAME).trim();

const nameOf = file => cleanName(file.replace(/\.[a-z0-9]{1,5}$/i, "")) || "picture";

// Each id is paid for, and refunded, by its name: there are no two of one name.
function freeId(name, ids) {
  for (let number = 1; ; number++) {
    const id = number === 1 ? name : `${name.slice(0, MAX_NAME - 5)} ${number}`;
    if (!ids.has(id)) return id;
  }
}

/** The picture as the API takes it: base64, nothing before it. */
export async function base64(picture) {
  if (picture.data !== null) return picture.data;
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Error(`${picture.id} can no longer be read: was its file moved?`)));
    reader.readAsDataURL(picture.file);
  });
  return url.slice(url.indexOf(",") + 1);
}

/** Draw it small, into a place; where it is no picture, say so. */
export async function showBefore(picture, place) {
  const whole = picture.data === null ? picture.file : blobOf(picture.data);
  try {
    const bitmap = await createImageBitmap(whole);
    const scale = Math.min(1, THUMBNAIL / Math.max(bitmap.width, bitmap.height));
    const canvas = el("canvas", {
      width: Math.max(1, Math.round(bitmap.width * scale)),
      height: Math.max(1, Math.round(bitmap.height * scale)),
      role: "img",
      "aria-label": `${picture.id}, before`,
    });
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    bitmap.close();
    place.replaceChildren(canvas);
  } catch {
    // A file that was cut off: what there is of it can still be seen, where the browser shows it.
    const url = URL.createObjectURL(whole);
    const image = el("img", { alt: `${picture.id}, before`, src: url });
    image.addEventListener("load", () => URL.revokeObjectURL(url));
    image.addEventListener("error", () => {
      URL.revokeObjectURL(url);
      image.replaceWith(el("span", { class: "nothing" }, "cannot be shown"));
    });
    place.replaceChildren(image);
  }
}

function blobOf(data) {
  try { return new Blob([Uint8Array.from(atob(data), character => character.charCodeAt(0))]); }
  catch { return new Blob([]); }
}
