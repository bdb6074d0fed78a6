// A result of influences by input: which parts of a training point's input move the loss of a test point.
import { go, link, whole } from "/address.js";
import { card, facts, sampleNode, titleOf } from "/cards.js";
import { $, askJson, button, el, quiet, shown } from "/dom.js";
import { stepper } from "/point.js";

function picture(found) {
  const image = el("img", { src: found.uri, width: found.width, height: found.height, className: "saliency" });
  image.alt = "influence of each place of the input";
  return el("figure", {}, image, el("figcaption", { className: "quiet",
    textContent: `blue: more of it helps, orange: harms; full colour from ±${shown(found.scale, 2)}` }));
}

function numbers(found) {
  const most = Math.max(...found.numbers.map(([, value]) => Math.abs(value))) || 1;
  return el("table", { className: "listed" },
    el("thead", {}, el("tr", {}, ...["place in the input", "influence", ""].map((text) =>
      el("th", { scope: "col", textContent: text })))),
    el("tbody", {}, ...found.numbers.slice(0, 20).map(([place, value]) => {
      const bar = el("span", { className: `bar ${value > 0 ? "helping" : "harming"}` });
      bar.style.width = `${(100 * Math.abs(value)) / most}%`;
      return el("tr", {}, el("td", { textContent: place }), el("td", { textContent: shown(value) }),
        el("td", { className: "bars" }, bar));
    })));
}

// Returns the function that steps to other training points.
export async function viewSaliency(at, about, isCurrent) {
  const test = Math.min(whole(at.test, 0), about.n_test - 1), train = Math.min(whole(at.train, 0), about.n_train - 1);
  const k = Math.max(1, Math.min(whole(at.k, 12), 500));
  const found = await askJson("saliency", { test, train, k });
  if (!isCurrent()) return null;
  const to = (changes) => go({ view: "saliency", test, train, k, ...changes });
  const tests = stepper("Test point", test, about.n_test, (i) => to({ test: i }));
  const trains = stepper("Training point", train, about.n_train, (i) => to({ train: i }));
  const strongest = found.strongest ?? [];
  $("saliency").replaceChildren(
    el("div", { className: "controls" }, ...tests.nodes), el("div", { className: "controls" }, ...trains.nodes),
    found.known ? "" : quiet("This training point is not computed yet."),
    el("div", { className: "beside large" },
      el("div", {}, el("h2", { textContent: titleOf("test", found.test_point) }), sampleNode(found.test_point.sample)),
      el("div", {},
        el("h2", { textContent: titleOf("train", found.train_point) }), sampleNode(found.train_point.sample)),
      el("div", {}, el("h2", { textContent: "Influence by input" }), found.uri ? picture(found) : null)),
    facts({ "norm over the input": shown(found.norm), "input": found.shape.join(" × ") }),
    el("h3", { textContent: "Where it is largest" }), numbers(found),
    el("h3", { textContent: "Training points whose inputs move this test point most" }),
    found.strongest === null ? quiet("The row is too large to be ranked here.")
      : strongest.length ? el("ul", { className: "cards" }, ...strongest.map((point) => el("li", {},
        card("train", point, link({ view: "saliency", test, train: point.index, k })),
        el("div", { className: "quiet", textContent: `norm ${shown(point.norm)}` })))) : quiet("None yet."),
    found.strongest === null ? "" : button("show more", "twice as many", () => to({ k: Math.min(2 * k, 500) })));
  return trains.step;
}
