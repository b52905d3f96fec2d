// Answer cards: one per method, filled while answers stream in. When a run is whole its words become handles: each points at what
// it read. Texts are text nodes, always.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { make, store, on, plain } = DynamicKV;
  const BIG = "Mean surviving probability: of every word of FullKV's answer, the part of its probability that is left with this cache.";

  function build(card) {
    const [name, ...rest] = card.label.split(", ");
    const node = make("article", { className: "dkv-card", data: { method: card.method, label: card.label } });
    const answer = make("div", { className: "dkv-answer", tabIndex: 0, role: "group" }, make("span", { className: "dkv-words" }), make("i", { className: "dkv-caret" }));
    answer.setAttribute("aria-label", `Answer of ${card.label}; left and right step through its words`);
    node.append(
      make("header", {}, make("span", { className: "dkv-glyph" }, card.glyph),
        make("h3", {}, name, ...(rest.length ? [make("span", { className: "dkv-unseen" }, ", "), make("small", {}, rest.join(", "))] : [])),
        make("span", { className: "dkv-big" }, make("b"), make("small")), make("span", { className: "dkv-counter" }, make("b"), make("small"))),
      make("div", { className: "dkv-meter" }, make("i")),
      make("p", { className: "dkv-kept" }, make("span"), make("button", { type: "button", className: "dkv-link dkv-erased" })),
      answer,
      make("canvas", { className: "dkv-card-map", role: "img", hidden: true }),
      make("p", { className: "dkv-fate" }),
      make("p", { className: "dkv-expected", title: "Measured: whether the answer contains, in any case, a phrase that is expected. It is counted as wrong when it does not." }, make("span"), make("span")),
      make("details", { className: "dkv-more" }, make("summary", {}, make("span", { className: "dkv-finish" }), make("span", { className: "dkv-chip" })),
        make("dl", { className: "dkv-receipts" }, ...card.receipts.filter((item) => item.label !== "Prefill" || card.method === "FullKV").map((item) => make("div", { title: item.hint, data: { label: item.label } },
          make("dt", {}, item.label), make("dd", {}, make("b"), make("small"))))),
        make("div", { className: "dkv-parting-place" })),
    );
    node.querySelector(".dkv-glyph").setAttribute("aria-hidden", "true");
    return node;
  }

  const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };
  const hits = (words) => { const found = /^holds (\d+) of (\d+)/.exec(words ?? ""); return found ? found[1] === found[2] : Boolean(words?.startsWith("contains")); };

  function fill(node, card) {
    node.dataset.state = card.state;
    const chip = node.querySelector(".dkv-chip");
    put(chip, card.chip);
    chip.dataset.tone = card.tone;
    const words = node.querySelector(".dkv-words");
    if (words.textContent !== card.answer.join("")) words.textContent = card.answer.join("");
    put(node.querySelector(".dkv-finish"), card.finish);
    const verdict = node.querySelector(".dkv-expected");
    verdict.dataset.tone = hits(card.verdict?.[0]) ? "good" : "loud";
    [...verdict.children].forEach((line, i) => put(line, card.verdict?.[i] ?? ""));
    const bar = node.querySelector(".dkv-meter > i");
    bar.style.width = `${100 * (card.kept ?? 0)}%`;
    const kept = card.receipts.find((item) => item.label === "Kept")?.value;
    const share = node.querySelector(".dkv-kept > span");
    put(share, card.kept === null ? "" : `${kept} kept`);
    share.hidden = true; // the big figure says it, until there is a better one
    for (const item of card.receipts) {
      const row = node.querySelector(`[data-label="${item.label}"]`);
      if (!row) continue;
      put(row.querySelector("b"), item.value);
      put(row.querySelector("small"), item.note);
    }
    // Until the run is whole, the one big figure is what is kept.
    big(node, card.method === "FullKV" ? "100 %" : card.kept === null ? "" : kept, card.kept === null ? "" : "kept", "");
    node.querySelector(".dkv-erased").hidden = true;
    put(node.querySelector(".dkv-fate"), "");
    node.querySelector(".dkv-parting-place").replaceChildren();
  }

  function big(node, value, words, title) {
    const box = node.querySelector(".dkv-big");
    put(box.querySelector("b"), value);
    put(box.querySelector("small"), words);
    box.title = title;
  }

  // What only the whole record says: words as handles, what survives, what is erased everywhere, the word that is lost.
  function detail(node, trace, index) {
    const run = trace.runs[index];
    const words = DynamicKV.wordsOf(trace)[index];
    const box = node.querySelector(".dkv-words");
    const text = run.pieces.join("");
    if (words.length && box.textContent.startsWith(text.trimEnd())) {
      let at = 0;
      const parts = [];
      const glowing = words.some((word) => word.lost);
      words.forEach((word, own) => {
        if (word.start > at) parts.push(text.slice(at, word.start));
        const mark = run.aligned ? word.lost : !glowing && own === firstApart(run);
        parts.push(make("span", { className: `dkv-handle${mark ? (run.aligned ? " dkv-glow" : " dkv-apart") : ""}`, data: { own } }, word.text));
        at = word.end;
      });
      box.replaceChildren(...parts, box.textContent.slice(at));
    }
    const aligned = run.aligned;
    node.querySelector(".dkv-kept > span").hidden = run.method !== "FullKV" && !aligned;
    if (run.method === "FullKV") big(node, "", "the reference", "Every other answer is compared with this one.");
    else if (aligned) big(node, DynamicKV.percent(aligned.surviving), "survives", BIG);
    put(node.querySelector(".dkv-fate"), fate(run, trace));
    const gone = run.method === "FullKV" ? 0 : run.erased ?? DynamicKV.erased(run, trace);
    const erased = node.querySelector(".dkv-erased");
    erased.hidden = !gone;
    put(erased, `${plain(gone)} erased everywhere`);
    const row = make("div", { data: { label: "Erased" } }, make("dt", {}, "Erased"), make("dd", {}, make("b", {}, plain(gone)), make("small", {}, "everywhere")));
    node.querySelector('[data-label="Erased"]')?.remove();
    if (gone) node.querySelector(".dkv-receipts").append(row);
    erased.title = "Tokens that no layer and no head keeps: no attention can repair their loss. Press to see them in the text.";
    if (run.expected_found !== undefined && run.expected_found !== null && !node.querySelector(".dkv-expected").textContent) {
      const verdict = node.querySelector(".dkv-expected");
      verdict.dataset.tone = run.expected_found ? "good" : "loud";
      put(verdict.children[0], run.expected_found ? "contains what you expect" : "misses what you expect");
    }
    const apart = store.cards?.partings?.find((item) => item.label === run.label);
    if (apart) node.querySelector(".dkv-parting-place").replaceChildren(parting(apart));
  }

  // The word that holds the first differing token, for records without aligned words.
  function firstApart(run) {
    const at = run.method === "FullKV" ? null : run.agreement?.first_divergence ?? null;
    if (at === null) return -1;
    const unit = run.pieces.slice(0, at).join("").length;
    return DynamicKV.answerWords(run).findIndex((word) => word.end > unit);
  }

  // One line: which word is lost, or that none is.
  function fate(run, trace) {
    if (run.method === "FullKV") return "";
    const { aligned } = run;
    if (!aligned) return run.agreement && run.agreement.first_divergence === null ? "the same answer, token by token" : "";
    if (aligned.loss === null) return run.agreement?.first_divergence === null ? "the same answer, token by token" : "no word is lost: a rewording";
    const full = trace.runs.find((item) => item.method === "FullKV");
    const [start, end] = aligned.utf16_spans[aligned.loss];
    const { percent } = DynamicKV;
    return `lost: “${DynamicKV.shortWord(full.pieces.join("").slice(start, end))}”, ${percent(aligned.probabilities_full[aligned.loss])} → ${percent(aligned.probabilities[aligned.loss])}`;
  }

  // Where an answer leaves FullKV's: the words before, both tokens, and how probable each was under either cache.
  function parting(item) {
    const cell = (words) => make("td", {}, words);
    const token = (words, name) => make("mark", { className: name }, words);
    const names = item.tokens.map((words) => words.replace(/\n/g, "⏎").trim() || words);
    return make("div", { className: "dkv-parting", data: { method: item.method } },
      make("p", {}, `First token that differs from FullKV's, ${item.at}: `, make("q", {}, item.shared), " ", token(names[0], "dkv-own"), " instead of ", token(names[1], "dkv-theirs")),
      make("table", {},
        make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "probability of"), make("th", { scope: "col" }, token(names[0], "dkv-own")), make("th", { scope: "col" }, token(names[1], "dkv-theirs")))),
        make("tbody", {},
          make("tr", {}, make("th", { scope: "row" }, "with this cache"), ...item.here.map(cell)),
          make("tr", {}, make("th", { scope: "row" }, "with the full cache"), ...item.full.map(cell)))));
  }

  // Two compressed runs side by side: they share every token before the first that differs, each is sure in its own way.
  function versus(a, b) {
    if (!a.token_ids?.length || !b.token_ids?.length || [...a.token_ids, ...b.token_ids].every((id) => id === 0)) return null;
    const at = a.token_ids.findIndex((id, i) => id !== b.token_ids[i]);
    const box = (...parts) => make("div", { className: "dkv-parting", data: { method: a.look } }, make("p", {}, ...parts));
    if (at < 0 && a.token_ids.length === b.token_ids.length) return box(make("b", {}, a.label), " and ", make("b", {}, b.label), " answer the same, token by token.");
    const end = at < 0 ? a.token_ids.length : at;
    const token = (run) => (end < run.token_ids.length ? (run.pieces[end] || `token ${run.token_ids[end]}`).replace(/\n/g, "⏎").trim() : "its end");
    const sure = (run) => (end < run.token_ids.length ? ` (${DynamicKV.percent(Math.exp(run.logprobs[end]))} with its own cache)` : "");
    const shared = a.pieces.slice(0, end).join("");
    return box(make("b", {}, a.label), " and ", make("b", {}, b.label), ` part at token ${end + 1}: `,
      make("q", {}, shared.length > 90 ? `…${shared.slice(-90)}` : shared), " ",
      make("mark", { className: "dkv-own" }, token(a)), sure(a), " against ", make("mark", { className: "dkv-theirs" }, token(b)), sure(b));
  }

  DynamicKV.register("answers", (element) => {
    let finished = null; // the last cards that belong to a whole record
    let live = false; // whether answers stream in: the record is still that of the run before
    let shown = []; // [{node, card, run: its place among the record's runs}]
    const find = (role) => element.querySelector(`[data-role="${role}"]`);
    const link = find("link");
    link.addEventListener("click", async () => { link.textContent = await DynamicKV.copyLink(); });
    find("save").addEventListener("click", () => DynamicKV.saveRun());
    const compared = () => {
      const { trace, view } = store;
      const [a, b] = [trace?.runs[view.run], view.against === null ? null : trace?.runs[view.against]];
      const told = a && b && a.method !== "FullKV" && b.method !== "FullKV" && !a.predicted && !b.predicted ? versus(a, b) : null;
      find("versus").replaceChildren(...(told ? [told] : []));
    };

    // The cards and the record arrive each by its own way: the later one makes the words.
    function details() {
      const { trace } = store;
      const whole = trace && finished && !live && finished === store.cards && trace.runs.filter((run) => !run.predicted).length === shown.length
        && shown.every(({ card, run }) => trace.runs[run]?.label === card.label && trace.runs[run].pieces.join("").trimEnd() === card.answer.join("").trimEnd());
      link.hidden = !whole || !trace.example;
      find("save").hidden = !whole || Boolean(trace.example) || !DynamicKV.copyLink;
      put(find("model"), whole ? `${trace.record.model.name} ·` : "");
      if (!whole) return;
      for (const { node, run } of shown) detail(node, trace, run);
      requestAnimationFrame(bringIn);
      sought(trace);
      mark();
    }

    // Whether the text holds what is expected.
    function sought(trace) {
      const { expected } = trace.record;
      find("sought").hidden = !expected;
      if (!expected) return;
      const span = expected.document_utf16_span;
      const show = make("button", { type: "button", className: "dkv-link" }, "show it");
      show.addEventListener("click", () => { const at = (unit) => DynamicKV.tokenAt(trace.prompt.starts, unit); DynamicKV.emit("reveal", at(span[0])); DynamicKV.setPin({ first: at(span[0]), last: at(span[1] - 1) }); });
      find("sought").replaceChildren("Expected: ", make("q", {}, expected.text), ...(span ? [" · found in your document ", show] : [" · not in your document, word for word"]));
    }

    // The lost word is in sight, however low its card, and no line is cut.
    function bringIn() {
      for (const { node } of shown) {
        const glow = node.querySelector(".dkv-glow");
        const box = node.querySelector(".dkv-answer");
        if (!glow) continue;
        const line = parseFloat(getComputedStyle(box).lineHeight) || 1;
        const below = glow.offsetTop - box.offsetTop + glow.offsetHeight / 2 - box.clientHeight;
        box.scrollTop = Math.max(0, Math.ceil(below / line) * line);
      }
    }

    // The chosen word, its counterparts in the other answers, and FullKV's word that the shown run loses.
    function mark() {
      const { trace } = store;
      const word = DynamicKV.word();
      const lost = trace?.runs[store.view.run]?.aligned?.loss ?? null;
      for (const { node, run } of shown) {
        node.classList.toggle("dkv-shown", run === store.view.run);
        const words = trace?.words?.[run] ?? [];
        for (const handle of node.querySelectorAll(".dkv-handle")) {
          const own = Number(handle.dataset.own);
          const same = word && words[own]?.full === word.full && (words[own].same || word.run === run);
          handle.classList.toggle("dkv-chosen", Boolean(word && word.run === run && word.own === own));
          handle.classList.toggle("dkv-same", Boolean(same));
          if (trace?.runs[run]?.method === "FullKV") handle.classList.toggle("dkv-glow", lost !== null && own === lost);
        }
      }
    }

    const place = (node) => shown.find((item) => item.node === node?.closest(".dkv-card"));
    const wordAt = (event) => {
      const handle = event.target.closest?.(".dkv-handle");
      const found = place(handle);
      if (!handle || !found || !store.trace?.words) return null;
      const own = Number(handle.dataset.own);
      return { run: found.run, own, full: store.trace.words[found.run][own].full };
    };
    const cards = find("cards");
    cards.addEventListener("pointerover", (event) => { if (event.pointerType === "mouse") { const word = wordAt(event); if (word || store.wordHover) DynamicKV.setWord(word, false); } });
    cards.addEventListener("pointerleave", () => { if (store.wordHover) DynamicKV.setWord(null, false); });
    cards.addEventListener("click", (event) => {
      const word = wordAt(event);
      const erased = event.target.closest(".dkv-erased");
      if (word) DynamicKV.setWord(store.word?.run === word.run && store.word.own === word.own ? null : word);
      else if (erased) DynamicKV.setView({ run: place(erased).run, layer: null, mark: store.view.mark === "erased" && store.view.run === place(erased).run ? "fill" : "erased" });
    });
    cards.addEventListener("keydown", (event) => {
      if (!event.target.classList.contains("dkv-answer") || event.ctrlKey || event.altKey || event.metaKey) return;
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      const found = place(event.target);
      if (!step || !found || !store.trace?.words?.[found.run]?.length) return;
      event.preventDefault();
      event.stopPropagation(); // elsewhere the arrow keys move the layer
      if (store.word?.run !== found.run) {
        const words = store.trace.words[found.run];
        const own = step > 0 ? 0 : words.length - 1;
        DynamicKV.setWord({ run: found.run, own, full: words[own].full });
      } else DynamicKV.stepWord(step);
      event.target.querySelector(".dkv-chosen")?.scrollIntoView({ block: "nearest", inline: "nearest" });
    });

    for (const name of ["trace", "runs", "view"]) on(name, compared);
    on("trace", details);
    const framedMark = DynamicKV.framed(mark);
    for (const name of ["word", "view"]) on(name, framedMark);
    const show = (received) => {
      const payload = received?.restore ? finished : received;
      if (!payload) return;
      if (payload.final) finished = payload;
      live = !payload.final;
      put(find("question"), payload.question);
      put(find("source"), payload.source);
      find("source").title = payload.circumstances ?? "";
      find("notice").hidden = !payload.notice;
      put(find("notice"), payload.notice);
      find("sought").hidden = true;
      const order = DynamicKV.inOrder(payload.cards, (card) => card.method);
      const same = order.length === shown.length && order.every((index, i) => shown[i].node.dataset.method === payload.cards[index].method && shown[i].node.dataset.label === payload.cards[index].label);
      if (!same) {
        shown = order.map((run) => ({ node: build(payload.cards[run]), run }));
        cards.replaceChildren(...shown.map((item) => item.node));
        cards.dataset.many = String(order.length > 4);
      }
      shown.forEach((item, i) => { item.run = order[i]; item.card = payload.cards[order[i]]; fill(item.node, item.card); });
      if (payload.final) store.cards = payload;
      details();
    };
    DynamicKV.showCards = show;
    return show;
  });
})();
