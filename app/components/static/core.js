// The page's shared ground: one namespace, one store of what is on screen, and the words it sends out.
// Views never call each other. They listen to window events "dkv:trace", "dkv:layer", "dkv:method", "dkv:hover", "dkv:theme".
// Texts from users reach the DOM through textContent only.
(() => {
  "use strict";
  const views = {};
  const store = { trace: null, layer: null, run: 0, hover: null };

  const emit = (name, detail) => window.dispatchEvent(new CustomEvent(`dkv:${name}`, { detail }));
  const on = (name, listener) => window.addEventListener(`dkv:${name}`, (event) => listener(event.detail));

  // Only one value changes at a time, and only a change is told.
  const setLayer = (layer) => { if (layer !== store.layer) { store.layer = layer; emit("layer", layer); } };
  const setRun = (run) => { if (run !== store.run && store.trace?.runs[run]) { store.run = run; emit("method", run); } };
  const setHover = (hover) => {
    const before = store.hover;
    if (before?.source === hover?.source && before?.layer === hover?.layer && before?.position === hover?.position) return;
    store.hover = hover;
    emit("hover", hover);
  };

  function setTrace(payload) {
    store.trace = payload ? decode(payload) : null;
    store.layer = null;
    store.hover = null;
    const runs = store.trace ? store.trace.runs : [];
    store.run = Math.max(0, runs.findLastIndex((run) => run.method !== "FullKV"));
    emit("trace", store.trace);
  }

  // The record with its token offsets unpacked (they travel as deltas: see encode_offsets in view_model.py) and its bits counted.
  function decode({ record, starts: deltas, ends: exceptions, looks, ...rest }) {
    const { length } = record.prompt;
    const starts = new Uint32Array(length);
    const ends = new Uint32Array(length);
    let at = 0;
    for (let i = 0; i < length; i += 1) { at += deltas[i]; starts[i] = at; }
    for (let i = 0; i + 1 < length; i += 1) ends[i] = starts[i + 1];
    for (const [index, end] of exceptions) ends[index] = end;
    const layers = record.model.num_layers;
    const runs = record.runs.map((run, i) => ({ ...run, ...looks[i], heads: run.retained.heads, kept: DynamicKV.keptHeads(run, layers, length) }));
    return { ...rest, record, layers, prompt: { ...record.prompt, starts, ends }, runs };
  }

  // The run file, exactly as the engine would write it, gzipped here: nothing is sent or kept anywhere.
  async function saveRun() {
    if (!store.trace) return;
    const { record, prompt, name } = store.trace;
    const offsets = Array.from(prompt.starts, (start, i) => [start, prompt.ends[i]]);
    const text = JSON.stringify({ ...record, prompt: { ...record.prompt, text_utf16_offsets: offsets } });
    const zipped = new Blob([text]).stream().pipeThrough(new CompressionStream("gzip"));
    saveBlob(await new Response(zipped).blob(), name);
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
  const plain = (number) => number.toLocaleString("en-GB");
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

  // Called by every gr.HTML component when Gradio has put its static template on the page.
  function mount(name, element, props, watch) {
    const update = views[name](element, props);
    const show = () => update(parse(props.value));
    watch("value", show);
    show();
  }

  const register = (name, view) => { views[name] = view; };

  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || !store.trace) return;
    if (event.target.closest("input:not([type=range]), textarea, select, [contenteditable], [role=tablist], [role=listbox]")) return;
    const onSlider = event.target.matches("input[type=range]");
    const last = store.trace.layers - 1;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step && !onSlider) {
      const layer = store.layer === null ? (step > 0 ? 0 : last) : store.layer + step;
      setLayer(layer < 0 || layer > last ? null : layer);
      event.preventDefault();
    } else if (event.key === "[" || event.key === "]") {
      const runs = store.trace.runs.length;
      setRun((store.run + (event.key === "]" ? 1 : runs - 1)) % runs);
    } else if (event.key === "Escape") {
      setHover(null);
    }
  });

  if (document.body) watchTheme(); else document.addEventListener("DOMContentLoaded", watchTheme);

  window.DynamicKV = {
    store, emit, on, setLayer, setRun, setHover, setTrace, register, mount,
    saveRun, saveBlob, make, framed, plain, dark, cssColor, reducedMotion,
  };
})();
