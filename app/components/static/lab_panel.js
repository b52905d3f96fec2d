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

  DynamicKV.register("lab", (element) => {
    const find = (role) => element.querySelector(`[data-role="${role}"]`);
    const plot = find("plot");
    let payload = null;
    let drawn = 0;

    const draw = async () => {
      plot.hidden = !payload?.figure;
      if (plot.hidden) return;
      const ticket = ++drawn;
      const Plotly = await DynamicKV.loadPlotly().catch((error) => { find("note").textContent = error.message; });
      if (!Plotly || ticket !== drawn) return;
      plot.style.height = `${payload.figure.height}px`;
      const { data, layout } = themed(payload.figure, payload.palette);
      await Plotly.react(plot, data, layout, { displaylogo: false, responsive: true, displayModeBar: false });
    };

    // In a tab that was hidden the chart has no width yet.
    new ResizeObserver(DynamicKV.framed(() => { if (plot.data && plot.clientWidth) window.Plotly.Plots.resize(plot); })).observe(plot);
    on("theme", draw);
    find("csv").addEventListener("click", () => {
      if (payload?.csv) DynamicKV.saveBlob(new Blob([payload.csv.text], { type: "text/csv" }), payload.csv.name);
    });

    return (next) => {
      if (!next) return;
      payload = next;
      find("title").textContent = payload.title;
      find("source").textContent = payload.source;
      find("note").textContent = payload.figure?.note ?? "";
      find("csv").hidden = !payload.csv;
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
