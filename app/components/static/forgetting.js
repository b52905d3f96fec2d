// The answer, token by token: where a method chose again while it answered, what it still holds of the prompt (every view draws
// `run.now`) and of the answer itself. The first place is the run as the prompt left it.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { store, on, emit, make, plain } = DynamicKV;
  const FAINT = 0.3; // opacity of a token that is held nowhere

  const choicesOf = (run) => (Array.isArray(run?.forgotten) ? run.forgotten : []);

  // The last choice by then, with its bits counted once: {position, length, counts (layers x length), budgets}.
  function choiceAt(run, answered, layers, length) {
    const found = choicesOf(run).filter((choice) => choice.position <= answered).at(-1);
    if (!found) return null;
    if (!found.counts) {
      const { heads, bits } = found.retained;
      const all = length + found.position;
      const counts = DynamicKV.keptHeads(DynamicKV.bytesIn(bits), heads, layers, all);
      const kept = new Uint8Array(layers * length);
      const budgets = [];
      for (let layer = 0; layer < layers; layer += 1) {
        const row = counts.subarray(layer * all, (layer + 1) * all);
        kept.set(row.subarray(0, length), layer * length);
        budgets.push(row.reduce((sum, count) => sum + count, 0) / heads);
      }
      Object.defineProperty(found, "counts", { value: counts });
      Object.defineProperty(found, "kept", { value: kept });
      Object.defineProperty(found, "budgets", { value: budgets });
    }
    return found;
  }

  /** What a run holds after so many answer tokens: of the prompt for the views, and the share of heads that hold each token said. */
  DynamicKV.heldWhileAnswering = (trace, run, answered) => {
    const { layers, prompt: { length } } = trace;
    const said = Math.min(answered, run.pieces.length);
    const choice = choiceAt(run, said, layers, length);
    const heads = choice?.retained.heads ?? run.heads;
    const budgets = (choice?.budgets ?? run.budgets).map((held) => held + said - (choice?.position ?? 0));
    const before = run.budgets.reduce((sum, held) => sum + held, 0);
    const bytes = before ? (run.kv_bytes * budgets.reduce((sum, held) => sum + held, 0)) / before : 0;
    const shares = Array.from({ length: said }, (_, token) => {
      if (!choice || token >= choice.position) return 1;
      let sum = 0;
      for (let layer = 0; layer < layers; layer += 1) sum += choice.counts[layer * (length + choice.position) + length + token];
      return sum / (layers * heads);
    });
    const now = { kept: choice?.kept ?? run.kept, budgets, read: new Uint8Array(layers).fill(1), count: layers, bytes, full: (run.kv_bytes_full * (length + said)) / length };
    return { choice, shares, now };
  };

  DynamicKV.register("forgetting", (element) => {
    const find = (role) => element.querySelector(`[data-role="${role}"]`);
    const line = element.querySelector(".dkv-forgetting");
    const slider = find("step");
    let at = 0;
    const forgetful = () => (store.trace?.runs ?? []).filter((run) => choicesOf(run).length);
    const total = () => Math.max(0, ...forgetful().map((run) => run.pieces.length));

    function go(next) {
      const { trace } = store;
      if (!trace || trace.live) return;
      at = Math.max(0, Math.min(total(), next));
      for (const run of trace.runs) {
        if (at && !run.predicted) run.now = DynamicKV.heldWhileAnswering(trace, run, at).now;
        else delete run.now;
      }
      store.film = at ? { step: trace.layers, total: trace.layers, live: false, answered: at } : null;
      document.body.classList.remove("dkv-filming");
      emit("film", store.film);
      say();
    }

    function say() {
      const runs = forgetful();
      line.hidden = !runs.length || Boolean(store.trace?.live);
      if (line.hidden) { find("answer").replaceChildren(); return; }
      slider.max = String(total());
      slider.value = String(at);
      const run = store.trace.runs[store.view.run];
      const own = run && !run.predicted ? run : runs[0];
      const { choice, shares, now } = DynamicKV.heldWhileAnswering(store.trace, own, at);
      find("where").textContent = `${plain(at)} of ${plain(total())} answer tokens`;
      const mean = now.budgets.reduce((sum, held) => sum + held, 0) / now.budgets.length;
      const times = choicesOf(own).filter((item) => item.position <= at).length;
      const moment = choice ? `${own.label} chose again ${times === 1 ? "once" : `${times} times`}, last after ${plain(choice.position)}` : choicesOf(own).length ? `${own.label} chooses first after ${plain(choicesOf(own)[0].position)}` : `${own.label} keeps every answer token`;
      find("note").textContent = `${moment}: holds ${plain(Math.round(mean))} per layer`;
      slider.setAttribute("aria-valuetext", `${find("where").textContent}; ${find("note").textContent}`);
      find("answer").replaceChildren(...shares.map((share, token) => {
        const span = make("span", { title: `held by ${Math.round(100 * share)} % of heads and layers`, className: share > 0 ? "" : "dkv-gone" }, own.pieces[token]);
        span.style.opacity = String(FAINT + (1 - FAINT) * share);
        return span;
      }));
    }

    find("back").addEventListener("click", () => go(at - 1));
    find("forward").addEventListener("click", () => go(at + 1));
    slider.addEventListener("input", () => go(Number(slider.value)));
    element.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: 1, ArrowDown: -1 }[event.key];
      const to = { Home: 0, End: total() }[event.key];
      if ((!by && to === undefined) || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      event.stopPropagation();
      go(by ? at + by : to);
    });
    on("trace", () => { at = 0; say(); });
    on("film", (film) => { if (at && film?.answered === undefined) { at = 0; say(); } });
    on("view", say);
    on("runs", say);
    say();
    return () => {};
  });
})();
