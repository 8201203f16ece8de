// One setting at a time, where there are several; then the first drawing of the plots.
"use strict";
(() => {
  const list = document.querySelector("[role=tablist]");
  const tabs = list ? [...list.querySelectorAll("[role=tab]")] : [];

  function select(tab) {
    for (const each of tabs) {
      const chosen = each === tab;
      each.setAttribute("aria-selected", chosen);
      each.tabIndex = chosen ? 0 : -1;
      document.getElementById(each.getAttribute("aria-controls")).hidden = !chosen;
    }
    plots.drawAll();
  }

  if (list) {
    list.hidden = false;
    list.addEventListener("click", (event) => event.target.closest("[role=tab]") && select(event.target));
    list.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      const next = tabs[(tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length];
      select(next);
      next.focus();
    });
    select(tabs[0]);
  } else {
    plots.drawAll();
  }
})();
