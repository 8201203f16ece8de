// Sorts tables by a click on a heading, filters them by text and by verdict.
"use strict";
document.querySelectorAll(".table").forEach((box) => {
  const body = box.querySelector("tbody");
  const rows = [...body.rows];
  const filters = box.querySelector(".filters");
  const text = filters.querySelector("input");
  const chips = [...filters.querySelectorAll("button.chip")];
  const count = filters.querySelector("output");
  filters.hidden = rows.length < 3;

  function compare(a, b) {
    if (a === "" || b === "") return 0;
    return isNaN(a) || isNaN(b) ? a.localeCompare(b) : Number(a) - Number(b);
  }

  box.querySelectorAll("thead th").forEach((head, column) => {
    head.addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") === "ascending";
      box.querySelectorAll("thead th").forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.sort;
      const sorted = [...rows].sort((a, b) => {
        // what has no value stays last, whichever way the column is sorted
        const missing = (key(a) === "") - (key(b) === "");
        return missing || (falling ? -1 : 1) * compare(key(a), key(b));
      });
      body.append(...sorted);
    });
  });

  function filter() {
    const wanted = text.value.trim().toLowerCase();
    const verdicts = chips.filter((chip) => chip.getAttribute("aria-pressed") === "true").map((chip) => chip.dataset.verdict);
    let shown = 0;
    for (const row of rows) {
      const fits = row.textContent.toLowerCase().includes(wanted);
      row.hidden = !fits || (verdicts.length > 0 && !verdicts.includes(row.dataset.verdict));
      shown += !row.hidden;
    }
    count.textContent = shown < rows.length ? `${shown} of ${rows.length}` : "";
  }

  text.addEventListener("input", filter);
  for (const chip of chips) {
    chip.addEventListener("click", () => {
      chip.setAttribute("aria-pressed", chip.getAttribute("aria-pressed") !== "true");
      filter();
    });
  }
});
