// Retained sets: from the record's bits to counts that views can draw. Pure functions of arrays.
(() => {
  "use strict";
  const { DynamicKV } = window;

  // A run's bits, most significant first, in the order (layer, head, position). Runs that keep everything travel without them.
  DynamicKV.bytesOf = (run, layers, length) => {
    return run.retained.bits ? bytesIn(run.retained.bits) : onesOf(layers * run.retained.heads * length);
  };

  // Base64 to bytes; a plain loop, because Uint8Array.from with a function takes ten times as long.
  DynamicKV.bytesIn = bytesIn;
  function bytesIn(base64) {
    const text = atob(base64);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
    return bytes;
  }

  // `size` ones, then zeros to the end of the last byte, as numpy.packbits writes them.
  function onesOf(size) {
    const bytes = new Uint8Array(Math.ceil(size / 8)).fill(255);
    if (size % 8) bytes[bytes.length - 1] = (255 << (8 - (size % 8))) & 255;
    return bytes;
  }

  // Spans of positions that a person pinned or evicted in a run, as [first, end) pairs within the prompt.
  DynamicKV.spansOf = (run, kind) => {
    const spans = run?.parameters?.[kind];
    const { length } = DynamicKV.store.trace.prompt;
    const whole = (end) => Number.isInteger(end) && end >= 0 && end <= length;
    return (Array.isArray(spans) ? spans : []).filter((span) => Array.isArray(span) && span.length === 2 && span.every(whole) && span[0] < span[1]);
  };

  DynamicKV.allOnes = (size) => {
    let text = "";
    const bytes = onesOf(size);
    for (let i = 0; i < bytes.length; i += 32768) text += String.fromCharCode(...bytes.subarray(i, i + 32768));
    return btoa(text);
  };

  // Kept heads per layer and position, (layers x length) as Uint8Array.
  DynamicKV.keptHeads = (bytes, heads, layers, length) => {
    const counts = new Uint8Array(layers * length);
    let bit = 0;
    for (let layer = 0; layer < layers; layer += 1) {
      const row = layer * length;
      for (let head = 0; head < heads; head += 1) {
        for (let position = 0; position < length; position += 1, bit += 1) {
          counts[row + position] += (bytes[bit >> 3] >> (7 - (bit & 7))) & 1;
        }
      }
    }
    return counts;
  };

  // The same for one head alone, 0 or 1; computed once per run and head.
  const keptByHead = (run, head, layers, length) => {
    run.byHead ??= {};
    if (run.byHead[head]) return run.byHead[head];
    const kept = new Uint8Array(layers * length);
    for (let layer = 0; layer < layers; layer += 1) {
      let bit = (layer * run.heads + head) * length;
      for (let position = 0; position < length; position += 1, bit += 1) kept[layer * length + position] = (run.bytes[bit >> 3] >> (7 - (bit & 7))) & 1;
    }
    run.byHead[head] = kept;
    return kept;
  };

  // What is looked at: all heads together, or one. {kept: (layers x length) counts, heads: how many at most}
  DynamicKV.seen = (run, head, layers, length) => {
    if (run.now) return { kept: run.now.kept, heads: run.heads }; // the film shows all heads together
    if (head === null) return { kept: run.kept, heads: run.heads };
    // A run per query head has several heads where others have one: show the first of its group.
    const most = Math.max(...DynamicKV.store.trace.runs.map((item) => item.heads));
    return { kept: keptByHead(run, Math.floor((head * run.heads) / most), layers, length), heads: 1 };
  };

  // In how many layers at least one head (or that head) keeps each position; computed once per run and head.
  DynamicKV.keptLayers = (run, layers, length, head = null) => {
    const found = ((run.now ?? run).layersKeeping ??= {});
    if (found[head]) return found[head];
    const { kept } = DynamicKV.seen(run, head, layers, length);
    const counts = new Uint16Array(length);
    for (let layer = 0; layer < layers; layer += 1) {
      if (run.now && run.now.read[layer] !== 1) continue;
      const row = layer * length;
      for (let position = 0; position < length; position += 1) counts[position] += kept[row + position] > 0 ? 1 : 0;
    }
    found[head] = counts;
    return counts;
  };

  const SHARES = [0.1, 0.25, 0.5, 0.75];
  DynamicKV.LEVELS = 5;

  // Counts per position and the count that means "all": heads in one layer, or layers over all.
  DynamicKV.countsAt = (run, layer, head, layers, length) => {
    if (layer === null && run.now?.count === 0) return { counts: new Uint8Array(length).fill(1), most: 1 };
    if (layer === null) return { counts: DynamicKV.keptLayers(run, layers, length, head), most: run.now?.count ?? layers };
    const { kept, heads } = DynamicKV.seen(run, head, layers, length);
    return { counts: kept.subarray(layer * length, (layer + 1) * length), most: heads };
  };

  // Level 0 (dropped) to 5 of a share; over all layers the steps are narrower at the low end, where most tokens lie.
  const levelOf = (share, all) => {
    if (share <= 0) return 0;
    if (!all) return Math.ceil(share * DynamicKV.LEVELS);
    return 1 + SHARES.filter((limit) => share > limit).length;
  };

  // Level of every position. With units (from unitsOf), all tokens of a unit share its mean.
  DynamicKV.levels = (run, layer, head, layers, length, units = null) => {
    const { counts, most } = DynamicKV.countsAt(run, layer, head, layers, length);
    const levels = new Uint8Array(length);
    const all = layer === null;
    if (!units) {
      const table = Uint8Array.from({ length: most + 1 }, (_, count) => levelOf(count / most, all));
      for (let i = 0; i < length; i += 1) levels[i] = table[counts[i]];
      return levels;
    }
    for (let unit = 0; unit + 1 < units.length; unit += 1) {
      let sum = 0;
      for (let i = units[unit]; i < units[unit + 1]; i += 1) sum += counts[i];
      levels.fill(levelOf(sum / (most * (units[unit + 1] - units[unit])), all), units[unit], units[unit + 1]);
    }
    return levels;
  };

  // 1 both, 2 only (or in clearly more layers) the first, 3 only the second, 0 neither.
  DynamicKV.difference = (a, b, layer, head, layers, length) => {
    const first = DynamicKV.countsAt(a, layer, head, layers, length).counts;
    const second = DynamicKV.countsAt(b, layer, head, layers, length).counts;
    const margin = layer === null ? DynamicKV.margin(layers) : 0;
    const out = new Uint8Array(length);
    for (let i = 0; i < length; i += 1) {
      const x = layer === null ? first[i] : first[i] > 0;
      const y = layer === null ? second[i] : second[i] > 0;
      if (x || y) out[i] = x - y > margin ? 2 : y - x > margin ? 3 : 1;
    }
    return out;
  };
  DynamicKV.margin = (layers) => Math.max(1, Math.round(layers / 10));

  // What each level stands for, in words, for the legend.
  DynamicKV.levelNames = (run, layer, head, layers, units = false) => {
    if (units) return (layer === null ? [0, ...SHARES, 1] : [0, 0.2, 0.4, 0.6, 0.8, 1]).slice(1).map((to) => `≤ ${Math.round(100 * to)} %`);
    if (layer === null) {
      const cuts = [0, ...SHARES.map((share) => Math.floor(share * layers)), layers];
      return cuts.slice(1).map((to, i) => (cuts[i] + 1 > to ? null : cuts[i] + 1 === to ? `${to}` : `${cuts[i] + 1}–${to}`));
    }
    if (head !== null) return [null, null, null, null, "kept"];
    const names = Array(DynamicKV.LEVELS).fill(null);
    for (let heads = 1; heads <= run.heads; heads += 1) {
      const level = levelOf(heads / run.heads, false) - 1;
      names[level] = names[level] === null ? `${heads}` : `${names[level].split("–")[0]}–${heads}`;
    }
    return names;
  };

  // First tokens of the units of a prompt, and its length at the end: words, sentences or paragraphs.
  DynamicKV.unitsOf = (prompt, kind) => {
    const { text, starts, length } = prompt;
    const breaks = [];
    if (kind === "paragraph") {
      for (const match of text.matchAll(/\n+/g)) breaks.push(match.index + match[0].length);
    } else {
      for (const part of new Intl.Segmenter(undefined, { granularity: kind }).segment(text)) breaks.push(part.index);
    }
    const units = [0];
    for (const unit of breaks) {
      // A token that reaches over a border belongs to the unit it begins in.
      let token = DynamicKV.tokenAt(starts, unit);
      if (token >= 0 && starts[token] < unit) token += 1;
      if (token > units.at(-1) && token < length) units.push(token);
    }
    units.push(length);
    return units;
  };

  // First index with starts[index] > unit, minus one: the token that holds this UTF-16 unit. -1 before the first.
  DynamicKV.tokenAt = (starts, unit) => {
    let low = 0;
    let high = starts.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (starts[middle] <= unit) low = middle + 1; else high = middle;
    }
    return low - 1;
  };
})();
