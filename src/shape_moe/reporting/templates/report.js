"use strict";
(() => {
  const specs = JSON.parse(document.getElementById("report-data").textContent);
  const root = document.documentElement;
  const NARROW = 440; // px, width of a plot below which it is laid out for a phone
  const PAPER = 688; // px, A4 within its margins
  const PRINTED = 0.82; // of the height on the screen
  const HALF = 330; // px, two figures side by side on paper
  const family = getComputedStyle(document.body).fontFamily;
  const config = { displayModeBar: false, scrollZoom: false, doubleClick: false };
  const chosen = { layers: {}, views: {} }; // the layer of each part of the page
  let printing = false;

  // --- binary arrays -------------------------------------------------------------------------------------------
  const KINDS = { f4: Float32Array, u1: Uint8Array, u2: Uint16Array, i4: Int32Array };
  const decoded = new WeakMap();

  function decode(array) {
    if (!decoded.has(array)) {
      const bytes = Uint8Array.from(atob(array.bdata), (letter) => letter.charCodeAt(0));
      const flat = new KINDS[array.dtype](bytes.buffer);
      const width = array.shape ? Number(array.shape.split(",")[1]) : 0;
      const rows = (n) => Array.from({ length: flat.length / n }, (_, row) => flat.subarray(row * n, (row + 1) * n));
      decoded.set(array, width ? rows(width) : flat);
    }
    return decoded.get(array);
  }

  // --- colours: "@name" is the CSS variable --name ---------------------------------------------------------------
  let palette = new Map(); // read once per theme: every look at a style may make the browser lay the page out

  function colour(name) {
    if (!palette.has(name)) palette.set(name, getComputedStyle(root).getPropertyValue(`--${name}`).trim());
    return palette.get(name);
  }

  function themed(value) {
    if (typeof value === "string") return value.startsWith("@") ? colour(value.slice(1)) : value;
    if (Array.isArray(value)) return typeof value[0] === "number" && typeof value.at(-1) === "number" ? value : value.map(themed);
    if (value === null || typeof value !== "object" || ArrayBuffer.isView(value)) return value;
    if (value.bdata !== undefined) return decode(value);
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, themed(inner)]));
  }

  function merged(...layers) {
    const result = {};
    for (const layer of layers) {
      for (const [key, value] of Object.entries(layer ?? {})) {
        const nested = value !== null && typeof value === "object" && !Array.isArray(value) && value.bdata === undefined;
        result[key] = nested && !ArrayBuffer.isView(value) ? merged(result[key], value) : value;
      }
    }
    return result;
  }

  // --- traces that are made here, because they would be large in the file ------------------------------------------
  const makers = {
    cells({ arrays }, _state, view) {
      const [kept, shade] = [decode(arrays.kept), decode(arrays.shade)];
      const [rank, share, tokens] = ["rank", "share", "tokens"].map((name) => arrays[name] && decode(arrays[name]));
      const ranked = rank !== undefined && view === 0;
      const width = kept[0].length;
      const blank = () => kept.map(() => new Array(width).fill(null));
      const [shown, hidden, facts] = [blank(), blank(), blank()];
      for (let row = 0; row < kept.length; row++) {
        for (let id = 0; id < width; id++) {
          const at = ranked ? rank[row][id] : id;
          (kept[row][id] ? shown : hidden)[row][at] = shade[row][id];
          facts[row][at] = rank ? [id, rank[row][id] + 1, share[row][id], tokens[row][id]] : [id];
        }
      }
      const common = { x: Array.from({ length: width }, (_, at) => at + (ranked ? 1 : 0)), y: arrays.layers.map(String), customdata: facts };
      return [{ ...common, z: shown }, { ...common, z: hidden }];
    },
    pairs(_spec, state) {
      const [ids, codes] = [decode(state.arrays.ids), decode(state.arrays.codes)];
      const size = ids.length;
      const square = () => Array.from({ length: size }, () => new Array(size).fill(null));
      const [z, facts] = [square(), square()];
      let at = 0;
      for (let row = 0; row < size; row++) {
        for (let column = row + 1; column < size; column++) {
          const code = codes[at++];
          if (code === 255) continue; // too few tokens to tell
          const times = 2 ** ((code - 127) / 20);
          const text = code === 0 ? "never meet" : `meet ${times.toPrecision(2)} times as often as their traffic suggests`;
          for (const [a, b] of [[row, column], [column, row]]) {
            z[a][b] = code === 0 ? -7 : Math.log2(times);
            facts[a][b] = [ids[a], ids[b], text];
          }
        }
      }
      return [{ z, customdata: facts }];
    },
  };

  // --- drawing -----------------------------------------------------------------------------------------------------
  const plotOf = (spec) => document.getElementById(`plot-${spec.name}`);
  const viewOf = (spec) => (spec.choice === "layer" ? (chosen.layers[spec.part] ?? 0) : (chosen.views[spec.name] ?? 0));

  function base(narrow, height) {
    const axis = {
      automargin: true, tickangle: 0, fixedrange: true, gridcolor: "@grid", linecolor: "@line", zerolinecolor: "@line", tickcolor: "@line",
      ticks: "outside", ticklen: 4, title: { standoff: 10, font: { size: narrow ? 11 : 13 } },
    };
    return {
      height, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false,
      font: { family, size: narrow ? 10.5 : 12.5, color: "@muted" },
      margin: { l: 8, r: 14, t: 8, b: 8 }, hoverlabel: { bgcolor: "@surface", bordercolor: "@faint", font: { color: "@text", size: 13 }, align: "left" },
      showlegend: false, yaxis: axis, xaxis: narrow ? { ...axis, nticks: 6 } : axis,
    };
  }

  function draw(spec, room = plotOf(spec).clientWidth) {
    const plot = plotOf(spec);
    const view = viewOf(spec);
    const state = spec.states[view] ?? {};
    const width = printing ? (spec.wide ? PAPER : HALF) : room;
    const narrow = width < NARROW;
    const made = spec.decode ? makers[spec.decode](spec, state, view) : [];
    const data = spec.data.map((trace, i) => ({ ...merged(themed(trace), themed(state.data?.[i])), ...made[i] }));
    const tall = printing ? PRINTED * spec.height : spec.height;
    const height = spec.square ? Math.min(tall, width) : tall;
    const start = base(narrow, height);
    for (const key of Object.keys(spec.layout)) if (/^[xy]axis\d$/.test(key)) start[key] = start.xaxis;
    const layout = themed(merged(start, spec.layout, state.layout, narrow ? spec.narrow : {}, { width }));
    plot.style.height = `${height}px`;
    Plotly.react(plot, data, layout, config);
    if (state.label) plot.setAttribute("aria-label", state.label);
    const line = document.getElementById(`line-of-${spec.name}`);
    const text = (state.lines ?? []).join(" ");
    if (line.textContent !== text) line.textContent = text;
    plot.dataset.drawn = String(view);
  }

  const rooms = () => specs.map((spec) => plotOf(spec).clientWidth);

  function drawAll() {
    palette = new Map();
    const widths = rooms();
    specs.forEach((spec, i) => draw(spec, widths[i]));
  }

  // --- choices -----------------------------------------------------------------------------------------------------
  const pickers = new Map([...document.querySelectorAll("select[data-layer]")].map((list) => [Number(list.dataset.layer), list]));

  function chooseLayer(part, index) {
    const list = pickers.get(part);
    const last = list.options.length - 1;
    chosen.layers[part] = Math.min(Math.max(index, 0), last);
    list.value = String(chosen.layers[part]);
    const [back, on] = list.parentElement.querySelectorAll("button");
    back.disabled = chosen.layers[part] === 0;
    on.disabled = chosen.layers[part] === last;
    const own = (spec) => spec.part === part && spec.choice === "layer" && plotOf(spec).dataset.drawn !== undefined;
    specs.filter(own).forEach((spec) => draw(spec));
  }

  for (const [part, list] of pickers) {
    list.addEventListener("change", () => chooseLayer(part, Number(list.value)));
    for (const button of list.parentElement.querySelectorAll("button")) {
      button.addEventListener("click", () => chooseLayer(part, chosen.layers[part] + Number(button.dataset.step)));
    }
  }
  for (const radio of document.querySelectorAll("input[data-view]")) {
    radio.addEventListener("change", () => {
      chosen.views[radio.dataset.view] = Number(radio.value);
      draw(specs.find((spec) => spec.name === radio.dataset.view));
    });
  }
  for (const radio of document.querySelectorAll("input[name=theme]")) {
    radio.checked = radio.value === (root.dataset.theme ?? "auto");
    radio.addEventListener("change", () => {
      if (radio.value === "auto") delete root.dataset.theme;
      else root.dataset.theme = radio.value;
      try {
        localStorage.setItem("shape-moe-theme", radio.value);
      } catch {
        // no storage for files in this browser: the theme is not remembered
      }
      drawAll();
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

  let width = root.clientWidth;
  let waiting = 0;
  window.addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      if (root.clientWidth !== width && !printing) drawAll();
      width = root.clientWidth;
    }, 120);
  });
  window.addEventListener("beforeprint", () => {
    printing = true;
    root.classList.add("printing");
    drawAll();
  });
  window.addEventListener("afterprint", () => {
    printing = false;
    root.classList.remove("printing");
    drawAll();
  });

  // --- begin: one plot after the other, so that the page can be used meanwhile ---------------------------------------
  function soon(task) {
    const channel = new MessageChannel(); // timers are slowed down in a tab that is not looked at, messages are not
    channel.port1.onmessage = task;
    channel.port2.postMessage(null);
  }

  function begin(index, widths) {
    if (index === specs.length) {
      root.dataset.ready = String(Math.round(performance.now()));
      return;
    }
    const spec = specs[index];
    draw(spec, widths[index]);
    if (spec.decode === "cells") {
      plotOf(spec).on("plotly_click", (event) => {
        const at = spec.arrays.layers.map(String).indexOf(String(event.points[0].y));
        if (at >= 0 && pickers.has(spec.part)) chooseLayer(spec.part, at);
      });
    }
    soon(() => begin(index + 1, widths));
  }
  for (const part of pickers.keys()) chooseLayer(part, 0);
  begin(0, rooms());
})();
