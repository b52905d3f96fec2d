// The page's shared ground: one namespace, one store of what is on screen, and the words it sends out.
// Views never call each other. They listen to window events "dkv:trace", "dkv:runs", "dkv:view", "dkv:hover", "dkv:pin",
// "dkv:word", "dkv:reads", "dkv:film", "dkv:reveal" and "dkv:theme". Texts from users reach the DOM through textContent only.
(() => {
  "use strict";
  const views = {};
  // What is looked at. layer null: all layers; head null: all heads; against: a second run to compare with, or null.
  const view = { layer: null, head: null, run: 0, against: null, unit: "token", mark: "fill", shades: "normal" };
  const CHOICES = { unit: ["token", "word", "sentence", "paragraph"], mark: ["fill", "underline", "erased"], shades: ["soft", "normal", "strong"] };
  const store = { payload: null, trace: null, view, hover: null, pin: null, cards: null, word: null, wordHover: null, film: null };

  const emit = (name, detail) => window.dispatchEvent(new CustomEvent(`dkv:${name}`, { detail }));
  const on = (name, listener) => window.addEventListener(`dkv:${name}`, (event) => listener(event.detail));

  const within = (value, count) => (Number.isInteger(value) && value >= 0 && value < count ? value : null);
  const heads = () => Math.max(0, ...store.trace.runs.map((run) => run.heads));

  // Change what is looked at; values that do not exist here are left out. Only a change is told.
  function setView(changes) {
    if (!store.trace) return;
    const { runs, layers } = store.trace;
    const next = { ...view, ...changes };
    next.layer = within(next.layer, layers);
    next.head = within(next.head, heads());
    next.run = within(next.run, runs.length) ?? view.run;
    next.against = within(next.against, runs.length);
    if (next.against === next.run) next.against = null;
    for (const [key, choices] of Object.entries(CHOICES)) if (!choices.includes(next[key])) next[key] = view[key];
    const changed = Object.keys(view).filter((key) => next[key] !== view[key]);
    if (!changed.length) return;
    Object.assign(view, next);
    emit("view", new Set(changed));
  }

  const setLayer = (layer) => setView({ layer });
  const setRun = (run) => setView({ run });
  // A view takes back only what it pointed at itself: the pointer may have reached the next one already.
  const setHover = (hover, source = null) => {
    const before = store.hover;
    if (!hover && source && before?.source !== source) return;
    if (["source", "layer", "position", "last"].every((key) => before?.[key] === hover?.[key])) return;
    store.hover = hover;
    emit("hover", hover);
  };
  const setPin = (pin) => { store.pin = pin; emit("pin", pin); };

  // The answer word that is looked at: {run, own, full}, its places among that answer's words and among FullKV's. What the
  // pointer rests on goes before what was chosen.
  const word = () => store.wordHover ?? store.word;
  const setWord = (next, chosen = true) => {
    const same = (a, b) => a === b || Boolean(a && b && a.run === b.run && a.own === b.own);
    const before = [store.word, store.wordHover];
    if (chosen) store.word = next;
    store.wordHover = chosen ? null : next;
    if (chosen && next && store.trace.runs[next.run]?.method !== "FullKV") setView({ run: next.run });
    if (!same(before[0], store.word) || !same(before[1], store.wordHover)) emit("word", word());
  };

  // The order in which runs stand beside each other: FullKV, DynamicKV, then the others as they ran.
  const inOrder = (items, methodOf) => {
    const place = (item) => ({ FullKV: 0, DynamicKV: 1 })[methodOf(item)] ?? 2;
    return items.map((_, i) => i).sort((a, b) => place(items[a]) - place(items[b]) || a - b);
  };
  const runOrder = () => inOrder(store.trace.runs, (run) => run.look);

  // Runs that were added to a comparison, with other settings, are labelled with them.
  const added = (run) => run.label !== run.method;

  // The run that is looked at first: one that was added, else DynamicKV's, else the last that compresses.
  function opening(runs) {
    const last = runs.findLastIndex((run) => run.method !== "FullKV");
    if (last < 0 || added(runs[last])) return Math.max(0, last);
    const ours = runs.findIndex((run) => run.label === "DynamicKV");
    return ours < 0 ? last : ours;
  }

  function setTrace(payload) {
    const { trace: before, pin } = store;
    store.payload = payload;
    store.trace = payload ? decode(payload) : null;
    Object.assign(store, { hover: null, word: null, wordHover: null });
    const runs = store.trace ? store.trace.runs : [];
    // A run that was watched goes on under the same view.
    const watched = before?.live && !payload?.live && before.prompt.text === store.trace?.prompt.text && before.runs.length === runs.length;
    if (!watched) Object.assign(view, { layer: null, head: null, against: null, run: opening(runs) });
    if (payload?.reads) store.trace.reads = DynamicKV.decodeReads(payload.reads);
    emit("trace", store.trace);
    // The passage that somebody asks about stays while its text does.
    setPin(pin && store.trace?.prompt.text === before?.prompt.text ? pin : null);
    emit("word", null);
  }

  // The record with its token offsets unpacked (they travel as deltas: see encode_offsets in record/payload.py) and its bits counted.
  function decode({ record, starts: deltas, ends: exceptions, looks, ...rest }) {
    const { length } = record.prompt;
    const starts = new Uint32Array(length);
    const ends = new Uint32Array(length);
    let at = 0;
    for (let i = 0; i < length; i += 1) { at += deltas[i]; starts[i] = at; }
    for (let i = 0; i + 1 < length; i += 1) ends[i] = starts[i + 1];
    for (const [index, end] of exceptions) ends[index] = end;
    const layers = record.model.num_layers;
    const runs = record.runs.map((run, i) => counted({ ...run, ...looks[i] }, layers, length));
    return { ...rest, record, layers, prompt: { ...record.prompt, starts, ends }, runs };
  }

  const counted = (run, layers, length) => {
    const bytes = DynamicKV.bytesOf(run, layers, length);
    return { ...run, heads: run.retained.heads, bytes, kept: DynamicKV.keptHeads(bytes, run.retained.heads, layers, length) };
  };

  // Show a choice that was not answered with beside the runs, or take it away. It is drawn like a run and saved with none.
  function setPredicted(run, select = true) {
    const { trace } = store;
    if (!trace) return;
    const had = trace.runs.at(-1)?.predicted;
    if (!run && !had) return;
    if (had) trace.runs.pop();
    if (run) trace.runs.push(counted(run, trace.layers, trace.prompt.length));
    const last = trace.runs.length - 1;
    if (run && select) view.run = last;
    if (view.run > last) view.run = Math.max(0, trace.runs.findLastIndex((item) => item.method !== "FullKV"));
    if (view.against > last || view.against === view.run) view.against = null;
    emit("runs");
  }

  // The run file, exactly as the engine would write it, gzipped here: nothing is sent or kept anywhere.
  async function wholeRecord() {
    const { record, prompt } = store.trace;
    const offsets = Array.from(prompt.starts, (start, i) => [start, prompt.ends[i]]);
    const runs = await Promise.all(record.runs.map(async (run, i) => ({
      ...run,
      retained: { ...run.retained, bits: run.retained.bits || DynamicKV.allOnes(record.model.num_layers * run.retained.heads * prompt.length) },
      scores: store.trace.runs[i].scored ? await scoresOf(i) : null,
    })));
    return { ...record, prompt: { ...record.prompt, text_utf16_offsets: offsets }, runs };
  }

  // Letters become dots, unit by unit, and spaces stay, so that offsets still fit; token numbers would give the words away.
  const dotted = (text) => text.replace(/\S/g, (character) => "·".repeat(character.length));
  function withoutText(record) {
    const runs = record.runs.map((run) => ({
      ...run,
      answer: dotted(run.answer), pieces: run.pieces.map(dotted), token_ids: run.token_ids.map(() => 0),
      agreement: run.agreement && { ...run.agreement, divergence: run.agreement.divergence && { ...run.agreement.divergence, token_ids: [0, 0], pieces: run.agreement.divergence.pieces.map(dotted) } },
      aligned: run.aligned && { ...run.aligned, instead: run.aligned.instead.map(dotted) },
    }));
    const expected = record.expected && { ...record.expected, text: dotted(record.expected.text) };
    return { ...record, expected, prompt: { ...record.prompt, text: dotted(record.prompt.text), question: dotted(record.prompt.question) }, runs };
  }

  async function saveRun(text = true) {
    if (!store.trace) return;
    const whole = await wholeRecord();
    const zipped = new Blob([JSON.stringify(text ? whole : withoutText(whole))]).stream().pipeThrough(new CompressionStream("gzip"));
    const { name } = store.trace;
    saveBlob(await new Response(zipped).blob(), text ? name : name.replace(".json.gz", "_no-text.json.gz"));
  }

  // Base64 of a run's scores: fetched once, when somebody asks. Null where none were recorded.
  async function scoresOf(index) {
    const run = store.trace.runs[index];
    if (!run.scored) return null;
    run.scores ??= store.server?.scores ? { bytes: (await store.server.scores({ key: store.trace.key, run: index }))?.bytes } : null;
    return run.scores?.bytes ? run.scores : null;
  }

  function saveBlob(blob, name) {
    const url = URL.createObjectURL(blob);
    const link = make("a", { href: url, download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  const dark = () => document.body.classList.contains("dark") || document.documentElement.classList.contains("dark");
  const watchTheme = () => {
    let was = dark();
    const check = () => { if (dark() !== was) { was = dark(); emit("theme", was); } };
    const observer = new MutationObserver(check);
    for (const node of [document.body, document.documentElement]) observer.observe(node, { attributes: true, attributeFilter: ["class"] });
  };

  const cssColor = (name) => getComputedStyle(document.body).getPropertyValue(name).trim();
  const reducedMotion = () => window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  const KIND_WORDS = { sliding: "sliding window", chunked: "chunked attention", linear: "linear attention", conv: "convolution",
    hybrid_sliding: "sliding window beside a state", shared: "shares an earlier layer's keys and values", moe: "experts without attention",
    mlp: "without attention" };
  /** What a layer is that no method compresses, in words; undefined for the others. */
  const otherKind = (model, layer) =>
    KIND_WORDS[model.layer_kinds?.length ? model.layer_kinds[layer] : model.sliding_layers?.includes(layer) ? "sliding" : "full"];
  const plain = (number) => number.toLocaleString("en-GB");
  const counting = (number, noun) => `${plain(number)} ${noun}${number === 1 ? "" : "s"}`;
  const parse = (value) => { try { return value ? JSON.parse(value) : null; } catch { return null; } };

  // Build an element from a tag, properties and children: strings become text nodes.
  function make(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(properties)) {
      if (key === "data") Object.assign(node.dataset, value);
      else if (key in node) node[key] = value;
      else node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  }

  // At most one run per frame, with the latest arguments.
  function framed(action) {
    let waiting = false;
    let last = [];
    return (...args) => {
      last = args;
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; action(...last); });
    };
  }

  // Called by every gr.HTML component when Gradio has put its static template on the page; `link` has its server's functions
  // and its events.
  function mount(name, element, props, watch, link = {}) {
    store.server = { ...store.server, ...Object.fromEntries(["scores", "predict", "reads"].filter((key) => link.server?.[key]).map((key) => [key, link.server[key]])) };
    const update = views[name](element, props, link);
    const show = () => update(parse(props.value));
    watch("value", show);
    show();
  }

  const register = (name, view_) => { views[name] = view_; };

  // ?embed=1 leaves out everything but the run; ?big=1 is for a lecture hall.
  function dress() {
    const wanted = new URLSearchParams(window.location.search);
    for (const name of ["embed", "big"]) document.body.classList.toggle(`dkv-${name}`, wanted.get(name) === "1");
    watchTheme();
  }
  if (document.body) dress(); else document.addEventListener("DOMContentLoaded", dress);

  window.DynamicKV = {
    store, emit, on, decode, setView, setLayer, setRun, setHover, setPin, setWord, word, inOrder, runOrder, setTrace, setPredicted, register, mount, added,
    saveRun, saveBlob, wholeRecord, scoresOf, make, framed, plain, otherKind, counting, dark, cssColor, reducedMotion,
  };
})();
