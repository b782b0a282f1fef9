"use strict";
// Values of the curves under the pointer, or by the arrow keys on a chart; and the slider of the sample grids.
const charts = JSON.parse(document.getElementById("curves").textContent);
const shown = (value) => (Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(5))));

function nearest(points, x) {
  let low = 0;
  let high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle;
    else high = middle;
  }
  return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
}

for (const figure of document.querySelectorAll(".chart")) {
  const { lines, left, right, width, axis } = charts[figure.dataset.chart];
  const svg = figure.querySelector("svg");
  const [x0, x1] = [Number(svg.dataset.x0), Number(svg.dataset.x1)];
  const cursor = svg.querySelector(".cursor");
  const outputs = figure.querySelectorAll("output");
  const at = figure.querySelector(".at");
  const steps = [...new Set(lines.flatMap((points) => points.map(([x]) => x)))].sort((a, b) => a - b);
  let place = -1;

  function show(number) {
    place = Math.max(0, Math.min(steps.length - 1, number));
    const x = steps[place];
    const across = left + ((x - x0) / (x1 - x0)) * (width - left - right);
    cursor.setAttribute("transform", `translate(${across} 0)`);
    cursor.setAttribute("visibility", "visible");
    at.textContent = `${axis} ${x.toLocaleString("en")}`;
    lines.forEach((points, i) => {
      const [where, value] = nearest(points, x);
      outputs[i].textContent = shown(value) + (where === x ? "" : ` (${where.toLocaleString("en")})`);
    });
  }

  function hide() {
    cursor.setAttribute("visibility", "hidden");
    at.textContent = "";
    for (const output of outputs) output.textContent = "";
    place = -1;
  }

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const across = ((event.clientX - box.left) / box.width) * width;
    const x = x0 + ((across - left) / (width - left - right)) * (x1 - x0);
    show(steps.indexOf(nearest(steps.map((step) => [step]), x)[0]));
  });
  svg.addEventListener("pointerleave", hide);
  figure.addEventListener("blur", hide);
  figure.addEventListener("focus", () => show(place < 0 ? steps.length - 1 : place));
  figure.addEventListener("keydown", (event) => {
    const far = Math.max(1, Math.round(steps.length / 10));
    const moves = { ArrowLeft: place - 1, ArrowRight: place + 1, PageUp: place - far, PageDown: place + far };
    const target = { ...moves, Home: 0, End: steps.length - 1 }[event.key];
    if (target === undefined) return;
    event.preventDefault();
    show(target);
  });
}

for (const samples of document.querySelectorAll(".samples")) {
  const slider = samples.querySelector("input");
  const pictures = samples.querySelectorAll("img");
  const choose = (number) => {
    pictures.forEach((picture, i) => { picture.hidden = i !== number; });
    const step = pictures[number].dataset.step;
    samples.querySelector(".step").textContent = `step ${Number(step).toLocaleString("en")}`;
    slider.setAttribute("aria-valuetext", `step ${step}`);
  };
  slider.addEventListener("input", () => choose(Number(slider.value)));
  window.addEventListener("beforeprint", () => choose(pictures.length - 1));
  window.addEventListener("afterprint", () => choose(Number(slider.value)));
  choose(Number(slider.value));
}
