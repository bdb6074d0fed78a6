// What made the result, how far it is, and how far its solves came.
import { go, link } from "/address.js";
import { facts } from "/cards.js";
import { $, askJson, colour, el, pen, quiet, shown } from "/dom.js";

const STATES = [
  ["unfinished", "not computed yet"], ["done", "computed"], ["damaged", "file lost"], ["apart", "quarantined"],
];

function stripBar(runs) {
  const total = runs.reduce((sum, [, n]) => sum + n, 0);
  const parts = runs.slice(0, 2000).map(([state, n]) => {
    const own = el("span", { className: STATES[state][0], title: `${n} strips ${STATES[state][1]}` });
    own.style.width = `${(100 * n) / total}%`;
    return own;
  });
  const counts = STATES.map(([, text], state) =>
    `${runs.filter(([other]) => other === state).reduce((sum, [, n]) => sum + n, 0)} strips ${text}`);
  return el("div", { className: "strips", role: "img", ariaLabel: counts.join(", ") }, ...parts);
}

// Numbers of test points on a logarithmic scale; a point that is clicked, or chosen by arrows and Enter, is opened.
class Scatter {
  constructor(id, what, found, values) {
    Object.assign(this, { found, values, at: 0 });
    const known = values.filter((value) => value !== null);
    this.canvas = el("canvas", { id, className: "scatter", tabIndex: 0, role: "img" });
    this.canvas.ariaLabel = known.length
      ? `${what} from ${shown(Math.min(...known), 2)} to ${shown(Math.max(...known), 2)}` : `${what}: none recorded`;
    this.said = el("p", { className: "quiet", role: "status", textContent: this.canvas.ariaLabel });
    this.logs = values.map((value) => (value === null ? null : Math.log10(Math.max(value, 1e-20))));
    const heights = this.logs.filter((value) => value !== null);
    this.low = heights.length ? Math.floor(Math.min(...heights)) : 0;
    this.high = heights.length ? Math.max(Math.ceil(Math.max(...heights)), this.low + 1) : 1;
    this.what = what;
    for (const moved of ["pointermove", "pointerdown"]) {
      this.canvas.addEventListener(moved, (event) => this.point(this.nearest(event)));
    }
    this.canvas.addEventListener("click", () => this.open(this.at)); // the one that is marked
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  x = (i) => 48 + ((i + 0.5) / this.logs.length) * (this.canvas.clientWidth - 56);
  y = (value) => {
    const height = this.canvas.clientHeight, share = (value - this.low) / (this.high - this.low);
    return height - 22 - share * (height - 36);
  };

  nearest(event) {
    const box = this.canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    let best = 0, least = Infinity;
    this.logs.forEach((value, i) => {
      const far = value === null ? Infinity : Math.hypot(this.x(i) - x, this.y(value) - y);
      if (far < least) [best, least] = [i, far];
    });
    return best;
  }

  key(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) this.point(Math.max(0, Math.min(this.logs.length - 1, this.at + by * (event.ctrlKey ? 20 : 1))));
    else if (event.key === "Enter") this.open(this.at);
    else return;
    event.preventDefault();
  }

  point(i) {
    this.at = i;
    this.said.textContent = `test point ${this.found.rows[i]}: ${shown(this.values[i], 2)}` +
      `${this.found.converged[i] ? "" : ", did not converge"}. A click or Enter opens it.`;
    this.draw();
  }

  open(i) {
    if (this.logs[i] !== null) go({ view: "test", index: this.found.rows[i] });
  }

  draw() {
    const draw = pen(this.canvas), width = this.canvas.clientWidth;
    const every = Math.max(1, Math.ceil((this.high - this.low) / 8));
    draw.textBaseline = "middle";
    for (let power = this.low; power <= this.high; power += every) {
      draw.fillStyle = colour("--line");
      draw.fillRect(44, Math.round(this.y(power)), width - 48, 1);
      draw.fillStyle = colour("--quiet");
      draw.textAlign = "right";
      draw.fillText(`1e${power}`, 40, this.y(power));
    }
    draw.textAlign = "center";
    const rows = this.found.rows, places = [0, rows.length >> 1, rows.length - 1];
    for (const i of new Set(places)) draw.fillText(String(rows[i]), this.x(i), this.canvas.clientHeight - 8);
    this.logs.forEach((value, i) => {
      if (value === null) return;
      draw.fillStyle = colour(this.found.converged[i] ? "--helps" : "--harms");
      draw.fillRect(this.x(i) - 1.5, this.y(value) - 1.5, 3, 3);
    });
    if (this.logs[this.at] !== null && this.at) {
      draw.strokeStyle = colour("--text");
      draw.strokeRect(this.x(this.at) - 5, this.y(this.logs[this.at]) - 5, 10, 10);
    }
  }
}

function worstTable(worst) {
  const head = ["test point", "label", "relative residual", "iterations", "error bound", "converged"];
  const row = (point) => el("tr", {},
    el("td", {}, el("a", { href: link({ view: "test", index: point.index }), textContent: `test ${point.index}` })),
    el("td", { textContent: point.label ?? "" }), el("td", { textContent: shown(point.relative_residual, 2) }),
    el("td", { textContent: point.iterations < 0 ? "not known" : String(point.iterations) }),
    el("td", { textContent: point.error_bound === null ? "none" : shown(point.error_bound, 2) }),
    el("td", { className: point.converged ? "" : "harms", textContent: point.converged ? "yes" : "no" }));
  return el("table", { className: "listed", id: "worst-rows" },
    el("thead", {}, el("tr", {}, ...head.map((name) => el("th", { scope: "col", textContent: name })))),
    el("tbody", {}, ...worst.map(row)));
}

let plots = [];

export async function viewProvenance(about, isCurrent) {
  const found = await askJson("convergence");
  if (!isCurrent()) return;
  const strips = stripBar(found.strips);
  const residuals = new Scatter("residuals", "relative residuals", found, found.relative_residual);
  const bounds = new Scatter("bounds", "error bounds", found, found.error_bound);
  const bounded = found.error_bound.some((value) => value !== null);
  $("provenance").replaceChildren(
    el("h2", { textContent: "What made it" }), facts(about.facts),
    el("h3", { textContent: "Strips" }), strips, quiet(strips.ariaLabel),
    ...Object.entries(found.quarantined).map(([strip, reason]) =>
      el("p", { textContent: `Strip ${strip} was quarantined: ${reason}` })),
    el("h3", { textContent: "Relative residual of each test point's solve" }),
    residuals.canvas, residuals.said, quiet("Orange did not converge."),
    el("h3", { textContent: "Error bound of each test point" }),
    ...(bounded ? [bounds.canvas, bounds.said, quiet("Times the gradient norm of a training point: by how much a " +
      "score may differ from the exact one.")] : [quiet("No bounds are recorded.")]),
    el("h3", { textContent: "Test points whose solves came least far" }),
    found.worst.length ? worstTable(found.worst) : quiet("Residuals are not recorded."),
    el("h3", { textContent: "All that is recorded" }), el("pre", { tabIndex: 0, textContent: found.provenance }));
  plots = bounded ? [residuals, bounds] : [residuals];
  plots.forEach((plot) => plot.draw());
}

export function listenToPlots() {
  const again = () => plots.forEach((plot) => { if (plot.canvas.clientWidth) plot.draw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  addEventListener("resize", again);
}
