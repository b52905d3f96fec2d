// Answers as words: their places, how they lie beside FullKV's, and what each word read. Pure functions of records, and one
// question to the server, which is asked once per record.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { store } = DynamicKV;
  const LONG = 32; // characters
  const MOST = 4; // words that may stand for one that is lost
  const LOST = 0.5; // less than this part of a word's probability survives, as in record/aligned.py
  // Word borders as in record/aligned.py: letters of scripts without spaces stand alone.
  const WORD = /[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[\p{L}\p{N}](?:[\p{L}\p{N}\p{M}]|[-'’.,:_/](?=[\p{L}\p{N}]))*|[^\s\p{L}\p{N}]+/gu;

  // [{text, start, end, first, last}]: UTF-16 places in the answer, and the tokens [first, last) that touch the word.
  DynamicKV.answerWords = (run) => {
    const text = run.pieces.join("");
    const starts = [];
    run.pieces.reduce((at, piece) => { starts.push(at); return at + piece.length; }, 0);
    const words = [...text.matchAll(WORD)].map((match) => ({ text: match[0], start: match.index, end: match.index + match[0].length }));
    for (const word of words) {
      word.first = Math.max(0, starts.findLastIndex((start) => start <= word.start));
      word.last = starts.findLastIndex((start) => start < word.end) + 1;
    }
    return words;
  };

  // FullKV's words with the record's own places where it has them.
  function fullWords(trace) {
    const full = trace.runs.find((run) => run.method === "FullKV" && !run.predicted);
    if (!full) return [];
    const known = trace.runs.find((run) => run.aligned)?.aligned;
    if (!known) return DynamicKV.answerWords(full);
    const text = full.pieces.join("");
    return known.utf16_spans.map(([start, end], i) => ({ text: text.slice(start, end), start, end, first: known.token_spans[i][0], last: known.token_spans[i][1] }));
  }

  // A word as sentences quote it: models that repeat themselves make very long ones.
  DynamicKV.shortWord = (text) => (text.trim().length > LONG ? `${text.trim().slice(0, LONG)}…` : text.trim());

  // For every word of `own` its place in `full` (both lists of texts): pairs of a longest common subsequence; -1 for the rest.
  DynamicKV.pairWords = (own, full) => {
    const same = (i, j) => own[i].toLowerCase() === full[j].toLowerCase();
    const width = full.length + 1;
    const best = new Uint16Array((own.length + 1) * width);
    for (let i = own.length - 1; i >= 0; i -= 1) {
      for (let j = full.length - 1; j >= 0; j -= 1) {
        best[i * width + j] = same(i, j) ? best[(i + 1) * width + j + 1] + 1 : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
      }
    }
    const pairs = Array(own.length).fill(-1);
    for (let i = 0, j = 0; i < own.length && j < full.length;) {
      if (same(i, j) && best[i * width + j] === best[(i + 1) * width + j + 1] + 1) { pairs[i] = j; i += 1; j += 1; } else if (best[(i + 1) * width + j] >= best[i * width + j + 1]) i += 1; else j += 1;
    }
    return pairs;
  };

  // Every answer's words, each with FullKV's word at its place (`full`), whether it is the same one, and whether the loss is here.
  DynamicKV.wordsOf = (trace) => {
    if (trace.words) return trace.words;
    const full = fullWords(trace);
    trace.words = trace.runs.map((run) => {
      if (run.predicted || !run.pieces) return [];
      if (run.method === "FullKV") return full.map((word, i) => ({ ...word, full: i, same: true, lost: false }));
      const own = DynamicKV.answerWords(run);
      const pairs = DynamicKV.pairWords(own.map((word) => word.text), full.map((word) => word.text));
      let next = 0; // FullKV's word after the last pair
      return own.map((word, i) => {
        if (pairs[i] >= 0) { next = pairs[i] + 1; return { ...word, full: pairs[i], same: true, lost: false }; }
        const after = pairs.slice(i).find((place) => place >= 0) ?? full.length;
        const loss = run.aligned?.loss ?? -1;
        return { ...word, full: full.length ? Math.min(next, full.length - 1) : null, same: false, lost: loss >= next && loss < after };
      });
    });
    // Where an answer goes on in words of its own, the loss is where it begins.
    for (const words of trace.words) {
      const lost = words.filter((word) => word.lost);
      if (lost.length > MOST) lost.slice(1).forEach((word) => { word.lost = false; });
    }
    return trace.words;
  };

  // A word of FullKV's answer under a run's cache: {here, full, instead, insteadHere}, probabilities; null where none is known.
  DynamicKV.underBoth = (run, place) => {
    const known = run?.aligned;
    if (!known || place === null || !(place in known.probabilities)) return null;
    return { here: known.probabilities[place], full: known.probabilities_full[place], instead: known.instead[place], insteadHere: known.instead_probabilities[place] };
  };
  DynamicKV.isLost = (both) => Boolean(both) && both.here < LOST * both.full;

  // Positions that no layer and no head keeps, counted from the bits.
  DynamicKV.erased = (run, trace = store.trace) => {
    const counts = DynamicKV.keptLayers(run, trace.layers, trace.prompt.length);
    let sum = 0;
    for (const count of counts) sum += count === 0 ? 1 : 0;
    return sum;
  };

  const bytesOf = (base64) => {
    const text = atob(base64);
    const out = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i += 1) out[i] = text.charCodeAt(i);
    return out;
  };
  // What every answer token read, as the server sends it, with its arrays unpacked.
  DynamicKV.decodeReads = (sent) => {
    const index = bytesOf(sent.index);
    return {
      ...sent, sent,
      index: sent.index_bytes === 4 ? new Uint32Array(index.buffer) : new Uint16Array(index.buffer),
      share: bytesOf(sent.share), document: bytesOf(sent.document),
      surviving: sent.surviving.map((item) => (item === null ? null : bytesOf(item))),
    };
  };

  // Fetched once, when somebody first asks; {error} where the server cannot say.
  DynamicKV.fetchReads = () => {
    const { trace } = store;
    if (!trace || trace.reads || !store.server?.reads || !trace.key) return Promise.resolve();
    trace.asking ??= store.server.reads({ key: trace.key }).catch(() => ({ error: "The server did not answer." })).then((reply) => {
      trace.asking = null;
      if (reply?.reads) trace.reads = DynamicKV.decodeReads(reply.reads);
      else trace.readsError = reply?.error ?? "Nothing is known of what this answer read.";
      if (trace === store.trace) DynamicKV.emit("reads", trace);
    });
    return trace.asking;
  };
  // A refusal may be over when a word is chosen again, or when the prompt has been read.
  DynamicKV.on("word", (word) => { if (word && (!store.trace.readsError || store.word)) DynamicKV.fetchReads(); });
  DynamicKV.on("standing", ({ ready }) => {
    const { trace } = store;
    if (!ready || !trace?.readsError) return;
    trace.readsError = null;
    if (DynamicKV.word()) DynamicKV.fetchReads(); else DynamicKV.emit("reads", trace);
  });

  // What the tokens [first, last) read: attention per position, mean over tokens and over layers (or at one), and of each
  // position the part that is still in the run's cache. {read, kept: Float32Array (positions), most}
  DynamicKV.readBy = (reads, run, first, last, layer) => {
    const { layers, strongest, positions } = reads;
    const { length } = store.trace.prompt;
    const read = new Float32Array(positions);
    const kept = new Float32Array(positions);
    let most = 0;
    for (let token = first; token < Math.min(last, reads.tokens); token += 1) {
      for (let l = 0; l < layers.length; l += 1) {
        if (layer !== null && layers[l] !== layer) continue;
        const row = layers[l] * length;
        const from = (token * layers.length + l) * strongest;
        for (let k = from; k < from + strongest; k += 1) {
          const share = reads.share[k];
          const position = reads.index[k];
          if (!share || !position) continue; // the first token is a sink: every head leaves attention there
          const weight = share * share;
          read[position] += weight;
          kept[position] += (weight * run.kept[row + position]) / run.heads;
          if (read[position] > most) most = read[position];
        }
      }
    }
    return { read, kept, most };
  };

  // Part of the document's attention that survives in a run, per layer and over all, for tokens [first, last). Null: not known.
  DynamicKV.survivingBy = (reads, index, first, last) => {
    const mine = reads.surviving[index];
    if (!mine) return null;
    const count = reads.layers.length;
    let above = 0;
    let below = 0;
    const layers = Array.from({ length: count }, (_, l) => {
      let sum = 0;
      let all = 0;
      for (let token = first; token < Math.min(last, reads.tokens); token += 1) {
        const weight = reads.document[token * count + l];
        sum += (weight * mine[token * count + l]) / 255;
        all += weight;
      }
      above += sum;
      below += all;
      return all ? sum / all : null;
    });
    return { layers, mean: below ? above / below : null };
  };
})();
