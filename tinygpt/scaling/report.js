// The figures of a report: plotly.js is unpacked once, each figure is drawn as it comes into sight.
"use strict";
(async () => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const packed = document.getElementById("plotly").textContent;
  const bytes = Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const library = document.createElement("script");
  library.textContent = await new Response(unpacked).text();
  document.head.append(library);

  // Ticks of a logarithmic axis at 1, 2 and 5, or at powers of ten, as many as have room.
  function ticks(range, pixels) {
    const [low, high] = range, most = Math.max(3, pixels / 55);
    if (high - low < 0.7) return { tickmode: "auto", tickvals: null, ticktext: null };
    for (const [digits, step] of [[[1, 2, 5], 1], [[1, 3], 1], [[1], 1], [[1], 2], [[1], 3], [[1], 6]]) {
      const values = [];
      for (let power = Math.floor(low); power <= high; power++) {
        if (power % step === 0) values.push(...digits.map((digit) => digit * 10 ** power));
      }
      const seen = values.filter((v) => Math.log10(v) >= low && Math.log10(v) <= high);
      if (seen.length <= most) return { tickmode: "array", tickvals: seen, ticktext: seen.map(short) };
    }
    return { tickmode: "auto", tickvals: null, ticktext: null };
  }

  function short(exact) {
    const value = Number(exact.toPrecision(3)); // first: what it rounds to may have the next unit
    const units = [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]];
    const [size, unit] = (value < 1e15 && units.find(([size]) => value >= size)) || [1, ""];
    const number = value / size;
    if (number >= 1e4 || number < 1e-3) return number.toExponential(0).replace("e+", "e");
    return number + unit;
  }

  // Dark colours are lighter on a dark page.
  function lighter(found, hex) {
    const parts = [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
    const light = (0.3 * parts[0] + 0.6 * parts[1] + 0.1 * parts[2]) / 255;
    const mix = light < 0.05 ? 0.9 : Math.max(0, 0.6 - 1.2 * light);
    return `"rgb(${parts.map((part) => Math.round(part + mix * (255 - part))).join(",")})"`;
  }

  // What plotly draws of a figure: one panel per row where the page is narrow.
  function built(name, width, isDark, linear) {
    const panels = figures[name].panels, many = panels.length;
    const columns = width < 560 ? 1 : Math.min(many, 3);
    const rows = Math.ceil(many / columns);
    const each = many === 1 || columns === 1 ? Math.min(380, Math.max(280, 0.62 * width)) : 270;
    const ink = isDark ? "#dddddd" : "#222222", lines = isDark ? "#3a3d42" : "#e6e6e6";
    const names = new Set(panels.flatMap((panel) => panel.traces.map((t) => t.name || "")));
    const room = [...names].reduce((sum, word) => sum + (word ? 6.5 * word.length + 50 : 0), 0);
    const top = 26 + 19 * Math.ceil(room / (width - 90));
    const layout = {
      width, height: rows * (each + 60) + top, margin: { l: 62, r: 12, t: top, b: 52 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "Helvetica, Arial, sans-serif", size: 12, color: ink },
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1, yanchor: "bottom",
        font: { size: 11 }, itemwidth: 30 },
      hoverlabel: { align: "left" }, hovermode: "closest", annotations: [],
    };
    const inner = { w: width - 74, h: layout.height - top - 52 }, data = [], seen = new Set();
    panels.forEach((panel, i) => {
      const bar = panel.traces.some((t) => t.marker && t.marker.colorbar) ? 78 : 0;
      const wide = inner.w / columns, high = inner.h / rows;
      const left = (i % columns) * wide, above = Math.floor(i / columns) * high;
      const right = left + wide - bar - ((i % columns) < columns - 1 ? 66 : 0);
      const bottom = above + high - (Math.floor(i / columns) < rows - 1 ? 68 : 0);
      const x = [left / inner.w, right / inner.w], y = [1 - bottom / inner.h, 1 - above / inner.h];
      const n = i ? String(i + 1) : "";
      for (const [letter, domain, anchor] of [["x", x, "y"], ["y", y, "x"]]) {
        const axis = panel[letter], type = linear[letter] ? "linear" : axis.type;
        const range = type === "log" ? axis.range.map(Math.log10) : axis.range;
        layout[letter + "axis" + n] = {
          domain, anchor: anchor + n, type, range, title: { text: axis.title, standoff: 6 },
          gridcolor: lines, linecolor: ink, zeroline: false, exponentformat: "SI", nticks: 6,
          minexponent: 4,
          ...(type === "log" ? ticks(range, letter === "x" ? right - left : 1.4 * (bottom - above)) : {}),
        };
      }
      for (const note of panel.notes) {
        layout.annotations.push({ text: note.text, font: { color: note.color, size: 11 },
          showarrow: false, x: 0, y: 0, xanchor: "left", yanchor: "bottom",
          xref: "x" + n + " domain", yref: "y" + n + " domain" });
      }
      for (const trace of panel.traces) {
        const isNarrow = columns === 1 && width < 560;  // labels of contours find no room
        if (isNarrow && trace.mode === "text") continue;
        const group = trace.legendgroup, first = trace.name && !seen.has(group);
        if (first) seen.add(group);
        let text = JSON.stringify({ type: "scatter", ...trace, tint: undefined,
          xaxis: "x" + n, yaxis: "y" + n, showlegend: Boolean(first) });
        if (isDark) text = text.replace(/"#([0-9a-f]{6})"/g, lighter);
        text = text.replaceAll('"paper"', isDark ? '"#16181b"' : '"#ffffff"');
        const one = JSON.parse(text);
        if (isNarrow && one.hoverinfo === "text" && one.mode === "lines") one.connectgaps = true;
        if (bar && one.marker && one.marker.colorbar) {
          Object.assign(one.marker.colorbar, { x: x[1], xpad: 6, thickness: 10, outlinewidth: 0,
            y: (y[0] + y[1]) / 2, len: y[1] - y[0] });
        }
        data.push(one);
      }
    });
    return { data, layout };
  }

  function save(name, content, type) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([content], { type }));
    link.download = name;
    link.click();
  }

  // The points of every panel, a row each; runs by their names.
  function table(name) {
    const quoted = (v) => /[",\n]/.test(v) ? '"' + String(v).replaceAll('"', '""') + '"' : v;
    const rows = [["panel", "series", "run", "x", "y", "x_label", "y_label"]];
    figures[name].panels.forEach((panel, i) => {
      for (const t of panel.traces.filter((t) => t.fill !== "toself" && t.mode !== "text")) {
        t.x.forEach((x, k) => {
          const said = Array.isArray(t.text) ? t.text[k] : t.text || "";
          const run = said.split("<br>")[0].replaceAll("&lt;", "<").replaceAll("&amp;", "&");
          if (x !== null) {
            rows.push([i + 1, t.name || t.legendgroup || "", run, x, t.y[k], panel.x.title,
              panel.y.title]);
          }
        });
      }
    });
    return rows.map((row) => row.map(quoted).join(",") + "\n").join("");
  }

  function live(figure) {
    const name = figure.dataset.figure, linear = {}, plot = document.createElement("div");
    const tools = document.createElement("div");
    plot.className = "live";
    tools.className = "tools live";
    figure.querySelector("img").classList.add("static");
    figure.prepend(plot, tools);
    const draw = () => {
      const { data, layout } = built(name, plot.clientWidth, dark.matches, linear);
      Plotly.react(plot, data, layout, { displayModeBar: false, responsive: false });
    };
    const button = (text, act) => {
      const one = document.createElement("button");
      one.textContent = text;
      one.onclick = () => act(one);
      tools.append(one);
    };
    for (const letter of ["x", "y"]) {
      if (figures[name].panels.every((panel) => panel[letter].type !== "log")) continue;
      button(letter + ": log", (one) => {
        linear[letter] = !linear[letter];
        one.textContent = letter + (linear[letter] ? ": linear" : ": log");
        draw();
      });
    }
    button("data (CSV)", () => save(name + ".csv", table(name), "text/csv"));
    button("figure (SVG)", () => {
      const paper = built(name, 900, false, linear), { width, height } = paper.layout;
      Plotly.downloadImage(paper, { format: "svg", filename: name, width, height });
    });
    let before = 0;
    draw();
    plot.on("plotly_relayout", (changed) => {  // zoomed: ticks for the new range
      const update = {};
      for (const key of Object.keys(changed)) {
        const axis = (key.match(/^([xy]axis\d*)\.(range|autorange)/) || [])[1];
        const shown = axis && plot._fullLayout[axis];
        if (shown && shown.type === "log") {
          const set = ticks(shown.range, axis[0] === "x" ? shown._length : 1.4 * shown._length);
          for (const [name, value] of Object.entries(set)) update[`${axis}.${name}`] = value;
        }
      }
      if (Object.keys(update).length) Plotly.relayout(plot, update);
    });
    dark.addEventListener("change", draw);
    new ResizeObserver(() => {
      if (plot.clientWidth && plot.clientWidth !== before) { before = plot.clientWidth; draw(); }
    }).observe(figure);
  }

  const watch = new IntersectionObserver((seen) => seen.filter((s) => s.isIntersecting)
    .forEach((s) => { watch.unobserve(s.target); live(s.target); }), { rootMargin: "400px" });
  document.querySelectorAll("figure[data-figure]").forEach((figure) => watch.observe(figure));
  addEventListener("beforeprint", () => document.querySelectorAll("details")
    .forEach((one) => { one.open = true; }));
})();
