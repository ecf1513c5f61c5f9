(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const tokens = data.tokens, T = tokens.length;
  const PLUS = [40, 110, 230], MINUS = [225, 110, 35];
  const $ = (id) => document.getElementById(id);
  const make = (name, attributes = {}, text = "") => {
    const e = document.createElement(name);
    for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
    if (text !== "") e.textContent = text;
    return e;
  };
  const SVG = "http://www.w3.org/2000/svg";
  const shape = (name, attributes, text = "") => {
    const e = document.createElementNS(SVG, name);
    for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
    if (text !== "") e.textContent = text;
    return e;
  };
  const unpack = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const percent = (p) => (p >= 0.0995 ? (100 * p).toFixed(1) : (100 * p).toPrecision(2)) + " %";

  $("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // ---- pictures of vectors: a row for each token, a column for each dimension ----
  const paint = (canvas, columns, rows, color) => {
    canvas.width = columns;
    canvas.height = rows;
    const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
    for (let i = 0; i < columns * rows; i++) image.data.set(color(i), 4 * i);
    context.putImageData(image, 0, 0);
  };

  const strip = (figure, part, head) => {
    const rows = part.norms.length / part.count, columns = part.columns;
    part.bytes ??= new Int8Array(unpack(part.values));
    const offset = head * rows * columns;
    const single = rows === 1;
    const tall = single ? 26 : Math.max(9, Math.min(20, Math.round(420 / rows)));
    const font = `height:${tall}px;line-height:${tall}px;font-size:${Math.min(12, tall * 0.8)}px`;
    const labels = make("ol"), lengths = make("ol", { class: "lengths" });
    for (let i = 0; i < rows; i++) {
      if (!single) labels.append(make("li", { style: font }, tokens[i]));
      lengths.append(make("li", { style: font }, part.norms[head * rows + i].toFixed(2)));
    }
    const canvas = make("canvas", { style: `height:${rows * tall}px`, role: "img" });
    canvas.setAttribute("aria-label", figure.querySelector("figcaption").textContent);
    paint(canvas, columns, rows, (i) => {
      const x = part.bytes[offset + i];
      return [...(x < 0 ? MINUS : PLUS), Math.min(255, 2 * Math.abs(x))];
    });
    const under = make("div", { class: "under" });
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      const column = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns)));
      const row = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
      const value = part.bytes[offset + row * columns + column] * part.scale;
      const name = single ? "" : `${tokens[row]} (token ${row}), `;
      under.textContent = `${name}dimension ${column}: about ${value.toPrecision(3)}`;
    });
    canvas.addEventListener("pointerleave", () => { under.textContent = ""; });
    const grid = make("div", { class: "grid" });
    grid.append(labels, canvas, lengths);
    figure.replaceChildren(figure.querySelector("figcaption"), grid, under);
  };

  for (const figure of document.querySelectorAll("[data-strip]"))
    if (data.strips[figure.dataset.strip]) strip(figure, data.strips[figure.dataset.strip], 0);

  // ---- a line of tokens to point at ----
  const line = (place, names, choose) => {
    const buttons = names.map((name, i) => {
      const button = make("button", { type: "button" }, name);
      for (const event of ["pointerenter", "focus", "click"]) button.addEventListener(event, () => choose(i));
      return button;
    });
    place.replaceChildren(...buttons);
    return buttons;
  };

  // ---- queries, keys, values and attention ----
  const attention = () => {
    const state = { layer: 0, head: 0, row: T - 1 };
    const weights = (layer) => (layer.shares ??= new Uint16Array(unpack(layer.weights)));
    const share = (i, j, head = state.head) =>
      weights(data.layers[state.layer])[(head * T + i) * T + j] / 65535;
    const seen = (layer, i, j) =>
      !(layer.causal && j > i) && !(layer.window !== null && Math.abs(i - j) >= layer.window);
    const cell = Math.max(9, Math.min(40, Math.floor(620 / T)));
    const left = 96, top = 84;
    const buttons = line($("looks"), tokens, (i) => { state.row = i; point(); });
    let frame = null;

    const point = () => {
      buttons.forEach((button, j) => {
        const w = share(state.row, j);
        button.style.setProperty("--share", (0.05 + 0.95 * Math.pow(w, 0.6)).toFixed(3));
        button.classList.toggle("strong", w > 0.3);
        button.classList.toggle("chosen", j === state.row);
        button.replaceChildren(tokens[j], make("small", {}, w >= 0.0005 ? w.toFixed(3) : "·"));
      });
      const order = tokens.map((_, j) => j).sort((a, b) => share(state.row, b) - share(state.row, a));
      const best = order.slice(0, 3).map((j) => `“${tokens[j]}” ${share(state.row, j).toFixed(3)}`);
      const sum = tokens.reduce((total, _, j) => total + share(state.row, j), 0);
      $("share").textContent =
        `“${tokens[state.row]}” (token ${state.row}) takes most from ${best.join(", ")}; its row sums to ${sum.toFixed(3)}.`;
      frame?.setAttribute("y", top + state.row * cell);
    };

    const matrix = () => {
      const layer = data.layers[state.layer], size = { w: left + T * cell + 50, h: top + T * cell + 4 };
      const svg = shape("svg", { width: size.w, height: size.h, role: "img", "aria-label": "Attention weights" });
      const hatch = shape("pattern", {
        id: "hatch", width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)",
      });
      hatch.append(shape("line", { x1: 0, y1: 0, x2: 0, y2: 5, class: "stroke" }));
      const definitions = shape("defs", {});
      definitions.append(hatch);
      svg.append(definitions, shape("rect", { x: left, y: top, width: T * cell, height: T * cell, class: "ground" }));
      const font = `font-size:${Math.min(12, cell)}px`;
      for (let i = 0; i < T; i++) {
        const middle = (i + 0.5) * cell;
        const short = tokens[i].length > 12 ? tokens[i].slice(0, 11) + "…" : tokens[i];
        svg.append(shape("text", { x: left - 6, y: top + middle + 4, "text-anchor": "end", style: font }, short));
        svg.append(shape("text", { transform: `translate(${left + middle + 3},${top - 6}) rotate(-50)`, style: font }, short));
        for (let j = 0; j < T; j++) {
          const visible = seen(layer, i, j), w = share(i, j);
          const rect = shape("rect", {
            x: left + j * cell, y: top + i * cell, width: cell - 1, height: cell - 1,
            class: visible ? "cell" : "hidden",
          });
          if (visible) rect.setAttribute("fill-opacity", Math.pow(w, 0.6).toFixed(3));
          rect.append(shape("title", {}, visible
            ? `“${tokens[i]}” takes ${w.toFixed(4)} from “${tokens[j]}”`
            : `“${tokens[i]}” does not see “${tokens[j]}”`));
          rect.addEventListener("pointerenter", () => { state.row = i; point(); });
          svg.append(rect);
        }
      }
      frame = shape("rect", { x: left - 1, y: top, width: T * cell + 1, height: cell - 1, class: "frame" });
      svg.append(frame);
      $("matrix").replaceChildren(svg);
    };

    const heads = () => {
      const layer = data.layers[state.layer];
      $("heads").replaceChildren(...Array.from({ length: layer.heads }, (_, head) => {
        const button = make("button", { type: "button", class: head === state.head ? "chosen" : "" });
        const canvas = make("canvas", {});
        paint(canvas, T, T, (i) => [...PLUS, 255 * Math.pow(share(Math.floor(i / T), i % T, head), 0.6)]);
        button.append(canvas, `head ${head + 1}`);
        button.addEventListener("click", () => { state.head = head; show(); });
        return button;
      }));
    };

    const show = () => {
      const layer = data.layers[state.layer];
      for (const select of document.querySelectorAll("select.layer")) select.value = state.layer;
      for (const select of document.querySelectorAll("select.head")) select.value = state.head;
      for (const name of ["q", "k", "v"]) {
        const part = layer[name];
        const group = Math.floor(state.head / (layer.heads / part.count));
        strip(document.querySelector(`[data-strip="qkv-${name}"]`), part, group);
      }
      matrix();
      heads();
      point();
    };

    const options = (select, name, count, choose) => {
      for (let i = 0; i < count; i++) select.append(make("option", { value: i }, `${i + 1} of ${count}`));
      select.setAttribute("aria-label", name);
      select.addEventListener("change", () => { choose(Number(select.value)); show(); });
    };
    for (const select of document.querySelectorAll("select.layer"))
      options(select, "layer", data.layers.length, (i) => {
        state.layer = i;
        state.head = Math.min(state.head, data.layers[i].heads - 1);
      });
    for (const select of document.querySelectorAll("select.head"))
      options(select, "head", data.layers[0].heads, (i) => { state.head = i; });
    show();
  };
  if (data.layers.length) attention();

  // ---- what the model expects ----
  const predictions = () => {
    // Of a next token, the token before it is pointed at.
    const at = new Map(data.predictions.map((p) => [data.next ? p.place - 1 : p.place, p]));
    const choose = (i) => {
      const p = at.get(i);
      if (!p) return;
      buttons.forEach((button, j) => button.classList.toggle("chosen", j === i));
      const where = data.next ? `After “${tokens[i]}”` : `At the place of “${tokens[i]}”`;
      $("guess").textContent = p.actual
        ? `${where}: “${p.actual}” is there, with p = ${percent(p.p)}, number ${p.rank} of all; ` +
          `${(-Math.log2(p.p)).toFixed(2)} bits.`
        : `${where}:`;
      const most = Math.max(p.top[0][1], 1e-9);
      $("top").replaceChildren(...p.top.map(([name, q], rank) => {
        const bar = make("div", { class: p.actual && rank === p.rank - 1 && name === p.actual ? "bar actual" : "bar" });
        bar.append(make("code", {}, name), make("i", { style: `width:${(100 * q) / most}%` }), make("b", {}, percent(q)));
        return bar;
      }));
    };
    const buttons = line($("places"), tokens, choose);
    buttons.forEach((button, i) => { button.disabled = !at.has(i); });
    // Begin with what the text hides, if it hides anything, else in the middle.
    const hidden = data.next ? undefined : data.predictions.find((p) => !p.actual)?.place;
    choose(hidden ?? [...at.keys()][Math.floor(at.size / 2)]);
  };
  if (data.predictions.length) predictions();
})();
