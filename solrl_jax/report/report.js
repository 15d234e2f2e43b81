"use strict";
// The page works without this. It adds the values under the pointer, and keys for plots and large pictures.

for (const plot of document.querySelectorAll(".plot")) {
  const svg = plot.querySelector("svg"), at = plot.querySelector(".at");
  const outputs = [...plot.querySelectorAll("output")], last = outputs.map((o) => o.textContent);
  const lines = [...svg.querySelectorAll("polyline")].map((line) => ({
    pixels: line.getAttribute("points").split(" ").map((p) => +p.split(",")[0]),
    x: line.dataset.x.split(" ").map(Number),
    y: line.dataset.y.split(" "),
  }));
  const marks = [...new Set(lines.flatMap((l) => l.x))].sort((a, b) => a - b);
  const pixelOf = new Map(lines.flatMap((l) => l.x.map((x, i) => [x, l.pixels[i]])));
  const rule = svg.appendChild(document.createElementNS(svg.namespaceURI, "line"));
  const { height } = svg.viewBox.baseVal;
  for (const [key, value] of Object.entries({ y1: 26, y2: height - 38, stroke: "currentColor", visibility: "hidden" }))
    rule.setAttribute(key, value);

  let shown = marks.length;
  const show = (i) => {
    shown = i;
    const x = marks[i], pixel = pixelOf.get(x);
    rule.setAttribute("x1", pixel);
    rule.setAttribute("x2", pixel);
    rule.setAttribute("visibility", "visible");
    at.textContent = `iteration ${x}`;
    lines.forEach((line, k) => {
      const found = line.x.indexOf(x);
      outputs[k].textContent = found < 0 ? "—" : line.y[found];
    });
  };
  const hide = () => {
    shown = marks.length;
    rule.setAttribute("visibility", "hidden");
    at.textContent = "last";
    outputs.forEach((output, k) => { output.textContent = last[k]; });
  };
  const point = (event) => {
    const box = svg.getBoundingClientRect();
    const pixel = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const away = marks.map((x) => Math.abs(pixelOf.get(x) - pixel));
    show(away.indexOf(Math.min(...away)));
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.tabIndex = 0;
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show(Math.max(0, Math.min(marks.length - 1, shown + step)));
  });
}

document.addEventListener("keydown", (event) => {
  const kind = { Escape: ".close", ArrowLeft: ".back", ArrowRight: ".on" }[event.key];
  document.querySelector("figure:target")?.querySelector(kind ?? ":not(*)")?.click();
});

addEventListener("hashchange", (event) => {
  const large = document.querySelector("figure:target");
  if (large) large.querySelector(".close").focus({ preventScroll: true });
  else document.getElementById(new URL(event.oldURL).hash.slice(1))?.querySelector(".open")?.focus({ preventScroll: true });
});
