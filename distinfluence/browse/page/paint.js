// Cells as colours: blue helps, orange harms, the page's background is 0.
import { $, colour, shown } from "/dom.js";

const parts = (name) => colour(name).split(" ").map(Number);
const UNFINISHED = [138, 143, 150];
const DAMAGED = [214, 48, 110];

// What the colours are in this scheme, light or dark.
export const palette = () => ({ zero: parts("--map-zero"), helps: parts("--map-helps"), harms: parts("--map-harms") });

export const mix = (from, to, share) => from.map((value, i) => Math.round(value + share * (to[i] - value)));

export const rgb = (values) => `rgb(${values.join(" ")})`;

// The magnitude from which on the colour is full: few large entries do not blanch the rest.
export function fullAt(cells) {
  const some = cells.length > 60000 ? cells.filter((_, i) => i % 7 === 0) : cells;
  const magnitudes = Array.from(some).filter(Number.isFinite).map(Math.abs).sort((a, b) => a - b);
  return magnitudes[Math.floor(0.99 * (magnitudes.length - 1))] || magnitudes.at(-1) || 1;
}

export const weight = (share, root) => (root ? Math.sqrt(Math.min(1, Math.abs(share))) : Math.min(1, Math.abs(share)));

// [height, width] cells → an image of as many dots, and how many cells are missing and damaged.
export function paint(cells, [height, width], scale, root) {
  const { zero, helps, harms } = palette();
  const image = new ImageData(width, height);
  const dots = image.data;
  let missing = 0, broken = 0;
  for (let i = 0; i < cells.length; i++) {
    const value = cells[i];
    let share, full;
    if (Number.isFinite(value)) {
      full = value > 0 ? helps : harms;
      share = weight(value / scale, root);
    } else {
      const lost = !Number.isNaN(value);
      if (lost) broken++;
      else missing++;
      full = lost ? DAMAGED : UNFINISHED;
      share = ((i % width) + ((i / width) | 0)) % 4 < 2 ? (lost ? 1 : 0.5) : 0;
    }
    for (let c = 0; c < 3; c++) dots[4 * i + c] = zero[c] + share * (full[c] - zero[c]);
    dots[4 * i + 3] = 255;
  }
  const own = new OffscreenCanvas(width, height);
  own.getContext("2d").putImageData(image, 0, 0);
  return { own, missing, broken };
}

export function legend(scale, root) {
  const { zero, helps, harms } = palette();
  $("low").textContent = `harms ${shown(-scale, 2)}`;
  $("high").textContent = `${shown(scale, 2)} helps`;
  const ramp = $("ramp").getContext("2d");
  for (let x = 0; x < 240; x++) {
    const share = x / 119.5 - 1;
    ramp.fillStyle = rgb(mix(zero, share > 0 ? helps : harms, weight(share, root)));
    ramp.fillRect(x, 0, 1, 12);
  }
}
