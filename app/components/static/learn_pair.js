// Same document, two questions: DynamicKV's budgets and kept tokens of two recorded runs, in the explorer's comparison colours.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { make, plain } = DynamicKV;
  const MARKS = ["dkv-pair-both", "dkv-pair-only-a", "dkv-pair-only-b"];

  DynamicKV.learnFigure((learn, find, { fetched }) => {
    const box = find("pair-text");
    const text = DynamicKV.textLayer([...box.children]);
    const slider = find("pair-layer");
    let pair = null;
    let views = null; // both records, and both runs with the question's tokens left out

    // The prompts differ after the document: both runs are cut to what they share.
    function shared(traces) {
      const length = traces[0].prompt.document_span[1];
      return traces.map((trace) => {
        const run = trace.runs.find((item) => item.method === "DynamicKV");
        const kept = new Uint8Array(trace.layers * length);
        for (let layer = 0; layer < trace.layers; layer += 1) kept.set(run.kept.subarray(layer * trace.prompt.length, layer * trace.prompt.length + length), layer * length);
        return { kept, heads: run.heads, budgets: run.budgets, color: run.color };
      });
    }

    async function load() {
      pair = await fetched("pair");
      const traces = pair.traces.map(DynamicKV.decode);
      views = { traces, runs: shared(traces), length: traces[0].prompt.document_span[1] };
      for (const place of learn.querySelectorAll("[data-pair]")) place.textContent = pair.numbers[place.dataset.pair] ?? "";
      find("questions").replaceChildren(...["A", "B"].map((name, i) => make("div", { data: { question: name } },
        make("p", {}, make("b", {}, `${name}: `), traces[i].record.prompt.question),
        make("dl", {}, ...Object.entries(pair.answers[i]).map(([method, answer]) => make("div", {}, make("dt", {}, method), make("dd", {}, answer)))))));
      find("pair-keys").replaceChildren(...["A", "B"].map((name) => make("span", { className: `dkv-key-${name.toLowerCase()}` }, `question ${name}`)));
      const { prompt } = traces[0];
      text.fill({ ...prompt, length: views.length });
      slider.max = String(traces[0].layers - 1);
      draw();
    }

    function draw() {
      if (!views || !learn.offsetParent) return;
      const layer = Number(slider.value) < 0 ? null : Number(slider.value);
      const { layers } = views.traces[0];
      const [a, b] = views.runs.map((run) => ({ ...run, layersKeeping: {} }));
      text.paint(Uint8Array.from(DynamicKV.difference(a, b, layer, null, layers, views.length)), MARKS);
      const margin = DynamicKV.margin(layers) + 1;
      find("pair-label").textContent = layer === null ? `all: ${margin} layers or more apart` : `${layer}: ${plain(a.budgets[layer])} for A, ${plain(b.budgets[layer])} for B`;
      slider.setAttribute("aria-valuetext", layer === null ? `all layers, ${margin} or more apart` : `layer ${layer}`);
    }

    function chart() {
      if (!views || !learn.offsetParent) return;
      const look = (method, name) => ({ look: method, color: ["light", "dark"].map((theme) => DynamicKV.cssColor(`--dkv-${name}-${theme}`)) });
      DynamicKV.drawFigure(find("pair-plot"), pair.figure, [look("DynamicKV", "question-a"), look("SnapKV", "question-b")]);
    }

    slider.addEventListener("input", draw);
    load().then(chart).catch((error) => { find("questions").textContent = `The two questions did not load: ${error.message}.`; });
    return { shown() { draw(); chart(); }, theme: chart };
  });
})();
