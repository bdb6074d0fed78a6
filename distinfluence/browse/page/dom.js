// Elements, questions to the server, numbers. Whatever came with the result is set as text, never as markup.

export const $ = (id) => document.getElementById(id);

export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const quiet = (text) => el("p", { className: "quiet", textContent: text });

export const button = (text, title, onclick) => el("button", { type: "button", textContent: text, title, onclick });

export function shown(value, digits = 4) {
  return value === null || value === undefined ? "not known" : String(Number(Number(value).toPrecision(digits)));
}

export async function ask(name, parameters = {}) {
  const given = Object.entries(parameters).filter(([, value]) => value !== undefined && value !== null);
  let answer;
  try {
    answer = await fetch(`/api/${name}?${new URLSearchParams(given)}`, { credentials: "same-origin" });
  } catch {
    throw new Error("The server does not answer. Start `distinfluence browse` again.");
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  throw new Error(told.error || `The server answered ${answer.status}.`);
}

export const askJson = async (name, parameters) => (await ask(name, parameters)).json();

export function problem(error) {
  $("problem").hidden = !error;
  $("problem").textContent = error ? error.message : "";
}

// A canvas of as many dots as the screen has, and a pen that draws in CSS pixels.
export function pen(canvas) {
  const dots = devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(canvas.clientWidth * dots));
  canvas.height = Math.max(1, Math.round(canvas.clientHeight * dots));
  const found = canvas.getContext("2d");
  found.scale(dots, dots);
  found.font = "12px system-ui, sans-serif";
  return found;
}

export const colour = (name) => getComputedStyle(document.body).getPropertyValue(name).trim();
