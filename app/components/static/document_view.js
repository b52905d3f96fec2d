// The document view: the prompt as it was, with kept tokens marked by the CSS Custom Highlight API.
// The text is one text node per paragraph; a layer change only rebuilds ranges. Browsers without the API get merged spans.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { store, on, make, plain, framed } = DynamicKV;
  const LEVEL_NAMES = [1, 2, 3, 4, 5].map((level) => `dkv-kept-${level}`);
  const native = () => Boolean(window.CSS?.highlights && window.Highlight && window.StaticRange);

  DynamicKV.register("document", (element) => {
    const find = (role) => element.querySelector(`[data-role="${role}"]`);
    const slider = find("slider");
    const tip = element.querySelector(".dkv-tip");
    const tabs = element.querySelector(".dkv-tabs");
    const scroll = element.querySelector(".dkv-scroll");
    const folds = { before: find("before"), after: find("after") };
    const boxes = [folds.before.querySelector(".dkv-text"), find("text"), folds.after.querySelector(".dkv-text")];
    let nodes = []; // {node, start, end} in UTF-16 units of the whole prompt, ascending
    let places = new Map(); // the same, by node

    const run = () => store.trace.runs[store.run];
    const previewed = () => (store.hover && store.hover.source !== "document" && store.hover.layer !== undefined ? store.hover.layer : store.layer);

    // ---- text -------------------------------------------------------------------------------------------------
    function fill() {
      nodes = [];
      const { text, document_utf16_span } = store.trace.prompt;
      const sections = [[0, document_utf16_span[0]], document_utf16_span, [document_utf16_span[1], text.length]];
      sections.forEach(([start, end], index) => fillSection(boxes[index], text, start, end));
      places = new Map(nodes.map((entry) => [entry.node, entry]));
    }

    function fillSection(box, text, start, end) {
      box.replaceChildren();
      let from = start;
      while (from < end) {
        const newline = text.indexOf("\n", from);
        const to = newline < 0 || newline + 1 > end ? end : newline + 1;
        const node = document.createTextNode(text.slice(from, to));
        box.append(node);
        nodes.push({ node, start: from, end: to });
        from = to;
      }
    }

    function nodeAt(unit) {
      let low = 0;
      let high = nodes.length - 1;
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (nodes[middle].start <= unit) low = middle; else high = middle - 1;
      }
      return low;
    }

    // Static ranges over [start, end) units; one per paragraph touched.
    function ranges(start, end, out) {
      for (let i = nodeAt(start); i < nodes.length && nodes[i].start < end; i += 1) {
        const { node, start: base, end: stop } = nodes[i];
        const from = Math.max(start, base) - base;
        const to = Math.min(end, stop) - base;
        if (to > from) out.push(new StaticRange({ startContainer: node, startOffset: from, endContainer: node, endOffset: to }));
      }
    }

    // Runs of tokens that share a level become one range.
    function merged(levels, use) {
      const { starts, ends } = store.trace.prompt;
      let first = 0;
      for (let i = 1; i <= levels.length; i += 1) {
        if (i < levels.length && levels[i] === levels[first]) continue;
        if (levels[first]) use(levels[first], starts[first], ends[i - 1]);
        first = i;
      }
    }

    // ---- marks ------------------------------------------------------------------------------------------------
    function paint() {
      if (!store.trace?.runs.length) return;
      const layer = previewed();
      const { length } = store.trace.prompt;
      const levels = DynamicKV.levels(run(), layer, store.trace.layers, length);
      if (native()) paintHighlights(levels); else paintSpans(levels);
      describe(layer);
    }

    function paintHighlights(levels) {
      const buckets = LEVEL_NAMES.map(() => []);
      merged(levels, (level, start, end) => ranges(start, end, buckets[level - 1]));
      LEVEL_NAMES.forEach((name, i) => setHighlight(name, buckets[i], 1));
    }

    function setHighlight(name, found, priority) {
      const highlight = new Highlight();
      for (const range of found) highlight.add(range);
      highlight.priority = priority;
      CSS.highlights.set(name, highlight);
    }

    function paintSpans(levels) {
      fill();
      const { text } = store.trace.prompt;
      const marks = [];
      merged(levels, (level, start, end) => marks.push([start, end, level]));
      let next = 0;
      for (const { node, start, end } of nodes) {
        const parts = [];
        let at = start;
        while (next < marks.length && marks[next][0] < end) {
          const [from, to, level] = marks[next];
          const left = Math.max(from, start);
          const right = Math.min(to, end);
          parts.push(text.slice(at, left), make("span", { className: `dkv-span-${level}` }, text.slice(left, right)));
          at = right;
          if (to > end) break;
          next += 1;
        }
        if (parts.length) node.replaceWith(...parts, text.slice(at, end));
      }
    }

    function markWindow() {
      if (!native()) return;
      const { length, starts, ends } = store.trace.prompt;
      const out = [];
      const window_ = run().window;
      if (window_) ranges(starts[length - window_], ends[length - 1], out);
      setHighlight("dkv-window", out, 2);
    }

    function markHover() {
      if (!native()) return;
      const out = [];
      const { starts, ends } = store.trace.prompt;
      const hover = store.hover;
      if (hover?.position !== undefined) ranges(starts[hover.position], ends[hover.last ?? hover.position], out);
      setHighlight("dkv-hover", out, 3);
    }

    // ---- words ------------------------------------------------------------------------------------------------
    function describe(layer) {
      const { layers, prompt } = store.trace;
      const current = run();
      const all = layer === null;
      find("all").setAttribute("aria-pressed", String(all));
      slider.max = String(layers - 1);
      if (!all) slider.value = String(layer);
      slider.classList.toggle("dkv-idle", all);
      slider.setAttribute("aria-valuetext", all ? "all layers" : `layer ${layer}`);
      find("where").textContent = all
        ? `all ${layers} layers`
        : `layer ${layer}: ${plain(current.budgets[layer])} of ${plain(prompt.length)} kept`;
      const names = DynamicKV.levelNames(current, layer, layers);
      find("legend").replaceChildren(
        make("span", { className: "dkv-legend-name" }, all ? "kept in … layers" : `kept by … of ${current.heads} heads`),
        make("span", { className: "dkv-swatch dkv-level-0" }, "0"),
        ...names.flatMap((name, i) => (name === null ? [] : [make("span", { className: `dkv-swatch dkv-level-${i + 1}` }, name)])),
        ...(current.window ? [make("span", { className: "dkv-swatch dkv-level-window" }, `window (last ${current.window})`)] : []),
      );
      fold(folds.before, 0, prompt.document_span[0], "template before the document", layer);
      fold(folds.after, prompt.document_span[1], prompt.length, "question and template after the document", layer);
    }

    function fold(box, from, to, name, layer) {
      const total = to - from;
      box.hidden = total <= 0;
      const { length } = store.trace.prompt;
      const counts = layer === null ? DynamicKV.keptLayers(run(), store.trace.layers, length) : run().kept.subarray(layer * length, (layer + 1) * length);
      const where = layer === null ? "in a layer or more" : `at layer ${layer}`;
      let kept = 0;
      for (let i = from; i < to; i += 1) kept += counts[i] > 0 ? 1 : 0;
      const seen = name.startsWith("question") ? (store.trace.prompt.question_aware ? " · the scorer saw the question" : " · the scorer did not see the question") : "";
      box.querySelector("summary").textContent = `${plain(total)} ${total === 1 ? "token" : "tokens"}: ${name} · ${plain(kept)} kept ${where}${seen}`;
    }

    function fillTabs() {
      tabs.replaceChildren(...store.trace.runs.map((item, index) => {
        const button = make("button", { type: "button", data: { method: item.method } },
          make("span", { className: "dkv-glyph", ariaHidden: "true" }, item.glyph), item.method);
        button.setAttribute("aria-pressed", String(index === store.run));
        button.addEventListener("click", () => DynamicKV.setRun(index));
        return button;
      }));
    }

    // ---- pointing ---------------------------------------------------------------------------------------------
    // Where a text node begins in the prompt; spans of the fallback are found by measuring their section.
    function unitOf(node) {
      const entry = places.get(node);
      if (entry) return entry.start;
      const index = node?.nodeType === Node.TEXT_NODE ? boxes.findIndex((box) => box.contains(node)) : -1;
      if (index < 0) return -1;
      const range = document.createRange();
      range.setStart(boxes[index], 0);
      range.setEnd(node, 0);
      const { document_utf16_span } = store.trace.prompt;
      return [0, ...document_utf16_span][index] + range.toString().length;
    }

    function unitAt(x, y) {
      let node; let offset;
      if (document.caretPositionFromPoint) {
        const caret = document.caretPositionFromPoint(x, y);
        if (!caret) return -1;
        ({ offsetNode: node, offset } = caret);
      } else if (document.caretRangeFromPoint) {
        const caret = document.caretRangeFromPoint(x, y);
        if (!caret) return -1;
        ({ startContainer: node, startOffset: offset } = caret);
      }
      const start = unitOf(node);
      if (start < 0) return -1;
      // The caret sits between characters: take the character whose box holds the pointer.
      for (const at of [offset - 1, offset]) {
        if (at < 0 || at >= node.length) continue;
        const range = document.createRange();
        range.setStart(node, at);
        range.setEnd(node, at + 1);
        const holds = [...range.getClientRects()].some((box) => x >= box.left && x <= box.right && y >= box.top && y <= box.bottom);
        if (holds) return start + at;
      }
      return -1;
    }

    const point = framed((x, y) => {
      if (!store.trace) return;
      const unit = unitAt(x, y);
      const { starts, ends } = store.trace.prompt;
      let position = unit < 0 ? -1 : DynamicKV.tokenAt(starts, unit);
      if (position >= 0 && ends[position] <= unit) position = -1;
      if (position < 0) { DynamicKV.setHover(null); return; }
      let last = position;
      while (position > 0 && ends[position - 1] > unit) position -= 1; // tokens that share this character
      DynamicKV.setHover({ source: "document", position, last });
      showTip(x, y, position, last);
    });

    function showTip(x, y, position, last) {
      const { prompt, layers } = store.trace;
      const current = run();
      const shown = prompt.text.slice(prompt.starts[position], prompt.ends[last]).replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·");
      const kept = DynamicKV.keptLayers(current, layers, prompt.length)[position];
      tip.querySelector('[data-role="token"]').textContent = shown;
      const place = last > position ? `${last - position + 1} tokens, positions ${position}–${last}` : `position ${plain(position)} of ${plain(prompt.length)}`;
      tip.querySelector('[data-role="facts"]').textContent = `${place} · ${current.method} keeps it in ${kept} of ${layers} layers`;
      const cells = tip.querySelector('[data-role="cells"]');
      if (cells.children.length !== layers) cells.replaceChildren(...Array.from({ length: layers }, () => make("i")));
      for (let layer = 0; layer < layers; layer += 1) {
        cells.children[layer].style.setProperty("--share", current.kept[layer * prompt.length + position] / current.heads);
        cells.children[layer].classList.toggle("dkv-on", layer === store.layer);
      }
      tip.hidden = false;
      const box = element.getBoundingClientRect();
      const left = Math.min(Math.max(8, x - box.left - tip.offsetWidth / 2), box.width - tip.offsetWidth - 8);
      const above = y - box.top - tip.offsetHeight - 18;
      tip.style.transform = `translate(${left}px, ${above > 0 ? above : y - box.top + 22}px)`;
    }

    scroll.addEventListener("pointermove", (event) => point(event.clientX, event.clientY));
    scroll.addEventListener("click", (event) => point(event.clientX, event.clientY));
    scroll.addEventListener("pointerleave", () => point(-1, -1));
    // What is copied is the text itself, byte for byte.
    scroll.addEventListener("copy", (event) => {
      const selection = document.getSelection();
      if (!selection.rangeCount || !scroll.contains(selection.getRangeAt(0).commonAncestorContainer)) return;
      event.clipboardData.setData("text/plain", selection.getRangeAt(0).toString());
      event.preventDefault();
    });
    slider.addEventListener("input", () => DynamicKV.setLayer(Number(slider.value)));
    find("all").addEventListener("click", () => DynamicKV.setLayer(store.layer === null ? Number(slider.value) : null));
    const move = (step) => {
      const last = store.trace ? store.trace.layers - 1 : 0;
      DynamicKV.setLayer(store.layer === null ? Number(slider.value) : Math.min(last, Math.max(0, store.layer + step)));
    };
    find("previous").addEventListener("click", () => move(-1));
    find("next").addEventListener("click", () => move(1));

    const show = (trace) => {
      element.classList.toggle("dkv-empty", !trace);
      if (!trace) return;
      slider.value = "0";
      fill();
      scroll.scrollTop = 0;
      for (const box of Object.values(folds)) box.open = false;
      fillTabs();
      markWindow();
      paint();
    };
    on("trace", show);
    on("layer", paint);
    on("method", () => { fillTabs(); markWindow(); paint(); });
    let preview = null;
    on("hover", () => {
      if (!store.trace) return;
      if (!store.hover || store.hover.source !== "document") tip.hidden = true;
      markHover();
      if (previewed() !== preview) { preview = previewed(); paint(); }
    });
    // "dkv:reveal" scrolls to a position: the layer map sends it.
    on("reveal", (position) => {
      const { starts } = store.trace.prompt;
      const { node, start } = nodes[nodeAt(starts[position])];
      const fold_ = node.parentElement.closest("details");
      if (fold_) fold_.open = true;
      const range = document.createRange();
      range.setStart(node, starts[position] - start);
      const line = range.getBoundingClientRect();
      scroll.scrollTop += line.top - scroll.getBoundingClientRect().top - scroll.clientHeight / 3;
    });
    if (store.trace) show(store.trace);
    return () => {};
  });
})();
