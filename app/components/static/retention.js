// Retained sets: from the record's bits to counts that views can draw. Pure functions of arrays.
(() => {
  "use strict";
  const { DynamicKV } = window;

  // Kept KV heads per layer and position, (layers x length) as Uint8Array. Bits are most significant first, (layer, head, position).
  DynamicKV.keptHeads = (run, layers, length) => {
    const bytes = Uint8Array.from(atob(run.retained.bits), (char) => char.charCodeAt(0));
    const counts = new Uint8Array(layers * length);
    let bit = 0;
    for (let layer = 0; layer < layers; layer += 1) {
      const row = layer * length;
      for (let head = 0; head < run.retained.heads; head += 1) {
        for (let position = 0; position < length; position += 1, bit += 1) {
          counts[row + position] += (bytes[bit >> 3] >> (7 - (bit & 7))) & 1;
        }
      }
    }
    return counts;
  };

  // In how many layers at least one head keeps each position; computed once per run.
  DynamicKV.keptLayers = (run, layers, length) => {
    if (run.keptLayers) return run.keptLayers;
    const counts = new Uint16Array(length);
    for (let layer = 0; layer < layers; layer += 1) {
      const row = layer * length;
      for (let position = 0; position < length; position += 1) counts[position] += run.kept[row + position] > 0 ? 1 : 0;
    }
    run.keptLayers = counts;
    return counts;
  };

  const SHARES = [0.1, 0.25, 0.5, 0.75];
  DynamicKV.LEVELS = 5;

  // Level 0 (dropped) to 5 for every position: by heads in one layer, or by layers over all.
  DynamicKV.levels = (run, layer, layers, length) => {
    const levels = new Uint8Array(length);
    if (layer === null) {
      const counts = DynamicKV.keptLayers(run, layers, length);
      for (let i = 0; i < length; i += 1) {
        if (counts[i]) levels[i] = 1 + SHARES.filter((share) => counts[i] > share * layers).length;
      }
      return levels;
    }
    const row = layer * length;
    for (let i = 0; i < length; i += 1) levels[i] = Math.ceil((run.kept[row + i] / run.heads) * DynamicKV.LEVELS);
    return levels;
  };

  // What each level stands for, in words, for the legend.
  DynamicKV.levelNames = (run, layer, layers) => {
    if (layer === null) {
      const cuts = [0, ...SHARES.map((share) => Math.floor(share * layers)), layers];
      return cuts.slice(1).map((to, i) => (cuts[i] + 1 >= to ? `${to}` : `${cuts[i] + 1}–${to}`));
    }
    const names = Array(DynamicKV.LEVELS).fill(null);
    for (let heads = 1; heads <= run.heads; heads += 1) {
      const level = Math.ceil((heads / run.heads) * DynamicKV.LEVELS) - 1;
      names[level] = names[level] === null ? `${heads}` : `${names[level].split("–")[0]}–${heads}`;
    }
    return names;
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
