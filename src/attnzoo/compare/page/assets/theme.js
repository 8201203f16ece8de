// Light or dark: the system's wish, until the reader says otherwise. Runs before the first paint.
"use strict";
const theme = (() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const remembered = "attnzoo-theme";
  const followers = [];
  let chosen = null;
  try { chosen = localStorage.getItem(remembered); } catch { /* a page without storage follows the system */ }

  const dark = () => (chosen ? chosen === "dark" : system.matches);

  function apply() {
    root.dataset.theme = dark() ? "dark" : "light";
    const button = document.getElementById("theme");
    if (button) {
      button.textContent = dark() ? "Light" : "Dark";
      button.setAttribute("aria-label", `Switch to ${dark() ? "light" : "dark"} colours`);
    }
    for (const follower of followers) follower();
  }

  function toggle() {
    chosen = dark() ? "light" : "dark";
    try { localStorage.setItem(remembered, chosen); } catch { /* then only until the page is closed */ }
    apply();
  }

  apply();
  system.addEventListener("change", apply);
  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    button.hidden = false;
    button.addEventListener("click", toggle);
    apply();
  });
  return { follow: (follower) => followers.push(follower) };
})();
