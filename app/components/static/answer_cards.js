// Answer cards: one per method, of fixed height, filled while answers stream in. Texts are text nodes, always.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { make } = DynamicKV;

  function build(card) {
    const method = { method: card.method };
    const node = make("article", { className: "dkv-card", data: method });
    const answer = make("div", { className: "dkv-answer", tabIndex: 0, role: "region" }, make("span"), make("mark"), make("span"), make("i", { className: "dkv-caret" }));
    answer.setAttribute("aria-label", `Answer of ${card.label}`);
    node.append(
      make("header", {}, make("span", { className: "dkv-glyph" }, card.glyph), make("h3", { title: card.label }, card.label), make("span", { className: "dkv-chip" })),
      make("div", { className: "dkv-meter" }, make("i")),
      answer,
      make("p", { className: "dkv-finish" }),
      make("p", { className: "dkv-expected", title: "Measured: whether the answer contains, in any case, a phrase that this example expects. It is counted as wrong when it does not." }, make("span"), make("span")),
      make("dl", { className: "dkv-receipts" }, ...card.receipts.map((item) => make("div", { title: item.hint },
        make("dt", {}, item.label), make("dd", {}, make("b"), make("small"))))),
    );
    node.querySelector(".dkv-glyph").setAttribute("aria-hidden", "true");
    return node;
  }

  const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };

  function fill(node, card) {
    node.dataset.state = card.state;
    const chip = node.querySelector(".dkv-chip");
    put(chip, card.chip);
    chip.dataset.tone = card.tone;
    const parts = node.querySelectorAll(".dkv-answer > span, .dkv-answer > mark");
    card.answer.forEach((text, i) => put(parts[i], text));
    parts[1].title = card.answer[1] ? "The first token that differs from FullKV's answer" : "";
    put(node.querySelector(".dkv-finish"), card.finish);
    const verdict = node.querySelector(".dkv-expected");
    verdict.dataset.tone = card.verdict?.[0]?.startsWith("contains") ? "good" : "loud";
    [...verdict.children].forEach((line, i) => put(line, card.verdict?.[i] ?? ""));
    const bar = node.querySelector(".dkv-meter > i");
    bar.style.width = `${100 * (card.kept ?? 0)}%`;
    node.querySelector(".dkv-meter").title = card.kept === null ? "" : `${(100 * card.kept).toFixed(1)} % of the cache is kept`;
    node.querySelectorAll(".dkv-receipts > div").forEach((row, i) => {
      put(row.querySelector("b"), card.receipts[i].value);
      put(row.querySelector("small"), card.receipts[i].note);
    });
    const answer = node.querySelector(".dkv-answer");
    answer.scrollTop = card.state === "running" ? answer.scrollHeight : 0;
  }

  // Where an answer leaves FullKV's: the words before, both tokens, and how probable each was under either cache.
  function parting(item) {
    const cell = (words) => make("td", {}, words);
    const token = (words, name) => make("mark", { className: name }, words);
    const names = item.tokens.map((words) => words.replace(/\n/g, "⏎"));
    return make("div", { className: "dkv-parting", data: { method: item.method } },
      make("p", {}, make("span", { className: "dkv-glyph", ariaHidden: "true" }, item.glyph), make("b", {}, item.label), ` leaves FullKV's answer at token ${item.at}: `,
        make("q", {}, item.shared), " ", token(names[0], "dkv-own"), " instead of ", token(names[1], "dkv-theirs")),
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
    const token = (run) => (end < run.token_ids.length ? (run.pieces[end] || `token ${run.token_ids[end]}`).replace(/\n/g, "⏎") : "its end");
    const sure = (run) => (end < run.token_ids.length ? ` (${percent(Math.exp(run.logprobs[end]))} with its own cache)` : "");
    const shared = a.pieces.slice(0, end).join("");
    return box(make("b", {}, a.label), " and ", make("b", {}, b.label), ` part at token ${end + 1}: `,
      make("q", {}, shared.length > 90 ? `…${shared.slice(-90)}` : shared), " ",
      make("mark", { className: "dkv-own" }, token(a)), sure(a), " against ", make("mark", { className: "dkv-theirs" }, token(b)), sure(b));
  }
  const percent = (share) => (share >= 0.9995 ? "100 %" : share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(share >= 0.2 ? 0 : 1)} %`);

  DynamicKV.register("answers", (element) => {
    let finished = null; // the last cards that belong to a whole record
    const find = (role) => element.querySelector(`[data-role="${role}"]`);
    const link = find("link");
    DynamicKV.on("trace", (trace) => { link.hidden = !trace?.example; link.textContent = "Copy link"; });
    link.addEventListener("click", async () => { link.textContent = await DynamicKV.copyLink(); });
    const compared = () => {
      const { trace, view } = DynamicKV.store;
      const [a, b] = [trace?.runs[view.run], view.against === null ? null : trace?.runs[view.against]];
      const told = a && b && a.method !== "FullKV" && b.method !== "FullKV" && !a.predicted && !b.predicted ? versus(a, b) : null;
      find("versus").replaceChildren(...(told ? [told] : []));
    };
    for (const name of ["trace", "runs", "view"]) DynamicKV.on(name, compared);
    return (received) => {
      const payload = received?.restore ? finished : received;
      if (!payload) return;
      const added = payload.final && payload.cards.length > (finished?.cards.length ?? Infinity) && DynamicKV.added(payload.cards.at(-1));
      if (payload.final) finished = payload;
      link.hidden = !payload.final || !DynamicKV.store.trace?.example;
      put(find("question"), payload.question);
      put(find("source"), payload.source);
      find("source").title = payload.circumstances ?? "";
      find("notice").hidden = !payload.notice;
      put(find("notice"), payload.notice);
      const cards = find("cards");
      const same = payload.cards.length === cards.children.length && payload.cards.every((card, i) => cards.children[i].dataset.method === card.method && cards.children[i].querySelector("h3").textContent === card.label);
      if (!same) cards.replaceChildren(...payload.cards.map(build));
      payload.cards.forEach((card, i) => fill(cards.children[i], card));
      find("partings").replaceChildren(...(payload.partings ?? []).map(parting));
      // A run that was added to those on screen comes last.
      if (added) requestAnimationFrame(() => { cards.scrollTo({ left: cards.scrollWidth, behavior: "instant" }); });
      if (payload.final) DynamicKV.store.cards = payload;
    };
  });
})();
