// A set of test points, a range or a class, and the training points that help and harm it most.
import { go, range, whole } from "/address.js";
import { cards, facts } from "/cards.js";
import { $, askJson, button, el, problem, quiet, shown } from "/dom.js";

const named = ({ label, name, n }) => el("option", { value: String(label), textContent: `“${name}” (${n})` });

function chooser(at, about, k) {
  const set = el("select", {},
    el("option", { value: "all", textContent: "all test points" }),
    el("option", { value: "range", textContent: "a range" }),
    ...(about.classes.test ?? []).map(named));
  set.value = at.class ?? (at.tests ? "range" : "all");
  const ends = el("input", {
    value: at.tests ?? `0:${Math.min(100, about.n_test)}`, size: 12, hidden: set.value !== "range",
    ariaLabel: "range of test points, as 0:100",
  });
  const among = el("select", {},
    el("option", { value: "", textContent: "all" }), ...(about.classes.train ?? []).map(named));
  among.value = at.among ?? "";
  const to = () => {
    const chosen = set.value === "all" ? {} : set.value === "range" ? { tests: ends.value } : { class: set.value };
    go({ view: "set", ...chosen, ...(among.value ? { among: among.value } : {}), k });
  };
  set.addEventListener("change", to);
  among.addEventListener("change", to);
  ends.addEventListener("change", () => {
    if (range(ends.value, about.n_test)) to();
    else problem(new Error(`The range must be as 0:100, within 0:${about.n_test}.`));
  });
  return el("div", { className: "controls" }, el("label", {}, "test points ", set), ends,
    about.classes.train ? el("label", {}, "training points ", among) : null);
}

export async function viewSet(at, about, isCurrent) {
  const k = Math.max(1, Math.min(whole(at.k, 8), 500));
  const controls = chooser(at, about, k), waiting = quiet("Adding up …");
  $("set").replaceChildren(controls, waiting);
  const found = await askJson("set", { tests: at.tests, class: at.class, among: at.among, k });
  if (!isCurrent()) return;
  const of = found.names.of === null ? "" : ` of class “${found.names.of}”`;
  const among = found.names.among === null ? "" : ` of class “${found.names.among}”`;
  controls.append(button("show more", "twice as many", () => go({ ...at, view: "set", k: Math.min(2 * k, 500) })));
  waiting.replaceWith(
    el("h2", { textContent: `${found.n} test points${of}` }),
    facts({
      "mean loss": shown(found.loss),
      "each score": `mean influence of a training point on the ${found.n} test points`,
      "ranked": `${found.n_among} training points${among}`,
    }),
    found.partial ? quiet("The run is not finished: ranked over what is there.") : "",
    found.damaged.length ? quiet(`Damaged strips are left out: ${found.damaged.join(", ")}`) : "",
    el("h3", { textContent: "Training points that help them most" }), cards("train", found.helpful, "None yet."),
    el("h3", { textContent: "Training points that harm them most" }), cards("train", found.harmful, "None yet."),
    el("h3", { textContent: found.n > found.first.length ? `The first ${found.first.length} of the set` : "The set" }),
    cards("test", found.first, "None."));
}
