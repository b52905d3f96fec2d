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

  DynamicKV.register("answers", (element) => {
    let finished = null; // the last cards that belong to a whole record
    const find = (role) => element.querySelector(`[data-role="${role}"]`);
    const link = find("link");
    DynamicKV.on("trace", (trace) => { link.hidden = !trace?.example; link.textContent = "Copy link"; });
    link.addEventListener("click", async () => { link.textContent = await DynamicKV.copyLink(); });
    return (received) => {
      const payload = received?.restore ? finished : received;
      if (!payload) return;
      if (payload.final) finished = payload;
      put(find("question"), payload.question);
      put(find("source"), payload.source);
      find("notice").hidden = !payload.notice;
      put(find("notice"), payload.notice);
      const cards = find("cards");
      const same = payload.cards.length === cards.children.length && payload.cards.every((card, i) => cards.children[i].dataset.method === card.method && cards.children[i].querySelector("h3").textContent === card.label);
      if (!same) cards.replaceChildren(...payload.cards.map(build));
      payload.cards.forEach((card, i) => fill(cards.children[i], card));
      find("partings").replaceChildren(...(payload.partings ?? []).map(parting));
      if (payload.final) DynamicKV.store.cards = payload;
    };
  });
})();
