// The link to what is shown, with the token: for whoever can reach this server.
import { settle } from "/address.js";
import { $, askJson, problem } from "/dom.js";

export function listenToShare() {
  $("copy").addEventListener("click", () => copy().catch(problem));
  addEventListener("hashchange", () => {
    $("copied").textContent = "";
    $("copied-link").hidden = true;
  });
}

async function copy() {
  settle();
  const { token } = await askJson("link");
  const url = `${location.origin}/?token=${encodeURIComponent(token)}${location.hash}`;
  try {
    await navigator.clipboard.writeText(url);
    $("copied").textContent = "copied";
  } catch { // a browser that forbids it, or a page that is not on this machine
    $("copied-link").hidden = false;
    $("copied-link").value = url;
    $("copied-link").select();
    $("copied").textContent = "copy it from here:";
  }
}
