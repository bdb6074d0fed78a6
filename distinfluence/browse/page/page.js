// The page: five views of one result. State lives in the address's fragment, so that a view is a link. Whatever came with
// the result is set as text, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const VIEWS = ["matrix", "test", "train", "suspects", "provenance"];
const HELPS = [33, 102, 172], HARMS = [200, 80, 20];
let about = null, turn = 0;

function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value; else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function shown(value, digits = 4) {
  return value === null || value === undefined ? "not known" : String(Number(Number(value).toPrecision(digits)));
}

async function ask(name, parameters = {}) {
  const answer = await fetch(`/api/${name}?${new URLSearchParams(parameters)}`, { credentials: "same-origin" });
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error || `The server answered ${answer.status}.`);
  return answer;
}

const askJson = async (name, parameters) => (await ask(name, parameters)).json();

function problem(error) {
  $("problem").hidden = !error;
  $("problem").textContent = error ? (error instanceof TypeError ? "The server does not answer. Start `distinfluence browse` again." : error.message) : "";
}

// The address
const state = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
const link = (parameters) => "#" + new URLSearchParams(parameters);
const count = (text, otherwise) => (/^\d{1,10}$/.test(text ?? "") ? Number(text) : otherwise);

function go(parameters, replace = false) {
  if (replace) history.replaceState(null, "", link(parameters)); else location.hash = link(parameters);
}

// Samples
function sampleNode(sample) {
  if (!sample) return null;
  const box = el("div", { className: "sample" });
  if (sample.kind === "image") box.append(el("img", { src: sample.uri, width: sample.width, height: sample.height, alt: "the sample" }));
  if (sample.kind === "text") box.append(el("p", { textContent: sample.text + (sample.cut ? " …" : "") }));
  if (sample.kind === "table") {
    const rows = sample.cells.map(([name, value]) => el("tr", {}, el("td", { className: "quiet", textContent: name }), el("td", { textContent: value })));
    box.append(el("table", {}, el("tbody", {}, ...rows)));
  }
  return box;
}

function card(axis, point) {
  const helps = point.value > 0;
  const value = point.value === undefined ? null : el("div", { className: `value ${helps ? "helps" : "harms"}`,
    textContent: `${helps ? "+" : ""}${shown(point.value)}${point.bound === null || point.bound === undefined ? "" : ` ± ${shown(point.bound, 2)}`}` });
  return el("a", { className: "card", href: link({ view: axis, index: point.index }) },
    sampleNode(point.sample),
    el("div", { textContent: `${axis === "test" ? "test" : "training"} ${point.index}${point.label === null ? "" : ` · “${point.label}”`}` }),
    value, el("div", { className: "quiet", textContent: point.loss === null ? "" : `loss ${shown(point.loss)}` }));
}

const cards = (axis, points, empty) => points.length
  ? el("ul", { className: "cards" }, ...points.map((point) => el("li", {}, card(axis, point))))
  : el("p", { className: "quiet", textContent: empty });

const facts = (entries) => el("dl", { className: "facts" },
  ...Object.entries(entries).flatMap(([name, text]) => [el("dt", { textContent: name }), el("dd", { textContent: text })]));

// One point, and the points of the other axis
async function viewPoint(axis, at) {
  const n = axis === "test" ? about.n_test : about.n_train, other = axis === "test" ? "train" : "test";
  const index = Math.min(count(at.index, 0), n - 1), k = Math.max(1, Math.min(count(at.k, 8), 500));
  const now = turn, point = await askJson(axis, { index, k });
  if (now !== turn) return;
  const input = el("input", { type: "number", min: 0, max: n - 1, value: index, id: "index", size: 9 });
  const step = (by) => go({ view: axis, index: Math.max(0, Math.min(n - 1, index + by)), k });
  input.addEventListener("change", () => go({ view: axis, index: Math.max(0, Math.min(n - 1, count(input.value, index))), k }));
  const title = axis === "test" ? "Test point" : "Training point";
  const known = axis === "test"
    ? { label: point.label ?? "not known", loss: shown(point.loss), "gradient norm": shown(point.test_gradient_norm),
        solve: `${point.converged ? "converged" : "did not converge"}${point.iterations < 0 ? "" : ` in ${point.iterations} iterations`}, relative residual ${shown(point.relative_residual, 2)}`,
        "error bound": point.error_bound === null ? "none" : `${shown(point.error_bound, 2)} × gradient norm of the training point` }
    : { label: point.label ?? "not known", loss: shown(point.loss), "gradient norm": shown(point.train_gradient_norm),
        "net harm": shown(point.net_harm), "self-influence": shown(point.self_influence) };
  $("point").replaceChildren(
    el("div", { className: "controls" }, el("label", { htmlFor: "index", textContent: title }), input, el("span", { className: "quiet", textContent: `of 0 to ${n - 1}` }),
      el("button", { type: "button", textContent: "previous", title: "key [", onclick: () => step(-1) }), el("button", { type: "button", textContent: "next", title: "key ]", onclick: () => step(1) }),
      el("button", { type: "button", textContent: "show more", onclick: () => go({ view: axis, index, k: Math.min(2 * k, 500) }) })),
    el("div", { className: "large" }, el("h2", { textContent: `${title} ${index}` }), sampleNode(point.sample), facts(known)),
    point.partial ? el("p", { className: "quiet", textContent: axis === "test" ? "The run is not finished: ranked over what is there." : "This training point is not computed yet." }) : "",
    el("h3", { textContent: axis === "test" ? "Training points that help it most" : "Test points that it helps most" }), cards(other, point.helpful, "None yet."),
    el("h3", { textContent: axis === "test" ? "Training points that harm it most" : "Test points that it harms most" }), cards(other, point.harmful, "None yet."));
  $("point").dataset.step = "";
  pointStep = step;
}
let pointStep = null;

// Suspicious labels
async function viewSuspects(at) {
  const names = { net_harm: "net harm", self_influence: "self-influence", train_loss: "training loss" };
  const by = at.by in names ? at.by : "net_harm", k = Math.max(1, Math.min(count(at.k, 60), 500));
  const select = el("select", { onchange: () => go({ view: "suspects", by: select.value, k }) },
    ...about.suspicions.map((name) => el("option", { value: name, textContent: names[name], selected: name === by })));
  const top = el("div", { className: "controls" }, el("label", {}, "ranked by ", select));
  $("suspects").replaceChildren(top);
  const now = turn, found = await askJson("suspects", { by, k });
  if (now !== turn) return;
  const boxes = found.points.map((point) => el("input", { type: "checkbox", ariaLabel: `choose training point ${point.index}`, value: point.index }));
  const note = el("span", { className: "quiet", role: "status" });
  const chosen = () => { const picked = found.points.filter((_, i) => boxes[i].checked); note.textContent = `${picked.length} chosen`; return picked; };
  const rows = found.points.map((point, i) => el("li", {}, el("label", { className: "choice" }, boxes[i], ` ${i + 1}. ${names[by]} ${shown(point.score)}`), card("train", point)));
  boxes.forEach((box, i) => box.addEventListener("change", () => { rows[i].className = box.checked ? "chosen" : ""; chosen(); }));
  const all = el("button", { type: "button", textContent: "choose all", onclick: () => { const on = boxes.some((box) => !box.checked); boxes.forEach((box, i) => { box.checked = on; rows[i].className = on ? "chosen" : ""; }); chosen(); } });
  top.append(all, el("button", { type: "button", textContent: "export CSV", onclick: () => save("suspects.csv", "text/csv", csv(chosen(), by)) }),
    el("button", { type: "button", textContent: "export JSON", onclick: () => save("suspects.json", "application/json", JSON.stringify(chosen().map((point) => ({ train: point.index, label: point.label, loss: point.loss, [by]: point.score })), null, 1)) }), note);
  chosen();
  $("suspects").append(el("p", { className: "quiet", textContent: by === "net_harm" ? "Net harm: minus the sum of a training point's influence on all test points." : "Largest first." }),
    found.points.length ? el("ol", { className: "cards" }, ...rows)
      : el("p", { className: "quiet", textContent: "No strip is finished yet." }));
}

function csv(points, by) {
  // a cell that begins so would be run as a formula by spreadsheets
  const cell = (value) => { const text = String(value ?? ""); const safe = /^[=+@\t\r-]/.test(text) && typeof value === "string" ? "'" + text : text; return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe; };
  return [["train", "label", "loss", by], ...points.map((point) => [point.index, point.label, point.loss, point.score])].map((row) => row.map(cell).join(",")).join("\n") + "\n";
}

function save(name, type, text) {
  const anchor = el("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 10000);
}

// Provenance and convergence
async function viewProvenance() {
  const now = turn, found = await askJson("convergence");
  if (now !== turn) return;
  const kinds = [["unfinished", "not computed yet"], ["done", "computed"], ["damaged", "file lost"], ["apart", "set apart"]];
  const total = found.strips.reduce((sum, [, n]) => sum + n, 0);
  const strips = el("div", { className: "strips", role: "img" }, ...found.strips.slice(0, 2000).map(([kind, n]) => {
    const part = el("span", { className: kinds[kind][0], title: `${n} strips ${kinds[kind][1]}` }); part.style.width = `${(100 * n) / total}%`; return part; }));
  strips.ariaLabel = kinds.map(([, text], kind) => `${found.strips.filter(([other]) => other === kind).reduce((sum, [, n]) => sum + n, 0)} strips ${text}`).join(", ");
  const canvas = el("canvas", { id: "residuals", role: "img" });
  const measured = found.relative_residual.filter((value) => value !== null);
  canvas.ariaLabel = measured.length ? `relative residuals from ${shown(Math.min(...measured), 2)} to ${shown(Math.max(...measured), 2)}` : "residuals not measured";
  $("provenance").replaceChildren(el("h2", { textContent: "What made it" }), facts(about.facts),
    el("h3", { textContent: "Strips" }), strips, el("p", { className: "quiet", textContent: strips.ariaLabel }),
    ...Object.entries(found.set_apart).map(([strip, reason]) => el("p", { textContent: `Strip ${strip} was set apart: ${reason}` })),
    el("h3", { textContent: "Relative residual of each test point's solve" }), canvas, el("p", { className: "quiet", textContent: `${canvas.ariaLabel}; orange: did not converge` }),
    el("h3", { textContent: "All that is recorded" }), el("pre", { tabIndex: 0, textContent: found.provenance }));
  drawResiduals(canvas, found);
}

function drawResiduals(canvas, found) {
  const scale = devicePixelRatio || 1, width = (canvas.width = canvas.clientWidth * scale), height = (canvas.height = canvas.clientHeight * scale);
  const logs = found.relative_residual.map((value) => (value === null ? null : Math.log10(Math.max(value, 1e-20))));
  const known = logs.filter((value) => value !== null);
  if (!known.length) return;
  const low = Math.floor(Math.min(...known)), high = Math.max(Math.ceil(Math.max(...known)), low + 1), pen = canvas.getContext("2d"), style = getComputedStyle(document.body);
  pen.font = `${11 * scale}px sans-serif`;
  for (let power = low; power <= high; power++) {
    const y = height - ((power - low) / (high - low)) * (height - 24 * scale) - 12 * scale;
    pen.fillStyle = style.getPropertyValue("--line"); pen.fillRect(0, y, width, 1);
    pen.fillStyle = style.getPropertyValue("--quiet"); pen.fillText(`1e${power}`, 4 * scale, y - 2);
  }
  logs.forEach((value, i) => {
    if (value === null) return;
    pen.fillStyle = style.getPropertyValue(found.converged[i] ? "--helps" : "--harms");
    pen.fillRect(44 * scale + (i / logs.length) * (width - 52 * scale), height - ((value - low) / (high - low)) * (height - 24 * scale) - 13 * scale, 3 * scale, 3 * scale);
  });
}

// The matrix
const map = { rows: [0, 1], columns: [0, 1], cells: null, shape: [1, 1], cursor: null, drag: null, wait: 0 };

function clampWindow(start, size, n) {
  size = Math.max(1, Math.min(n, Math.round(size)));
  start = Math.max(0, Math.min(n - size, Math.round(start)));
  return [start, start + size];
}

const part = (text, n) => { const found = /^(\d{1,10}):(\d{1,10})$/.exec(text ?? ""); return found && +found[1] < +found[2] && +found[2] <= n ? [+found[1], +found[2]] : [0, n]; };
const mapState = () => ({ view: "matrix", rows: map.rows.join(":"), columns: map.columns.join(":"), "row-order": $("row-order").value, "column-order": $("column-order").value, contrast: $("contrast").value });

function choices(id, names, chosen) {
  const known = { stored: "as stored", class: "by class", norm: "by gradient norm", loss: "by loss", "net harm": "by net harm", cluster: "by similarity" };
  $(id).replaceChildren(...names.map((name) => el("option", { value: name, textContent: known[name] ?? name, selected: name === chosen })));
  $(id).disabled = names.length < 2;
  $(id).title = names.length < 2 ? "Sorting needs the whole matrix, which is too large here." : "";
}

async function viewMatrix(at) {
  map.rows = part(at.rows, about.n_test); map.columns = part(at.columns, about.n_train);
  choices("row-order", about.orders.test, at["row-order"]); choices("column-order", about.orders.train, at["column-order"]);
  $("contrast").value = at.contrast === "root" ? "root" : "linear";
  if (!$("cell").hasChildNodes() && about.worst.length) $("cell").replaceChildren(el("h2", { textContent: "Test points of largest loss" }), ...about.worst.map((point) => card("test", point)));
  await fetchMap();
}

const orders = () => ({ "row-order": $("row-order").value, "column-order": $("column-order").value });

async function fetchMap() {
  const canvas = $("map"), now = ++map.wait;
  const parameters = { rows: map.rows.join(":"), columns: map.columns.join(":"), height: Math.max(1, Math.min(600, Math.floor(canvas.clientHeight))), width: Math.max(1, Math.min(1400, Math.floor(canvas.clientWidth))), ...orders() };
  const answer = await ask("picture", parameters);
  const cells = new Float32Array(await answer.arrayBuffer()), told = JSON.parse(answer.headers.get("X-Picture"));
  if (now !== map.wait) return;
  Object.assign(map, { cells, shape: told.shape, block: told.block, damaged: told.damaged });
  map.cursor = map.cursor && map.cursor[0] < told.shape[0] && map.cursor[1] < told.shape[1] ? map.cursor : [told.shape[0] >> 1, told.shape[1] >> 1];
  draw();
}

const background = () => getComputedStyle(document.body).backgroundColor.match(/\d+/g).slice(0, 3).map(Number);

function draw() {
  const canvas = $("map"), [height, width] = map.shape, cells = map.cells;
  const magnitudes = Array.from(cells.length > 60000 ? cells.filter((_, i) => i % 7 === 0) : cells).filter(Number.isFinite).map(Math.abs).sort((a, b) => a - b);
  const scale = magnitudes[Math.floor(0.99 * (magnitudes.length - 1))] || magnitudes.at(-1) || 1;
  const root = $("contrast").value === "root", zero = background(), image = new ImageData(width, height), pixels = image.data;
  let missing = 0, broken = 0;
  for (let i = 0; i < cells.length; i++) {
    const value = cells[i], x = i % width, y = (i / width) | 0;
    let share = Math.max(-1, Math.min(1, value / scale)), colour = zero;
    if (Number.isNaN(value)) { missing++; share = (x + y) % 4 < 2 ? 0.5 : 0; colour = [138, 143, 150]; }
    else if (!Number.isFinite(value)) { broken++; share = (x + y) % 4 < 2 ? 1 : 0; colour = [194, 24, 91]; }
    else { colour = share > 0 ? HELPS : HARMS; share = root ? Math.sqrt(Math.abs(share)) : Math.abs(share); }
    for (let c = 0; c < 3; c++) pixels[4 * i + c] = zero[c] + share * (colour[c] - zero[c]);
    pixels[4 * i + 3] = 255;
  }
  const own = new OffscreenCanvas(width, height), dots = devicePixelRatio || 1;
  own.getContext("2d").putImageData(image, 0, 0);
  canvas.width = canvas.clientWidth * dots; canvas.height = canvas.clientHeight * dots;
  const pen = canvas.getContext("2d"); pen.imageSmoothingEnabled = false; pen.drawImage(own, 0, 0, canvas.width, canvas.height);
  const [r, c] = map.cursor, w = canvas.width / width, h = canvas.height / height;
  pen.strokeStyle = getComputedStyle(document.body).color; pen.lineWidth = 2; pen.strokeRect(c * w - 2, r * h - 2, w + 4, h + 4);
  const many = map.block[0] * map.block[1], rows = map.rows, columns = map.columns;
  $("window").textContent = `test ${rows[0]} to ${rows[1] - 1}, training ${columns[0]} to ${columns[1] - 1}${many > 1 ? `, from an overview of ${map.block[0]} × ${map.block[1]} blocks` : ""}` +
    (missing === cells.length ? " · nothing is computed yet" : missing ? ` · ${Math.max(1, Math.round((100 * missing) / cells.length))} % not computed yet` : "") + (broken ? ` · damaged strips: ${map.damaged.join(", ")}` : "");
  $("low").textContent = `harms ${shown(-scale, 2)}`; $("high").textContent = `${shown(scale, 2)} helps`;
  const ramp = $("ramp").getContext("2d");
  for (let x = 0; x < 240; x++) { const share = x / 119.5 - 1, colour = share > 0 ? HELPS : HARMS, weight = root ? Math.sqrt(Math.abs(share)) : Math.abs(share); ramp.fillStyle = `rgb(${zero.map((z, i) => z + weight * (colour[i] - z))})`; ramp.fillRect(x, 0, 1, 12); }
  canvas.ariaLabel = `Heat map of ${about.n_test} test by ${about.n_train} training points`;
  canvas.dataset.drawn = `${rows.join(":")} ${columns.join(":")}`;
}

const range = (window, n, i) => { const size = window[1] - window[0]; return `${window[0] + Math.floor((i * size) / n)}:${window[0] + Math.floor(((i + 1) * size) / n)}`; };

async function look() {
  const [r, c] = map.cursor;
  draw();
  const found = await askJson("cell", { rows: range(map.rows, map.shape[0], r), columns: range(map.columns, map.shape[1], c), ...orders() });
  const helps = found.value > 0;
  $("cell").replaceChildren(el("h2", { textContent: "Strongest in this cell" }),
    el("p", { className: found.value === null ? "quiet" : helps ? "helps" : "harms", textContent: found.value === null ? "not computed yet" : `${helps ? "helps" : "harms"}: ${shown(found.value)}` }),
    card("test", found.test_point), card("train", found.train_point));
}

function zoom(factor, r = 0.5, c = 0.5) {
  const scaled = (window, n, share) => { const size = window[1] - window[0]; return clampWindow(window[0] + share * size * (1 - factor), Math.max(4, size * factor), n); };
  moved(scaled(map.rows, about.n_test, r), scaled(map.columns, about.n_train, c));
}

function pan(r, c) {
  const by = (window, n, share) => { const size = window[1] - window[0]; return clampWindow(window[0] + (share ? Math.sign(share) * Math.max(1, Math.abs(share) * size) : 0), size, n); };
  moved(by(map.rows, about.n_test, r), by(map.columns, about.n_train, c));
}

let later = 0;
function moved(rows, columns) {
  map.rows = rows; map.columns = columns;
  go(mapState(), true);
  clearTimeout(later);
  later = setTimeout(() => fetchMap().then(() => problem(null), problem), 60);
}

function at(event) {
  const box = $("map").getBoundingClientRect();
  return [Math.max(0, Math.min(0.9999, (event.clientY - box.top) / box.height)), Math.max(0, Math.min(0.9999, (event.clientX - box.left) / box.width))];
}

function listenToMap() {
  const canvas = $("map");
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoom(event.deltaY < 0 ? 0.7 : 1 / 0.7, ...at(event)); }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => { map.drag = { from: at(event), rows: map.rows, columns: map.columns, far: false }; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointermove", (event) => {
    if (!map.drag) return;
    const [r, c] = at(event), dr = map.drag.from[0] - r, dc = map.drag.from[1] - c;
    if (!map.drag.far && Math.hypot(dr, dc) < 0.01) return;
    map.drag.far = true;
    const by = (window, n, share) => clampWindow(window[0] + share * (window[1] - window[0]), window[1] - window[0], n);
    moved(by(map.drag.rows, about.n_test, dr), by(map.drag.columns, about.n_train, dc));
  });
  canvas.addEventListener("pointerup", (event) => {
    const drag = map.drag; map.drag = null;
    if (!drag || drag.far || !map.cells) return;
    const [r, c] = at(event);
    map.cursor = [Math.floor(r * map.shape[0]), Math.floor(c * map.shape[1])];
    look().then(() => problem(null), problem);
  });
  canvas.addEventListener("keydown", (event) => {
    const arrow = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (arrow && event.shiftKey) pan(0.25 * arrow[0], 0.25 * arrow[1]);
    else if (arrow && map.cells) {
      const jump = (i) => (event.ctrlKey ? Math.ceil(map.shape[i] / 20) : 1) * arrow[i];
      map.cursor = [0, 1].map((i) => Math.max(0, Math.min(map.shape[i] - 1, map.cursor[i] + jump(i)))); draw();
    } else if (event.key === "Enter" && map.cells) look().then(() => problem(null), problem);
    else return;
    event.preventDefault();
  });
  for (const id of ["row-order", "column-order"]) $(id).addEventListener("change", () => moved(map.rows, map.columns));
  $("contrast").addEventListener("change", () => { go(mapState(), true); draw(); });
  document.querySelectorAll("[data-do]").forEach((button) => button.addEventListener("click", () => act(button.dataset.do)));
  new ResizeObserver(() => { if (map.cells && canvas.clientWidth) draw(); }).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (map.cells && canvas.clientWidth) draw(); });
}

function act(name) {
  if (name === "in") zoom(0.5); else if (name === "out") zoom(2); else moved([0, about.n_test], [0, about.n_train]);
}

// The whole
async function show() {
  const now = ++turn, here = state(), view = VIEWS.includes(here.view) ? here.view : "matrix";
  pointStep = null;
  for (const id of ["matrix", "point", "suspects", "provenance"]) $(id).hidden = id !== (view === "test" || view === "train" ? "point" : view);
  document.querySelectorAll("nav a").forEach((anchor) => { if (anchor.dataset.view === view) anchor.setAttribute("aria-current", "page"); else anchor.removeAttribute("aria-current"); });
  document.body.dataset.shown = "";
  problem(null);
  try {
    about = about && about.complete ? about : await askJson("summary");
    $("name").textContent = `${about.path}, ${about.n_test} test × ${about.n_train} training points`;
    document.title = `Influences: ${about.path}`;
    $("state").textContent = about.n_finished === about.n_strips ? (about.complete ? "complete" : "computed, not finished") : `running: ${about.n_finished} of ${about.n_strips} strips`;
    if (view === "matrix") await viewMatrix(here);
    else if (view === "suspects") await viewSuspects(here);
    else if (view === "provenance") await viewProvenance();
    else await viewPoint(view, here);
  } catch (error) { if (now === turn) problem(error); }
  if (now === turn) document.body.dataset.shown = location.hash || "#";
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  const view = VIEWS[Number(event.key) - 1];
  if (view) go(view === "test" || view === "train" ? { view, index: 0 } : { view });
  else if (pointStep && (event.key === "[" || event.key === "]")) pointStep(event.key === "]" ? 1 : -1);
  else if (!$("matrix").hidden && about && ["+", "=", "-", "0"].includes(event.key)) act({ "+": "in", "=": "in", "-": "out", 0: "all" }[event.key]);
});
// A run that goes on: what it has written since is shown, where that disturbs nobody's choices.
async function follow() {
  if (about && !about.complete && !document.hidden && (!$("matrix").hidden || !$("provenance").hidden)) {
    const found = await askJson("summary").catch(() => null);
    if (found && (found.n_finished !== about.n_finished || found.complete)) await show();
  }
  setTimeout(follow, 3000);
}

addEventListener("hashchange", show);
follow();
listenToMap();
show();
