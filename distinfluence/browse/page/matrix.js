// The matrix as a heat map that is zoomed and moved by mouse, fingers and keys.
import { note, place, range } from "/address.js";
import { drawAxes, drawBoundaries, sorting } from "/axes.js";
import { card } from "/cards.js";
import { $, ask, askJson, colour, el, pen, problem, shown } from "/dom.js";
import { fullAt, legend, paint } from "/paint.js";

const ORDERS = {
  stored: "as stored", class: "by class", norm: "by gradient norm", loss: "by loss", "net harm": "by net harm",
  cluster: "by similarity",
};
let about = null;
// rows, columns: the window; cells: [shape], as they were asked for; cursor: a cell; place: the entry that it is to
// stay on while cells change; pair: the test and training point that are looked at
const map = {
  rows: [0, 1], columns: [0, 1], cells: null, shape: [1, 1], cursor: null, place: null, pair: null, wait: 0,
};

const orders = () => ({ "row-order": $("row-order").value, "column-order": $("column-order").value });

const mapState = () => ({
  view: "matrix", rows: map.rows.join(":"), columns: map.columns.join(":"), ...orders(), contrast: $("contrast").value,
  ...(map.place ? { cursor: map.place.join(",") } : {}), ...(map.pair ? { pair: map.pair.join(",") } : {}),
});

function choices(id, names, chosen) {
  $(id).replaceChildren(...names.map((name) =>
    el("option", { value: name, textContent: ORDERS[name] ?? name, selected: name === chosen })));
  $(id).disabled = names.length < 2;
}

export async function viewMatrix(at, told) {
  about = told;
  map.rows = range(at.rows, about.n_test) ?? [0, about.n_test];
  map.columns = range(at.columns, about.n_train) ?? [0, about.n_train];
  map.place = place(at.cursor, about.n_test, about.n_train);
  const pair = place(at.pair, about.n_test, about.n_train);
  choices("row-order", about.orders.test, at["row-order"]);
  choices("column-order", about.orders.train, at["column-order"]);
  $("unsorted").hidden = about.orders.test.length > 1 || !about.classes.test || !about.classes.train;
  $("contrast").value = at.contrast === "root" ? "root" : "linear";
  if (!pair && about.worst.length) {
    const worst = about.worst.map((point) => card("test", point));
    $("cell").replaceChildren(el("h2", { textContent: "Test points of largest loss" }), ...worst);
  }
  map.pair = pair;
  await fetchMap();
  if (pair) showPair(await askJson("pair", { test: pair[0], train: pair[1], ...orders() }));
}

// Half precision → numbers, by a table of all of them.
const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : (2 ** -14 * fraction) / 1024);
});

async function fetchMap() {
  const canvas = $("map"), now = ++map.wait;
  const answer = await ask("picture", {
    rows: map.rows.join(":"), columns: map.columns.join(":"),
    height: Math.max(1, Math.min(600, Math.floor(canvas.clientHeight))),
    width: Math.max(1, Math.min(1400, Math.floor(canvas.clientWidth))), ...orders(),
  });
  const told = JSON.parse(answer.headers.get("X-Picture"));
  const halves = new Uint16Array(await answer.arrayBuffer());
  if (now !== map.wait) return;
  const cells = Float32Array.from(halves, (bits) => HALVES[bits] * told.scale);
  Object.assign(map, { cells, shape: told.shape, block: told.block, damaged: told.damaged });
  map.cursor = map.place ? [0, 1].map((i) => cellOf(i, map.place[i])) : [told.shape[0] >> 1, told.shape[1] >> 1];
  draw();
}

const windowOf = (i) => (i ? map.columns : map.rows);

// The cell of the picture that shows a place, the nearest one if none does.
function cellOf(i, at) {
  const [start, stop] = windowOf(i), n = map.shape[i];
  return Math.max(0, Math.min(n - 1, Math.ceil(((at - start + 1) * n) / (stop - start)) - 1));
}

// The places that a cell covers.
function covered(i, cell) {
  const [start, stop] = windowOf(i), size = stop - start, n = map.shape[i];
  return [start + Math.floor((cell * size) / n), start + Math.floor(((cell + 1) * size) / n)];
}

const sideText = (name, order, [start, stop]) => {
  const ends = stop - start > 1 ? `${start} to ${stop - 1}` : String(start);
  return order === "stored" ? `${name} ${ends}` : `${name} places ${ends} ${sorting(order)}`;
};

function draw() {
  const canvas = $("map"), root = $("contrast").value === "root", scale = fullAt(map.cells);
  const { own, missing, broken } = paint(map.cells, map.shape, scale, root);
  const draws = pen(canvas), width = canvas.clientWidth, height = canvas.clientHeight;
  draws.imageSmoothingEnabled = false;
  draws.drawImage(own, 0, 0, width, height);
  drawBoundaries(draws, canvas, about, map, orders());
  const [r, c] = map.cursor, w = width / map.shape[1], h = height / map.shape[0];
  for (const [ink, line] of [["--back", 4], ["--text", 2]]) {
    draws.strokeStyle = colour(ink);
    draws.lineWidth = line;
    draws.strokeRect(c * w - 3, r * h - 3, w + 6, h + 6);
  }
  drawAxes(about, map, orders());
  legend(scale, root);
  tellWindow(missing, broken);
  canvas.ariaLabel = `Heat map of ${about.n_test} test by ${about.n_train} training points`;
  performance.mark("matrix drawn");
  canvas.dataset.drawn = `${map.rows.join(":")} ${map.columns.join(":")}`;
}

function tellWindow(missing, broken) {
  const many = map.block[0] * map.block[1] > 1, share = Math.round((100 * missing) / map.cells.length);
  const text = [
    `${sideText("test", orders()["row-order"], map.rows)}, ` +
      `${sideText("training", orders()["column-order"], map.columns)}` +
      (many ? `, from an overview of ${map.block[0]} × ${map.block[1]} blocks` : ""),
    missing === map.cells.length ? "nothing is computed yet"
      : missing ? `${Math.max(1, share)} % not computed yet` : "",
    broken ? `damaged strips: ${map.damaged.join(", ")}` : "",
  ].filter(Boolean).join(" · ");
  if ($("window").textContent !== text) $("window").textContent = text; // or it is read out again
}

// What stands under the cursor, for the eye and for readers of the screen.
function tellCursor() {
  const [r, c] = map.cursor, value = map.cells[r * map.shape[1] + c];
  const where = `${sideText("test", orders()["row-order"], covered(0, r))}, ` +
    `${sideText("training", orders()["column-order"], covered(1, c))}`;
  const what = Number.isNaN(value) ? "not computed yet" : !Number.isFinite(value) ? "damaged"
    : `${value > 0 ? "helps" : "harms"} ${shown(value, 3)}`;
  $("cursor").textContent = `${where}: ${what}`;
}

function moveCursor(cell) {
  map.cursor = cell;
  map.place = [covered(0, cell[0])[0], covered(1, cell[1])[0]];
  draw();
  tellCursor();
  note(mapState());
}

async function look() {
  const [rows, columns] = [0, 1].map((i) => covered(i, map.cursor[i]).join(":"));
  const found = await askJson("cell", { rows, columns, ...orders() });
  map.place = found.place;
  map.pair = [found.test, found.train];
  showPair(found);
  note(mapState());
}

function showPair(found) {
  const helps = found.value > 0, missing = found.value === null;
  $("cell").replaceChildren(
    el("h2", { textContent: "Strongest in this cell" }),
    el("p", {
      className: missing ? "quiet" : helps ? "helps" : "harms",
      textContent: missing ? "not computed yet" : `${helps ? "helps" : "harms"}: ${shown(found.value)}`,
    }),
    card("test", found.test_point), card("train", found.train_point));
  if (map.cells) {
    map.place = found.place;
    map.cursor = [0, 1].map((i) => cellOf(i, found.place[i]));
    draw();
  }
}

function clampWindow(start, size, n) {
  const own = Math.max(1, Math.min(n, Math.round(size))), first = Math.max(0, Math.min(n - own, Math.round(start)));
  return [first, first + own];
}

function zoom(factor, r = 0.5, c = 0.5) {
  const scaled = (window, n, share) => {
    const size = window[1] - window[0];
    return clampWindow(window[0] + share * size * (1 - factor), Math.max(4, size * factor), n);
  };
  moved(scaled(map.rows, about.n_test, r), scaled(map.columns, about.n_train, c));
}

// r, c: by which share of the window; at least one point.
function pan(r, c) {
  const by = (window, n, share) => {
    const size = window[1] - window[0], step = share ? Math.sign(share) * Math.max(1, Math.abs(share) * size) : 0;
    return clampWindow(window[0] + step, size, n);
  };
  moved(by(map.rows, about.n_test, r), by(map.columns, about.n_train, c));
}

let later = 0;
function moved(rows, columns) {
  map.rows = rows;
  map.columns = columns;
  note(mapState());
  clearTimeout(later);
  later = setTimeout(() => fetchMap().then(() => problem(null), problem), 60);
}

export function act(name) {
  if (name === "in") zoom(0.5);
  else if (name === "out") zoom(2);
  else moved([0, about.n_test], [0, about.n_train]);
}

function at(event) {
  const box = $("map").getBoundingClientRect();
  const share = (x, start, size) => Math.max(0, Math.min(0.9999, (x - start) / size));
  return [share(event.clientY, box.top, box.height), share(event.clientX, box.left, box.width)];
}

// One finger or the mouse drags, two fingers pinch.
const fingers = new Map();
let drag = null;
let spread = 0;

const distance = ([a, b]) => Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);

function press(event) {
  $("map").setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, event);
  drag = fingers.size === 1 ? { from: at(event), rows: map.rows, columns: map.columns, far: false } : null;
  if (fingers.size === 2) spread = distance([...fingers.values()]);
}

function slide(event) {
  if (!fingers.has(event.pointerId)) return;
  fingers.set(event.pointerId, event);
  if (fingers.size === 2) {
    const both = [...fingers.values()], now = Math.max(1, distance(both)), factor = spread / now;
    if (Math.abs(factor - 1) < 0.05) return;
    const [a, b] = both.map(at);
    spread = now;
    zoom(factor, (a[0] + b[0]) / 2, (a[1] + b[1]) / 2);
  } else if (drag) {
    const [r, c] = at(event), dr = drag.from[0] - r, dc = drag.from[1] - c;
    if (!drag.far && Math.hypot(dr, dc) < 0.01) return;
    drag.far = true;
    const by = ([start, stop], n, share) => clampWindow(start + share * (stop - start), stop - start, n);
    moved(by(drag.rows, about.n_test, dr), by(drag.columns, about.n_train, dc));
  }
}

function release(event) {
  fingers.delete(event.pointerId);
  const own = drag;
  drag = null;
  if (event.type !== "pointerup" || !own || own.far || !map.cells) return;
  const [r, c] = at(event);
  moveCursor([Math.floor(r * map.shape[0]), Math.floor(c * map.shape[1])]);
  look().then(() => problem(null), problem);
}

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

function pressKey(event) {
  const arrow = ARROWS[event.key];
  if (arrow && event.shiftKey) pan(0.25 * arrow[0], 0.25 * arrow[1]);
  else if (arrow && map.cells) {
    const jump = (i) => (event.ctrlKey ? Math.ceil(map.shape[i] / 20) : 1) * arrow[i];
    moveCursor([0, 1].map((i) => Math.max(0, Math.min(map.shape[i] - 1, map.cursor[i] + jump(i)))));
  } else if (event.key === "Enter" && map.cells) look().then(() => problem(null), problem);
  else return;
  event.preventDefault();
}

export function listenToMap() {
  const canvas = $("map"), again = () => { if (map.cells && canvas.clientWidth) draw(); };
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(event.deltaY < 0 ? 0.7 : 1 / 0.7, ...at(event));
  }, { passive: false });
  canvas.addEventListener("pointerdown", press);
  canvas.addEventListener("pointermove", slide);
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("keydown", pressKey);
  for (const id of ["row-order", "column-order"]) {
    $(id).addEventListener("change", () => {
      map.place = map.pair = null; // another point stands there now
      moved(map.rows, map.columns);
    });
  }
  $("contrast").addEventListener("change", () => { note(mapState()); draw(); });
  document.querySelectorAll("[data-do]").forEach((each) => each.addEventListener("click", () => act(each.dataset.do)));
  new ResizeObserver(again).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
}
