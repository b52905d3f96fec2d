// Nothing typed is lost: a tab keeps its form, the reader's own text and the run on screen in sessionStorage, which no other tab
// sees and which the browser drops with the tab. A built-in example is kept by its name alone.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { store, on } = DynamicKV;
  const [STATE, OWN, RUN] = ["dkv-form", "dkv-own", "dkv-run"];
  const DELAY = 300; // ms after the last change
  const [EXAMPLE, EXPECTED, DOCUMENT, QUESTION] = [0, 1, 2, 3]; // places in KEPT of explore/layout.py
  const OWN_TEXT = "own";
  const asked = new URLSearchParams(window.location.search).get("ex"); // as the page was opened: it changes with what is shown
  const followed = Boolean(asked) && performance.getEntriesByType("navigation")[0]?.type === "navigate"; // no reload, no way back

  // A full or forbidden storage loses the kept state, and nothing else.
  const write = (key, value) => { try { if (value === null) sessionStorage.removeItem(key); else sessionStorage.setItem(key, JSON.stringify(value)); return true; } catch { return false; } };
  const read = (key) => { try { return JSON.parse(sessionStorage.getItem(key)); } catch { return null; } };

  let values = null; // the form as it stands
  let typed = false; // whether somebody put in a text of his own since the last example was chosen
  let restored = false; // nothing is written before what was kept is back
  let example = ""; // whose run is on screen; a run that is going on is not yet
  let timer = null;
  let sought = null; // what the example chosen last expects

  const hasText = (form) => Boolean(form && (form[DOCUMENT]?.trim() || form[QUESTION]?.trim() || form[EXPECTED]?.trim()));
  function flush() {
    clearTimeout(timer);
    timer = null;
    if (!restored || !values) return;
    write(STATE, { values, typed, example });
    if (typed && hasText(values)) write(OWN, values);
  }
  const later = () => { clearTimeout(timer); timer = setTimeout(flush, DELAY); };
  window.addEventListener("pagehide", flush);
  const PLACES = { "#dkv-expected": EXPECTED, "#dkv-document": DOCUMENT, "#dkv-question": QUESTION };
  document.addEventListener("input", (event) => {
    if (!event.isTrusted || !event.target.matches("#dkv-inputs textarea, #dkv-inputs #dkv-expected input")) return;
    typed = true;
    // Gradio tells of a change when it has time to, and a reload may come sooner.
    const place = Object.entries(PLACES).find(([box]) => event.target.closest(box))?.[1];
    if (!values || place === undefined) return;
    values = [...values];
    values[place] = event.target.value;
    if (place === DOCUMENT) values[EXAMPLE] = OWN_TEXT;
    if (restored) later();
  });
  document.addEventListener("change", (event) => { if (event.target.matches?.("input[type=file]") && event.target.closest("#dkv-below-document")) typed = true; });

  DynamicKV.keep = (now) => { values = now; if (restored) later(); };

  // The text became the reader's own: what the example expected goes, and nothing that was typed since.
  DynamicKV.expecting = (example, expected) => {
    return example === OWN_TEXT && expected === sought ? "" : expected;
  };

  // An example is being chosen: what stands in the form is the reader's own and comes back with "Your own text".
  DynamicKV.picking = () => { flush(); typed = false; };

  // After a choice in the picker: "Your own text" brings back what was typed, and the run made of it.
  DynamicKV.ownText = (now) => {
    if (now[EXAMPLE] !== OWN_TEXT) return now;
    const own = read(OWN);
    typed = Boolean(own);
    const next = own ? [OWN_TEXT, ...own.slice(1)] : now.map((value, i) => ([EXPECTED, DOCUMENT, QUESTION].includes(i) ? "" : value));
    showRun();
    return next;
  };

  // The page was opened: a reload, or a tab that comes back, goes on where it was. A link to something else goes before.
  DynamicKV.restoreForm = (now) => {
    restored = true;
    const state = read(STATE);
    const same = state && Array.isArray(state.values) && state.values.length === now.length && (!asked || (asked === state.example && !(followed && state.typed)));
    if (!same) { values = now; return now; }
    typed = state.typed;
    values = state.values;
    if (!asked) showRun();
    return values;
  };

  // ---- the run on screen ------------------------------------------------------------------------------------------
  function showRun() {
    const kept = read(RUN);
    if (!kept?.payload || !kept.cards || store.trace?.live) return;
    try {
      DynamicKV.showCards(kept.cards);
      DynamicKV.setTrace(kept.payload);
    } catch { write(RUN, null); }
  }
  // The cards and the record of a run come each by its own way. A reading that was fetched goes along.
  const keepRun = () => {
    if (!restored || !store.payload || store.payload.live || store.payload.example || !store.cards) return;
    const payload = store.trace?.reads ? { ...store.payload, reads: store.trace.reads.sent } : store.payload;
    if (!write(RUN, { payload, cards: store.cards })) write(RUN, null);
  };
  const idle = window.requestIdleCallback ?? ((action) => setTimeout(action, 200));
  on("trace", (trace) => { if (trace?.live) return; if (trace?.example) sought = trace.record.expected?.text ?? null; example = trace?.example ?? ""; idle(keepRun); if (values) later(); });
  on("reads", () => idle(keepRun));
})();
