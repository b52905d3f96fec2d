// The film: what every run holds after each layer that is read. Live while a prompt is read, from the record afterwards; text,
// budgets and maps all draw `run.now` while there is one, so that they show the same moment.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { store, on, emit, plain } = DynamicKV;
  const WHOLE_MS = 4000;
  const END_MS = 500; // the last picture stays so long before the answers come
  const JUMP_MS = 150;
  const SEEN = "dkv-film"; // per tab: the film has played by itself
  const given = new URLSearchParams(window.location.search);

  // ---- what a run holds ------------------------------------------------------------------------------------------
  // Bytes so far: layers that were not read still hold the whole prompt, and those that no method compresses what they hold always.
  const recordedBytes = (run, budgets, { layers, prompt: { length }, record: { model } }) => {
    const places = Array.from({ length: layers }, (_, layer) => layer).filter((layer) => !DynamicKV.otherKind(model, layer));
    const tokens = (held) => places.reduce((all, layer) => all + (held[layer] ?? length), 0);
    const [most, least] = [tokens([]), tokens(run.budgets)];
    return most > least ? run.kv_bytes + ((run.kv_bytes_full - run.kv_bytes) * (tokens(budgets) - least)) / (most - least) : run.kv_bytes;
  };

  // The best of the dropped ones, by recorded score, until `count` are held. Levels 0..255; ties by position.
  function best(kept, row, length, scores, heads, count) {
    const numbers = new Uint32Array(256);
    for (let i = 0; i < length; i += 1) if (!kept[row + i]) numbers[scores[row + i]] += 1;
    let level = 255;
    let left = count;
    while (level > 0 && numbers[level] <= left) { left -= numbers[level]; level -= 1; }
    for (let i = 0; i < length; i += 1) {
      if (kept[row + i]) continue;
      if (scores[row + i] > level) kept[row + i] = heads;
      else if (scores[row + i] === level && left > 0) { kept[row + i] = heads; left -= 1; }
    }
  }

  // A recorded run after `read` layers, from its record: what is dropped later is known by its score alone.
  DynamicKV.heldAfter = (trace, index, read, scores = null) => {
    const run = trace.runs[index];
    const { layers, prompt: { length } } = trace;
    const budgets = (read ? trace.film?.[index]?.[read - 1] ?? run.budgets.slice(0, read) : []).slice(0, layers);
    const kept = new Uint8Array(layers * length).fill(run.heads);
    for (let layer = 0; layer < read; layer += 1) {
      const row = layer * length;
      kept.set(run.kept.subarray(row, row + length), row);
      const more = Math.round(budgets[layer] - run.budgets[layer]);
      if (more > 0 && scores) best(kept, row, length, scores, run.heads, more);
    }
    return { kept, budgets, read: DynamicKV.rowsOf(run, trace).map((told, layer) => (layer < read ? told : 0)), count: read, bytes: recordedBytes(run, budgets, trace), full: run.kv_bytes_full };
  };

  // ---- cards: a map and a counter each ---------------------------------------------------------------------------
  const MiB = (bytes) => `${(bytes / 2 ** 20).toLocaleString("en-GB", { minimumSignificantDigits: 3, maximumSignificantDigits: 3 })} MiB`;
  function drawCards() {
    const { trace } = store;
    const { layers, prompt: { length } } = trace;
    for (const card of document.querySelectorAll(".dkv-card")) {
      const run = trace.runs.find((item) => item.label === card.dataset.label);
      const canvas = card.querySelector(".dkv-card-map");
      canvas.hidden = !run?.now;
      if (!run?.now) continue;
      const columns = Math.max(1, Math.min(length, canvas.clientWidth || 200));
      DynamicKV.drawMap(canvas, run.now.kept, layers, length, columns, run.heads, run.now.read);
      canvas.setAttribute("aria-label", `${run.label}: ${run.now.count} of ${layers} layers read, ${MiB(run.now.bytes)} of ${MiB(run.now.full)} held`);
      card.querySelector(".dkv-counter b").textContent = run.now.full ? MiB(run.now.bytes) : "";
      card.querySelector(".dkv-counter small").textContent = run.now.full ? `of ${MiB(run.now.full)}` : "";
      card.style.setProperty("--held", `${run.now.full ? (100 * run.now.bytes) / run.now.full : 100}%`);
    }
  }

  const filming = (yes) => document.body.classList.toggle("dkv-filming", yes);
  const tell = () => { if (store.film) drawCards(); emit("film", store.film); };

  // ---- live ------------------------------------------------------------------------------------------------------
  let before = null; // the payload that was on screen before the run
  let live = null; // {places: the layers that methods compress}

  function begin(opening) {
    before = store.trace?.live ? before : store.payload;
    DynamicKV.setTrace({ ...opening, live: true });
    const { layers, runs } = store.trace;
    const { model } = store.trace.record;
    live = { places: Array.from({ length: layers }, (_, layer) => layer).filter((layer) => !DynamicKV.otherKind(model, layer)) };
    for (const run of runs) run.now = { kept: run.kept, budgets: [], read: new Uint8Array(layers), count: 0, bytes: 0, full: 0, held: new Float64Array(layers) };
    store.film = { step: 0, total: layers, live: true };
    document.body.classList.add("dkv-live");
    filming(true);
  }

  function take([index, layer, budget, bytes, full, bits]) {
    const run = store.trace.runs[index];
    const { layers, prompt: { length } } = store.trace;
    const { now } = run;
    const row = layer * length;
    now.kept.fill(0, row, row + length);
    if (bits) {
      const packed = DynamicKV.bytesIn(bits);
      run.heads = Math.max(1, Math.floor((packed.length * 8) / length));
      const counts = DynamicKV.keptHeads(packed, run.heads, 1, length);
      now.kept.set(counts, row);
    } else now.kept.fill(run.heads, row, row + length);
    if (now.read[layer] !== 1) now.count += 1;
    now.read[layer] = 1;
    now.budgets[layer] = budget;
    now.held[layer] = bytes;
    now.layersKeeping = null;
    now.full = full * live.places.length;
    now.bytes = now.held.reduce((all, held) => all + held, 0) + full * (live.places.length - now.count);
  }

  /** One picture of a run that is going on; null ends it without a record. */
  DynamicKV.liveFilm = (picture) => {
    if (!picture) {
      if (store.trace?.live && before) DynamicKV.setTrace(before);
      return;
    }
    if (picture.opening && (!store.trace?.live || picture.number === 0)) begin(picture.opening);
    if (!store.trace?.live) return;
    for (const row of picture.rows) take(row);
    // A layer that is read, and of which it is told later or never what is kept, is no gap in the map.
    const reached = picture.read ? store.trace.layers : 1 + Math.max(live.places[picture.layers - 1] ?? -1, ...picture.rows.map(([, layer]) => layer));
    for (const { now } of store.trace.runs) for (let layer = 0; layer < reached; layer += 1) now.read[layer] ||= 2;
    store.film.step = Math.max(...store.trace.runs.map((run) => run.now.count));
    if (picture.read) filming(false);
    tell();
  };

  // ---- recorded --------------------------------------------------------------------------------------------------
  DynamicKV.register("film", (element) => {
    const find = (role) => element.querySelector(`[data-role="${role}"]`);
    const slider = find("step");
    const skip = find("skip");
    let timer = null;
    let auto = false; // plays by itself, for the first time
    let scores = []; // of the runs whose layers were cut again, once they are here
    const total = () => store.trace?.layers ?? 0;
    const at = () => (store.film ? store.film.step : total());

    function end() {
      const was = Boolean(store.film);
      stop();
      store.film = null;
      for (const run of store.trace?.runs ?? []) delete run.now;
      filming(false);
      if (was) tell();
      say();
    }

    function stop() {
      cancelAnimationFrame(timer);
      timer = null;
      auto = false;
      skip.hidden = true;
      find("play").textContent = "▶";
      find("play").setAttribute("aria-label", "Play the film");
    }

    // Show the moment after so many layers; the last is the run as it is.
    function go(step, rest = true) {
      const { trace } = store;
      if (!trace?.runs.length || trace.live) return;
      const next = Math.max(0, Math.min(total(), step));
      if (next === total() && rest) { end(); return; }
      if (!store.film) { DynamicKV.setWord(null); fetchScores(trace); }
      trace.runs.forEach((run, index) => { if (!run.predicted) run.now = DynamicKV.heldAfter(trace, index, next, scores[index]); });
      store.film = { step: next, total: total(), live: false };
      filming(true);
      tell();
      say();
    }

    function fetchScores(trace) {
      trace.runs.forEach(async (run, index) => {
        if (!trace.film?.[index] || scores[index]) return;
        const found = await DynamicKV.scoresOf(index).catch(() => null);
        if (!found?.bytes || store.trace !== trace) return;
        scores[index] = DynamicKV.bytesIn(found.bytes);
        if (store.film) go(store.film.step, false);
      });
    }

    function play() {
      const from = at() >= total() ? 0 : at();
      let elapsed = (from / total()) * WHOLE_MS;
      let last = performance.now();
      find("play").textContent = "❚❚";
      find("play").setAttribute("aria-label", "Pause the film");
      const tick = (now) => {
        elapsed += Math.min(now - last, JUMP_MS); // a busy page holds the film up and skips none of it
        last = now;
        const step = Math.min(total(), Math.max(0, Math.floor((elapsed / WHOLE_MS) * total())));
        if (elapsed >= WHOLE_MS + END_MS) { end(); return; }
        if (!store.film || step !== at()) go(step, false);
        timer = requestAnimationFrame(tick);
      };
      go(from, false);
      timer = requestAnimationFrame(tick);
    }

    function words() {
      const { trace, film } = store;
      if (!trace) return ["", ""];
      const where = film ? `${plain(film.step)} of ${total()} layers read` : `all ${total()} layers read`;
      if (!film || film.live) return [where, ""];
      const shared = trace.runs.findIndex((run) => run.budget_history?.some((update) => update.length === film.step));
      const run = trace.runs[shared];
      const late = trace.runs.filter((item) => item.endsAlone).map((item) => item.label).join(", ");
      if (run && run.budget_history.length > 1) return [where, `${run.label} shares its budget again`];
      return [where, late && `${late}: the record has the last budgets alone`];
    }

    function say() {
      const [where, note] = words();
      const running = Boolean(store.trace?.live);
      element.classList.toggle("dkv-empty", !store.trace?.runs.length);
      slider.max = String(total());
      slider.value = String(at());
      const shown = store.trace?.runs[store.view.run];
      slider.setAttribute("aria-valuetext", `${where}${shown?.now?.full ? `; ${shown.label} holds ${MiB(shown.now.bytes)} of ${MiB(shown.now.full)}` : ""}`);
      find("where").textContent = where;
      find("note").textContent = note;
      for (const role of ["play", "back", "forward", "step"]) find(role).disabled = running;
    }

    const step = (by) => { stop(); go(at() + by); };
    find("play").addEventListener("click", () => {
      if (timer) { stop(); say(); } else if (DynamicKV.reducedMotion()) { go(at() >= total() ? 0 : at() + 1); } else play();
    });
    find("back").addEventListener("click", () => step(-1));
    find("forward").addEventListener("click", () => step(1));
    skip.addEventListener("click", end);
    slider.addEventListener("input", () => { stop(); go(Number(slider.value)); });
    // Anywhere on the film the arrow keys step; elsewhere they move the layer that is looked at.
    element.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: 1, ArrowDown: -1 }[event.key];
      const to = { Home: 0, End: total() }[event.key];
      if ((!by && to === undefined) || event.ctrlKey || event.altKey || event.metaKey || store.trace?.live) return;
      event.preventDefault();
      event.stopPropagation();
      stop();
      go(by ? at() + by : to);
    });
    // Whoever does something else wants the answers.
    for (const kind of ["pointerdown", "keydown"]) window.addEventListener(kind, (event) => {
      if (event.key === "Escape" && store.film && !store.film.live) end();
      else if (auto && !element.contains(event.target)) end();
    }, true);

    function opens(trace) {
      const first = !given.has("ex") && !given.has("lesson") && !given.has("tab") && !given.has("embed");
      if (!first || !trace.example || DynamicKV.reducedMotion() || !element.offsetParent || !trace.runs.length) return;
      try { if (sessionStorage.getItem(SEEN)) return; sessionStorage.setItem(SEEN, "1"); } catch { return; }
      play();
      auto = true;
      skip.hidden = false;
    }

    const shown = (trace) => {
      stop();
      scores = [];
      if (!trace?.live) { store.film = null; filming(false); document.body.classList.remove("dkv-live"); }
      say();
      if (trace && !trace.live) requestAnimationFrame(() => { if (store.trace === trace && !store.film) opens(trace); });
    };
    on("trace", shown);
    on("film", () => { if (store.film?.live) say(); });
    on("view", say);
    on("theme", () => { if (store.film) drawCards(); });
    shown(store.trace); // which may have been there first
    return () => {};
  });
})();
