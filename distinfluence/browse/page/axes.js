// What stands beside the map: numbers of points in the order of the disk, names of classes where sorted by class.
import { $, colour, pen } from "/dom.js";

// [{name, start, stop}] of the classes that a window of places sees, clipped to it.
export function spans(classes, window) {
  const found = [];
  let start = 0;
  for (const { name, n } of classes ?? []) {
    const stop = start + n;
    if (stop > window[0] && start < window[1]) {
      found.push({ name, start: Math.max(start, window[0]), stop: Math.min(stop, window[1]) });
    }
    start = stop;
  }
  return found;
}

function numbers(window, length, every) {
  const size = window[1] - window[0];
  const raw = Math.max(1, (size * every) / length);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = Math.max(1, [1, 2, 5, 10].map((m) => m * power).find((m) => m >= raw));
  const found = [];
  for (let at = Math.ceil(window[0] / step) * step; at < window[1]; at += step) found.push(at);
  return found;
}

function fitted(draw, text, width) {
  if (draw.measureText(text).width <= width) return text;
  let cut = text;
  while (cut.length > 1 && draw.measureText(`${cut}…`).width > width) cut = cut.slice(0, -1);
  return cut.length > 1 ? `${cut}…` : "";
}

// axis: { canvas, title, window, classes (null unless sorted by class), upright }
function drawAxis({ canvas, title, window, classes, upright }) {
  const draw = pen(canvas);
  const width = canvas.clientWidth, height = canvas.clientHeight, length = upright ? height : width;
  const at = (place) => ((place - window[0]) / (window[1] - window[0])) * length;
  draw.fillStyle = draw.strokeStyle = colour("--quiet");
  draw.textBaseline = "middle";
  const mark = (text, middle, room) => {
    draw.textAlign = upright ? "right" : "center";
    if (upright) draw.fillText(fitted(draw, text, width - 30), width - 7, Math.max(7, Math.min(height - 7, middle)));
    else if (room > 14) draw.fillText(fitted(draw, text, room - 2), middle, 12);
  };
  const line = (place) => (upright ? draw.fillRect(width - 4, at(place), 4, 1) : draw.fillRect(at(place), 0, 1, 4));
  if (classes) {
    for (const { name, start, stop } of spans(classes, window)) {
      if (start > window[0]) line(start);
      if (!upright || at(stop) - at(start) >= 11) mark(name, (at(start) + at(stop)) / 2, at(stop) - at(start));
    }
  } else {
    for (const place of numbers(window, length, upright ? 40 : 90)) {
      const half = length / (window[1] - window[0]) / 2;
      line(place);
      draw.textAlign = "center";
      if (upright) mark(String(place), at(place) + Math.min(half, 1e9), 100);
      else draw.fillText(String(place), Math.max(20, Math.min(width - 30, at(place) + half)), 12);
    }
  }
  draw.textAlign = "center";
  draw.fillStyle = colour("--text");
  if (upright) {
    draw.translate(9, height / 2);
    draw.rotate(-Math.PI / 2);
    draw.fillText(title, 0, 0);
  } else draw.fillText(title, width / 2, 30);
}

const BY = { class: "class", norm: "gradient norm", loss: "loss", "net harm": "net harm", cluster: "similarity" };

export const sorting = (order) => (order === "stored" ? "" : `by ${BY[order] ?? order}`);

export function drawAxes(about, map, orders) {
  const sides = [
    ["row-axis", "test", "rows", orders["row-order"]], ["column-axis", "train", "columns", orders["column-order"]],
  ];
  for (const [id, axis, window, order] of sides) {
    const title = `${axis === "test" ? "test" : "training"} points ${sorting(order)}`.trim();
    const classes = order === "class" ? about.classes[axis] : null;
    drawAxis({ canvas: $(id), title, window: map[window], classes, upright: axis === "test" });
  }
}

// Lines on the map where a class ends.
export function drawBoundaries(draw, canvas, about, map, orders) {
  draw.fillStyle = colour("--text");
  draw.globalAlpha = 0.55;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  const lines = (axis, order, window, length, put) => {
    if (order !== "class") return;
    const found = spans(about.classes[axis], window).slice(1);
    if (found.length * 6 > length) return; // more lines than picture
    for (const { start } of found) put(Math.round(((start - window[0]) / (window[1] - window[0])) * length));
  };
  lines("test", orders["row-order"], map.rows, height, (y) => draw.fillRect(0, y, width, 1));
  lines("train", orders["column-order"], map.columns, width, (x) => draw.fillRect(x, 0, 1, height));
  draw.globalAlpha = 1;
}
