// Training points whose label may be wrong: ranked, chosen, exported.
import { go, note, whole } from "/address.js";
import { card } from "/cards.js";
import { $, askJson, button, el, quiet, shown } from "/dom.js";

const NAMES = { net_harm: "net harm", self_influence: "self-influence", train_loss: "training loss" };
const MEANS = {
  net_harm: "Net harm: minus the sum of a training point's influence on all test points, the largest first.",
  self_influence: "Self-influence: how much a training point moves its own loss, the largest first.",
  train_loss: "Training loss, the largest first.",
};

function save(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

function csv(points, by) {
  // a text that a spreadsheet would run as a formula gets an apostrophe in front
  const cell = (value) => {
    const text = String(value ?? "");
    const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  const lines = points.map((point) => [point.index, point.label, point.loss, point.score].map(cell).join(","));
  return [`train,label,loss,${by}`, ...lines].join("\r\n") + "\r\n";
}

const json = (points, by) => JSON.stringify(points.map((point) =>
  ({ train: point.index, label: point.label, loss: point.loss, [by]: point.score })), null, 1);

export async function viewSuspects(at, about, isCurrent) {
  const by = at.by in NAMES ? at.by : "net_harm", k = Math.max(1, Math.min(whole(at.k, 60), 500));
  const select = el("select", { onchange: () => go({ view: "suspects", by: select.value, k }) },
    ...about.suspicions.map((name) => el("option", { value: name, textContent: NAMES[name], selected: name === by })));
  const top = el("div", { className: "controls" }, el("label", {}, "ranked by ", select));
  $("suspects").replaceChildren(top);
  const found = await askJson("suspects", { by, k });
  if (!isCurrent()) return;
  list(found.points, top, by, k, new Set((at.chosen ?? "").split(",")));
}

function list(points, top, by, k, wanted) {
  const boxes = points.map((point) => el("input", {
    type: "checkbox", value: point.index, checked: wanted.has(String(point.index)),
    ariaLabel: `choose training point ${point.index}`,
  }));
  const rows = points.map((point, i) => el("li", {},
    el("label", { className: "choice" }, boxes[i], ` ${i + 1}. ${NAMES[by]} ${shown(point.score)}`),
    card("train", point)));
  const said = el("span", { className: "quiet", role: "status" });
  const chosen = () => points.filter((_, i) => boxes[i].checked);
  const mark = () => {
    boxes.forEach((box, i) => { rows[i].className = box.checked ? "chosen" : ""; });
    said.textContent = `${chosen().length} chosen`;
  };
  const changed = () => {
    mark();
    const indices = chosen().map((point) => point.index).join(",");
    note({ view: "suspects", by, k, ...(indices ? { chosen: indices } : {}) });
  };
  boxes.forEach((box) => box.addEventListener("change", changed));
  const all = () => {
    const on = boxes.some((box) => !box.checked);
    boxes.forEach((box) => { box.checked = on; });
    changed();
  };
  top.append(
    button("choose all", "or none", all),
    button("export CSV", "the chosen ones", () => save("suspects.csv", "text/csv", csv(chosen(), by))),
    button("export JSON", "the chosen ones", () => save("suspects.json", "application/json", json(chosen(), by))),
    button("show more", "twice as many", () => go({ view: "suspects", by, k: Math.min(2 * k, 500) })),
    said);
  mark();
  $("suspects").append(quiet(MEANS[by]),
    points.length ? el("ol", { className: "cards" }, ...rows) : quiet("No strip is finished yet."));
}
