// Evidence: for a pinned token, why it was kept or dropped in every layer; for a passage, in which layers which method kept it.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { store, on, make, plain, counting } = DynamicKV;
  const SHOWN = 80; // characters of the passage in the title
  const SIDE = 340; // least width of the drawer beside the text; where there is less room it is a sheet at the foot

  DynamicKV.register("evidence", (element) => {
    const find = (role) => element.querySelector(`[data-role="${role}"]`);
    const drawer = element.querySelector(".dkv-evidence");
    let asked = 0;
    let opener = null;
    let reasons = null; // {rows, run} of one token, when its scores have come

    // Share of (token, head) pairs that a run keeps in every layer.
    function shares(run, first, last) {
      const { layers, prompt: { length } } = store.trace;
      return Array.from({ length: layers }, (_, layer) => {
        let sum = 0;
        for (let i = first; i <= last; i += 1) sum += DynamicKV.seen(run, null, layers, length).kept[layer * length + i];
        return sum / (run.heads * (last - first + 1));
      });
    }

    const REFERENCE = "the reference: the others are compared with it";
    const unanswered = (run) => (run.method === "FullKV" ? REFERENCE : store.trace.runs.some((other) => other.method === "FullKV") ? "stopped before it could be compared" : "there is no FullKV run to compare with");
    const answered = (run) => {
      if (run.predicted) return "not run";
      if (run.method === "FullKV") return "–";
      if (run.aligned) return DynamicKV.percent(run.aligned.surviving);
      if (!run.agreement) return "–";
      const at = run.agreement.first_divergence;
      return at === null ? "as FullKV" : `differs at ${at + 1}`;
    };

    // Score, rank and cut of one token in every layer, from the recorded scores (mean over heads, in 256 steps).
    function reasonsOf(run, scores, position) {
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

    // Layers down, runs across; with one token of a scored run also its score, rank and cut.
    function table(first, last) {
      const { trace } = store;
      const one = first === last;
      const columns = DynamicKV.runOrder().map((index) => ({ run: trace.runs[index], index, found: shares(trace.runs[index], first, last) }));
      const rows = reasons?.rows ?? null;
      const place = (layer) => (rows.last[layer] <= rows.cut[layer] ? "in" : rows.rank[layer] <= rows.cut[layer] ? "tied" : "");
      const column = (parts, name = "") => make("th", { scope: "col", className: name }, ...parts);
      const word = (share, run) => (one ? `${Math.round(share * run.heads)}` : share ? `${Math.max(1, Math.round(100 * share))}` : "");
      const cell = ({ run, found }, layer) => {
        const share = found[layer];
        const node = make("td", { className: share === 1 ? "dkv-deep" : "" }, word(share, run));
        node.style.setProperty("--share", share);
        node.title = `${run.label}, layer ${layer}: ${one ? `${word(share, run)} of ${run.heads} heads keep it` : `${Math.round(100 * share)} % of it is kept`}`;
        return node;
      };
      const why = (layer) => {
        const rank = make("td", { className: `dkv-reason ${place(layer) ? `dkv-${place(layer)}` : ""}` }, plain(rows.rank[layer]));
        if (rows.last[layer] > rows.rank[layer]) rank.title = `between ${plain(rows.rank[layer])} and ${plain(rows.last[layer])}: ${counting(rows.last[layer] - rows.rank[layer] + 1, "token")} have this score`;
        return [make("td", { className: "dkv-reason" }, String(rows.score[layer])), rank, make("td", { className: "dkv-reason" }, plain(rows.cut[layer]))];
      };
      const sums = (name, words) => make("tr", { className: "dkv-sums" }, make("th", { scope: "row" }, name), ...columns.map((item) => make("td", { title: words(item) === "–" ? unanswered(item.run) : "" }, words(item))), ...(rows ? [make("td", { colSpan: 3 }, "")] : []));
      return make("table", { className: columns.length > 4 ? "dkv-tall" : "" },
        make("thead", {},
          make("tr", {}, column(["layer"], "dkv-side"), ...columns.map(({ run, index }) => {
            const head = column([make("span", { className: "dkv-glyph", ariaHidden: "true" }, run.glyph), make("span", { className: "dkv-column" }, run.label)], index === store.view.run ? "dkv-shown" : "");
            head.dataset.method = run.look;
            head.title = run.label;
            return head;
          }), ...(rows ? [["score", "0 to 255, of the layer's best"], ["rank", "among the layer's tokens, by the mean of its heads"], ["cut", "tokens kept besides the window"]].map(([name, title]) => { const head = column([name], "dkv-narrow"); head.title = title; return head; }) : [])),
          sums("survives", ({ run }) => answered(run)),
          sums("layers", ({ found }) => `${found.filter((share) => share > 0).length}/${found.length}`)),
        make("tbody", {}, ...Array.from({ length: trace.layers }, (_, layer) => make("tr", { data: { layer } }, make("th", { scope: "row" }, String(layer)), ...columns.map((item) => cell(item, layer)), ...(rows ? why(layer) : [])))));
    }

    function rankWords(rows) {
      const count = (name) => rows.rank.filter((_, layer) => (rows.last[layer] <= rows.cut[layer] ? "in" : rows.rank[layer] <= rows.cut[layer] ? "tied" : "") === name).length;
      return ` · within ${reasons.run.label}'s cut in ${count("in")}${count("tied") ? `, tied in ${count("tied")}` : ""} of ${rows.rank.length}`;
    }

    const quoted = (first, last) => {
      const { text, starts, ends } = store.trace.prompt;
      const whole = text.slice(starts[first], ends[last]);
      const passage = whole.trim() ? whole.trim().replace(/\s+/g, " ") : whole.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·");
      return passage.length > SHOWN ? `“${passage.slice(0, SHOWN)}…”` : `“${passage}”`;
    };

    async function show() {
      const ticket = ++asked;
      const { pin, trace } = store;
      const open = Boolean(pin && trace?.runs.length);
      const was = !drawer.hidden;
      drawer.hidden = !open;
      document.body.classList.toggle("dkv-with-evidence", open);
      if (!open) { find("table").replaceChildren(); return; }
      if (!was) opener = document.activeElement;
      const { first, last } = pin;
      reasons = null;
      const run = trace.runs[store.view.run];
      find("title").textContent = quoted(first, last);
      const marked = ["pinned", "evicted"].find((kind) => DynamicKV.spansOf(run, kind).some(([from, end]) => first >= from && last < end));
      let words = first === last ? `position ${plain(first)} · heads that keep it, per layer` : `${counting(last - first + 1, "token")}, positions ${plain(first)}–${plain(last)} · per cent of it kept, per layer`;
      if (marked) words += ` · ${marked} by hand in ${run.label}`;
      const draw = () => { find("note").textContent = words; find("table").replaceChildren(table(first, last)); mark(); };
      const always = ` · in the observation window: ${run.label} always keeps it`;
      if (first === last && run.method !== "FullKV" && !run.scored) words += run.window && first >= trace.prompt.length - run.window ? always : " · no scores are recorded for this run";
      place();
      draw();
      steps();
      if (first !== last || !run.scored) return;
      const scores = await DynamicKV.scoresOf(store.view.run);
      if (ticket !== asked || !scores) return;
      const rows = reasonsOf(run, scores, first);
      reasons = rows && { rows, run };
      words += rows ? rankWords(rows) : always;
      draw();
    }

    // ---- changing it and answering again: the what-if panel does the work and tells how it stands -----------------
    let stand = null; // {ready, predicted, spans, seconds, words, running}
    function steps() {
      find("marking").hidden = !store.server?.predict || !store.trace?.key;
      if (find("marking").hidden || !store.pin) { find("said").textContent = ""; return; }
      const { first, last } = store.pin;
      const held = (kind) => Boolean(stand?.spans?.[kind].some(([from, end]) => first >= from && last < end));
      for (const button of element.querySelectorAll("[data-mark]")) button.setAttribute("aria-pressed", String(held(button.dataset.mark)));
      const marked = held("pinned") ? "pinned" : held("evicted") ? "evicted" : "";
      find("answer").hidden = !stand?.predicted;
      find("read").hidden = !marked || stand?.ready !== false;
      find("read").textContent = `Read the prompt (about ${stand?.seconds ?? 1} s)`;
      find("said").textContent = !marked ? "" : stand?.error || (stand?.predicted
        ? `${marked === "pinned" ? "Pinned" : "Evicted"}, ${counting(last - first + 1, "token")}: predicted, not run.`
        : stand?.ready === false ? `${marked === "pinned" ? "Pinned" : "Evicted"}, ${counting(last - first + 1, "token")}: the prompt must be read once before it can be answered with.` : "");
    }
    // The answer that was asked for comes in above; the drawer says what became of it.
    let asking = false;
    on("answerwith", () => { asking = true; });
    on("trace", (trace) => {
      if (!asking || !trace?.runs.length) return;
      asking = false;
      const run = trace.runs.at(-1);
      requestAnimationFrame(() => { find("said").replaceChildren(make("b", {}, `${run.label}: `), make("q", {}, run.answer.trim())); });
    });
    on("standing", (next) => { stand = next; steps(); });
    find("answer").addEventListener("click", () => DynamicKV.emit("answerwith"));
    find("read").addEventListener("click", () => DynamicKV.emit("readprompt"));

    // ---- where it stands: beside the text, or at the foot of a narrow screen --------------------------------------
    function place() {
      const text = document.querySelector(".dkv-document")?.getBoundingClientRect();
      const left = text ? text.right + 12 : 0;
      const beside = text && document.documentElement.clientWidth - left >= SIDE;
      drawer.classList.toggle("dkv-sheet", !beside);
      drawer.style.left = beside ? `${left}px` : "";
    }
    window.addEventListener("resize", () => { if (!drawer.hidden) place(); });

    function mark() {
      const layer = store.hover?.layer ?? store.view.layer;
      for (const row of element.querySelectorAll("tr[data-layer]")) row.classList.toggle("dkv-on", Number(row.dataset.layer) === layer);
    }

    function close() {
      const within = drawer.contains(document.activeElement);
      DynamicKV.setPin(null);
      if (within) (opener?.isConnected ? opener : document.querySelector(".dkv-scroll"))?.focus({ preventScroll: true });
    }
    find("close").addEventListener("click", close);
    drawer.addEventListener("keydown", (event) => { if (event.key === "Escape") { event.stopPropagation(); close(); } });
    find("earlier").addEventListener("click", () => DynamicKV.stepPin(-1));
    find("later").addEventListener("click", () => DynamicKV.stepPin(1));
    find("longer").addEventListener("click", () => DynamicKV.stepPin(1, true));
    find("sentence").addEventListener("click", () => DynamicKV.pinSentence());

    const layerOf = (event) => { const at = event.target.closest("tr[data-layer]")?.dataset.layer; return at === undefined ? null : Number(at); };
    find("table").addEventListener("click", (event) => { const layer = layerOf(event); if (layer !== null) DynamicKV.setLayer(layer); });
    find("table").addEventListener("pointermove", (event) => {
      const layer = layerOf(event);
      DynamicKV.setHover(layer === null ? null : { source: "evidence", layer, position: store.pin?.first, last: store.pin?.last }, "evidence");
    });
    find("table").addEventListener("pointerleave", () => DynamicKV.setHover(null, "evidence"));
    for (const button of element.querySelectorAll("[data-mark]")) {
      button.addEventListener("click", () => DynamicKV.emit("edit", { kind: button.dataset.mark, first: store.pin.first, end: store.pin.last + 1, undo: button.getAttribute("aria-pressed") === "true" }));
    }
    on("pin", show);
    on("runs", () => { if (store.pin) show(); });
    on("view", (changed) => { if (store.pin && changed.has("run")) show(); else mark(); });
    on("hover", () => { if (store.pin) mark(); });
    show();
    return () => {};
  });

  // ---- the pinned passage, moved by keys and buttons: word by word, longer, or to its sentence ---------------------
  const unitsAt = (kind) => { const { trace } = store; trace.units ??= {}; return (trace.units[kind] ??= DynamicKV.unitsOf(trace.prompt, kind)); };
  const unitOf = (units, token) => Math.max(0, units.findLastIndex((first) => first <= token && first < store.trace.prompt.length));
  const blank = (units, unit) => { const { text, starts, ends } = store.trace.prompt; return !text.slice(starts[units[unit]], ends[units[unit + 1] - 1]).trim(); };
  function pinTo(first, last) {
    DynamicKV.setPin({ first, last });
    DynamicKV.emit("reveal", first);
  }
  DynamicKV.stepPin = (step, longer = false) => {
    const { trace, pin } = store;
    if (!trace) return;
    if (!pin) { const first = DynamicKV.firstVisible?.() ?? trace.prompt.document_span[0]; const units = unitsAt("word"); const unit = unitOf(units, first); pinTo(units[unit], units[unit + 1] - 1); return; }
    const units = unitsAt("word");
    let unit = unitOf(units, step > 0 ? pin.last : pin.first) + step;
    while (unit >= 0 && unit < units.length - 1 && blank(units, unit)) unit += step;
    if (unit < 0 || unit >= units.length - 1) return;
    const [first, last] = [units[unit], units[unit + 1] - 1];
    pinTo(longer ? Math.min(first, pin.first) : first, longer ? Math.max(last, pin.last) : last);
  };
  DynamicKV.pinSentence = () => {
    const { pin } = store;
    if (!pin) return;
    const units = unitsAt("sentence");
    const from = unitOf(units, pin.first);
    const to = unitOf(units, pin.last);
    pinTo(units[from], units[to + 1] - 1);
  };
})();
