"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const hues = [212, 22, 150, 285, 45, 340, 180, 95];
  let paper = false; // whether it is drawn to be printed
  let closed = []; // what is opened to be printed
  const drawn = new Map();

  // lines are told apart by their hue, and those after the eighth by dashes
  function line(name, number) {
    const light = dark.matches && !paper ? 68 : 40;
    const stroke = `hsl(${hues[number % hues.length]} 70% ${light}%)`;
    const dash = number < hues.length ? [] : [6, 3];
    const value = (_, own) => (own == null ? "–" : String(+own.toPrecision(4)));
    return { label: name, stroke, dash, width: 1.75, spanGaps: true, value };
  }

  function draw(place) {
    const chart = data.charts[place.dataset.chart];
    drawn.get(place)?.destroy();
    const style = getComputedStyle(document.documentElement);
    const ink = paper ? "#000" : style.getPropertyValue("--pale");
    const rule = paper ? "#ccc" : style.getPropertyValue("--rule");
    const axis = { stroke: ink, grid: { stroke: rule, width: 1 }, ticks: { stroke: rule, width: 1 } };
    const short = (_, values) => values.map((own) => (own == null ? "" : String(+own.toPrecision(6))));
    const options = {
      width: Math.max(200, place.clientWidth),
      height: 220,
      scales: { x: { time: false } },
      axes: [axis, { ...axis, size: 64, values: short }],
      series: [{ label: "step" }, ...chart.lines.map((own, i) => line(own.name, i))],
    };
    drawn.set(place, new uPlot(options, [chart.steps, ...chart.lines.map((own) => own.values)], place));
  }

  const places = [...document.querySelectorAll(".chart")];
  const sized = new ResizeObserver((seen) => {
    for (const { target } of seen) {
      const own = drawn.get(target);
      const width = Math.max(200, target.clientWidth);
      if (own && own.width !== width) own.setSize({ width, height: 220 });
    }
  });
  // the text is painted first
  setTimeout(() => {
    for (const place of places) {
      draw(place);
      sized.observe(place);
    }
  });
  dark.addEventListener("change", () => [...drawn.keys()].forEach(draw));
  addEventListener("beforeprint", () => {
    paper = true;
    places.forEach(draw);
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const each of closed) each.open = true;
  });
  addEventListener("afterprint", () => {
    paper = false;
    places.forEach(draw);
    for (const each of closed) each.open = false;
  });

  const slider = document.getElementById("step");
  slider?.addEventListener("input", () => {
    const step = data.previews.steps[slider.value];
    slider.setAttribute("aria-valuetext", `step ${step}`);
    document.getElementById("at").value = step;
    for (const each of document.querySelectorAll(".at")) each.textContent = step;
    for (const [kind, name] of [["adapted", "pictures"], ["map", "maps"]]) {
      for (const image of document.querySelectorAll(`img.${kind}`)) {
        const own = data.previews.prompts[image.dataset.prompt][name][step];
        image.style.visibility = own ? "visible" : "hidden";
        if (own) image.src = own;
        image.alt = image.dataset.alt + step;
      }
    }
  });

  const by = document.getElementById("by");
  by?.addEventListener("change", () => {
    const items = data.best[by.value].map(([name, value]) => {
      const item = document.createElement("li");
      item.textContent = `${name}: ${+value.toPrecision(4)}`;
      return item;
    });
    document.getElementById("ranked").replaceChildren(...items);
  });
})();
