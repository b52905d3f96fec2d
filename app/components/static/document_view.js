// The document view: the prompt as it was, with kept tokens marked, and what one can ask of it.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { store, on, make, plain, counting, framed, setView } = DynamicKV;
  const { SHADES, swatch, levelLegend, windowWords, differenceLegend } = DynamicKV;
  const { view } = store;
  const KEPT = [1, 2, 3, 4, 5].map((shade) => `dkv-kept-${shade}`);
  const DIFFERS = ["dkv-both", "dkv-only-a", "dkv-only-b"];
  const READ = [1, 2, 3, 4, 5].map((shade) => `dkv-read-${shade}`);
  const MARKS = [...KEPT, ...DIFFERS, ...READ, "dkv-hole-1", "dkv-hole-2", "dkv-erased"];
  const ERASED = MARKS.length;
  const FAINT = 0.01; // of the strongest: below it a position counts as not read
  const GAP = 12; // tokens in a row that nothing keeps

  DynamicKV.register("document", (element) => {
    const find = (role) => element.querySelector(`[data-role="${role}"]`);
    const slider = find("slider");
    const tip = element.querySelector(".dkv-tip");
    const scroll = element.querySelector(".dkv-scroll");
    const folds = { before: find("before"), after: find("after") };
    const boxes = [folds.before.querySelector(".dkv-text"), find("text"), folds.after.querySelector(".dkv-text")];
    const text = DynamicKV.textLayer(boxes);
    const minimap = DynamicKV.minimap(text, scroll, find("minimap"));
    let units = {}; // first tokens of words, sentences and paragraphs, found when asked for
    let hits = [];
    let hit = -1;
    let gap = -1;

    // The explanations serve as tooltips too.
    document.addEventListener("pointerdown", (event) => { const menu = find("menu"); if (menu.open && !menu.contains(event.target)) menu.open = false; });
    for (const about of element.querySelectorAll("[data-about]")) find(about.dataset.about).title = about.textContent;

    const run = () => store.trace.runs[view.run];
    const other = () => (view.against === null ? null : store.trace.runs[view.against]);
    const previewed = () => (store.hover && store.hover.source !== "document" && store.hover.layer !== undefined ? store.hover.layer : view.layer);
    const unitsNow = () => (view.unit === "token" ? null : (units[view.unit] ??= DynamicKV.unitsOf(store.trace.prompt, view.unit)));

    // ---- marks ------------------------------------------------------------------------------------------------
    function paint() {
      if (!store.trace?.runs.length) return;
      const layer = previewed();
      const { layers, prompt: { length } } = store.trace;
      const shades = SHADES[view.shades];
      const looked = lookedAt();
      element.classList.toggle("dkv-reads", Boolean(looked));
      if (looked) {
        text.paint(readMarks(looked, layer), MARKS, true);
      } else if (view.mark === "erased") {
        const counts = DynamicKV.keptLayers(run(), layers, length);
        text.paint(Uint8Array.from(counts, (count) => (count ? 0 : ERASED)), MARKS);
      } else if (other()) {
        const marks = DynamicKV.difference(run(), other(), layer, view.head, layers, length);
        text.paint(marks.map((mark) => (mark ? KEPT.length + mark : 0)), MARKS);
      } else {
        const levels = DynamicKV.levels(run(), layer, view.head, layers, length, unitsNow());
        text.paint(levels.map((level) => (level ? shades[level - 1] : 0)), MARKS);
      }
      element.classList.toggle("dkv-underlined", view.mark === "underline");
      describe(layer);
    }

    // The answer word whose reading is shown: FullKV's word at its place, once it is known what it read.
    function lookedAt() {
      const { trace } = store;
      const word = DynamicKV.word();
      const full = trace.runs.findIndex((item) => item.method === "FullKV" && !item.predicted);
      if (!word || !trace.reads || full < 0 || word.full === null) return null;
      return DynamicKV.wordsOf(trace)[full][word.full] ?? null;
    }

    // Heat where the word read and the run still holds it; a hole where most of what it read there is gone.
    let strongest = -1; // the position of the document that the word read most
    function readMarks(word, layer) {
      const { read, kept, most } = DynamicKV.readBy(store.trace.reads, run(), word.first, word.last, layer);
      const marks = new Uint8Array(read.length);
      const [first, end] = store.trace.prompt.document_span;
      strongest = -1;
      const from = KEPT.length + DIFFERS.length;
      for (let i = 0; i < read.length; i += 1) {
        if (read[i] < FAINT * most || !most) continue;
        if (i >= first && i < end && (strongest < first || read[i] > read[strongest])) strongest = i;
        const share = Math.sqrt(read[i] / most);
        marks[i] = from + (kept[i] >= read[i] / 2 ? Math.ceil(share * READ.length) : READ.length + (share > 0.4 ? 2 : 1));
      }
      return marks;
    }

    function readLegend(word) {
      const back = make("button", { type: "button", className: "dkv-link" }, "back (Esc)");
      back.addEventListener("click", () => DynamicKV.setWord(null));
      return [make("span", { className: "dkv-legend-name" }, "read for ", make("q", {}, DynamicKV.shortWord(word.text))),
        ...["little", "\u00a0", "\u00a0", "\u00a0", "much"].map((words, i) => swatch(`read-${i + 1}`, words)),
        swatch("hole-2", `mostly gone with ${run().label}`), ...(store.word ? [back] : [])];
    }

    function markExpected() {
      const span = store.trace.record.expected?.document_utf16_span;
      if (span) text.markUnits("dkv-sought", [span], 2); else text.clear("dkv-sought");
    }

    function markWindow() {
      const { length } = store.trace.prompt;
      if (run()?.window) text.markTokens("dkv-window", length - run().window, length - 1, 2); else text.clear("dkv-window");
    }

    // What a person pinned or evicted in this run.
    function markEdits() {
      const { starts, ends } = store.trace.prompt;
      for (const kind of ["pinned", "evicted"]) text.markUnits(`dkv-${kind}`, DynamicKV.spansOf(run(), kind).map(([first, end]) => [starts[first], ends[end - 1]]), 2);
    }

    function markHover() {
      const { hover } = store;
      if (hover?.position === undefined) text.clear("dkv-hover");
      else text.markTokens("dkv-hover", hover.position, hover.last ?? hover.position, 4);
    }

    // ---- words ------------------------------------------------------------------------------------------------
    const otherKind = (layer) => DynamicKV.otherKind(store.trace.record.model, layer);

    function describe(layer) {
      const { layers, prompt } = store.trace;
      const current = run();
      const { budgets } = current.now ?? current;
      const all = layer === null;
      find("all").setAttribute("aria-pressed", String(all));
      slider.max = String(layers - 1);
      if (!all) slider.value = String(layer);
      slider.classList.toggle("dkv-idle", all);
      slider.setAttribute("aria-valuetext", all ? "all layers" : `layer ${layer}`);
      find("where").textContent = all
        ? store.film ? `${store.film.step} of ${layers} layers read` : `all ${layers} layers`
        : current.now && current.now.read[layer] !== 1 ? `layer ${layer}: not read yet`
        : otherKind(layer) ? `layer ${layer}, ${otherKind(layer)}: last ${plain(budgets[layer])} held, not compressed`
          : `layer ${layer}: ${plain(budgets[layer])} of ${plain(prompt.length)} kept`;
      const looked = lookedAt();
      const erased = () => [swatch("erased", `erased everywhere: ${plain(DynamicKV.erased(current))} of ${counting(prompt.length, "token")} that no layer and no head keeps`)];
      find("legend").replaceChildren(...(looked ? readLegend(looked) : view.mark === "erased" ? erased() : other() ? differenceLegend(all) : levelLegend(layer)));
      find("last").textContent = String(layers - 1);
      fold(folds.before, 0, prompt.document_span[0], "template before the document", layer);
      fold(folds.after, prompt.document_span[1], prompt.length, "question and template after the document", layer);
    }

    function fold(box, from, to, name, layer) {
      const total = to - from;
      box.hidden = total <= 0;
      const { counts } = DynamicKV.countsAt(run(), layer, view.head, store.trace.layers, store.trace.prompt.length);
      const where = layer === null ? "in a layer or more" : `at layer ${layer}`;
      let kept = 0;
      for (let i = from; i < to; i += 1) kept += counts[i] > 0 ? 1 : 0;
      const seen = name.startsWith("question") ? (store.trace.prompt.question_aware ? " · the scorer saw the question" : " · the scorer did not see the question") : "";
      box.querySelector("summary").textContent = `${counting(total, "token")}: ${name} · ${plain(kept)} kept ${where}${seen}${name.startsWith("question") ? windowWords(run().window) : ""}`;
    }

    function fillTabs() {
      find("tabs").replaceChildren(...DynamicKV.runOrder().map((index) => {
        const item = store.trace.runs[index];
        const button = make("button", { type: "button", data: { method: item.look } },
          make("span", { className: "dkv-glyph", ariaHidden: "true" }, item.glyph), item.label);
        button.setAttribute("aria-pressed", String(index === view.run));
        button.addEventListener("click", () => DynamicKV.setRun(index));
        return button;
      }));
    }

    const option = (value, label, chosen) => make("option", { value: String(value), selected: chosen }, label);
    function fillChoices() {
      const { runs } = store.trace;
      const heads = Math.max(0, ...runs.map((item) => item.heads));
      find("head").replaceChildren(option("", "all", view.head === null), ...Array.from({ length: heads }, (_, head) => option(head, String(head), head === view.head)));
      find("against").replaceChildren(option("", "nothing", view.against === null),
        ...runs.flatMap((item, index) => (index === view.run ? [] : [option(index, item.label, index === view.against)])));
      for (const key of ["unit", "mark", "shades"]) find(key).value = view[key];
      find("unit").disabled = view.against !== null;
    }

    // ---- pointing ---------------------------------------------------------------------------------------------
    const point = framed((x, y) => {
      if (!store.trace?.runs.length) return;
      const found = text.tokensAt(x, y);
      DynamicKV.setHover(found && { source: "document", ...found }, "document");
      const { pin } = store;
      if (found && !(pin && found.position >= pin.first && found.last <= pin.last)) showTip(x, y, found.position, found.last); else tip.hidden = true;
    });

    const visible = (part) => part.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·");

    function showTip(x, y, position, last) {
      const { prompt, layers } = store.trace;
      const current = run();
      const kept = DynamicKV.keptLayers(current, layers, prompt.length, view.head)[position];
      tip.querySelector('[data-role="token"]').textContent = visible(prompt.text.slice(prompt.starts[position], prompt.ends[last]));
      const place = last > position ? `${last - position + 1} tokens, positions ${position}–${last}` : `position ${plain(position)} of ${plain(prompt.length)}`;
      tip.querySelector('[data-role="facts"]').textContent = `${place} · ${current.label} keeps it in ${kept} of ${layers} layers · click: why`;
      const cells = tip.querySelector('[data-role="cells"]');
      if (cells.children.length !== layers) cells.replaceChildren(...Array.from({ length: layers }, () => make("i")));
      const seen = DynamicKV.seen(current, view.head, layers, prompt.length);
      for (let layer = 0; layer < layers; layer += 1) {
        cells.children[layer].style.setProperty("--share", seen.kept[layer * prompt.length + position] / seen.heads);
        cells.children[layer].classList.toggle("dkv-on", layer === view.layer);
      }
      tip.hidden = false;
      const box = element.getBoundingClientRect();
      const left = Math.min(Math.max(8, x - box.left - tip.offsetWidth / 2), box.width - tip.offsetWidth - 8);
      const above = y - box.top - tip.offsetHeight - 18;
      tip.style.transform = `translate(${left}px, ${above > 0 ? above : y - box.top + 22}px)`;
    }

    scroll.addEventListener("pointermove", (event) => point(event.clientX, event.clientY));
    scroll.addEventListener("pointerleave", () => point(-1, -1));
    // A click asks why one token was kept; a selection asks in which layers the passage survived.
    scroll.addEventListener("click", (event) => {
      if (!store.trace?.runs.length || event.target.closest("summary")) return;
      const passage = text.selected();
      const found = passage || text.tokensAt(event.clientX, event.clientY);
      if (found) DynamicKV.setPin({ first: found.first ?? found.position, last: found.last });
      tip.hidden = true; // the drawer says more, and nothing lies over the line that was clicked
    });
    on("pin", (pin) => { if (!store.trace) return; if (pin) text.markTokens("dkv-pin", pin.first, pin.last, 3); else text.clear("dkv-pin"); });
    // What is copied is the text itself, byte for byte.
    scroll.addEventListener("copy", (event) => {
      const selection = document.getSelection();
      if (!selection.rangeCount || !scroll.contains(selection.getRangeAt(0).commonAncestorContainer)) return;
      event.clipboardData.setData("text/plain", selection.getRangeAt(0).toString());
      event.preventDefault();
    });

    // What a word read lies elsewhere in the text most of the time: a chosen word brings it into the box.
    const showWord = framed(() => {
      if (!store.trace?.runs.length) return;
      paint();
      if (store.word && !store.wordHover && lookedAt() && strongest >= 0) { const line = text.lineOf(strongest); const box = scroll.getBoundingClientRect(); if (line.top < box.top || line.bottom > box.bottom) reveal(strongest); }
    });
    on("word", showWord);
    on("reads", showWord);
    // The first token of the document's text that the box shows.
    DynamicKV.firstVisible = () => {
      const box = scroll.getBoundingClientRect();
      const found = text.tokensAt(box.left + 24, box.top + 24) ?? text.tokensAt(box.left + 24, box.top + 40);
      return found?.position ?? store.trace.prompt.document_span[0];
    };

    // ---- controls ---------------------------------------------------------------------------------------------
    slider.addEventListener("input", () => DynamicKV.setLayer(Number(slider.value)));
    find("all").addEventListener("click", () => DynamicKV.setLayer(view.layer === null ? Number(slider.value) : null));
    const move = (step) => {
      const last = store.trace ? store.trace.layers - 1 : 0;
      DynamicKV.setLayer(view.layer === null ? Number(slider.value) : Math.min(last, Math.max(0, view.layer + step)));
    };
    find("previous").addEventListener("click", () => move(-1));
    find("next").addEventListener("click", () => move(1));
    for (const key of ["head", "against"]) find(key).addEventListener("change", (event) => setView({ [key]: event.target.value === "" ? null : Number(event.target.value) }));
    for (const key of ["unit", "mark", "shades"]) find(key).addEventListener("change", (event) => setView({ [key]: event.target.value }));

    function reveal(position) {
      const line = text.lineOf(position, true);
      scroll.scrollTop += line.top - scroll.getBoundingClientRect().top - scroll.clientHeight / 3;
    }

    // ---- find -------------------------------------------------------------------------------------------------
    function search() {
      const wanted = find("find").value;
      hits = [];
      hit = -1;
      if (wanted && store.trace) {
        const pattern = new RegExp(wanted.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "giu");
        for (const match of store.trace.prompt.text.matchAll(pattern)) hits.push([match.index, match.index + match[0].length]);
      }
      text.markUnits("dkv-find", hits, 3);
      if (hits.length) go(0); else sayFound();
    }

    const sayFound = () => { find("found").textContent = !find("find").value ? "" : hits.length ? `${hit + 1} of ${hits.length}` : "not in the text"; };
    function go(next) {
      if (!hits.length) return;
      hit = (next + hits.length) % hits.length;
      reveal(Math.max(0, DynamicKV.tokenAt(store.trace.prompt.starts, hits[hit][0])));
      text.markUnits("dkv-found", [hits[hit]], 5);
      sayFound();
    }
    find("find").addEventListener("input", () => { text.clear("dkv-found"); search(); });
    find("find").addEventListener("keydown", (event) => {
      if (event.key === "Enter") go(hit + (event.shiftKey ? -1 : 1));
      else if (event.key === "Escape") { event.target.value = ""; text.clear("dkv-found"); search(); scroll.focus(); }
    });

    // ---- gaps: stretches of the document that this run drops, at this layer or at all ------------------------------
    function gaps() {
      const { layers, prompt } = store.trace;
      const { counts } = DynamicKV.countsAt(run(), view.layer, view.head, layers, prompt.length);
      const found = [];
      let first = prompt.document_span[0];
      for (let i = first; i <= prompt.document_span[1]; i += 1) {
        if (i < prompt.document_span[1] && !counts[i]) continue;
        if (i - first >= GAP) found.push([first, i - 1]);
        first = i + 1;
      }
      return found;
    }
    function goToGap(step) {
      if (!store.trace?.runs.length) return;
      const found = gaps();
      if (!found.length) { find("gap").textContent = `none of ${GAP} tokens`; gap = -1; return; }
      gap = gap < 0 ? (step > 0 ? 0 : found.length - 1) : (gap + step + found.length) % found.length;
      const [first, last] = found[gap];
      reveal(first);
      text.markTokens("dkv-found", first, last, 5);
      find("gap").textContent = `${gap + 1} of ${found.length}: ${counting(last - first + 1, "token")}`;
    }
    find("gap-on").addEventListener("click", () => goToGap(1));
    find("gap-back").addEventListener("click", () => goToGap(-1));

    // ---- listening --------------------------------------------------------------------------------------------
    const show = (trace) => {
      element.classList.toggle("dkv-empty", !trace);
      if (!trace) return;
      slider.value = "0";
      units = {};
      gap = -1;
      find("find").value = "";
      for (const role of ["found", "gap"]) find(role).textContent = "";
      for (const name of ["dkv-find", "dkv-found", "dkv-hover", "dkv-pin", "dkv-sought"]) text.clear(name);
      text.fill(trace.prompt);
      const code = DynamicKV.looksLikeCode(trace.prompt.text.slice(...trace.prompt.document_utf16_span));
      element.classList.toggle("dkv-code-text", code);
      document.querySelector("#dkv-document")?.classList.toggle("dkv-code-text", code && Boolean(trace.example));
      scroll.scrollTop = 0;
      for (const box of Object.values(folds)) box.open = false;
      redraw();
      minimap.measure();
    };
    function redraw() {
      if (!store.trace) return;
      fillTabs();
      fillChoices();
      markWindow();
      markEdits();
      markExpected();
      paint();
      minimap.draw();
    }
    on("trace", show);
    on("runs", redraw);
    on("film", () => { if (store.trace?.runs.length) { paint(); minimap.draw(); } });
    on("view", (changed) => {
      gap = -1;
      find("gap").textContent = "";
      if (changed.size === 1 && changed.has("layer")) paint(); else redraw();
    });
    let preview = null;
    on("hover", () => {
      if (!store.trace) return;
      if (!store.hover || store.hover.source !== "document") tip.hidden = true;
      markHover();
      if (previewed() !== preview) { preview = previewed(); paint(); }
    });
    on("theme", minimap.draw);
    // "dkv:reveal" scrolls to a position: the layer map and the evidence send it.
    on("reveal", reveal);
    for (const box of Object.values(folds)) box.addEventListener("toggle", minimap.measure);
    new ResizeObserver(minimap.measure).observe(scroll);
    // The text takes what the screen has left below the answers.
    const above = framed(() => {
      const stage = element.closest("#dkv-stage");
      if (stage?.offsetParent) document.documentElement.style.setProperty("--dkv-above", `${Math.round(stage.getBoundingClientRect().top + window.scrollY)}px`);
    });
    for (const node of document.querySelectorAll("#dkv-answers, #dkv-head")) new ResizeObserver(above).observe(node);
    if (store.trace) show(store.trace);
    return () => {};
  });
})();
