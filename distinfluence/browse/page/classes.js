// Classes on classes: how much a training point of one helps a test point of another, in the mean.
import { go, link } from "/address.js";
import { $, askJson, button, el, quiet, shown } from "/dom.js";
import { mix, palette, rgb, weight } from "/paint.js";

const MOST = 40; // classes on a side: the largest of more

function largest(classes) {
  const order = classes.map((_, i) => i);
  if (classes.length <= MOST) return order;
  return order.sort((a, b) => classes[b].n - classes[a].n).slice(0, MOST).sort((a, b) => a - b);
}

function table(values, tests, trains) {
  const rows = largest(tests), columns = largest(trains), { zero, helps, harms } = palette();
  const scale = Math.max(...rows.flatMap((r) => columns.map((c) => Math.abs(values[r][c] ?? 0)))) || 1;
  const cell = (r, c) => {
    const value = values[r][c], anchor = el("a", {
      href: link({ view: "set", class: tests[r].label, among: trains[c].label }),
      textContent: columns.length <= 16 ? (value === null ? "–" : shown(value, 2)) : "",
      title: `training “${trains[c].name}” on test “${tests[r].name}”: ${shown(value)}`,
    });
    anchor.ariaLabel = anchor.title;
    if (value !== null) {
      const share = 0.5 * weight(value / scale, true); // not more, so that the number stays readable
      anchor.style.background = rgb(mix(zero, value > 0 ? helps : harms, share));
    }
    return el("td", {}, anchor);
  };
  const head = columns.map((c) =>
    el("th", { scope: "col", textContent: trains[c].name, title: `${trains[c].n} points` }));
  const said = "rows: classes of test points, columns: classes of training points";
  return el("table", { className: "classes" },
    el("caption", { className: "quiet", textContent: said }),
    el("thead", {}, el("tr", {}, el("td"), ...head)),
    el("tbody", {}, ...rows.map((r) => el("tr", {},
      el("th", { scope: "row", textContent: tests[r].name, title: `${tests[r].n} points` }),
      ...columns.map((c) => cell(r, c))))));
}

export async function viewClasses(at, about, isCurrent) {
  const { test: tests, train: trains } = about.classes;
  if (!tests || !trains) {
    $("classes").replaceChildren(quiet("Classes are shown of test and training points with labels. Store them with " +
      "`distinfluence annotate`, or pass --job to `distinfluence browse`."));
    return;
  }
  $("classes").replaceChildren(quiet("Adding up …"));
  const found = await askJson("classes", { all: at.all === "1" ? 1 : 0 });
  if (!isCurrent()) return;
  const part = found.n_read < about.n_finished - found.damaged.length;
  const more = el("p", { className: "controls" },
    `Estimated from ${found.n_read} of ${about.n_finished} strips, spread over the matrix. `,
    button("read all of it", "takes a while", () => go({ view: "classes", all: 1 })));
  $("classes").replaceChildren(
    el("h2", { textContent: "Mean influence of classes on classes" }), part ? more : "",
    found.damaged.length ? quiet(`Damaged strips are left out: ${found.damaged.join(", ")}`) : "",
    el("div", { className: "wide" }, table(found.values, tests, trains)),
    quiet("Blue helps, orange harms. A cell opens the training points of its column that help and harm the test " +
      "points of its row most."),
    tests.length > MOST || trains.length > MOST ? quiet(`The ${MOST} largest classes are shown.`) : "");
}
