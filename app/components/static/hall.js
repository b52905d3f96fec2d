// ?big=1: the hall. One thing fills the screen; the arrow keys, a clicker or a click go on, and every screen does what it tells.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { make, store, on } = DynamicKV;
  const asked = new URLSearchParams(window.location.search);
  if (asked.get("big") !== "1" || asked.has("lesson") || asked.get("embed") === "1") return;
  const clear = () => { DynamicKV.setPin(null); DynamicKV.setWord(null); };
  // [selector, title, what it does]
  const SCREENS = [
    ["#dkv-answers", "The answers", () => { clear(); DynamicKV.setLayer(null); }],
    ["#dkv-word", "The word that is lost", () => { DynamicKV.setPin(null); DynamicKV.acts.lostWord(); }],
    ["#dkv-document-view", "What that word read", () => { DynamicKV.setPin(null); DynamicKV.acts.lostWord(); }],
    ["#dkv-document-view", "What one layer kept", () => { clear(); DynamicKV.acts.middle(); }],
    ["#dkv-evidence", "Where the sentence survives", () => { DynamicKV.setWord(null); DynamicKV.acts.passage(); }],
    ["#dkv-figures", "Tokens per layer", () => { clear(); DynamicKV.setLayer(null); DynamicKV.acts.play(); }],
    ["#dkv-map", "Every layer at once", () => { clear(); DynamicKV.setLayer(null); }],
  ];
  let at = 0;
  let bar = null;
  const hall = () => document.body.classList.contains("dkv-hall");
  const explore = () => Boolean(document.querySelector("#dkv-views")?.offsetParent);

  function show() {
    const [selector, title, act] = SCREENS[at];
    act();
    const shown = document.querySelector(selector);
    for (const part of document.querySelectorAll("#dkv-views > *, #dkv-stage > *, #dkv-reading > *, #dkv-why > *")) {
      part.classList.toggle("dkv-hall-off", !(part === shown || part.contains(shown) || shown?.contains(part)));
      part.classList.toggle("dkv-hall-on", part === shown);
    }
    bar.querySelector("h2").textContent = title;
    bar.querySelector('[data-role="asked"]').textContent = store.trace?.record.prompt.question ?? "";
    bar.querySelector('[data-role="place"]').textContent = `${at + 1} of ${SCREENS.length}`;
    bar.querySelector('[data-go="-1"]').disabled = at === 0;
    bar.querySelector('[data-go="1"]').disabled = at === SCREENS.length - 1;
    window.scrollTo(0, 0);
    // Charts and canvases take the new width.
    requestAnimationFrame(() => window.dispatchEvent(new Event("resize")));
  }
  const go = (by) => { const next = Math.min(SCREENS.length - 1, Math.max(0, at + by)); if (next !== at) { at = next; show(); } };

  function enter() {
    if (!bar) {
      bar = make("nav", { className: "dkv-hall-bar" },
        make("h2", {}), make("span", { data: { role: "asked" } }),
        make("span", { data: { role: "place" }, role: "status" }),
        ...[["-1", "‹", "Back"], ["1", "›", "On"]].map(([by, words, name]) => { const button = make("button", { type: "button", data: { go: by } }, words); button.setAttribute("aria-label", name); return button; }),
        make("button", { type: "button", data: { go: "full" } }, "Full screen"), make("button", { type: "button", data: { go: "leave" } }, "Leave"));
      bar.setAttribute("aria-label", "Hall mode: one thing per screen");
      bar.addEventListener("click", (event) => {
        const to = event.target.dataset?.go;
        if (to === "full") { if (document.fullscreenElement) document.exitFullscreen(); else document.documentElement.requestFullscreen?.().catch(() => {}); } else if (to === "leave") leave(); else if (to) go(Number(to));
      });
      document.body.append(bar);
    }
    document.body.classList.add("dkv-hall");
    show();
  }
  function leave() {
    left = true;
    document.body.classList.remove("dkv-hall");
    for (const part of document.querySelectorAll(".dkv-hall-off, .dkv-hall-on")) part.classList.remove("dkv-hall-off", "dkv-hall-on");
    bar.remove();
    bar = null;
    clear();
    requestAnimationFrame(() => window.dispatchEvent(new Event("resize")));
  }

  // A clicker sends PageDown and PageUp; both come before the page's own keys.
  const STEPS = { ArrowRight: 1, PageDown: 1, " ": 1, ArrowLeft: -1, PageUp: -1 };
  window.addEventListener("keydown", (event) => {
    if (!hall() || !explore() || event.altKey || event.ctrlKey || event.metaKey || document.querySelector("dialog[open], .dkv-tour")) return;
    if (event.key === "Escape" && !document.fullscreenElement) { leave(); event.stopPropagation(); return; }
    const control = event.target.closest?.("input, textarea, select, summary, [role=tablist]");
    if (control || (event.key === " " && event.target.closest?.("button, [tabindex]"))) return;
    if (event.key === "Home" || event.key === "End") { at = event.key === "Home" ? 0 : SCREENS.length - 1; show(); event.preventDefault(); event.stopPropagation(); return; }
    // Up and down move the layer, which left and right do elsewhere.
    if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      if (event.target.matches?.("canvas") || !store.trace) return;
      const last = store.trace.layers - 1;
      const now = store.view.layer;
      const next = now === null ? (event.key === "ArrowDown" ? 0 : last) : now + (event.key === "ArrowDown" ? 1 : -1);
      DynamicKV.setLayer(next < 0 || next > last ? null : next);
      event.preventDefault();
      event.stopPropagation();
      return;
    }
    const by = STEPS[event.key];
    if (!by) return;
    go(by);
    event.preventDefault();
    event.stopPropagation();
  }, true);
  // A click on the paper, not on something that does anything itself, goes on.
  document.addEventListener("click", (event) => {
    if (!hall() || event.defaultPrevented || event.target.closest("button, a, select, input, summary, canvas, .dkv-handle, .dkv-scroll, .dkv-plot, .dkv-table, .dkv-hall-bar, .dkv-tour, [role=slider]")) return;
    if (event.target.closest("#dkv-views")) go(1);
  });
  // Gradio puts the page together piece by piece: the views may come after the first record.
  let left = false;
  const whenThere = () => { if (bar || left) return; if (explore() && document.querySelector("#dkv-map canvas")) enter(); else setTimeout(whenThere, 100); };
  on("trace", (trace) => { if (!trace) return; if (bar) show(); else whenThere(); });
})();
