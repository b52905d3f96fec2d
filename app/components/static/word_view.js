// One answer word: how probable it is under the full and under each smaller cache, and, layer by layer, how much of what it read
// in the full cache is still there.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { store, on, make, framed } = DynamicKV;
  const HINT = "Point at a word of an answer, or click it: the text shows what it read, and this strip how much of that each cache still holds.";

  // Small shares keep one digit, so that a half tells.
  const small = (value) => (value >= 1e-4 ? value.toPrecision(1) : value && value.toExponential(0));
  DynamicKV.percent = (share) => (share >= 0.9995 ? "100 %" : share < 0.001 ? `${small(100 * share)} %` : `${(100 * share).toFixed(share >= 0.1 ? 0 : 1)} %`);
  const { percent } = DynamicKV;

  DynamicKV.register("word", (element) => {
    const find = (role) => element.querySelector(`[data-role="${role}"]`);
    const strips = find("strips");
    const framedShow = framed(() => show());

    // One row per compressed run: its name, a cell per layer, the probability of the word, the part that survives.
    function build() {
      const { trace } = store;
      element.classList.toggle("dkv-empty", !trace?.runs.length);
      if (!trace) return;
      const rows = DynamicKV.runOrder().filter((index) => !trace.runs[index].predicted);
      strips.replaceChildren(...rows.map((index) => {
        const run = trace.runs[index];
        const row = make("div", { className: "dkv-strip", data: { run: index, method: run.look } },
          make("span", { className: "dkv-strip-name", title: run.label }, make("span", { className: "dkv-glyph", ariaHidden: "true" }, run.glyph), run.label),
          make("b", { className: "dkv-strip-chance" }),
          make("span", { className: "dkv-strip-cells", role: "img" }, ...Array.from({ length: trace.layers }, (_, layer) => make("i", { data: { layer } }))),
          make("b", { className: "dkv-strip-sum" }));
        return row;
      }));
      strips.prepend(make("div", { className: "dkv-strip dkv-strip-head" }, make("span"), make("span", { title: "Probability of the word, FullKV's answer up to it given" }, "probability"),
        make("span", { title: "Per layer: the part of what the word read in the document that this cache still holds" }, make("span", {}, "0"), make("span", {}, "still there, by layer"), make("span", {}, String(trace.layers - 1))), make("span", {}, "mean")));
      show();
    }

    function show() {
      const { trace } = store;
      const word = DynamicKV.word();
      if (!trace?.runs.length) return;
      const words = DynamicKV.wordsOf(trace);
      const own = word && words[word.run]?.[word.own];
      const fullRun = trace.runs.findIndex((run) => run.method === "FullKV" && !run.predicted);
      const full = own && own.full !== null && fullRun >= 0 ? words[fullRun][own.full] : null;
      find("away").disabled = !store.word;
      element.classList.toggle("dkv-word-sheet", Boolean(store.word)); // on a phone it comes up over the answers
      find("title").replaceChildren(...(own ? ["Why ", make("q", {}, DynamicKV.shortWord(own.text)), "?"] : ["Why this word?"]));
      find("said").replaceChildren(...(own ? said(trace, word, own, full) : [HINT]));
      for (const row of strips.querySelectorAll("[data-run]")) fill(trace, row, full);
      find("read").hidden = !own || !trace.readsError || stand?.ready !== false;
      find("read").textContent = `Read the prompt (about ${stand?.seconds ?? 1} s)`;
      find("note").textContent = !own ? "" : !full ? "There is no FullKV answer to compare with." : trace.reads ? readNote(trace, full) : trace.readsError ?? (store.server?.reads && trace.key ? "Looking up what it read …" : "This file does not hold what the words read.");
    }

    function said(trace, word, own, full) {
      const run = trace.runs[word.run];
      if (!full) return [""];
      const shown = run.method === "FullKV" ? trace.runs[store.view.run] : run;
      const both = DynamicKV.underBoth(shown, own.full);
      const words = [];
      if (run.method !== "FullKV" && !own.same) words.push("FullKV says ", make("q", {}, DynamicKV.shortWord(full.text)), " at this place. ");
      if (!both) return words.length ? words : ["The same word as in FullKV's answer."];
      const fate = DynamicKV.isLost(both) ? (both.instead ? ["; this cache would rather say ", make("q", {}, DynamicKV.shortWord(both.instead) || "an end"), ` (${percent(both.insteadHere)})`] : []) : ["; it survives"];
      return [...words, make("q", {}, DynamicKV.shortWord(full.text)), ` is ${percent(both.full)} probable with the full cache and `, make("b", {}, percent(both.here)), ` with ${shown.label}'s`, ...fate, "."];
    }

    function fill(trace, row, full) {
      const index = Number(row.dataset.run);
      const run = trace.runs[index];
      const both = full ? DynamicKV.underBoth(run, DynamicKV.wordsOf(trace)[trace.runs.findIndex((item) => item.method === "FullKV")].indexOf(full)) : null;
      const chance = run.method === "FullKV" && full ? Math.exp(run.logprobs.slice(full.first, full.last).reduce((a, b) => a + b, 0)) : both?.here;
      row.querySelector(".dkv-strip-chance").textContent = chance === undefined ? "" : percent(chance);
      row.classList.toggle("dkv-lost", DynamicKV.isLost(both));
      row.classList.toggle("dkv-shown", index === store.view.run);
      const held = full && trace.reads ? DynamicKV.survivingBy(trace.reads, index, full.first, full.last) : null;
      row.querySelector(".dkv-strip-sum").textContent = held && held.mean !== null ? percent(held.mean) : "";
      const cells = row.querySelector(".dkv-strip-cells");
      const places = trace.reads?.layers ?? [];
      for (const cell of cells.children) {
        const at = places.indexOf(Number(cell.dataset.layer));
        const share = held && at >= 0 ? held.layers[at] : null;
        cell.style.setProperty("--share", share ?? 0);
        cell.classList.toggle("dkv-none", share === null);
        cell.classList.toggle("dkv-on", Number(cell.dataset.layer) === (store.hover?.layer ?? store.view.layer));
        cell.title = share === null ? `layer ${cell.dataset.layer}` : `layer ${cell.dataset.layer}: ${percent(share)} of what it read is still there`;
      }
      const worst = held ? held.layers.flatMap((share, l) => (share !== null && share < 0.5 ? [places[l]] : [])) : [];
      cells.setAttribute("aria-label", held ? `${run.label}: ${percent(held.mean ?? 0)} of what it read is still there; less than half in ${worst.length ? `layers ${worst.join(", ")}` : "no layer"}` : `${run.label}: not looked up`);
    }

    function readNote(trace, full) {
      const { reads } = trace;
      let sum = 0;
      let count = 0;
      for (let token = full.first; token < Math.min(full.last, reads.tokens); token += 1) for (let l = 0; l < reads.layers.length; l += 1) { sum += reads.document[token * reads.layers.length + l] / 255; count += 1; }
      return count ? `${percent(sum / count)} of its attention goes to the document, mean over ${DynamicKV.counting(reads.layers.length, "layer")}; the rest to the first token, the question and the answer so far.` : "";
    }

    let stand = null; // what the what-if panel tells: whether the prompt is held, and how long reading it takes
    on("standing", (next) => { stand = next; framedShow(); });
    find("read").addEventListener("click", () => DynamicKV.emit("readprompt"));

    // Step through the words of the answer that is looked at; without one, the shown run's.
    DynamicKV.stepWord = (step) => {
      const { trace, word, view } = store;
      if (!trace?.runs.length) return;
      const run = word?.run ?? view.run;
      const { length } = DynamicKV.wordsOf(trace)[run] ?? [];
      if (!length) return;
      const own = word ? Math.min(length - 1, Math.max(0, word.own + step)) : 0;
      DynamicKV.setWord({ run, own, full: DynamicKV.wordsOf(trace)[run][own].full });
    };
    find("previous").addEventListener("click", () => DynamicKV.stepWord(-1));
    find("next").addEventListener("click", () => DynamicKV.stepWord(1));
    find("away").addEventListener("click", () => DynamicKV.setWord(null));
    strips.addEventListener("click", (event) => { const layer = event.target.dataset.layer; if (layer !== undefined) { DynamicKV.setView({ run: Number(event.target.closest("[data-run]").dataset.run), layer: Number(layer) }); } });
    strips.addEventListener("pointermove", (event) => { const layer = event.target.dataset.layer; DynamicKV.setHover(layer === undefined ? null : { source: "word", layer: Number(layer) }, "word"); });
    strips.addEventListener("pointerleave", () => DynamicKV.setHover(null, "word"));
    on("trace", build);
    on("runs", build);
    for (const name of ["word", "reads", "view", "hover"]) on(name, framedShow);
    build();
    return () => {};
  });
})();
