"use strict";
// Draws the plots from the numbers that they carry, against the axis that the reader chooses. The place under the
// pointer is marked in every plot of the same part of the page; the plot that is pointed at shows its numbers there.
const NAMES = {step: "step", time: "time since the start", tokens: "trained tokens"};
const HEIGHT = 230, TOP = 8, BOTTOM = 40, RIGHT = 12;

function add(parent, name, attributes, content) {
  const element = parent.appendChild(document.createElementNS("http://www.w3.org/2000/svg", name));
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (content !== undefined) element.textContent = content;
  return element;
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${+(value / 1e9).toPrecision(4)}G`;
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(4)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(4)}k`;
  return size > 0 && size < 1e-3 ? (+value.toPrecision(4)).toExponential() : `${+value.toPrecision(4)}`;
}

function duration(seconds, span) {
  if (span < 300) return `${+seconds.toPrecision(4)} s`;
  return span < 3 * 3600 ? `${+(seconds / 60).toPrecision(4)} min` : `${+(seconds / 3600).toPrecision(4)} h`;
}

function ticks(low, high, count, unit = 1) {  // round numbers, in multiples of `unit` times 1, 2 or 5
  const rough = (high - low) / unit / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = unit * power * [1, 2, 5, 10].find(factor => factor * power >= rough);
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) found.push(index * step);
  return found;
}

function logTicks(low, high) {
  const powers = [], first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const skip = Math.max(1, Math.ceil((last - first) / 6));
  const factors = last - first <= 2 ? [1, 2, 5] : [1];
  for (let power = first; power <= last; power += skip) {
    for (const factor of factors) powers.push(factor * 10 ** power);
  }
  const inside = powers.filter(value => value >= low * 0.999 && value <= high * 1.001);
  return inside.length > 1 ? inside : ticks(low, high, 4);
}

function runningMean(values, window) {  // over the values around each place; over those that exist at the ends
  const half = (window - 1) / 2;
  return values.map((_, place) => {
    const near = values.slice(Math.max(0, place - half), place + half + 1);
    return near.reduce((sum, value) => sum + value, 0) / near.length;
  });
}

function at(known, wanted, values) {  // `values` at the place of `wanted` among `known`, linear in between
  const after = known.findIndex(value => value >= wanted);
  if (after < 0) return values[values.length - 1];
  if (after === 0 || known[after] === wanted) return values[after];
  const share = (wanted - known[after - 1]) / (known[after] - known[after - 1]);
  return values[after - 1] + share * (values[after] - values[after - 1]);
}

class Plot {
  constructor(element, part) {
    Object.assign(this, {element, part, data: JSON.parse(element.dataset.numbers)});
    this.cursor = element.appendChild(Object.assign(document.createElement("div"), {className: "cursor", hidden: true}));
    this.told = element.appendChild(Object.assign(document.createElement("div"), {className: "values", hidden: true}));
    element.addEventListener("pointermove", event => part.point(this, event));
    element.addEventListener("pointerleave", () => part.leave());
    new ResizeObserver(() => this.draw()).observe(element);
  }

  draw() {
    const width = this.element.clientWidth, {data, part} = this;
    if (!width) return;  // in a closed <details>: drawn when it opens
    const mode = data.x === "step" ? part.x : "step";
    this.lines = data.lines.map(line => ({...line, xs: line.steps.map(step => part.along(line.run, step, mode))}));
    if (data.stacked) this.stack();
    this.element.querySelector("svg")?.remove();
    const svg = add(this.element, "svg", {viewBox: `0 0 ${width} ${HEIGHT}`, "aria-label": data.title});
    const y = this.yAxis(part.log || data.log);
    const labels = y.ticks.map(short), left = 26 + 6.4 * Math.max(...labels.map(label => label.length));
    Object.assign(this, {width, left, right: width - RIGHT, mode, ...this.xAxis(mode)});
    for (const [index, value] of y.ticks.entries()) {
      add(svg, "path", {class: "grid", d: `M${left},${y.place(value)}H${this.right}`});
      add(svg, "text", {x: left - 6, y: y.place(value) + 4, "text-anchor": "end"}, labels[index]);
    }
    const span = this.last - this.first, count = Math.max(2, Math.floor((this.right - left) / (mode === "time" ? 75 : 50)));
    const unit = mode !== "time" ? 1 : span < 300 ? 1 : span < 3 * 3600 ? 60 : 3600;
    const whole = mode === "step" && span < count ? 1 : 0;
    for (const value of ticks(this.first, this.last, whole ? span || 1 : count, unit)) {
      if (mode === "step" && !Number.isInteger(value)) continue;
      add(svg, "text", {x: this.place(value), y: HEIGHT - 22, "text-anchor": "middle"},
          mode === "time" ? duration(value, span) : short(value));
    }
    add(svg, "path", {class: "axis", d: `M${left},${TOP}V${HEIGHT - BOTTOM}H${this.right}`});
    add(svg, "text", {x: (left + this.right) / 2, y: HEIGHT - 6, "text-anchor": "middle"},
        data.x === "step" ? NAMES[mode] : data.x);
    add(svg, "text", {transform: `translate(12,${(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)`, "text-anchor": "middle"},
        data.unit);
    if (data.band) {
      const [low, high] = data.band.map(value => y.place(value));
      add(svg, "rect", {x: left, y: high, width: this.right - left, height: low - high, class: "band"});
    }
    for (const line of this.lines) this.drawLine(svg, line, y);
    if (data.ring) add(svg, "circle", {cx: this.place(data.ring[0]), cy: y.place(data.ring[1]), r: 8, class: "ring"});
  }

  stack() {  // each line's area stands on those before it
    const sums = new Map();
    for (const line of this.lines) {
      line.base = line.steps.map(step => sums.get(step) ?? 0);
      line.tops = line.values.map((value, index) => line.base[index] + value);
      line.steps.forEach((step, index) => sums.set(step, line.tops[index]));
    }
  }

  xAxis(mode) {
    const xs = this.lines.flatMap(line => line.xs), first = Math.min(...xs), last = Math.max(...xs);
    const room = (last - first) * 0.02 || (mode === "step" ? 0.5 : 1);
    return {first: first - room, last: last + room};
  }

  yAxis(wantsLog) {
    let values = this.lines.flatMap(line => [...(line.tops ?? line.values), ...(line.low ?? []), ...(line.high ?? [])]);
    values = values.concat(this.data.band ?? []);
    const positive = values.filter(value => value > 0), bottom = HEIGHT - BOTTOM;
    if (wantsLog && positive.length && !this.data.stacked) {
      let low = Math.min(...positive), high = Math.max(...positive);
      if (high / low < 1.5) [low, high] = [low / 2, high * 2];
      const scale = (bottom - TOP) / Math.log(high / low);
      return {ticks: logTicks(low, high), log: true,
              place: value => bottom - 6 - (scale - 10 / Math.log(high / low)) * Math.log(Math.max(value, low) / low)};
    }
    let low = Math.min(...values), high = Math.max(...values);
    const fromZero = (this.data.fromZero || this.data.stacked) && low >= 0;
    if (low === high) {  // a constant is not magnified
      const room = Math.abs(low) / 4 || 1;
      [low, high] = [low - room, high + room];
    }
    if (fromZero) low = 0;
    const room = (high - low) * 0.05;
    [low, high] = [fromZero ? -0.02 * high : low - room, high + room];
    const place = value => bottom - (bottom - TOP) * (value - low) / (high - low);
    return {ticks: ticks(Math.max(low, fromZero ? 0 : low), high, 5), log: false, place};
  }

  place(x) {
    return this.left + (this.right - this.left) * (x - this.first) / (this.last - this.first);
  }

  drawLine(svg, line, y) {
    const shown = line.values.map((value, index) => index).filter(index => !y.log || line.values[index] > 0);
    const xs = shown.map(index => this.place(line.xs[index]));
    const path = values => "M" + values.map((value, i) => `${xs[i].toFixed(1)},${y.place(value).toFixed(1)}`).join("L");
    const pick = values => shown.map(index => values[index]), values = pick(line.values), paint = `--line:${line.color}`;
    if (!shown.length) return;
    if (line.tops) {
      const down = pick(line.base).map((value, i) => `L${xs[i].toFixed(1)},${y.place(value).toFixed(1)}`).reverse();
      if (xs.length > 1) return void add(svg, "path", {class: "area", style: paint, d: path(pick(line.tops)) + down.join("") + "Z"});
      const [top, bottom] = [pick(line.tops)[0], pick(line.base)[0]].map(value => y.place(value));
      return void add(svg, "rect", {class: "area", style: paint, x: xs[0] - 30, width: 60, y: top, height: bottom - top});
    }
    if (line.low) pick(line.low).forEach((low, i) => add(svg, "path", {class: "bars", style: paint,
      d: `M${xs[i]},${y.place(low)}V${y.place(line.high[shown[i]])}`}));
    if (line.low || xs.length === 1) {
      xs.forEach((x, i) => add(svg, "circle", {class: "dot", style: paint, cx: x, cy: y.place(values[i]), r: 3.2}));
    }
    if (xs.length === 1) return;
    if (line.window > 1) add(svg, "path", {class: "line faint", style: paint, d: path(values)});
    const strong = line.window > 1 ? runningMean(values, line.window) : values;
    add(svg, "path", {class: `line ${line.constant ? "constant" : line.style}`, style: paint, d: path(strong)});
  }

  nearest(x) {  // the x of a point of some line, closest to that of the pointer
    return this.lines.flatMap(line => line.xs).reduce((best, each) => Math.abs(each - x) < Math.abs(best - x) ? each : best);
  }

  mark(x) {
    const xs = this.lines?.flatMap(line => line.xs) ?? [];
    this.cursor.hidden = !xs.length || x < Math.min(...xs) || x > Math.max(...xs);
    this.cursor.style.left = `${this.place?.(x)}px`;
  }

  tell(x) {
    const span = this.last - this.first;
    const shown = {step: `${x}`, time: duration(x, span), tokens: x.toLocaleString("en")}[this.mode];
    const rows = this.lines.filter(line => !line.constant).flatMap(line => {
      const place = line.xs.reduce((best, each, index) => Math.abs(each - x) < Math.abs(line.xs[best] - x) ? index : best, 0);
      const near = this.mode === "step" ? line.xs[place] === x : Math.abs(line.xs[place] - x) <= span * 0.02;
      return near ? [row(line.color, line.label, line.values[place])] : [];
    });
    this.told.replaceChildren(row("transparent", this.mode, shown), ...rows);
    const before = this.place(x) > this.width / 2;
    this.told.style.left = before ? "auto" : `${this.place(x) + 8}px`;
    this.told.style.right = before ? `${this.width - this.place(x) + 8}px` : "auto";
    this.told.hidden = false;
  }
}

function row(color, label, value) {
  const line = document.createElement("div");
  const mark = line.appendChild(document.createElement("i"));
  mark.style.background = color;
  line.appendChild(document.createElement("span")).textContent = label;
  line.appendChild(document.createElement("b")).textContent = value;
  return line;
}

class Part {  // plots that share their axes
  constructor(root) {
    Object.assign(this, {x: "step", log: false, axes: JSON.parse(root.dataset.axes ?? "[]")});
    this.plots = [...root.querySelectorAll(".plot")].filter(each => each.closest(".steps") === root.closest(".steps"))
      .map(each => new Plot(each, this));
    for (const button of root.querySelectorAll("button[data-x]")) {
      button.addEventListener("click", () => {
        this.x = button.dataset.x;
        for (const each of root.querySelectorAll("button[data-x]")) each.ariaPressed = String(each === button);
        this.redraw();
      });
    }
    root.querySelector("input.log")?.addEventListener("change", event => {
      this.log = event.target.checked;
      this.redraw();
    });
  }

  along(run, step, mode) {
    return mode === "step" ? step : at(this.axes[run].step, step, this.axes[run][mode]);
  }

  redraw() {
    this.leave();
    for (const plot of this.plots) plot.draw();
  }

  point(plot, event) {
    const pixel = event.clientX - plot.element.getBoundingClientRect().left;
    if (!plot.lines || pixel < plot.left || pixel > plot.right) return this.leave();
    const x = plot.nearest(plot.first + (plot.last - plot.first) * (pixel - plot.left) / (plot.right - plot.left));
    for (const each of this.plots) {
      each.mark(x);
      each.told.hidden = true;
    }
    plot.tell(x);
  }

  leave() {
    for (const plot of this.plots) plot.cursor.hidden = plot.told.hidden = true;
  }
}

for (const root of document.querySelectorAll(".steps")) new Part(root);
for (const plot of document.querySelectorAll(".plot")) {
  if (!plot.closest(".steps")) new Part(plot.parentElement);
}

for (const frame of document.querySelectorAll(".scroll")) {  // whether there is more to either side
  const mark = () => {
    frame.classList.toggle("more-left", frame.scrollLeft > 2);
    frame.classList.toggle("more-right", frame.scrollLeft + frame.clientWidth < frame.scrollWidth - 2);
  };
  frame.addEventListener("scroll", mark);
  new ResizeObserver(mark).observe(frame);
}

for (const part of document.querySelectorAll(".samples")) {
  const field = part.querySelector("input"), choice = part.querySelector("select");
  const lines = [...part.querySelectorAll("tbody tr")].map(line => ({line, text: line.textContent.toLowerCase(),
    verdict: line.querySelector(".verdict").textContent}));
  const find = () => {
    const wanted = field.value.toLowerCase();
    for (const {line, text, verdict} of lines) {
      line.hidden = !text.includes(wanted) || (choice.value && choice.value !== verdict);
    }
    part.querySelector(".found").textContent = `${lines.filter(each => !each.line.hidden).length} of ${lines.length} responses`;
  };
  field.addEventListener("input", find);
  choice.addEventListener("input", find);
}
