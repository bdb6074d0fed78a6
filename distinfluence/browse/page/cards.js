// Points as cards: the sample as what it is, its label, its loss, and what it does.
import { link } from "/address.js";
import { el, quiet, shown } from "/dom.js";
import { mix, palette, rgb, weight } from "/paint.js";

const NAMES = { test: "test", train: "training" };

export function sampleNode(sample) {
  if (!sample) return null;
  const box = el("div", { className: "sample" });
  if (sample.kind === "image") {
    box.append(el("img", { src: sample.uri, width: sample.width, height: sample.height, alt: "the sample" }));
  } else if (sample.kind === "text") {
    box.append(el("p", { textContent: sample.text + (sample.cut ? " …" : "") }));
  } else if (sample.kind === "table") {
    const rows = sample.cells.map(([name, value]) =>
      el("tr", {}, el("td", { className: "quiet", textContent: name }), el("td", { textContent: value })));
    box.append(el("table", {}, el("tbody", {}, ...rows)), sample.cut ? quiet("…") : "");
  } else if (sample.kind === "parts") {
    box.append(...sample.parts.map(sampleNode));
  }
  return box;
}

export function influence(value, bound) {
  const helps = value > 0;
  const known = bound === null || bound === undefined ? "" : ` ± ${shown(bound, 2)}`;
  const text = value === null ? "not computed" : `${helps ? "+" : ""}${shown(value)}${known}`;
  return el("div", { className: `value ${value === null ? "quiet" : helps ? "helps" : "harms"}`, textContent: text });
}

export const titleOf = (axis, point) =>
  `${NAMES[axis]} ${point.index}${point.label === null ? "" : ` · “${point.label}”`}`;

// What an influence is made of: a bar for each layer.
function blockBars(blocks) {
  const most = Math.max(...blocks.map(([, value]) => Math.abs(value))) || 1;
  return el("table", { className: "blocks" }, el("tbody", {}, ...blocks.map(([name, value]) => {
    const bar = el("span", { className: `bar ${value > 0 ? "helping" : "harming"}` });
    bar.style.width = `${(100 * Math.abs(value)) / most}%`;
    return el("tr", {}, el("th", { scope: "row", textContent: name, title: name }),
      el("td", { className: "bars" }, bar), el("td", { className: "number", textContent: shown(value, 2) }));
  })));
}

// What an influence is made of: each piece of the text in the colour of its share.
function tokenText(tokens) {
  const most = Math.max(...tokens.map(([, value]) => Math.abs(value))) || 1;
  const { zero, helps, harms } = palette();
  return el("p", { className: "tokens" }, ...tokens.map(([piece, value]) => {
    const own = el("span", { textContent: piece, title: shown(value, 3) });
    own.style.background = rgb(mix(zero, value > 0 ? helps : harms, 0.5 * weight(value / most)));
    return own;
  }));
}

export function card(axis, point, href = link({ view: axis, index: point.index })) {
  return el("a", { className: point.blocks ? "card broad" : "card", href },
    point.tokens ? tokenText(point.tokens) : sampleNode(point.sample),
    el("div", { textContent: titleOf(axis, point) }),
    point.id ? el("div", { className: "quiet", textContent: point.id }) : null,
    point.value === undefined ? null : influence(point.value, point.bound),
    el("div", { className: "quiet", textContent: point.loss === null ? "" : `loss ${shown(point.loss)}` }),
    point.blocks ? blockBars(point.blocks) : null);
}

export const cards = (axis, points, empty) => (points.length
  ? el("ul", { className: "cards" }, ...points.map((point) => el("li", {}, card(axis, point))))
  : quiet(empty));

export const facts = (entries) => el("dl", { className: "facts" },
  ...Object.entries(entries).flatMap(([name, text]) => [
    el("dt", { textContent: name }), el("dd", { textContent: text }),
  ]));
