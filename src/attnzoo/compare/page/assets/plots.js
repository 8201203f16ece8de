// Draws the plots. A figure names its colours as CSS variables; they are looked up at each drawing.
"use strict";
const plots = (() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const narrow = matchMedia("(max-width: 640px)");
  const touch = matchMedia("(pointer: coarse)").matches;
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
    // named one by one: the default has one that uploads the figure
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    toImageButtonOptions: { scale: 2 },
  };

  const probe = document.body.appendChild(document.createElement("i"));
  probe.hidden = true;

  function colours(figure) {
    const found = {};
    const text = JSON.stringify(figure).replace(/var\((--[\w-]+)\)/g, (whole, name) => {
      if (!(name in found)) {
        probe.style.color = whole;
        found[name] = getComputedStyle(probe).color;
      }
      return found[name];
    });
    return JSON.parse(text);
  }

  function draw(plot) {
    const canvas = plot.querySelector(".canvas");
    const chosen = [...plot.querySelectorAll(".choices button[aria-pressed=true]")].map((button) => button.value).join("|");
    const key = narrow.matches && "narrow" in figures[plot.id] ? "narrow" : chosen;
    const figure = figures[plot.id][key];
    if (!figure || !canvas.offsetWidth) return;
    const { data, layout } = colours(figure);
    layout.uirevision = key;
    // on a touch screen a finger on a plot scrolls the page
    if (touch) layout.dragmode = false;
    const named = { ...config, toImageButtonOptions: { ...config.toImageButtonOptions, filename: plot.id } };
    Plotly.react(canvas, data, layout, named);
  }

  const drawAll = () => document.querySelectorAll(".plot").forEach(draw);

  document.querySelectorAll(".choices [role=group]").forEach((group) => {
    group.addEventListener("click", (event) => {
      const pressed = event.target.closest("button");
      if (!pressed) return;
      group.querySelectorAll("button").forEach((button) => button.setAttribute("aria-pressed", button === pressed));
      draw(group.closest(".plot"));
    });
  });

  theme.follow(drawAll);
  narrow.addEventListener("change", drawAll);
  return { drawAll };
})();
