"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const view = { smoothing: 0, logX: false, logY: false, hidden: new Set() };
  const SVG = "http://www.w3.org/2000/svg";

  const make = (name, attributes = {}, text) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const shape = (name, attributes, text) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };

  /** A number in few characters: 0.00012 → 1.2e-4, 69279744 → 69.3M. */
  const short = (v, digits = 3) => {
    const size = Math.abs(v);
    if (size === 0) return "0";
    if (size < 1e-3) return v.toExponential(digits - 1).replace(/\.?0+e/, "e");
    for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]])
      if (size >= unit) return Number((v / (unit === 1e4 ? 1e3 : unit)).toPrecision(digits)) + letter;
    return String(Number(v.toPrecision(digits)));
  };

  /** Exponential mean of the values, divided by the weight that is there yet (as in Adam). */
  const smooth = (values, weight) => {
    let mean = 0, share = 1;
    return values.map((v) => {
      mean = weight * mean + (1 - weight) * v;
      share *= weight;
      return mean / (1 - share);
    });
  };

  /** Positions of ticks on an axis: 1, 2 or 5 times a power of ten apart, or powers on a logarithmic one. */
  const ticks = (low, high, log, wanted) => {
    const out = [];
    if (log) {
      const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
      const factors = last - first <= 2 ? [1, 2, 5] : [1];
      const stride = Math.max(1, Math.ceil((last - first) / 6));
      for (let p = first; p <= last; p += stride)
        for (const f of factors) {
          const v = Number((f * 10 ** p).toPrecision(3));
          if (v >= low && v <= high) out.push(v);
        }
      if (out.length > 1) return out;
      out.length = 0;
    }
    const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
    const strides = [10, 5, 2, 1, 0.5, 0.2, 0.1].map((f) => f * power);
    const at = (stride) => {
      const found = [];
      for (let i = Math.ceil(low / stride - 1e-9); i * stride <= high + 1e-9 * stride; i++)
        found.push(Number((i * stride).toPrecision(12)));
      return found;
    };
    // One place alone tells no scale.
    const coarse = strides.filter((s) => s >= rough).pop();
    return at(strides.find((s) => s <= coarse && at(s).length > 1));
  };

  /** Index of the entry of an ascending list whose place is nearest to x. */
  const nearest = (list, x, place = (v) => v) => {
    let low = 0, high = list.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (place(list[middle]) < x) low = middle + 1;
      else high = middle;
    }
    return low > 0 && x - place(list[low - 1]) <= place(list[low]) - x ? low - 1 : low;
  };

  /** The curves of a chart: {run, held, steps, values, drawn}; drawn are the smoothed values. */
  const curves = (key) => {
    const out = [];
    data.runs.forEach((run, i) => {
      if (view.hidden.has(i)) return;
      for (const [held, name] of key === "loss" ? [[false, key], [true, "valid_loss"]] : [[false, key]]) {
        const [steps, values] = run.series[name];
        if (!steps.length) continue;
        const still = held || key === "learning_rate" || view.smoothing === 0;
        out.push({ run: i, held, steps, values, drawn: still ? values : smooth(values, view.smoothing), still });
      }
    });
    return out;
  };

  const draw = (chart) => {
    const { spec, svg, wide } = chart;
    const width = Math.max(280, svg.clientWidth || 340), height = wide ? 320 : 200;
    const left = 56, right = 12, top = 8, bottom = 22;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    chart.lines = curves(spec.key);
    chart.place = null;
    if (!chart.lines.length) return;
    const xs = chart.lines.flatMap((l) => [l.steps[0], l.steps[l.steps.length - 1]]);
    // With smoothing on, noise beyond its range may leave the picture: the axis follows what is drawn.
    const ys = chart.lines.flatMap((l) => l.drawn);
    let x0 = Math.min(...xs), x1 = Math.max(...xs);
    let y0 = ys.reduce((a, b) => Math.min(a, b)), y1 = ys.reduce((a, b) => Math.max(a, b));
    const logX = view.logX && x0 > 0, logY = view.logY && y0 > 0;
    if (x0 === x1) [x0, x1] = logX ? [x0 / 2, x1 * 2] : [x0 - 1, x1 + 1];
    if (y0 === y1) [y0, y1] = logY ? [y0 / 2, y1 * 2] : y0 === 0 ? [0, 1] : [Math.min(0, 2 * y0), Math.max(0, 2 * y0)];
    else if (!logY) {
      const spare = (y1 - y0) * 0.04;
      [y0, y1] = [y0 >= 0 ? Math.max(0, y0 - spare) : y0 - spare, y1 + spare];
    }
    const scale = (a, b, from, to, log) => {
      const f = log ? Math.log : (v) => v;
      return (v) => from + ((f(v) - f(a)) / (f(b) - f(a))) * (to - from);
    };
    const px = scale(x0, x1, left, width - right, logX), py = scale(y0, y1, height - bottom, top, logY);
    const marks = ticks(y0, y1, logY, wide ? 6 : 4);
    // As many digits as tell two ticks apart.
    const apart = marks.length > 1 && !logY ? Math.abs(marks[marks.length - 1] / (marks[1] - marks[0])) : 1;
    const digits = Math.max(3, Math.ceil(Math.log10(apart)) + 1);
    for (const v of marks) {
      const y = py(v);
      svg.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: y, y2: y }));
      svg.append(shape("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, short(v, digits)));
    }
    for (const v of ticks(x0, x1, logX, width / 110)) {
      if (v < x0 || v > x1) continue;
      svg.append(shape("line", { class: "grid", x1: px(v), x2: px(v), y1: height - bottom, y2: height - bottom + 4 }));
      svg.append(shape("text", { x: px(v), y: height - 6, "text-anchor": "middle" }, short(v, 4)));
    }
    const clip = `clip-${spec.key}`, frame = shape("clipPath", { id: clip });
    frame.append(shape("rect", { x: left, y: top - 4, width: width - left - right + 4, height: height - top - bottom + 8 }));
    const plot = shape("g", { "clip-path": `url(#${clip})` });
    const path = (steps, values) => steps.map((s, i) => `${i ? "L" : "M"}${px(s).toFixed(1)} ${py(values[i]).toFixed(1)}`).join("");
    const visible = (l, values) => !logY || values.every((v) => v > 0);
    for (const l of chart.lines) {
      if (!l.still && visible(l, l.values))
        plot.append(shape("path", { class: `curve raw c${l.run}`, d: path(l.steps, l.values) }));
      plot.append(shape("path", { class: `curve c${l.run}${l.held ? " held" : ""}`, d: path(l.steps, l.drawn) }));
      if (l.held && l.steps.length <= 100 || l.steps.length === 1)
        l.steps.forEach((s, i) => plot.append(shape("circle", { class: `dot c${l.run}`, cx: px(s), cy: py(l.drawn[i]), r: 2.5 })));
    }
    chart.pointer = shape("g", {});
    svg.append(frame, plot, chart.pointer);
    chart.place = { px, py, left, right: width - right, top, bottom: height - bottom, width };
  };

  /** Shows the values at the step nearest to a place, or hides them. */
  const point = (chart, x) => {
    if (!chart.place || x === null) {
      chart.pointer?.replaceChildren();
      chart.tip.hidden = true;
      return;
    }
    const p = chart.place;
    // The step that is nearest on the picture, of any curve that is no evaluation where there is one.
    const main = chart.lines.filter((l) => !l.held);
    const all = (main.length ? main : chart.lines).map((l) => ({ l, i: nearest(l.steps, x, p.px) }));
    const best = all.reduce((a, b) => (Math.abs(p.px(a.l.steps[a.i]) - x) <= Math.abs(p.px(b.l.steps[b.i]) - x) ? a : b));
    const step = best.l.steps[best.i], at = p.px(step);
    chart.step = step;
    chart.pointer.replaceChildren(shape("line", { class: "cross", x1: at, x2: at, y1: p.top, y2: p.bottom }));
    chart.tip.replaceChildren(make("b", {}, `step ${step.toLocaleString("en")}`));
    for (const l of chart.lines) {
      const i = nearest(l.steps, step);
      const where = l.steps[i] === step ? "" : ` (step ${l.steps[i].toLocaleString("en")})`;
      const both = l.still ? "" : `, smoothed ${short(l.drawn[i], 5)}`;
      const line = make("div");
      line.append(make("i", { class: `key c${l.run}` }), `${data.runs[l.run].name}${l.held ? ", held out" : ""}: ${short(l.values[i], 5)}${both}${where}`);
      chart.tip.append(line);
      chart.pointer.append(shape("circle", { class: `at c${l.run}`, cx: p.px(l.steps[i]), cy: p.py(l.drawn[i]), r: 3.5 }));
    }
    chart.tip.hidden = false;
    const ratio = chart.svg.clientWidth / p.width, room = chart.figure.clientWidth - chart.tip.offsetWidth;
    const wanted = at < p.width / 2 ? at * ratio + 12 : at * ratio - chart.tip.offsetWidth - 12;
    chart.tip.style.left = `${Math.max(0, Math.min(room, wanted))}px`;
  };
  const charts = [];
  const container = byId("charts");
  for (const spec of data.charts) {
    const keys = spec.key === "loss" ? ["loss", "valid_loss"] : [spec.key];
    if (!data.runs.some((r) => keys.some((key) => r.series[key][0].length))) continue;
    const wide = spec.key === "loss";
    const figure = make("figure", wide ? { class: "wide" } : {});
    const caption = make("figcaption", {}, spec.title);
    if (spec.unit) caption.append(make("small", {}, ` ${spec.unit}`));
    const svg = shape("svg", { role: "img", tabindex: "0", "aria-label": `${spec.title} by step; arrow keys read values` });
    const tip = make("div", { class: "tip", role: "status" });
    tip.hidden = true;
    figure.append(caption, svg, tip);
    container.append(figure);
    const chart = { spec, svg, tip, figure, wide, lines: [], step: null };
    svg.addEventListener("pointermove", (e) => {
      if (chart.place) point(chart, (e.offsetX * chart.place.width) / svg.clientWidth);
    });
    svg.addEventListener("pointerleave", () => point(chart, null));
    svg.addEventListener("blur", () => point(chart, null));
    svg.addEventListener("keydown", (e) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
      if (!way || !chart.lines.length) return;
      e.preventDefault();
      const steps = (chart.lines.find((l) => !l.held) ?? chart.lines[0]).steps;
      const i = chart.step === null ? (way > 0 ? 0 : steps.length - 1) : nearest(steps, chart.step) + way;
      point(chart, chart.place.px(steps[Math.max(0, Math.min(steps.length - 1, i))]));
    });
    charts.push(chart);
  }
  const redraw = () => charts.forEach((chart) => { point(chart, null); draw(chart); });

  data.runs.forEach((run, i) => {
    const button = make("button", { type: "button", "aria-pressed": "true", title: "show or hide" });
    button.append(make("i", { class: `key c${i}` }), run.name);
    button.addEventListener("click", () => {
      if (!view.hidden.delete(i)) view.hidden.add(i);
      button.setAttribute("aria-pressed", String(!view.hidden.has(i)));
      redraw();
    });
    byId("legend").append(button);
  });
  byId("smoothing").addEventListener("input", (e) => {
    view.smoothing = Number(e.target.value);
    byId("smoothed").textContent = view.smoothing.toFixed(2);
    redraw();
  });
  byId("log-y").addEventListener("change", (e) => { view.logY = e.target.checked; redraw(); });
  byId("log-x").addEventListener("change", (e) => { view.logX = e.target.checked; redraw(); });
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = (root.dataset.theme ?? (system ? "dark" : "light")) === "dark" ? "light" : "dark";
  });
  let before = 0;
  new ResizeObserver(() => {
    if (container.clientWidth !== before) { before = container.clientWidth; redraw(); }
  }).observe(container);
  redraw();
})();
