// The page's keys: what the mouse can do, and a list of them. Forms keep their own keys.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { store, make } = DynamicKV;
  const { view } = store;
  const KEYS = [
    ["Ctrl+Enter", "run"],
    ["← →", "the layer before and after; on an answer, its words; on the map, the position"],
    ["↑ ↓", "on the map, the layer"],
    ["[ ]", "the method before and after"],
    ["a n p", "answer words: into the answer shown, the next, the one before"],
    [". ,", "text words: the next and the one before, with the evidence beside"],
    ["Shift+. Shift+,", "the passage a word longer, at its end or its start"],
    ["s", "the passage to its whole sentence"],
    ["k d", "always keep, always drop the passage"],
    ["e", "into the evidence, and back"],
    ["/", "find in the text"],
    ["?", "this list"],
    ["Esc", "close the evidence, let go of a word"],
  ];
  const TYPING = "input:not([type=range]):not([type=checkbox]):not([type=radio]), textarea, select, [contenteditable], [role=tablist], [role=listbox], .cm-editor";
  let opener = null;

  function list() {
    let dialog = document.querySelector(".dkv-keys-list");
    if (!dialog) {
      const close = make("button", { type: "button", className: "dkv-toggle" }, "Close");
      dialog = make("dialog", { className: "dkv-keys-list" }, make("h2", { id: "dkv-keys-title" }, "Keys"),
        make("dl", {}, ...KEYS.flatMap(([keys, words]) => [make("dt", {}, keys), make("dd", {}, words)])), close);
      dialog.setAttribute("aria-labelledby", "dkv-keys-title");
      close.addEventListener("click", () => dialog.close());
      dialog.addEventListener("close", () => opener?.focus?.({ preventScroll: true }));
      document.body.append(dialog);
    }
    if (dialog.open) { dialog.close(); return; }
    opener = document.activeElement;
    dialog.showModal();
  }
  DynamicKV.listKeys = list;

  const press = (selector) => { const button = document.querySelector(selector); if (button && !button.disabled && button.offsetParent) { button.click(); return true; } return false; };
  function intoAnswer() {
    const shown = document.querySelector(".dkv-card.dkv-shown .dkv-answer") ?? document.querySelector(".dkv-answer");
    shown?.focus();
    if (!store.word) DynamicKV.stepWord(0);
  }
  function evidence() {
    const drawer = document.querySelector(".dkv-evidence:not([hidden])");
    if (!drawer) return;
    if (drawer.contains(document.activeElement)) document.querySelector(".dkv-scroll")?.focus({ preventScroll: true });
    else drawer.querySelector(".dkv-table").focus();
  }
  function layer(step) {
    const last = store.trace.layers - 1;
    const next = view.layer === null ? (step > 0 ? 0 : last) : view.layer + step;
    DynamicKV.setLayer(next < 0 || next > last ? null : next);
  }
  function method(step) {
    const order = DynamicKV.runOrder();
    DynamicKV.setRun(order[(order.indexOf(view.run) + step + order.length) % order.length]);
  }
  function letGo() {
    const menu = document.querySelector("details.dkv-menu[open]");
    if (menu) { menu.open = false; menu.querySelector("summary").focus(); return; }
    DynamicKV.setHover(null);
    if (store.pin) DynamicKV.setPin(null); else DynamicKV.setWord(null);
  }
  const ACTIONS = {
    ArrowLeft: () => layer(-1), ArrowRight: () => layer(1), "[": () => method(-1), "]": () => method(1),
    a: intoAnswer, n: () => DynamicKV.stepWord(1), p: () => DynamicKV.stepWord(-1),
    ".": () => DynamicKV.stepPin(1), ",": () => DynamicKV.stepPin(-1), ">": () => DynamicKV.stepPin(1, true), ":": () => DynamicKV.stepPin(1, true),
    "<": () => DynamicKV.stepPin(-1, true), ";": () => DynamicKV.stepPin(-1, true), s: () => DynamicKV.pinSentence(),
    k: () => press('.dkv-evidence:not([hidden]) [data-mark="pinned"]'), d: () => press('.dkv-evidence:not([hidden]) [data-mark="evicted"]'),
    e: evidence, "/": () => document.querySelector('.dkv-document [data-role="find"]')?.focus(), Escape: letGo,
  };

  // Gradio's footer says "Settings" twice, in words and as its icon's: once is enough.
  let looks = 40;
  const silence = () => {
    const icons = document.querySelectorAll("footer img[alt]:not([alt=''])");
    for (const icon of icons) icon.alt = "";
    if (!icons.length && (looks -= 1)) setTimeout(silence, 250);
  };
  silence();
  // Opened settings are brought into the form's view.
  document.addEventListener("click", (event) => {
    const fold = event.target.closest?.("#dkv-advanced > button");
    const form = document.querySelector("#dkv-fields");
    if (fold && form) setTimeout(() => { form.scrollTop += fold.getBoundingClientRect().top - form.getBoundingClientRect().top - 8; }, 60);
  });

  // Gradio's lists open with the focus and stay open when Tab takes it away: they close first.
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Tab" || event.target.getAttribute?.("aria-expanded") !== "true") return;
    event.stopImmediatePropagation(); // any other key would open the list again
    event.target.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
  }, true);

  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { if (press("#dkv-run") || press("#dkv-run button")) event.preventDefault(); return; }
    if (event.altKey || event.ctrlKey || event.metaKey || document.querySelector("dialog[open], .dkv-tour")) return;
    if (event.target.closest(TYPING)) return;
    if (event.key === "?") { list(); event.preventDefault(); return; }
    const arrows = event.key.startsWith("Arrow");
    if (!store.trace?.runs.length || (arrows && event.target.matches("input[type=range], input[type=radio]"))) return;
    // Letters move things on Explore alone; the other tabs have their own figures.
    if (!arrows && event.key !== "Escape" && !document.querySelector(".dkv-document")?.offsetParent) return;
    const action = ACTIONS[event.key];
    if (!action) return;
    action();
    if (event.key !== "Escape") event.preventDefault();
  });
})();
