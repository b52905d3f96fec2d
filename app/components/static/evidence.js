// Evidence: for a pinned token, why it was kept or dropped in every layer; for a passage, in which layers which method kept it.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { store, on, make, plain, counting } = DynamicKV;
  const SHOWN = 80; // characters of the passage in the title

  DynamicKV.register("evidence", (element) => {
    const find = (role) => element.querySelector(`[data-role="${role}"]`);
    const hint = find("note").textContent;
    let asked = 0;

    // Share of (token, head) pairs that a run keeps in every layer.
    function shares(run, first, last) {
      const { layers, prompt: { length } } = store.trace;
      return Array.from({ length: layers }, (_, layer) => {
        let sum = 0;
        for (let i = first; i <= last; i += 1) sum += run.kept[layer * length + i];
        return sum / (run.heads * (last - first + 1));
      });
    }

    function row(run, first, last) {
      const found = shares(run, first, last);
      const layers = found.filter((share) => share > 0).length;
      const one = first === last;
      const words = found.map((share) => (one ? `${Math.round(share * run.heads)}` : share ? `${Math.max(1, Math.round(100 * share))}` : ""));
      return make("tr", { data: { method: run.look } },
        make("th", { scope: "row" }, make("span", { className: "dkv-glyph", ariaHidden: "true" }, run.glyph), run.label),
        make("td", { className: "dkv-sum" }, answered(run)),
        make("td", { className: "dkv-sum" }, `${layers} of ${found.length} layers`),
        ...found.map((share, layer) => {
          const cell = make("td", { data: { layer } }, words[layer]);
          cell.style.setProperty("--share", share);
          if (share === 1) cell.className = "dkv-deep"; // words on lesser shades stay readable in ink
          cell.title = `layer ${layer}: ${one ? `${words[layer]} of ${run.heads} heads keep it` : `${Math.round(100 * share)} % of it is kept`}`;
          return cell;
        }));
    }

    function answered(run) {
      if (run.predicted) return "not run";
      if (run.method === "FullKV") return "the reference";
      if (!run.agreement) return "–";
      const at = run.agreement.first_divergence;
      return at === null ? "as FullKV" : `differs at ${at + 1}`;
    }

    // Score, rank and cut of one token in every layer, from the recorded scores (mean over heads, in 256 steps).
    function reasons(run, scores, position) {
      const { layers, prompt: { length } } = store.trace;
      const bytes = Uint8Array.from(atob(scores.bytes), (char) => char.charCodeAt(0));
      const end = store.trace.prompt.question_aware ? length - run.window : store.trace.prompt.document_span[1] - run.window;
      if (position >= end) return null;
      const rows = { score: [], rank: [], cut: [], last: [] };
      for (let layer = 0; layer < layers; layer += 1) {
        const mine = bytes[layer * length + position];
        let above = 0;
        let same = 0;
        for (let i = 0; i < end; i += 1) {
          above += bytes[layer * length + i] > mine ? 1 : 0;
          same += bytes[layer * length + i] === mine ? 1 : 0;
        }
        rows.score.push(mine);
        rows.rank.push(above + 1);
        rows.last.push(above + same); // 256 steps make ties: the token's true place lies between the two
        rows.cut.push(Math.max(0, run.budgets[layer] - (length - end)));
      }
      return rows;
    }

    function reasonRows(rows) {
      const total = rows.score.length;
      const line = (name, values, note) => make("tr", { className: "dkv-reason" }, make("th", { scope: "row" }, name),
        make("td", { className: "dkv-sum", colSpan: 2 }, note),
        ...values.map((value, layer) => {
          const cell = make("td", { data: { layer } }, String(value));
          if (name === "rank" && rows.last[layer] > value) cell.title = `between ${plain(value)} and ${plain(rows.last[layer])}: ${plain(rows.last[layer] - value + 1)} tokens have this score`;
          if (name === "rank" && place(layer)) cell.className = `dkv-${place(layer)}`;
          return cell;
        }));
      const place = (layer) => (rows.last[layer] <= rows.cut[layer] ? "in" : rows.rank[layer] <= rows.cut[layer] ? "tied" : "");
      const counted = (name) => rows.rank.filter((_, layer) => place(layer) === name).length;
      const tied = counted("tied");
      return [
        line("score", rows.score, "0–255, of the layer's best"),
        line("rank", rows.rank, `within the cut in ${counted("in")}${tied ? `, tied in ${tied}` : ""} of ${total}`),
        line("cut", rows.cut, "tokens kept besides the window"),
      ];
    }

    const quoted = (first, last) => {
      const { text, starts, ends } = store.trace.prompt;
      const whole = text.slice(starts[first], ends[last]);
      const passage = whole.trim() ? whole.replace(/\s+/g, " ") : whole.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·");
      return passage.length > SHOWN ? `“${passage.slice(0, SHOWN)}…”` : `“${passage}”`;
    };

    async function show() {
      const ticket = ++asked;
      const { pin, trace } = store;
      element.classList.toggle("dkv-empty", !trace);
      find("table").hidden = !pin || !trace?.runs.length;
      find("marking").hidden = find("table").hidden || !store.server?.predict || !trace.key;
      find("about").hidden = find("marking").hidden;
      find("title").textContent = "Evidence";
      find("note").textContent = hint;
      if (find("table").hidden) { find("table").replaceChildren(); return; }
      const { first, last } = pin;
      const one = first === last;
      const run = trace.runs[store.view.run];
      const marked = ["pinned", "evicted"].find((kind) => DynamicKV.spansOf(run, kind).some(([from, end]) => first >= from && last < end));
      find("title").textContent = quoted(first, last);
      find("note").textContent = one
        ? `position ${plain(first)} · heads that keep it, per layer`
        : `${counting(last - first + 1, "token")}, positions ${plain(first)}–${plain(last)} · per cent of it kept, per layer`;
      if (marked) find("note").textContent += ` · ${marked} by hand in ${run.label}`;
      const head = make("tr", {}, make("th", { scope: "col" }, ""),
        make("th", { scope: "col", className: "dkv-sum" }, "answer"), make("th", { scope: "col", className: "dkv-sum" }, "survives in"),
        ...Array.from({ length: trace.layers }, (_, layer) => make("th", { scope: "col", title: `layer ${layer}`, data: { layer } }, String(layer))));
      const body = make("tbody", {}, ...trace.runs.map((item) => row(item, first, last)));
      find("table").replaceChildren(make("table", {}, make("thead", {}, head), body));
      mark();
      if (!one || !run.scored) {
        if (one && run.window && first >= trace.prompt.length - run.window) find("note").textContent += ` · in the observation window: ${run.label} always keeps it`;
        else if (one && run.method !== "FullKV") find("note").textContent += " · no scores are recorded for this run";
        return;
      }
      const scores = await DynamicKV.scoresOf(store.view.run);
      if (ticket !== asked || !scores) return;
      const rows = reasons(run, scores, first);
      if (!rows) { find("note").textContent += ` · in the observation window: ${run.label} always keeps it`; return; }
      body.append(...reasonRows(rows));
      find("note").textContent += ` · ${run.label} ranks tokens in each head by itself; below, the mean of its heads`;
      mark();
    }

    function mark() {
      const layer = store.hover?.layer ?? store.view.layer;
      for (const cell of element.querySelectorAll("[data-layer]")) cell.classList.toggle("dkv-on", Number(cell.dataset.layer) === layer);
    }

    const layerOf = (event) => { const at = event.target.closest("[data-layer]")?.dataset.layer; return at === undefined ? null : Number(at); };
    find("table").addEventListener("click", (event) => { const layer = layerOf(event); if (layer !== null) DynamicKV.setLayer(layer); });
    find("table").addEventListener("pointermove", (event) => {
      const layer = layerOf(event);
      DynamicKV.setHover(layer === null ? null : { source: "evidence", layer, position: store.pin?.first, last: store.pin?.last }, "evidence");
    });
    find("table").addEventListener("pointerleave", () => DynamicKV.setHover(null, "evidence"));
    for (const button of element.querySelectorAll("[data-mark]")) {
      button.addEventListener("click", () => DynamicKV.emit("edit", { kind: button.dataset.mark, first: store.pin.first, end: store.pin.last + 1 }));
    }
    on("pin", show);
    on("runs", show);
    on("view", (changed) => { if (changed.has("run")) show(); else mark(); });
    on("hover", () => { if (store.pin) mark(); });
    show();
    return () => {};
  });
})();
