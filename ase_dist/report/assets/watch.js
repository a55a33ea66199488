"use strict";
// Of a page that "report --watch" serves: when there is a newer one it is loaded, with the same places open and shown.
(() => {
  const own = document.querySelector("meta[name=version]").content;
  const state = document.getElementById("watch-state");
  const key = "watched " + location.pathname;
  const folds = () => [...document.querySelectorAll("details")];

  const kept = JSON.parse(sessionStorage.getItem(key) || "null");
  if (kept) {
    sessionStorage.removeItem(key);
    folds().forEach((fold, i) => { fold.open = kept.open[i] ?? fold.open; });
    scrollTo(0, kept.top);
  }

  async function look() {
    try {
      const answer = await fetch("version", {cache: "no-store"});
      const newest = (await answer.text()).trim();
      state.textContent = "It renews itself while the run goes on.";
      if (answer.ok && newest !== own && !document.querySelector("dialog[open]")) {
        sessionStorage.setItem(key, JSON.stringify({top: scrollY, open: folds().map((fold) => fold.open)}));
        location.reload();
        return;
      }
    } catch {
      state.textContent = "The command that renewed it has ended.";
    }
    setTimeout(look, 1000);
  }
  setTimeout(look, 1000);
})();
