// Earlier runs of this tab: their keys and what they were about lie in its sessionStorage, the runs themselves on the server.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { make, store, on } = DynamicKV;
  const [KEY, MOST] = ["dkv-history", 12];
  const read = () => { try { const found = JSON.parse(sessionStorage.getItem(KEY)); return Array.isArray(found) ? found : []; } catch { return []; } };
  const write = (runs) => { try { sessionStorage.setItem(KEY, JSON.stringify(runs)); } catch { /* without storage there is no history */ } };

  function note(trace) {
    const { record, key, example } = trace;
    if (!key || !record.runs.length) return;
    const capacity = record.runs.find((run) => run.parameters.capacity)?.parameters.capacity;
    const { question } = record.prompt;
    const about = { key, example: Boolean(example), question: question.slice(0, 120), model: record.model.name, tokens: record.prompt.length, capacity: capacity ?? null,
      methods: trace.runs.filter((run) => !run.predicted).map((run) => run.label).join(", ").slice(0, 160), at: new Date().toTimeString().slice(0, 5) };
    // A prompt that was read again has a key of its own and stands for the same run.
    const same = (run) => run.key === key || (run.question === about.question && run.methods === about.methods && run.tokens === about.tokens && run.capacity === about.capacity && run.model === about.model);
    write([about, ...read().filter((run) => !same(run))].slice(0, MOST));
  }

  function show() {
    const menu = document.querySelector('.dkv-onward [data-role="history"]');
    if (!menu) return;
    const runs = read().filter((run) => run && run.key !== store.trace?.key);
    menu.hidden = !runs.length;
    menu.querySelector('[data-role="earlier"]').replaceChildren(...runs.map((run) => {
      const button = make("button", { type: "button", className: "dkv-history-run" }, make("b", {}, run.question), make("small", {}, [run.at, run.model, run.capacity && `capacity ${run.capacity}`, run.methods].filter(Boolean).join(" · ")));
      button.addEventListener("click", () => { menu.open = false; DynamicKV.restoreRun?.(run.key); });
      return button;
    }));
  }
  on("trace", (trace) => { if (trace) { note(trace); show(); } });
  // The panel may come after the first record.
  DynamicKV.showHistory = show;
})();
