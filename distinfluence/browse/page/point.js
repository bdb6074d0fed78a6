// One point, and the points of the other axis that it moves, or that move it.
import { go, link, whole } from "/address.js";
import { cards, facts, sampleNode } from "/cards.js";
import { $, askJson, button, el, quiet, shown } from "/dom.js";

const TITLES = { test: "Test point", train: "Training point" };

const named = (point) => ({ ...(point.id ? { id: point.id } : {}), label: point.label ?? "not known" });

function testFacts(point) {
  const steps = point.iterations < 1 ? "" : ` in ${point.iterations} iterations`;
  const bound = point.error_bound === null ? "none"
    : `${shown(point.error_bound, 2)} × gradient norm of the training point`;
  return {
    ...named(point), loss: shown(point.loss), "gradient norm": shown(point.test_gradient_norm),
    solve: point.relative_residual === null && !point.converged ? "approximate, residual not measured" :
      `${point.converged ? "converged" : "did not converge"}${steps}, ` +
      `relative residual ${shown(point.relative_residual, 2)}`,
    "error bound": bound,
  };
}

const trainFacts = (point) => ({
  ...named(point), loss: shown(point.loss), "gradient norm": shown(point.train_gradient_norm),
  "net harm": shown(point.net_harm), "self-influence": shown(point.self_influence),
});

// An input for an index, with its steps; to: goes to another index.
export function stepper(title, index, n, to) {
  const input = el("input", { type: "number", min: 0, max: n - 1, value: index, size: 9 });
  const within = (i) => Math.max(0, Math.min(n - 1, i));
  input.addEventListener("change", () => to(within(whole(input.value, index))));
  return {
    step: (by) => to(within(index + by)),
    nodes: [
      el("label", {}, `${title} `, input), el("span", { className: "quiet", textContent: `of 0 to ${n - 1}` }),
      button("previous", "key p", () => to(within(index - 1))), button("next", "key n", () => to(within(index + 1))),
    ],
  };
}

// Returns the function that steps to other points.
export async function viewPoint(axis, at, about, isCurrent) {
  const n = axis === "test" ? about.n_test : about.n_train, other = axis === "test" ? "train" : "test";
  const index = Math.min(whole(at.index, 0), n - 1), k = Math.max(1, Math.min(whole(at.k, 8), 500));
  const point = await askJson(axis, { index, k });
  if (!isCurrent()) return null;
  const { step, nodes } = stepper(TITLES[axis], index, n, (i) => go({ view: axis, index: i, k }));
  const isTest = axis === "test";
  const unfinished = isTest ? "The run is not finished: ranked over what is there."
    : "This training point is not computed yet.";
  $("point").replaceChildren(
    el("div", { className: "controls" }, ...nodes,
      button("show more", "twice as many", () => go({ view: axis, index, k: Math.min(2 * k, 500) })),
      el("a", { href: link({ view: "matrix" }), textContent: "in the matrix", id: "to-matrix" })),
    el("div", { className: "large" },
      el("h2", { textContent: `${TITLES[axis]} ${index}` }),
      el("div", { className: "beside" },
        sampleNode(point.sample), facts(isTest ? testFacts(point) : trainFacts(point)))),
    point.partial ? quiet(unfinished) : "",
    el("h3", { textContent: isTest ? "Training points that help it most" : "Test points that it helps most" }),
    cards(other, point.helpful, "None yet."),
    el("h3", { textContent: isTest ? "Training points that harm it most" : "Test points that it harms most" }),
    cards(other, point.harmful, "None yet."));
  toMatrix(axis, index, point);
  return step;
}

// Where the strongest of its pairs stands in the matrix.
function toMatrix(axis, index, point) {
  const strongest = [...point.helpful.slice(0, 1), ...point.harmful.slice(0, 1)]
    .sort((a, b) => Math.abs(b.value) - Math.abs(a.value))[0];
  if (!strongest) {
    $("to-matrix").remove();
    return;
  }
  const pair = axis === "test" ? [index, strongest.index] : [strongest.index, index];
  $("to-matrix").href = link({ view: "matrix", pair: pair.join(",") });
}
