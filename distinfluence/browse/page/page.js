// The page: views of one result, told apart by the address's fragment.
import { forget, go, state } from "/address.js";
import { viewClasses } from "/classes.js";
import { $, askJson, problem } from "/dom.js";
import { act, listenToMap, viewMatrix } from "/matrix.js";
import { viewPoint } from "/point.js";
import { listenToPlots, viewProvenance } from "/provenance.js";
import { viewSaliency } from "/saliency.js";
import { viewSet } from "/sets.js";
import { listenToShare } from "/share.js";
import { viewSuspects } from "/suspects.js";

const SECTIONS = {
  matrix: "matrix", classes: "classes", test: "point", set: "set", train: "point", suspects: "suspects",
  saliency: "saliency", provenance: "provenance",
};
let about = null;
let turn = 0;
let step = null; // to the next point, or the one before

// Views of a result with one number per pair, and of one with a number per input.
const views = () => (about && about.input_shape.length ? ["saliency", "provenance"]
  : ["matrix", "classes", "test", "set", "train", "suspects", "provenance"]);

function tell() {
  $("name").textContent = `${about.path}, ${about.n_test} test × ${about.n_train} training points`;
  document.title = `Influences: ${about.path}`;
  const all = about.n_finished === about.n_strips;
  $("state").textContent = all ? (about.complete ? "complete" : "computed, not finished")
    : `running: ${about.n_finished} of ${about.n_strips} strips`;
}

function mark(view) {
  for (const id of new Set(Object.values(SECTIONS))) $(id).hidden = id !== SECTIONS[view];
  document.querySelectorAll("nav a").forEach((anchor) => {
    const own = anchor.dataset.view, place = views().indexOf(own);
    anchor.hidden = place < 0;
    anchor.title = `key ${place + 1}`;
    if (own !== view) {
      anchor.removeAttribute("aria-current");
      return;
    }
    anchor.setAttribute("aria-current", "page");
    if (location.hash) anchor.href = location.hash;
  });
}

async function show() {
  const now = ++turn, here = state(), isCurrent = () => now === turn;
  forget();
  step = null;
  document.body.dataset.shown = "";
  problem(null);
  try {
    about = about && about.complete ? about : await askJson("summary");
    if (!isCurrent()) return;
    tell();
    const view = views().includes(here.view) ? here.view : views()[0];
    mark(view);
    if (view === "matrix") await viewMatrix(here, about);
    else if (view === "classes") await viewClasses(here, about, isCurrent);
    else if (view === "set") await viewSet(here, about, isCurrent);
    else if (view === "suspects") await viewSuspects(here, about, isCurrent);
    else if (view === "provenance") await viewProvenance(about, isCurrent);
    else if (view === "saliency") step = await viewSaliency(here, about, isCurrent);
    else step = await viewPoint(view, here, about, isCurrent);
  } catch (error) {
    if (isCurrent()) problem(error);
  }
  if (isCurrent()) document.body.dataset.shown = location.hash || "#";
}

function open(view) {
  const anchor = document.querySelector(`nav a[data-view=${view}]`);
  if (anchor.hash === location.hash) return;
  if (anchor.hash) location.hash = anchor.hash;
  else go({ view });
}

const MAP_KEYS = { "+": "in", "=": "in", "-": "out", 0: "all" };
const STEP_KEYS = { n: 1, "]": 1, p: -1, "[": -1 };

document.addEventListener("keydown", (event) => {
  const typed = event.getModifierState("AltGraph"); // on many keyboards brackets are made with it
  if (!typed && (event.ctrlKey || event.metaKey || event.altKey)) return;
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  const view = /^[1-9]$/.test(event.key) ? views()[Number(event.key) - 1] : undefined;
  if (view) open(view);
  else if (step && event.key in STEP_KEYS) step(STEP_KEYS[event.key]);
  else if (!$("matrix").hidden && about && event.key in MAP_KEYS) act(MAP_KEYS[event.key]);
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
listenToMap();
listenToPlots();
listenToShare();
follow();
show();
