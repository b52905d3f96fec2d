// Predict, then reveal: a reader marks the sentences to keep, and sees how each method's choice lies to that.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { make, plain, counting } = DynamicKV;
  const percent = (share) => `${share && share < 0.1 ? (100 * share).toFixed(1) : Math.round(100 * share)} %`;

  DynamicKV.learnFigure((learn, find) => {
    const list = find("sentences");
    const reveal = find("reveal");
    let lesson = null;
    let sentences = []; // {first, end, node, marked}
    let active = 0;
    let shown = false;

    const marked = () => sentences.filter((sentence) => sentence.marked);
    const spent = () => marked().reduce((sum, { first, end }) => sum + end - first, 0);

    // Sentences of the document, as tokens [first, end); pieces without a letter or number join the one before.
    function cut() {
      const { prompt } = lesson.trace;
      const [from, to] = prompt.document_span;
      const units = DynamicKV.unitsOf(prompt, "sentence").filter((token) => token > from && token < to);
      const found = [];
      [from, ...units].forEach((first, i, all) => {
        const end = i + 1 < all.length ? all[i + 1] : to;
        const words = prompt.text.slice(prompt.starts[first], prompt.ends[end - 1]);
        if (found.length && !/[\p{L}\p{N}]{2}/u.test(words)) found.at(-1).end = end; else found.push({ first, end });
      });
      return found;
    }

    function build() {
      const { prompt } = lesson.trace;
      sentences = cut();
      active = 0;
      shown = false;
      list.replaceChildren(...sentences.flatMap((sentence, i) => {
        const words = prompt.text.slice(prompt.starts[sentence.first], i + 1 < sentences.length ? prompt.starts[sentences[i + 1].first] : prompt.ends[sentence.end - 1]);
        const inner = words.trim();
        const at = words.indexOf(inner);
        sentence.node = make("span", { id: `dkv-sentence-${i}`, role: "option" }, inner);
        sentence.node.setAttribute("aria-selected", "false");
        return [words.slice(0, at), sentence.node, words.slice(at + inner.length)];
      }));
      list.scrollTop = 0;
      list.removeAttribute("aria-activedescendant");
      find("verdict").replaceChildren(make("p", { className: "dkv-note" }, "What each method kept appears here, beside your choice."));
      count();
    }

    function count() {
      const room = lesson.parameters.capacity;
      const used = spent();
      Object.assign(find("spent"), { max: room, value: Math.min(used, room) });
      find("spent-label").textContent = `${plain(used)} of ${plain(room)} tokens`;
      reveal.disabled = !used || shown;
    }

    function toggle(i) {
      if (shown) return;
      const sentence = sentences[i];
      const size = sentence.end - sentence.first;
      if (!sentence.marked && spent() + size > lesson.parameters.capacity) {
        find("spent-label").textContent = `Full: this sentence has ${counting(size, "token")}. Take back another first.`;
        return;
      }
      sentence.marked = !sentence.marked;
      sentence.node.setAttribute("aria-selected", String(sentence.marked));
      count();
    }

    function move(i) {
      sentences[active]?.node.classList.remove("dkv-active");
      active = Math.max(0, Math.min(sentences.length - 1, i));
      const { node } = sentences[active];
      node.classList.add("dkv-active");
      list.setAttribute("aria-activedescendant", node.id);
      const place = node.getBoundingClientRect();
      const frame = list.getBoundingClientRect();
      if (place.top < frame.top || place.bottom > frame.bottom) list.scrollTop += place.top - frame.top - frame.height / 3;
    }

    // Of what a run keeps of the document, over layers and heads: the part that lies in these sentences.
    function overlap(run, chosen) {
      const { layers, prompt: { length, document_span: [from, to] } } = lesson.trace;
      let inside = 0;
      let all = 0;
      const mine = new Uint8Array(length);
      for (const { first, end } of chosen) mine.fill(1, first, end);
      for (let layer = 0; layer < layers; layer += 1) {
        for (let i = from; i < to; i += 1) {
          const kept = run.kept[layer * length + i];
          all += kept;
          if (mine[i]) inside += kept;
        }
      }
      return all ? inside / all : 0;
    }
    const holds = (chosen) => lesson.spans.filter(([first, last]) => {
      for (let i = first; i <= last; i += 1) if (!chosen.some((sentence) => i >= sentence.first && i < sentence.end)) return false;
      return true;
    }).length;

    function judge() {
      shown = true;
      const chosen = marked();
      const { layers, prompt, runs } = lesson.trace;
      const [from, to] = prompt.document_span;
      const chance = spent() / (to - from);
      const proof = new Set();
      sentences.forEach((sentence, i) => { if (lesson.spans.some(([first, last]) => first < sentence.end && last >= sentence.first)) proof.add(i); });
      proof.forEach((i) => sentences[i].node.classList.add("dkv-proof"));
      const others = runs.filter((run) => run.method !== "FullKV");
      const shares = others.map((run) => overlap(run, chosen));
      const most = Math.max(chance, ...shares) * 1.02 || 1;
      const rows = others.map((run, i) => {
        const kept = lesson.survival[run.method];
        const share = shares[i];
        const bar = make("i", { style: `width:${(100 * share) / most}%` });
        return make("tr", { data: { method: run.look } },
          make("th", { scope: "row" }, make("span", { className: "dkv-glyph", ariaHidden: "true" }, run.glyph), run.label),
          make("td", { className: "dkv-share" }, bar, make("s", { style: `left:${(100 * chance) / most}%` })), make("td", { data: { overlap: run.method } }, percent(share)),
          make("td", {}, `${kept.filter((part) => part > 0).length} of ${layers} layers`));
      });
      const had = holds(chosen);
      find("verdict").replaceChildren(
        make("p", {}, make("b", {}, had === lesson.spans.length ? "You kept the evidence." : had ? `You kept ${had} of ${lesson.spans.length} passages of the evidence.` : "You did not keep the evidence."),
          ` It is framed in the text now. Your sentences hold ${percent(chance)} of the document.`),
        make("table", { className: "dkv-bars dkv-verdict-table" }, make("caption", {}, `How much of each method's choice lies in your sentences; the upright line is chance, ${percent(chance)}`),
          make("thead", {}, make("tr", {}, make("td"), make("td"), make("th", { scope: "col" }, "overlap"), make("th", { scope: "col" }, "evidence in"))),
          make("tbody", {}, ...rows)),
        make("p", { className: "dkv-note" }, "You chose once, for all layers. A method chooses for every layer and head, so it can keep a little of much: a token that is gone in one layer may live on in another."));
      const [first] = proof;
      if (first !== undefined) move(first);
      count();
    }

    list.addEventListener("click", (event) => {
      const i = sentences.findIndex(({ node }) => node === event.target);
      if (i < 0) return;
      move(i);
      toggle(i);
    });
    list.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1, PageDown: 8, PageUp: -8, Home: -1e6, End: 1e6 }[event.key];
      if (step) move(list.hasAttribute("aria-activedescendant") ? active + step : 0);
      else if (event.key === " " || event.key === "Enter") toggle(active);
      else return;
      event.preventDefault();
    });
    reveal.addEventListener("click", judge);
    find("again").addEventListener("click", build);
    return { lesson(next) {
      lesson = next;
      find("asked-again").textContent = next.trace.record.prompt.question;
      build();
    } };
  });
})();
