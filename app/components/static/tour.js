// The guided tour of Explore: a frame around a real control, and a few words beside it. The page stays usable underneath.
// It opens when asked, and by itself from a link with ?tour=1, every time. What is remembered is the step, or "done", and no text.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { make } = DynamicKV;
  const KEY = "dkv-tour";
  const { store } = DynamicKV;
  // What a step does while it is told: the page moves, and is put back when the tour ends.
  const middle = () => store.trace && DynamicKV.setView({ layer: Math.floor(store.trace.layers / 2), mark: "fill" });
  const lostWord = () => {
    if (!store.trace?.runs.length) return;
    const words = DynamicKV.wordsOf(store.trace);
    const runs = DynamicKV.runOrder().filter((run) => store.trace.runs[run].method !== "FullKV");
    const run = runs.find((index) => words[index].some((word) => word.lost)) ?? runs[0];
    if (run === undefined || !words[run].length) return;
    const own = Math.max(0, words[run].findIndex((word) => word.lost));
    DynamicKV.setWord({ run, own, full: words[run][own].full });
  };
  const passage = () => {
    if (!store.trace?.runs.length) return;
    const { prompt, record } = store.trace;
    const at = record.expected?.document_utf16_span ? DynamicKV.tokenAt(prompt.starts, record.expected.document_utf16_span[0]) : Math.floor((prompt.document_span[0] + prompt.document_span[1]) / 2);
    DynamicKV.setPin({ first: at, last: at });
    DynamicKV.pinSentence();
  };
  const play = () => { if (!DynamicKV.reducedMotion()) document.querySelector('.dkv-film [data-role="play"][aria-label="Play the film"]')?.click(); };
  DynamicKV.acts = { middle, lostWord, passage, play };
  const other = () => { if (!store.trace?.runs.length) return; const runs = DynamicKV.runOrder().filter((run) => store.trace.runs[run].method !== "FullKV"); if (runs.length) DynamicKV.setRun(runs.find((run) => run !== store.view.run) ?? runs[0]); };
  const putBack = () => { if (store.trace) { DynamicKV.setPin(null); DynamicKV.setWord(null); DynamicKV.setLayer(null); } };
  const STEPS = [
    ["#dkv-example", "A document", "The page opens with a recorded run of a built-in example. Choose another here, or paste or upload your own text below. Looking around needs no model."],
    ["#dkv-question", "A question", "Document and question together are the prompt. The end of the prompt decides what is kept, so another question keeps other tokens. Try two."],
    ["#dkv-methods", "Methods", "FullKV keeps everything and is the yardstick. The others keep a part. A first comparison worth seeing: SnapKV, which gives every layer equally many tokens, and DynamicKV, which does not. The views have just gone from one to the other.", other],
    ["#dkv-capacity", "How much to keep", "Capacity is the number of prompt tokens a layer keeps on average. The line below says what that means in per cent and in MiB. Small values show the differences best."],
    ["#dkv-run-row", "Run", "The model reads the prompt once and then answers from every method's cache in turn. Stop keeps what is there. You can also go on with the recorded run."],
    ["#dkv-answers", "Answers", "One card per method: the answer, how much of FullKV's answer survives, and how much is kept. The word that carries the loss glows; a harmless rewording does not. All figures are in the fold."],
    ["#dkv-word", "Why this word?", "Each answer word is a handle. One is chosen now: how probable it is with every cache, and how much of what it read each cache still holds, layer by layer.", lostWord],
    ["#dkv-document-view", "What the cache kept", "The text shows one layer now. Darker tokens are kept by more heads; over all layers, in more layers. The left and right arrow keys move the layer, [ and ] the method.", () => { DynamicKV.setWord(null); middle(); }],
    [".dkv-evidence", "Evidence", "A sentence is chosen in the text: here you see in which layers each method still has it. Always keep it, and answer again from right here.", passage],
    ["#dkv-figures", "Budgets", "How many tokens each layer keeps. SnapKV is flat; DynamicKV has a shape of its own. The film plays: every step is a real update of this run, and the total stays the same.", () => { DynamicKV.setPin(null); play(); }],
    ["#dkv-what-if", "What if?", "Other settings, tried on the prompt that was read. The choice is recomputed at once and marked as predicted; an answer comes when you ask for it."],
    ["#dkv-map", "The whole cache at a glance", "All layers and positions on one map. Bright columns are tokens that many heads keep. Click a place to see it in the text."],
    ['.tab-wrapper, [role="tablist"]', "Where to go from here", "Learn explains the ideas in ten minutes. Runs and API saves and opens runs, and has the same comparison as code."],
  ];
  let at = 0;
  let steps = [];
  let opener = null;
  let frame = null;
  let panel = null;

  const remembered = () => { try { return window.localStorage.getItem(KEY); } catch { return null; } };
  const remember = (value) => { try { window.localStorage.setItem(KEY, value); } catch { /* a private window: the tour just starts anew */ } label(); };
  const begun = () => { const step = Number(remembered()); return Number.isInteger(step) && step > 0 && step < STEPS.length ? step : 0; };

  function label() {
    for (const button of document.querySelectorAll("[data-tour=start]")) {
      button.textContent = begun() ? `Continue the tour (${begun() + 1} of ${STEPS.length})` : button.dataset.label ??= button.textContent;
    }
  }
  DynamicKV.labelTour = label;

  const target = (step) => [...document.querySelectorAll(STEPS[step][0])].find((node) => node.getClientRects().length);
  const toExplore = () => [...document.querySelectorAll('[role="tab"]')].find((node) => node.textContent.trim() === "Explore" && node.offsetParent)?.click();

  function build() {
    frame = make("div", { className: "dkv-tour-frame", ariaHidden: "true" });
    panel = make("div", { className: "dkv-tour", role: "dialog", tabIndex: -1 },
      make("h2", { id: "dkv-tour-title" }), make("p", { id: "dkv-tour-words" }),
      make("div", { className: "dkv-tour-foot" }, make("span", { className: "dkv-tour-place" }),
        make("button", { type: "button", data: { go: "skip" } }, "Skip"), make("button", { type: "button", data: { go: "back" } }, "Back"),
        make("button", { type: "button", className: "dkv-tour-next", data: { go: "next" } }, "Next")));
    panel.setAttribute("aria-labelledby", "dkv-tour-title");
    panel.setAttribute("aria-describedby", "dkv-tour-words");
    panel.addEventListener("click", (event) => ({ skip: leave, back: () => go(-1), next: () => go(1) })[event.target.dataset.go]?.());
    panel.addEventListener("keydown", (event) => {
      const action = { Escape: leave, ArrowRight: () => go(1), ArrowLeft: () => go(-1) }[event.key];
      if (!action || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      event.stopPropagation(); // the page's own arrow keys move layers
      action();
    });
    document.body.append(frame, panel);
    window.addEventListener("resize", place);
    window.addEventListener("scroll", place, true);
  }

  function start(from = begun()) {
    if (panel) return;
    opener = document.activeElement;
    toExplore();
    let tries = 0;
    const wait = () => {
      steps = STEPS.map((_, i) => i).filter((step) => target(step) || STEPS[step][0] === ".dkv-evidence");
      // Gradio puts the page together piece by piece.
      if (steps.length < STEPS.length && tries++ < 120) { requestAnimationFrame(wait); return; }
      if (!steps.length || panel) return;
      build();
      at = Math.max(0, steps.findIndex((step) => step >= from));
      show();
    };
    wait();
  }

  function go(by) {
    if (at + by >= steps.length) { finish(); return; }
    at = Math.max(0, at + by);
    show();
  }

  function show() {
    const [, title, words, act] = STEPS[steps[at]];
    act?.();
    remember(String(steps[at]));
    panel.querySelector("h2").textContent = title;
    panel.querySelector("p").textContent = words;
    panel.querySelector(".dkv-tour-place").textContent = `${at + 1} of ${steps.length}`;
    panel.querySelector('[data-go="back"]').disabled = at === 0;
    panel.querySelector('[data-go="next"]').textContent = at + 1 === steps.length ? "Done" : "Next";
    const node = target(steps[at]);
    if (!node) { go(1); return; }
    const tall = node.getBoundingClientRect().height > window.innerHeight * 0.6;
    node.scrollIntoView({ block: tall || window.innerWidth < 700 ? "start" : "center", behavior: "auto" });
    if (node.getBoundingClientRect().top < 16) window.scrollBy(0, node.getBoundingClientRect().top - 16);
    place();
    panel.querySelector('[data-go="next"]').focus({ preventScroll: true });
    requestAnimationFrame(place);
  }

  // Below the control, above it, or, on a narrow screen and beside tall controls, at the foot of the window.
  function place() {
    if (!panel) return;
    const node = target(steps[at]);
    if (!node) return;
    const box = node.getBoundingClientRect();
    Object.assign(frame.style, { left: `${box.left - 5}px`, top: `${box.top - 5}px`, width: `${box.width + 10}px`, height: `${box.height + 10}px` });
    const { offsetWidth: width, offsetHeight: height } = panel;
    const room = 14;
    let top = box.bottom + room;
    if (top + height > window.innerHeight - room) top = box.top - height - room;
    if (top < room) top = window.innerHeight - height - room;
    let left = Math.min(Math.max(room, box.left), window.innerWidth - width - room);
    if (box.height > window.innerHeight * 0.6) left = box.left > window.innerWidth / 2 ? Math.max(room, box.left - width - room) : Math.min(box.right + room, window.innerWidth - width - room);
    if (window.innerWidth < 700) { left = (window.innerWidth - width) / 2; top = window.innerHeight - height - room; }
    Object.assign(panel.style, { left: `${left}px`, top: `${top}px` });
  }

  function close() {
    putBack();
    window.removeEventListener("resize", place);
    window.removeEventListener("scroll", place, true);
    frame.remove();
    panel.remove();
    frame = panel = null;
    // The button may have gone with its tab.
    const back = opener?.offsetParent ? opener : [...document.querySelectorAll("[data-tour=start]")].find((button) => button.offsetParent);
    back?.focus({ preventScroll: true });
  }
  function leave() { close(); }
  function finish() { remember("done"); close(); }

  document.addEventListener("click", (event) => {
    if (event.target.closest?.("[data-tour=start]")) start();
    else if (panel && event.isTrusted && event.target.closest?.('[role="tab"]')) leave(); // what it shows stays behind
  });
  // Wherever the focus went meanwhile.
  window.addEventListener("keydown", (event) => { if (panel && event.key === "Escape" && !panel.contains(event.target)) { event.stopPropagation(); leave(); } }, true);
  // Every time: a lecture is rehearsed.
  if (new URLSearchParams(window.location.search).get("tour") === "1") {
    const ready = () => { if (target(0)) { remember("0"); start(0); } else requestAnimationFrame(ready); };
    requestAnimationFrame(ready);
  }
})();
