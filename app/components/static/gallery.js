// The gallery: recorded losses as cards with an address each. Texts are text nodes.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { make } = DynamicKV;
  const hidden = (node) => { node.setAttribute("aria-hidden", "true"); return node; };

  function card({ title, model, question, lost, about, address, elsewhere, rows }) {
    const link = make("a", { className: "dkv-gallery-open", href: address }, "Open in Explore");
    link.setAttribute("aria-label", `Open in Explore: ${title}, ${model}`);
    return make("article", { className: "dkv-panel dkv-gallery-card" },
      make("p", { className: "dkv-gallery-model" }, make("b", {}, model), ` · ${about}`),
      make("h3", {}, title), make("p", { className: "dkv-gallery-lost" }, lost), make("p", { className: "dkv-note" }, make("q", {}, question)),
      make("ul", {}, ...rows.map((row) => make("li", { data: { method: row.method, holds: row.holds } },
        make("b", {}, hidden(make("span", { className: "dkv-glyph" }, row.glyph)), ` ${row.label}`), make("span", { className: "dkv-gallery-verdict" }, row.holds ? "holds it" : "lost"), make("span", { className: "dkv-gallery-answer" }, row.answer)))),
      ...(elsewhere ? [make("p", { className: "dkv-note" }, elsewhere)] : []), link);
  }
  DynamicKV.register("gallery", (element) => (payload) => {
    element.querySelector('[data-role="cards"]').replaceChildren(...(payload ?? []).map(card));
  });
})();
