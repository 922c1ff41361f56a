"use strict";
// The step under the pointer is marked in every plot; the plot that is pointed at shows its numbers there.
const plots = [...document.querySelectorAll(".plot")].map(element => {
  const {box: [left, right, first, last], lines} = JSON.parse(element.dataset.numbers);
  const cursor = element.appendChild(Object.assign(document.createElement("div"), {className: "cursor", hidden: true}));
  const values = element.appendChild(Object.assign(document.createElement("div"), {className: "values", hidden: true}));
  const steps = [...new Set(lines.flatMap(line => line.steps))].sort((a, b) => a - b);
  return {element, cursor, values, lines, steps, left, right, first, last};
});

function nearest(steps, wanted) {
  return steps.reduce((best, step) => Math.abs(step - wanted) < Math.abs(best - wanted) ? step : best, steps[0]);
}

function place(plot, step) {
  return plot.left + (plot.right - plot.left) * (step - plot.first) / (plot.last - plot.first);
}

function row(color, label, value) {
  const line = document.createElement("div");
  const mark = line.appendChild(document.createElement("i"));
  mark.style.background = color;
  line.appendChild(document.createElement("span")).textContent = label;
  line.appendChild(document.createElement("b")).textContent = value;
  return line;
}

function show(active, step) {
  for (const plot of plots) {
    plot.cursor.hidden = step < plot.steps[0] || step > plot.steps[plot.steps.length - 1];
    plot.cursor.style.left = `${100 * place(plot, step)}%`;
    plot.values.hidden = plot !== active;
  }
  const rows = active.lines.filter(line => line.steps.includes(step))
    .map(line => row(line.color, line.label, line.values[line.steps.indexOf(step)]));
  active.values.replaceChildren(row("transparent", "step", step), ...rows);
  const before = place(active, step) > 0.5;
  active.values.style.left = before ? "auto" : `${100 * place(active, step) + 2}%`;
  active.values.style.right = before ? `${100 - 100 * place(active, step) + 2}%` : "auto";
}

function hide() {
  for (const plot of plots) plot.cursor.hidden = plot.values.hidden = true;
}

for (const plot of plots) {
  plot.element.addEventListener("pointermove", event => {
    const area = plot.element.getBoundingClientRect();
    const along = ((event.clientX - area.left) / area.width - plot.left) / (plot.right - plot.left);
    if (along < 0 || along > 1) hide();
    else show(plot, nearest(plot.steps, plot.first + along * (plot.last - plot.first)));
  });
  plot.element.addEventListener("pointerleave", hide);
}
