// What the document view's marks stand for, in words: its legends, its folds' window, whether a text is code.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { store, make } = DynamicKV;
  const { view } = store;
  // Which of the five shades each level gets: a choice of contrast, told by the legend.
  const SHADES = { soft: [1, 1, 2, 2, 3], normal: [1, 2, 3, 4, 5], strong: [2, 3, 4, 5, 5] };

  // Whether a text is code or a table of columns: then only a face of equal widths lines it up.
  const CODE = /^\s*(def|class|import|from|return|if|else|elif|for|while|try|function|const|let|var|fn|pub|use|struct|#include|package|public|private|@\w+)\b|^(\t| {2,})\S|[;{}]\s*$|^\s*(\/\/|#!)/;
  DynamicKV.looksLikeCode = (text) => {
    const lines = text.split("\n").filter((line) => line.trim());
    return lines.length >= 5 && lines.filter((line) => CODE.test(line)).length > 0.5 * lines.length;
  };

  const shown = () => store.trace.runs[view.run];
  const against = () => store.trace.runs[view.against];
  const swatch = (name, words) => make("span", { className: `dkv-swatch dkv-level-${name}` }, words);

  function levelLegend(layer) {
    const current = shown();
    const names = DynamicKV.levelNames(current, layer, view.head, current.now?.count ?? store.trace.layers, view.unit !== "token");
    const shades = SHADES[view.shades];
    const by = view.head === null ? "" : ` by head ${view.head}`;
    const what = view.unit !== "token" ? `of the ${view.unit} is kept${by}` : layer === null ? `kept${by} in … layers` : view.head === null ? `kept by … of ${current.heads} heads` : `head ${view.head}`;
    return [
      make("span", { className: "dkv-legend-name" }, what),
      swatch(0, view.head !== null && layer !== null ? "dropped" : "0"),
      ...names.flatMap((name, i) => (name === null ? [] : [swatch(shades[i], name)])),
      ...(current.window ? [swatch("window", `window (last ${current.window})`)] : []),
      ...["pinned", "evicted"].flatMap((kind) => (DynamicKV.spansOf(current, kind).length ? [swatch(kind, `${kind} by hand`)] : [])),
    ];
  }

  // The observation window scores the rest and is always kept: with a chat template a small one covers little of the question.
  function windowWords(size) {
    const { prompt } = store.trace;
    if (!size) return "";
    if (!prompt.question_aware) return ` · the observation window is the document's last ${size}`;
    const [first, last] = prompt.question_span;
    const asked = Math.max(0, Math.min(last, prompt.length) - Math.max(first, prompt.length - size));
    return ` · the observation window is the last ${size}: ${asked} of the question, ${size - asked} of the template`;
  }

  function differenceLegend(all) {
    const margin = DynamicKV.margin(store.trace.layers);
    const [a, b] = [shown().label, against().label];
    return all
      ? [swatch("only-a", `${a} keeps it in ${margin + 1} layers more, at least`), swatch("only-b", `${b} does`), swatch("both", "about as many"), swatch(0, "neither")]
      : [swatch("only-a", `only ${a}`), swatch("only-b", `only ${b}`), swatch("both", "both"), swatch(0, "neither")];
  }

  Object.assign(DynamicKV, { SHADES, swatch, levelLegend, windowWords, differenceLegend });
})();
