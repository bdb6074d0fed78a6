// The state of a view lives in the address's fragment, so that a view is a link.

export const state = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

export const link = (parameters) => "#" + new URLSearchParams(parameters);

// To another view; the browser's history remembers this one.
export function go(parameters) {
  location.hash = link(parameters);
}

// What changed within this view: no new entry in the history, nothing is drawn again. Browsers slow down a page that
// writes its address too often, so it is written once the hand rests.
let later = 0;
let pending = null;
export function note(parameters) {
  pending = parameters;
  const here = document.querySelector("nav a[aria-current]");
  if (here) here.href = link(parameters); // coming back, one is where one was
  clearTimeout(later);
  later = setTimeout(settle, 60);
}

export function settle() {
  clearTimeout(later);
  if (pending === null) return;
  history.replaceState(null, "", link(pending));
  document.body.dataset.shown = location.hash;
  pending = null;
}

// What was noted belongs to the view that was left.
export function forget() {
  clearTimeout(later);
  pending = null;
}

// "12" → 12
export const whole = (text, otherwise) => (/^\d{1,10}$/.test(text ?? "") ? Number(text) : otherwise);

// "3:8" within 0:n → [3, 8]
export function range(text, n) {
  const found = /^(\d{1,10}):(\d{1,10})$/.exec(text ?? "");
  return found && +found[1] < +found[2] && +found[2] <= n ? [+found[1], +found[2]] : null;
}

// "3,8" with 3 < n and 8 < m → [3, 8]
export function place(text, n, m) {
  const found = /^(\d{1,10}),(\d{1,10})$/.exec(text ?? "");
  return found && +found[1] < n && +found[2] < m ? [+found[1], +found[2]] : null;
}
