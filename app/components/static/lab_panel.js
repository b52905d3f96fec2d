// The Lab: a chart, tables and sentences of one measurement, drawn again while it goes on; and its status line, which leaves
// the rest of the page alone. Everything arrives as data and reaches the page as text.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { make, on } = DynamicKV;

  function themed(figure, palette) {
    const dark = DynamicKV.dark() ? 1 : 0;
    const muted = DynamicKV.cssColor("--dkv-muted");
    const line = DynamicKV.cssColor("--dkv-line");
    const font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: muted };
    const data = figure.data.map((trace) => {
      const color = palette[trace.meta]?.[dark];
      if (!color) return trace;
      const painted = { ...trace, marker: { ...trace.marker, color } };
      if (trace.line) painted.line = { ...trace.line, color };
      if (trace.error_y) painted.error_y = { ...trace.error_y, color };
      return painted;
    });
    const layout = { ...figure.layout, font, autosize: true };
    for (const [name, axis] of Object.entries(layout)) {
      if (!/^[xy]axis\d*$/.test(name)) continue;
      layout[name] = { ...axis, gridcolor: line, linecolor: line, tickcolor: line, tickfont: font, title: { ...axis.title, font } };
    }
    const ink = { ...font, color: DynamicKV.cssColor("--dkv-ink") };
    layout.annotations = (layout.annotations ?? []).map((item) => ({ ...item, font: ink }));
    layout.hoverlabel = { bgcolor: DynamicKV.cssColor("--dkv-panel"), bordercolor: line, font: ink };
    return { data, layout };
  }

  function table({ caption, lines }) {
    const [head, ...rows] = lines;
    const cells = (line, tag) => line.map((text, place) => (place === 0 && tag === "th" && !text ? make("td") : place === 0 ? make("th", { scope: tag === "th" ? "col" : "row" }, text) : tag === "th" ? make("th", { scope: "col" }, text) : make("td", {}, text)));
    // It may be wider than a phone: then it scrolls by itself, with the keyboard too.
    return make("div", { className: "dkv-lab-table", tabIndex: 0, role: "region", "aria-label": caption },
      make("table", {}, make("caption", {}, caption), make("thead", {}, make("tr", {}, ...cells(head, "th"))),
        make("tbody", {}, ...rows.map((line) => make("tr", {}, ...cells(line, "td"))))));
  }

  // Where a cell of the chart is drawn, in pixels of the plot.
  function boxOf(plot, [curve, first, second]) {
    const trace = plot._fullData?.[curve];
    const layout = plot._fullLayout;
    if (!trace) return null;
    const axis = (name) => layout[name.length > 1 ? `${name[0]}axis${name.slice(1)}` : `${name}axis`];
    const [x, y] = [axis(trace.xaxis), axis(trace.yaxis)];
    const heat = trace.type === "heatmap";
    const [across, down] = heat ? [trace.x[second], trace.y[first]] : [trace.x[first], trace.y[first]];
    const [left, top] = [x._offset + x.d2p(across), y._offset + y.d2p(down)];
    const [width, height] = heat ? [x._length / trace.x.length, y._length / trace.y.length] : [18, 18];
    return Number.isFinite(left + top) ? { left: left - width / 2, top: top - height / 2, width, height } : null;
  }

  // The nearest cell in a direction, straight ahead before aside.
  function nearest(boxes, from, [right, down]) {
    let best = null;
    boxes.forEach((box, i) => {
      if (!box || i === from) return;
      const [x, y] = [box.left + box.width / 2 - boxes[from].left - boxes[from].width / 2, box.top + box.height / 2 - boxes[from].top - boxes[from].height / 2];
      const [ahead, aside] = right ? [x * right, Math.abs(y)] : [y * down, Math.abs(x)];
      if (ahead < 1) return;
      const far = ahead + 4 * aside;
      if (!best || far < best.far) best = { i, far };
    });
    return best?.i ?? from;
  }
  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  DynamicKV.register("lab", (element, props, link) => {
    const find = (role) => element.querySelector(`[data-role="${role}"]`);
    const plot = find("plot");
    let payload = null;
    let drawn = 0;
    let relative = false;
    let chosen = null; // the place in payload.cells

    const figure = () => (relative && payload.relative) || payload.figure;
    const draw = async () => {
      plot.hidden = !payload?.figure;
      if (plot.hidden) return;
      const ticket = ++drawn;
      const Plotly = await DynamicKV.loadPlotly().catch((error) => { find("note").textContent = error.message; });
      if (!Plotly || ticket !== drawn) return;
      plot.style.height = `${figure().height}px`;
      const { data, layout } = themed(figure(), payload.palette);
      await Plotly.react(plot, data, layout, { displaylogo: false, responsive: true, displayModeBar: false });
      bind();
      mark();
    };

    let bound = false;
    function bind() {
      if (bound) return;
      bound = true;
      plot.on("plotly_click", ({ points: [point] }) => {
        const at = Array.isArray(point.pointIndex) ? point.pointIndex : [point.pointIndex];
        // A grey cell lies in the trace after its heatmap's.
        const same = (cell) => (cell.at[0] === point.curveNumber || (at.length > 1 && payload.kind === "needle" && cell.at[0] === point.curveNumber - 1)) && String(cell.at.slice(1)) === String(at);
        const index = payload.cells.findIndex(same);
        if (index >= 0) { choose(index); open(); }
      });
    }

    function mark() {
      const box = chosen === null ? null : boxOf(plot, payload.cells[chosen].at);
      find("mark").hidden = !box;
      if (box) Object.assign(find("mark").style, Object.fromEntries(Object.entries(box).map(([name, value]) => [name, `${value}px`])));
    }
    function choose(index) {
      chosen = index;
      const cell = payload.cells[index];
      find("cell").textContent = cell ? cell.words : "";
      find("open").hidden = !cell?.open;
      if (cell && !cell.open) find("cell").textContent += ". Its text is not here: measure a file of your own, then its points open.";
      mark();
    }
    function open() {
      const cell = payload.cells[chosen];
      if (!cell?.open) return;
      const { layer = null, ...asked } = cell.open;
      const text = payload.texts?.[asked.example];
      if (layer !== null) DynamicKV.afterNextRun(() => DynamicKV.setLayer(layer));
      link.trigger("open", { kind: payload.kind, settings: payload.settings, cell: text ? { ...asked, text } : asked });
    }
    plot.addEventListener("keydown", (event) => {
      if (!payload?.cells.length || !plot.data || event.altKey || event.ctrlKey || event.metaKey) return;
      if (event.key === "Enter" && chosen !== null) { open(); event.preventDefault(); return; }
      const way = ARROWS[event.key];
      if (!way) return;
      event.preventDefault();
      event.stopPropagation();
      const boxes = payload.cells.map((cell) => boxOf(plot, cell.at));
      choose(chosen === null ? 0 : nearest(boxes, chosen, way));
    });
    find("open").addEventListener("click", open);
    find("relative").addEventListener("click", () => {
      relative = !relative;
      find("relative").setAttribute("aria-pressed", String(relative));
      find("note").textContent = figure().note ?? "";
      draw();
    });

    // In a tab that was hidden the chart has no width yet.
    new ResizeObserver(DynamicKV.framed(async () => { if (plot.data && plot.clientWidth) { await window.Plotly.Plots.resize(plot); mark(); } })).observe(plot);
    on("theme", draw);
    find("save").addEventListener("change", (event) => {
      const format = event.target.value;
      event.target.value = "";
      if (!payload || !format) return;
      const name = payload.csv.name.replace(".csv", "");
      if (format === "csv") DynamicKV.saveBlob(new Blob([payload.csv.text], { type: "text/csv" }), payload.csv.name);
      else if (plot.data) DynamicKV.savePlot(plot, payload.caption, format, `${name}.${format}`);
    });

    return (next) => {
      if (!next) return;
      payload = next;
      if (chosen !== null && !payload.cells[chosen]) chosen = null;
      find("title").textContent = payload.title;
      find("source").textContent = payload.source;
      find("relative").hidden = !payload.relative;
      find("note").textContent = payload.figure ? figure().note ?? "" : "";
      find("save").hidden = !payload.csv;
      find("said").replaceChildren(...payload.said.map((text) => make("li", {}, text)));
      find("tables").replaceChildren(...payload.tables.map(table));
      draw();
    };
  });

  // The field that an error is about is marked until it is changed or measured again.
  function mark(form, field) {
    for (const node of form?.querySelectorAll("[aria-invalid=true]") ?? []) node.removeAttribute("aria-invalid");
    const input = field && form?.querySelector(`.dkv-field-${field} :is(input, textarea)`);
    if (!input) return;
    input.setAttribute("aria-invalid", "true");
    input.addEventListener("input", () => input.removeAttribute("aria-invalid"), { once: true });
    input.focus();
  }

  DynamicKV.register("labstatus", (element) => (payload) => {
    mark(element.closest(".dkv-lab-form"), payload?.field);
    DynamicKV.sayStatus(element, payload);
  });
})();
