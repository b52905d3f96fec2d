// Charts: draws any registered view with Plotly, which is loaded when the rest of the page is painted.
// Films are stepped here, by restyling bars: Plotly's own frames never reach the page through Gradio.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { store, on, make, framed } = DynamicKV;
  const FRAME_MS = 900;
  let loading = null;

  function loadPlotly() {
    loading ??= new Promise((resolve, reject) => {
      if (window.Plotly) { resolve(window.Plotly); return; }
      const root = window.gradio_config?.root || "";
      const script = make("script", { src: `${root}/explorer/plotly.js`, async: true });
      script.onload = () => resolve(window.Plotly);
      script.onerror = () => { loading = null; reject(new Error("the chart library did not load")); };
      document.head.append(script);
    });
    return loading;
  }
  DynamicKV.loadPlotly = loadPlotly;

  DynamicKV.register("figures", (element, props) => {
    const find = (role) => element.querySelector(`[data-role="${role}"]`);
    const plot = find("plot");
    const marks = find("marks");
    const slider = find("step");
    const titles = JSON.parse(props.titles);
    let key = titles[0].key;
    let timer = null;
    let wide = false;
    let painted = false;
    let drawn = 0;

    const figure = () => store.trace?.figures[key];
    const isFilm = () => figure()?.steps.length > 1;
    const current = () => figure().steps[Number(slider.value)];

    // The method's colour in this theme; bars carry their method in `meta`.
    function themed(data) {
      const dark = DynamicKV.dark() ? 1 : 0;
      return data.map((trace) => {
        const run = store.trace.runs.find((item) => item.method === trace.meta);
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

    const limit = () => (wide && figure().wideLimit ? figure().wideLimit : isFilm() ? current().limit : null);

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
      let data = themed(spec.data);
      if (isFilm()) data = data.map((trace, i) => ({ ...trace, x: current().x[i], base: current().base[i] }));
      const layout = themedLayout(spec.layout);
      if (limit()) layout.xaxis = { ...layout.xaxis, range: [0, limit()] };
      plot.style.height = `${spec.height}px`;
      await Plotly.react(plot, data, layout, config());
      bind();
      drawMarks();
    };

    let bound = false;
    function bind() {
      if (bound) return;
      bound = true;
      plot.on("plotly_hover", (event) => {
        const axis = figure()?.layerAxis;
        if (axis) DynamicKV.setHover({ source: "figure", layer: event.points[0][axis] });
      });
      plot.on("plotly_unhover", () => DynamicKV.setHover(null));
      plot.on("plotly_click", (event) => {
        const axis = figure()?.layerAxis;
        if (axis) DynamicKV.setLayer(event.points[0][axis]);
      });
    }

    // Marks beside the layer axis: the chosen layer, and the layers that keep the token under the pointer.
    function drawMarks() {
      const spec = figure();
      const axis = plot._fullLayout?.yaxis;
      marks.hidden = !spec || spec.layerAxis !== "y" || !axis;
      if (marks.hidden) return;
      const { layers } = store.trace;
      const { length } = store.trace.prompt;
      const run = store.trace.runs[store.run];
      const position = store.hover?.position;
      if (marks.children.length !== layers) marks.replaceChildren(...Array.from({ length: layers }, () => make("i")));
      const height = Math.abs(axis.l2p(1) - axis.l2p(0));
      for (let layer = 0; layer < layers; layer += 1) {
        const mark = marks.children[layer];
        mark.style.top = `${axis._offset + axis.l2p(layer) - height / 2}px`;
        mark.style.height = `${height}px`;
        mark.classList.toggle("dkv-on", layer === store.layer || layer === store.hover?.layer);
        mark.classList.toggle("dkv-keeps", position !== undefined && run.kept[layer * length + position] > 0);
      }
    }

    function stop() {
      clearInterval(timer);
      timer = null;
      find("play").textContent = "▶";
      find("play").setAttribute("aria-label", "Play the updates");
    }

    function setStep(step) {
      slider.value = String(step);
      showStep();
      draw();
    }

    function showStep() {
      const film = isFilm();
      find("player").classList.toggle("dkv-hidden", !film);
      if (!film) return;
      find("label").textContent = current().label;
      find("step-note").textContent = current().note;
    }

    function play() {
      if (timer) { stop(); return; }
      const last = figure().steps.length - 1;
      if (Number(slider.value) >= last) setStep(0);
      find("play").textContent = "❚❚";
      find("play").setAttribute("aria-label", "Pause");
      timer = setInterval(() => {
        setStep(Number(slider.value) + 1);
        if (Number(slider.value) >= last) stop();
      }, FRAME_MS);
    }

    function showTabs() {
      element.querySelector(".dkv-figure-tabs").replaceChildren(...titles.map((item) => {
        const button = make("button", { type: "button" }, item.title);
        button.setAttribute("aria-pressed", String(item.key === key));
        button.addEventListener("click", () => { if (key !== item.key) { key = item.key; window.Plotly?.purge(plot); bound = false; show(); } });
        return button;
      }));
    }

    function showKeys() {
      find("keys").replaceChildren(...store.trace.runs.map((run) => make("span", { data: { method: run.method } },
        make("span", { className: "dkv-glyph", ariaHidden: "true" }, run.glyph), run.method)),
      ...(figure()?.layerAxis && store.trace.runs.some((run) => run.window) ? [make("span", { className: "dkv-key-window" }, "observation window")] : []));
    }

    function show() {
      stop();
      showTabs();
      if (!figure()) return;
      showKeys();
      slider.max = String(Math.max(0, figure().steps.length - 1));
      slider.value = slider.max;
      find("wide").hidden = !figure().wideLimit;
      find("note").textContent = figure().note;
      plot.style.height = `${figure().height}px`;
      showStep();
      draw();
    }

    find("play").addEventListener("click", () => {
      if (DynamicKV.reducedMotion()) { const last = figure().steps.length - 1; setStep((Number(slider.value) + 1) % (last + 1)); } else play();
    });
    find("back").addEventListener("click", () => { stop(); setStep(Math.max(0, Number(slider.value) - 1)); });
    find("forward").addEventListener("click", () => { stop(); setStep(Math.min(Number(slider.max), Number(slider.value) + 1)); });
    slider.addEventListener("input", () => { stop(); showStep(); framedDraw(); });
    find("wide").addEventListener("click", (event) => {
      wide = !wide;
      event.currentTarget.setAttribute("aria-pressed", String(wide));
      draw();
    });
    const framedDraw = framed(draw);
    on("trace", (trace) => { if (trace) show(); });
    on("theme", draw);
    const framedMarks = framed(drawMarks);
    for (const name of ["layer", "hover", "method"]) on(name, framedMarks);
    // The chart library is large: it waits until the rest of the page is painted and quiet.
    const idle = window.requestIdleCallback || ((action) => setTimeout(action, 200));
    idle(() => { painted = true; draw(); }, { timeout: 1000 });
    new ResizeObserver(framedMarks).observe(plot);
    if (store.trace) show();
    return () => {};
  });
})();
