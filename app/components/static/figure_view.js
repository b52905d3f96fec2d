// Charts: draws any registered view with Plotly, which is loaded when the rest of the page is painted.
// The film moves bars on an axis that stands still: Plotly's own frames never reach the page through Gradio.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { store, on, make, framed } = DynamicKV;
  const SPAN = 0.84; // of a layer's height, shared by the lanes, as in views/budgets.py
  const MANY = 4; // runs, and lanes at most that are shown unasked
  const idle = window.requestIdleCallback || ((action) => setTimeout(action, 200));
  let loading = null;

  function loadPlotly() {
    loading ??= new Promise((resolve, reject) => {
      if (window.Plotly) { resolve(window.Plotly); return; }
      const root = window.gradio_config?.root || "";
      const script = make("script", { src: `${root}/gradio_api/explorer/plotly.js`, async: true });
      script.onload = () => resolve(window.Plotly);
      script.onerror = () => { loading = null; reject(new Error("the chart library did not load")); };
      document.head.append(script);
    });
    return loading;
  }
  DynamicKV.loadPlotly = loadPlotly;

  // The method's colour in this theme; bars carry their method in `meta`.
  function themed(data, runs) {
    const dark = DynamicKV.dark() ? 1 : 0;
    return data.map((trace) => {
      const run = runs.find((item) => item.look === trace.meta);
      if (!run) return trace;
      const color = run.color[dark];
      const marker = { ...trace.marker, color };
      return { ...trace, marker, ...(trace.line ? { line: { ...trace.line, color } } : {}) };
    });
  }

  function themedLayout(layout) {
    const ink = DynamicKV.cssColor("--dkv-muted");
    const line = DynamicKV.cssColor("--dkv-line");
    const font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: ink };
    const axis = (spec = {}) => ({ ...spec, gridcolor: line, linecolor: line, tickcolor: line, tickfont: font, title: { ...spec.title, font } });
    return {
      ...layout, font, autosize: true,
      xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
      hoverlabel: { bgcolor: DynamicKV.cssColor("--dkv-panel"), bordercolor: line, font: { ...font, color: DynamicKV.cssColor("--dkv-ink") } },
    };
  }

  async function react(Plotly, plot, data, layout, config) {
    await Plotly.react(plot, data, layout, config);
    // On a page with a <base>, Plotly points its patterns at the address of that moment, and ours changes with the view.
    if (plot._context._baseUrl) {
      plot._context._baseUrl = "";
      await Plotly.redraw(plot);
    }
  }

  // A figure of app/views drawn elsewhere on the page, in the runs' colours; `limit` ends the value axis. Calls are drawn in turn.
  const turns = new WeakMap();
  DynamicKV.drawFigure = (plot, spec, runs, limit = null) => {
    const turn = (turns.get(plot) ?? Promise.resolve()).then(async () => {
      const Plotly = await loadPlotly();
      const layout = themedLayout(spec.layout);
      if (limit) layout.xaxis = { ...layout.xaxis, range: [0, limit] };
      plot.style.height = `${spec.height}px`;
      await react(Plotly, plot, themed(spec.data, runs), layout, { displaylogo: false, responsive: true, displayModeBar: false });
    }).catch((error) => { plot.textContent = error.message; });
    turns.set(plot, turn);
    return turn;
  };

  DynamicKV.register("figures", (element, props) => {
    const find = (role) => element.querySelector(`[data-role="${role}"]`);
    const plot = find("plot");
    const marks = find("marks");
    const outlines = find("outlines");
    const titles = JSON.parse(props.titles);
    let key = titles[0].key;
    let wide = false;
    let painted = false;
    let drawn = 0; // drawings begun, and the last one that is done
    let settled = 0;
    let draft = null; // {budgets, editable, drag}: outlined bars, predicted or being drawn

    let hidden = new Set(); // looks of the runs that the keys switched off
    const figure = () => store.trace?.figures[key];

    // Lanes of the runs that are shown; each run has its bars in the figure under its look.
    const lanes = () => store.trace.runs.filter((run) => !run.predicted && !hidden.has(run.look)).map((run) => run.look);
    const height = () => (figure().layerAxis === "y" ? Math.max(figure().height, Math.min(1100, 4 * store.trace.layers * lanes().length + 90)) : figure().height);
    function laned(data) {
      const shown = lanes();
      const lane = SPAN / Math.max(1, shown.length);
      return data.map((trace) => {
        const at = shown.indexOf(trace.meta);
        if (at < 0) return { ...trace, visible: false };
        return trace.offset === undefined ? trace : { ...trace, offset: at * lane - SPAN / 2, width: 0.9 * lane };
      });
    }
    const isFilm = () => Boolean(store.film && figure()?.filmLimit);
    // What a run's bars show at the film's moment: its window and what was chosen. Layers that are not read have none.
    function moved(data) {
      return data.map((trace) => {
        const run = store.trace.runs.find((item) => item.look === trace.meta);
        if (!run?.now || trace.offset === undefined) return trace;
        const held = Array.from({ length: store.trace.layers }, (_, layer) => run.now.budgets[layer] ?? 0);
        const window_ = held.map((kept) => Math.min(kept, run.window));
        const first = /, window$/.test(trace.name);
        return { ...trace, x: first ? window_ : held.map((kept, i) => kept - window_[i]), base: first ? held.map(() => 0) : window_, customdata: held };
      });
    }

    // Budgets that were not run, as a saved picture has them: an outline over all lanes of a layer.
    const outline = () => ({
      type: "bar", orientation: "h", name: "predicted", hoverinfo: "none", width: 0.96, offset: -0.48, base: 0,
      y: draft.budgets.map((_, layer) => layer), x: draft.budgets,
      marker: { color: "rgba(0,0,0,0)", line: { width: draft.editable ? 2 : 1.5, color: DynamicKV.cssColor(draft.editable ? "--dkv-draw" : "--dkv-predicted") } },
    });
    const outlined = () => Boolean(draft && figure()?.layerAxis === "y");

    const limit = () => (wide && figure().wideLimit ? figure().wideLimit : isFilm() ? figure().filmLimit : figure().layerAxis === "y" ? figure().layout.xaxis.range[1] : null);

    const config = () => ({
      displaylogo: false, responsive: true, displayModeBar: false,
      toImageButtonOptions: { filename: `dynamickv_${store.trace.record.model.name}_${key}` },
    });

    const draw = async () => {
      if (!painted || !figure()) return;
      const ticket = ++drawn;
      const Plotly = await loadPlotly().catch((error) => { find("note").textContent = error.message; });
      if (!Plotly || ticket !== drawn) return;
      const spec = figure();
      let data = laned(themed(spec.data, store.trace.runs));
      if (isLive()) data = [];
      else if (isFilm()) data = moved(data);
      const layout = { ...themedLayout(spec.layout), height: height() };
      if (outlined() && limit() && !dragging) roof = Math.max(limit(), 1.08 * Math.max(...draft.budgets));
      if (outlined() && limit()) layout.xaxis = { ...layout.xaxis, range: [0, Math.max(roof, limit())] };
      else if (limit()) layout.xaxis = { ...layout.xaxis, range: [0, limit()] };
      plot.style.height = `${height()}px`;
      await react(Plotly, plot, data, layout, config());
      settled = ticket;
      plot.classList.remove("dkv-stale");
      bind();
      drawBars();
      drawMarks();
      drawOutlines();
    };

    // ---- files ------------------------------------------------------------------------------------------------
    const fileName = (ending) => {
      const layer = store.view.layer === null ? "" : `_layer${store.view.layer}`;
      return store.trace.name.replace(/_\d{4}-\d\d-\d\d\.json\.gz$/, "").replace(/\.json\.gz$/, "") + `_${key}${layer}.${ending}`;
    };

    // White paper, a legend and a caption, whatever the page's theme.
    async function saveImage(format) {
      const Plotly = await loadPlotly();
      const ink = { color: "#1b1f24" };
      const axis = (spec) => ({ ...spec, gridcolor: "#dfe3e8", linecolor: "#5b6470", tickfont: ink, title: { ...spec?.title, font: ink } });
      const { data, layout } = plot;
      // One entry per run: the window's part has the method's colour too.
      const named = data.map((trace) => {
        const run = store.trace.runs.find((item) => item.look === trace.meta);
        const color = run?.color[0];
        return { ...trace, showlegend: !/, window$/.test(trace.name ?? ""), ...(color ? { marker: { ...trace.marker, color } } : {}), ...(color && trace.line ? { line: { ...trace.line, color } } : {}) };
      });
      const { record } = store.trace;
      const plainly = (words) => words.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"); // Plotly reads some HTML
      const capacity = record.runs.find((run) => run.parameters.capacity)?.parameters.capacity;
      const { question } = record.prompt;
      const made = [record.model.name, DynamicKV.counting(record.prompt.length, "token"), capacity && `capacity ${capacity}`, lanes().join(", ")].filter(Boolean).join(" · ");
      const caption = `${titles.find((item) => item.key === key).title}: ${plainly(question.length > 80 ? `${question.slice(0, 80)}…` : question)}<br><span style="font-size:12px">${plainly(made)}</span>`;
      const url = await Plotly.toImage({
        data: outlined() ? [...named, outline()] : named,
        layout: { ...layout, paper_bgcolor: "#ffffff", plot_bgcolor: "#ffffff", font: { ...layout.font, ...ink }, showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
          title: { text: caption, font: { size: 15, ...ink } }, margin: { l: 60, r: 20, t: 110, b: 64 }, xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis) },
      }, { format, width: 900, height: height() + 124, scale: format === "png" ? 2 : 1 });
      const body = format === "svg" ? decodeURIComponent(url.slice(url.indexOf(",") + 1)) : Uint8Array.from(atob(url.slice(url.indexOf(",") + 1)), (char) => char.charCodeAt(0));
      DynamicKV.saveBlob(new Blob([body], { type: format === "svg" ? "image/svg+xml" : "image/png" }), fileName(format));
    }

    // Every trace's points: x, y and the name; bars that stand on others are given with what is below them.
    function saveTable() {
      const quoted = (text) => `"${String(text).replace(/"/g, '""')}"`;
      const { runs, layers, record } = store.trace;
      const rows = figure().layerAxis
        ? [["layer", ...runs.map((run) => quoted(run.label))], ...Array.from({ length: layers }, (_, layer) => [layer, ...runs.map((run) => run.budgets[layer])])]
        : [["position_percent", ...plot.data.map((trace) => quoted(trace.name))], ...plot.data[0].x.map((x, i) => [x, ...plot.data.map((trace) => trace.y[i])])];
      const note = `# ${record.model.name}, ${record.created}: ${figure().layerAxis ? "prompt tokens kept per layer and head, window included" : "per cent kept, over layers and heads"}`;
      DynamicKV.saveBlob(new Blob([`${note}\n${rows.map((row) => row.join(",")).join("\n")}\n`], { type: "text/csv" }), fileName("csv"));
    }

    find("save").addEventListener("change", (event) => {
      const format = event.target.value;
      event.target.value = "";
      if (!store.trace || store.trace.live || !plot.data) return; // while a run goes on the chart has no bars of its own
      if (format === "csv") saveTable(); else if (format) saveImage(format);
    });

    let roof = 0;
    let dragging = false;
    // Drag a bar: the pointer's height is the layer, its place along the axis the tokens.
    const drag = framed((x, y, layer) => {
      const { xaxis, yaxis } = plot._fullLayout;
      const box = plot.getBoundingClientRect();
      const at = layer ?? Math.round(yaxis.p2d(y - box.top - yaxis._offset));
      draft?.drag(at, xaxis.p2d(x - box.left - xaxis._offset));
    });
    let held = null;
    plot.addEventListener("pointerdown", (event) => {
      if (!outlined() || !draft.editable) return;
      const { yaxis } = plot._fullLayout;
      held = Math.round(yaxis.p2d(event.clientY - plot.getBoundingClientRect().top - yaxis._offset));
      if (held < 0 || held >= draft.budgets.length) { held = null; return; }
      dragging = true;
      DynamicKV.setLayer(held);
      drag(event.clientX, event.clientY, held);
      event.preventDefault();
      event.stopPropagation();
    }, true);
    window.addEventListener("pointermove", (event) => { if (held !== null) drag(event.clientX, event.clientY, held); });
    window.addEventListener("pointerup", () => { if (held !== null) { held = null; dragging = false; draw(); } });

    let bound = false;
    function bind() {
      if (bound) return;
      bound = true;
      plot.on("plotly_hover", (event) => {
        const axis = figure()?.layerAxis;
        if (axis) DynamicKV.setHover({ source: "figure", layer: event.points[0][axis] });
        else if (figure()?.positionAxis) DynamicKV.setHover({ source: "figure", ...stretch(event.points[0]) });
      });
      plot.on("plotly_unhover", () => DynamicKV.setHover(null, "figure"));
      plot.on("plotly_click", (event) => {
        const axis = figure()?.layerAxis;
        if (axis && !draft?.editable) DynamicKV.setLayer(event.points[0][axis]);
        else if (figure()?.positionAxis) DynamicKV.emit("reveal", stretch(event.points[0]).position);
      });
    }

    // The tokens of the document that one point of a line stands for.
    function stretch(point) {
      const [first, end] = store.trace.prompt.document_span;
      const parts = point.data.x.length;
      const at = (part) => first + Math.round(((end - first) * part) / parts);
      return { position: at(point.pointIndex), last: Math.max(at(point.pointIndex), at(point.pointIndex + 1) - 1) };
    }

    // Marks beside the layer axis: the chosen layer, and the layers that keep the token under the pointer.
    function drawMarks() {
      const spec = figure();
      const axis = plot._fullLayout?.yaxis;
      marks.hidden = !spec || spec.layerAxis !== "y" || !axis;
      if (marks.hidden) return;
      const { layers } = store.trace;
      const { length } = store.trace.prompt;
      const run = store.trace.runs[store.view.run];
      const position = store.hover?.position;
      if (marks.children.length !== layers) marks.replaceChildren(...Array.from({ length: layers }, () => make("i")));
      const height = Math.abs(axis.l2p(1) - axis.l2p(0));
      for (let layer = 0; layer < layers; layer += 1) {
        const mark = marks.children[layer];
        mark.style.top = `${axis._offset + axis.l2p(layer) - height / 2}px`;
        mark.style.height = `${height}px`;
        mark.classList.toggle("dkv-on", layer === store.view.layer || layer === store.hover?.layer);
        mark.classList.toggle("dkv-keeps", position !== undefined && DynamicKV.seen(run, null, layers, length).kept[layer * length + position] > 0);
      }
    }

    // The same outline on screen, as boxes over the chart: Plotly would take some 40 ms a time, and a slider moves it.
    function drawOutlines() {
      const { xaxis, yaxis } = plot._fullLayout ?? {};
      outlines.hidden = !outlined() || !yaxis;
      if (outlines.hidden) return;
      const { budgets } = draft;
      if (outlines.children.length !== budgets.length) outlines.replaceChildren(...budgets.map(() => make("i")));
      const height = 0.96 * Math.abs(yaxis.l2p(1) - yaxis.l2p(0));
      const left = xaxis._offset + xaxis.l2p(0);
      budgets.forEach((budget, layer) => {
        const { style } = outlines.children[layer];
        style.left = `${left}px`;
        style.width = `${Math.min(xaxis._length, xaxis.l2p(budget) - xaxis.l2p(0))}px`;
        style.top = `${yaxis._offset + yaxis.l2p(layer) - height / 2}px`;
        style.height = `${height}px`;
      });
    }

    function open(next) {
      if (key === next || !titles.some((item) => item.key === next)) return;
      key = next;
      window.Plotly?.purge(plot);
      bound = false;
      show();
    }

    function showTabs() {
      element.querySelector(".dkv-figure-tabs").replaceChildren(...titles.map((item) => {
        const button = make("button", { type: "button" }, item.title);
        button.setAttribute("aria-pressed", String(item.key === key));
        button.addEventListener("click", () => open(item.key));
        return button;
      }));
    }

    function showKeys() {
      find("keys").replaceChildren(...store.trace.runs.map((run) => {
        const key_ = make("button", { type: "button", title: "Show or hide", data: { method: run.look } },
          make("span", { className: "dkv-glyph", ariaHidden: "true" }, run.predicted ? "▭" : run.glyph), run.label);
        key_.setAttribute("aria-pressed", String(!hidden.has(run.look)));
        key_.disabled = Boolean(run.predicted);
        key_.addEventListener("click", () => { if (!hidden.delete(run.look)) hidden.add(run.look); showKeys(); showNote(); draw(); });
        return key_;
      }),
      ...(figure()?.layerAxis && store.trace.runs.some((run) => run.window) ? [make("span", { className: "dkv-key-window" }, "observation window")] : []));
    }

    function showNote() {
      const off = figure().layerAxis ? store.trace.runs.filter((run) => hidden.has(run.look)) : [];
      const full = hidden.has("FullKV") && figure().layerAxis;
      find("wide").hidden = full || !figure().wideLimit;
      const words = off.length && `${off.map((run) => run.label).join(", ")} ${off.length > 1 ? "are" : "is"} switched off to make room: ${off.length > 1 ? "their keys show them" : "its key shows it"}.`;
      find("note").textContent = [!full && figure().note, words].filter(Boolean).join(" ");
    }

    // Many lanes are too thin to read: FullKV's, which are all as long as the prompt, those equal to another's, and what is
    // more than fits, wait behind their keys.
    function crowded(runs) {
      if (runs.length < MANY) return new Set();
      const seen = new Set();
      const order = DynamicKV.runOrder().filter((index) => runs[index].look !== "FullKV").sort((a, b) => DynamicKV.added(runs[b]) - DynamicKV.added(runs[a]));
      const shown = order.filter((index) => { const same = store.trace.live ? index : String(runs[index].budgets); return !seen.has(same) && seen.add(same); }).slice(0, MANY);
      return new Set(runs.filter((_, index) => !shown.includes(index)).map((run) => run.look));
    }

    function show() {
      if (store.trace && !figure()) key = titles[0].key;
      showTabs();
      if (!figure()) return;
      showKeys();
      showNote();
      plot.style.height = `${height()}px`;
      plot.classList.toggle("dkv-stale", isLive()); // its bars are those of the run before
      axes = !isLive();
      if (axes) draw();
    }

    find("wide").addEventListener("click", (event) => {
      wide = !wide;
      event.currentTarget.setAttribute("aria-pressed", String(wide));
      draw();
    });
    // While a run goes on Plotly draws the axes alone: with the bars it takes the browser longer than all other views together.
    const isLive = () => Boolean(store.trace?.live && figure()?.layerAxis === "y");
    const drawBars = () => DynamicKV.liveBars(find("bars"), plot, isLive() && drawn === settled ? lanes() : null, SPAN);
    // The axes wait for the first row of the maps.
    let axes = true;
    const framedFilm = framed(() => {
      if (!isLive()) draw();
      else if (axes) drawBars();
      else if (store.film?.step) { axes = true; idle(draw, { timeout: 500 }); }
    });
    // The chart itself is drawn anew only where its axis has no room for the outline.
    const framedDraft = framed(() => {
      const room = plot.layout?.xaxis?.range?.[1];
      if (drawn !== settled || !outlined() || !(Math.max(...draft.budgets) <= room)) draw(); else drawOutlines();
    });
    on("trace", (trace) => { if (!trace) return; hidden = crowded(trace.runs); show(); });
    on("theme", draw);
    on("film", framedFilm);
    const framedMarks = framed(drawMarks);
    for (const name of ["view", "hover"]) on(name, framedMarks);
    on("runs", () => { if (store.trace) showKeys(); });
    on("draft", (next) => { draft = next; for (const box of [plot, outlines]) box.classList.toggle("dkv-editable", Boolean(next?.editable)); framedDraft(); });
    // The chart library is large: it waits until the rest of the page is painted and quiet.
    idle(() => { painted = true; draw(); }, { timeout: 1000 });
    new ResizeObserver(framed(() => { drawMarks(); drawOutlines(); })).observe(plot);
    if (store.trace) show();
    return () => {};
  });
})();
