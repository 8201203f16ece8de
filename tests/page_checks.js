// What the browser tests ask of a page; each function gives what is wrong or what is there.
window.checks = {
  drawn: () => [...document.querySelectorAll(".plot .canvas")].filter((c) => c.offsetWidth && !c.querySelector(".main-svg")).length === 0,

  // elements that stick out of the window, apart from those in a box that scrolls by itself
  outside: () =>
    [...document.querySelectorAll("body *")]
      .filter((e) => e.checkVisibility() && !e.closest(".scroll, .tabs, .skip, svg"))
      .filter((e) => e.getBoundingClientRect().width && (e.getBoundingClientRect().left < -0.5 || e.getBoundingClientRect().right > innerWidth + 0.5))
      .map((e) => e.outerHTML.slice(0, 80)),

  // tables that do not fit their box
  wide: () => [...document.querySelectorAll(".table .scroll")].filter((s) => s.scrollWidth > s.clientWidth + 1).map((s) => s.parentElement.id),

  texts: () => {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const found = new Set();
    while (walker.nextNode()) {
      const element = walker.currentNode.parentElement;
      if (walker.currentNode.data.trim() && element.checkVisibility()) found.add(element);
    }
    return [...found];
  },

  small: () => checks.texts().filter((e) => parseFloat(getComputedStyle(e).fontSize) < 12).map((e) => e.outerHTML.slice(0, 80)),

  pale: () => checks.texts().filter((e) => !e.closest("svg") && checks.contrast(e) < 4.5).map((e) => `${checks.contrast(e)} ${e.outerHTML.slice(0, 80)}`),

  // as WCAG 2 defines it
  contrast: (element) => {
    const parse = (colour) => colour.match(/[\d.]+/g).map(Number);
    const luminance = (colour) => {
      const [r, g, b] = colour.slice(0, 3).map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    let ground = [255, 255, 255];
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) { ground = colour; break; }
    }
    const [low, high] = [luminance(parse(getComputedStyle(element).color)), luminance(ground)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  },

  plots: () =>
    [...document.querySelectorAll(".plot")].map((plot) => {
      const box = plot.querySelector(".main-svg").getBoundingClientRect();
      return [plot.id, Math.min(box.width, box.height), plot.querySelectorAll(".trace .js-line, .trace .point, .trace text").length];
    }),

  // the first line of a plot: its colours, its last point, the titles of the axes
  line: (id) => {
    const canvas = document.querySelector(`#${id} .canvas`);
    const line = canvas._fullData.find((trace) => trace.meta === "line");
    const { xaxis, yaxis, font } = canvas._fullLayout;
    return { x: line.x.at(-1), y: line.y.at(-1), titles: [xaxis.title.text, yaxis.title.text],
      colours: [getComputedStyle(document.body).backgroundColor, font.color, line.line.color, yaxis.gridcolor] };
  },

  sort: (id, column) => {
    const table = document.getElementById(id);
    table.querySelectorAll("thead button")[column].click();
    return { keys: [...table.querySelectorAll("tbody tr")].map((row) => row.cells[column].dataset.sort),
      marks: [...table.querySelectorAll("thead th")].map((head) => head.getAttribute("aria-sort")) };
  },

  rows: (id) => [...document.querySelectorAll(`#${id} tbody tr`)].filter((row) => row.checkVisibility()).map((row) => row.cells[0].innerText.trim()),
};
