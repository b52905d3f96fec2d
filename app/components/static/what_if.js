// What if: other settings on the prompt that was read. The server chooses again without the model; what it would keep is shown at
// once as "predicted, not run", and answered with on request. Drawn budgets keep their total whatever is dragged.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { store, on, make, plain } = DynamicKV;
  const STEP = 8; // tokens per press of + or -
  const SHAPES = {
    uniform: () => 1,
    pyramid: (layer, layers) => 1.75 - (1.5 * layer) / Math.max(1, layers - 1),
    rising: (layer, layers) => 0.25 + (1.5 * layer) / Math.max(1, layers - 1),
  };

  // Whole numbers in [least, most] that follow the weights and add up to the total (as near as the bounds allow).
  DynamicKV.share = (weights, total, least, most) => {
    const out = weights.map(() => least);
    let rest = Math.min(total, most * weights.length) - least * weights.length;
    while (rest > 0) {
      const open = out.flatMap((value, i) => (value < most ? [i] : []));
      const sum = open.reduce((all, i) => all + weights[i], 0);
      const gain = open.map((i) => Math.min(most - out[i], Math.floor(sum > 0 ? (rest * weights[i]) / sum : rest / open.length)));
      if (!gain.some(Boolean)) { open.sort((a, b) => weights[b] - weights[a]).slice(0, rest).forEach((i) => { out[i] += 1; }); break; }
      open.forEach((i, k) => { out[i] += gain[k]; rest -= gain[k]; });
    }
    return out;
  };

  // The form's slider starts where this panel's does, above the window; the field beside it takes what is typed, and the form says
  // what is wrong with it.
  function offerCapacities({ min }, looks = 40) {
    const slider = document.querySelector("#dkv-capacity input[type=range]");
    if (!slider) { if (looks) setTimeout(() => offerCapacities({ min }, looks - 1), 250); return; }
    slider.min = min;
    const least = document.querySelector("#dkv-capacity [data-testid=min-value]");
    if (least) least.textContent = min;
  }

  DynamicKV.register("whatif", (element, props, link) => {
    const find = (role) => element.querySelector(`[data-role="${role}"]`);
    let form = null; // {methods: {name: [setting]}, drawn: [setting], controls: {setting: its control}, defaults}
    let method = null;
    let settings = {};
    let drawn = null; // budgets per layer while drawing
    let spans = { pinned: [], evicted: [] }; // [first, end) positions that are kept or dropped whatever the method says
    let busy = false;
    let again = false;
    let error = "";

    const key = () => store.trace?.key;
    const ready = () => Boolean(store.trace?.ready && store.server?.predict);
    const predicted = () => (store.trace?.runs.at(-1)?.predicted ? store.trace.runs.at(-1) : null);
    const asked = () => {
      const taken = drawn ? form.drawn : form.methods[method];
      const wanted = Object.fromEntries(taken.filter((name) => settings[name] !== undefined).map((name) => [name, settings[name]]));
      return { key: key(), ...spans, ...(drawn ? { budgets: drawn } : { method }), settings: wanted };
    };

    // One question at a time; while it is answered only the latest next one waits.
    async function predict() {
      if (!ready() || !form) return;
      if (busy) { again = true; return; }
      busy = true;
      const { trace } = store;
      const reply = await store.server.predict(asked()).catch(() => null);
      busy = false;
      if (trace === store.trace) {
        error = reply ? reply.error ?? "" : "The server did not answer: try again.";
        if (reply?.run) {
          DynamicKV.setPredicted({ ...reply.run, label: drawn ? "Your own" : `${method}, what if` });
          tellDraft();
        }
        say();
      }
      if (again) { again = false; predict(); }
    }

    function tellDraft() {
      const budgets = drawn ?? predicted()?.budgets ?? null;
      DynamicKV.emit("draft", budgets && { budgets, editable: Boolean(drawn), drag });
    }

    // ---- drawing ----------------------------------------------------------------------------------------------
    const least = () => Number(settings.window_size ?? 8);
    const most = () => store.trace.prompt.length;
    const total = () => Math.max(settings.capacity, least() + 1) * store.trace.layers;
    function startFrom(name) {
      const { layers } = store.trace;
      const shown = store.trace.runs[store.view.run];
      const shape = SHAPES[name] ?? ((layer) => Math.max(0, shown.budgets[layer] - least()));
      drawn = DynamicKV.share(Array.from({ length: layers }, (_, layer) => shape(layer, layers)), total(), least(), most());
      changed();
    }
    // One layer gets what it is given; the others share the rest as they did before.
    function drag(layer, tokens) {
      if (!drawn || !(layer in drawn)) return;
      const others = drawn.length - 1;
      const roof = Math.min(most(), total() - least() * others);
      const value = Math.round(Math.min(roof, Math.max(least(), total() - most() * others, tokens)));
      const weights = drawn.filter((_, i) => i !== layer).map((budget) => Math.max(0.5, budget - least()));
      const rest = DynamicKV.share(weights, total() - value, least(), most());
      rest.splice(layer, 0, value);
      drawn = rest;
      changed();
    }
    function nudge(step) {
      if (!drawn) return;
      const layer = store.view.layer ?? 0;
      if (store.view.layer === null) DynamicKV.setLayer(0);
      drag(layer, drawn[layer] + step);
    }

    // ---- pinned and evicted passages --------------------------------------------------------------------------
    const marked = () => spans.pinned.length + spans.evicted.length > 0;
    const without = (list, first, end) => list.flatMap(([from, to]) => [[from, Math.min(to, first)], [Math.max(from, end), to]].filter(([a, b]) => a < b));
    on("edit", ({ kind, first, end, undo }) => {
      if (!form || !store.trace) return;
      const other = kind === "pinned" ? "evicted" : "pinned";
      const kept = without(spans[kind], first, end);
      spans = { [kind]: undo ? kept : [...kept, [first, end]].sort((a, b) => a[0] - b[0]), [other]: without(spans[other], first, end) };
      changed();
    });
    function showSpans() {
      const { text, starts, ends } = store.trace.prompt;
      const chip = (kind, [first, end]) => {
        const remove = make("button", { type: "button", className: "dkv-step" }, "×");
        remove.setAttribute("aria-label", `No longer ${kind}`);
        remove.addEventListener("click", () => { spans = { ...spans, [kind]: without(spans[kind], first, end) }; if (marked() || predicted()) changed(); else say(); });
        return make("span", { className: "dkv-marked-chip" }, make("b", {}, kind), make("q", {}, text.slice(starts[first], ends[end - 1]).replace(/\s+/g, " ")), DynamicKV.counting(end - first, "token"), remove);
      };
      find("spans").hidden = !marked();
      find("spans").replaceChildren(...["pinned", "evicted"].flatMap((kind) => spans[kind].map((span) => chip(kind, span))));
    }

    function changed() {
      if (drawn) tellDraft(); // otherwise the outline is the last prediction's and stays until the next
      say();
      predict();
    }

    // ---- controls ---------------------------------------------------------------------------------------------
    function control(name) {
      const { label, options, ...range } = form.controls[name];
      const value = settings[name];
      if (options) {
        const select = make("select", { data: { setting: name } }, ...options.map((item) => make("option", { value: item, selected: item === value }, item.replace("_", " "))));
        return make("label", {}, label, select);
      }
      const limit = name === "capacity" ? Math.max(range.min, Math.min(range.max, store.trace?.prompt.length ?? range.max)) : range.max;
      const input = make("input", { type: "range", ...range, max: String(limit), data: { setting: name } });
      input.value = String(value);
      input.setAttribute("aria-label", label);
      return make("label", {}, make("span", {}, `${label} `, make("b", {}, String(value))), input);
    }

    function build() {
      if (!form || !store.trace) return;
      const names = Object.keys(form.methods);
      const picker = make("select", { data: { setting: "method" } }, ...names.map((name) => make("option", { value: name, selected: name === method }, name)));
      const shown = drawn ? ["capacity", ...form.drawn] : form.methods[method];
      find("sliders").replaceChildren(...(drawn ? [] : [make("label", {}, "Method", picker)]), ...shown.map(control));
      for (const node of element.querySelectorAll("[data-setting], [data-start], [data-role=draw]")) node.disabled = !ready();
    }

    function say() {
      const run = predicted();
      const on_ = ready();
      element.querySelector(".dkv-what-if").hidden = !store.trace?.runs.length || !store.server?.predict;
      find("read").hidden = on_ || !store.trace?.key;
      find("read").textContent = `Read the prompt (about ${Math.max(1, Math.round(store.trace?.record.prefill_seconds ?? 1))} s)`;
      find("answer").hidden = !run;
      find("back").hidden = !run && !drawn && !marked();
      showSpans();
      find("sliders").hidden = !on_;
      // Budgets are given for the layers that are compressed: with sliding-window layers between them there is nothing to draw.
      element.querySelector(".dkv-draw").hidden = !on_ || store.trace.record.model.layer_kinds?.some((kind) => kind !== "full") || Boolean(store.trace.record.model.sliding_layers?.length);
      find("chip").textContent = run ? "predicted, not run" : "";
      find("chip").dataset.tone = "loud";
      find("drawing").hidden = !drawn;
      find("draw").setAttribute("aria-pressed", String(Boolean(drawn)));
      if (drawn) {
        const layer = store.view.layer;
        find("total").textContent = `${plain(drawn.reduce((a, b) => a + b, 0))} of ${plain(total())} tokens${layer === null ? "" : ` · layer ${layer}: ${plain(drawn[layer])}`}`;
      }
      find("words").textContent = error || (run ? `${run.words}, chosen in ${Math.max(1, Math.round(1000 * run.seconds))} ms without the model. ${windowWords()}`
        : on_ ? `Move anything: the views show at once what would be kept. ${windowWords()}`
          : store.trace?.live ? "The prompt is being read." : `This run was not made here just now: its prompt must be read once before ${marked() ? "the change can be shown" : "other settings can be tried"}.`);
      find("words").classList.toggle("dkv-wrong", Boolean(error));
      DynamicKV.emit("standing", { ready: on_, predicted: Boolean(run), spans, error, seconds: Math.max(1, Math.round(store.trace?.record.prefill_seconds ?? 1)) });
      if (drawn && !error) find("words").textContent = `Drag the outlined bars in the chart: the total stays. ${find("words").textContent}`;
    }

    // Whose attention decides: with a chat model and a small window mostly that of the template's end.
    function windowWords() {
      const { prompt } = store.trace;
      const size = Math.min(settings.window_size ?? 0, prompt.length);
      if (!size || !form.methods[method].includes("window_size")) return "";
      const end = prompt.question_aware ? prompt.length : prompt.document_span[1];
      const [first, last] = prompt.question_span;
      const decides = `What is kept follows the attention paid by the last ${DynamicKV.counting(size, "token")} of the`;
      if (!prompt.question_aware) return `${decides} document (the observation window); the question is not seen.`;
      const within = (from, to) => Math.max(0, Math.min(to, end) - Math.max(from, end - size));
      const parts = [[within(0, first), "before the question"], [within(first, last), "of the question"], [within(last, end), "of the chat template after it"]];
      const named = parts.filter(([tokens]) => tokens).map(([tokens, place]) => `${plain(tokens)} ${place}`);
      return `${decides} prompt (the observation window): ${named.join(", ")}.`;
    }

    find("sliders").addEventListener("input", (event) => {
      const name = event.target.dataset.setting;
      if (name === "method") { method = event.target.value; build(); changed(); return; }
      settings[name] = form.controls[name].options ? event.target.value : Number(event.target.value);
      const shown = event.target.parentElement.querySelector("b");
      if (shown) shown.textContent = String(settings[name]);
      if (drawn) drawn = DynamicKV.share(drawn.map((budget) => Math.max(0.5, budget - least())), total(), least(), most());
      changed();
    });
    find("draw").addEventListener("click", () => { if (drawn) takeBack(); else { startFrom("shown"); build(); say(); document.querySelector(".dkv-figures")?.scrollIntoView({ block: "nearest", behavior: DynamicKV.reducedMotion() ? "auto" : "smooth" }); } });
    for (const button of element.querySelectorAll("[data-start]")) button.addEventListener("click", () => startFrom(button.dataset.start));
    find("less").addEventListener("click", () => nudge(-STEP));
    find("more").addEventListener("click", () => nudge(STEP));
    const answerWith = () => { if (predicted()) link.trigger("answer", asked()); };
    const readPrompt = () => link.trigger("read", { key: key() });
    find("answer").addEventListener("click", answerWith);
    find("read").addEventListener("click", readPrompt);
    // The evidence holds the same two buttons, beside the passage.
    on("answerwith", answerWith);
    on("readprompt", readPrompt);
    function takeBack() {
      drawn = null;
      error = "";
      spans = { pinned: [], evicted: [] };
      DynamicKV.setPredicted(null);
      adopt();
      tellDraft();
    }
    find("back").addEventListener("click", takeBack);

    // Begin with the settings of the run that is looked at.
    function adopt() {
      drawn = null;
      error = "";
      if (!form || !store.trace) { say(); return; }
      const fits = (item) => item?.method in form.methods && !item.predicted;
      const shown = store.trace.runs[store.view.run];
      const run = fits(shown) ? shown : store.trace.runs.findLast(fits);
      method = run?.method ?? Object.keys(form.methods).at(-1);
      const taken = form.methods[method] ?? [];
      const known = Object.fromEntries(Object.entries(run?.parameters ?? {}).filter(([name]) => name in form.controls && taken.includes(name)));
      settings = { capacity: 128, ...form.defaults, ...known };
      build();
      say();
    }
    on("trace", (trace) => {
      adopt();
      const last = trace?.runs.at(-1);
      spans = { pinned: trace ? DynamicKV.spansOf(last, "pinned") : [], evicted: trace ? DynamicKV.spansOf(last, "evicted") : [] };
      if (form && trace) say();
      tellDraft();
    });
    on("view", () => { if (store.trace) say(); });
    return (payload) => {
      if (payload?.methods) { form = payload; offerCapacities(form.controls.capacity); }
      if (payload?.key && store.trace) Object.assign(store.trace, { key: payload.key, ready: true });
      if (store.trace && !predicted()) adopt();
      if (payload?.key && marked()) changed();
    };
  });
})();
