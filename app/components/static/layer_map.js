// Layer x position map on one canvas. Columns hold several positions; each shows its best-kept one, so that needles stay visible.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { store, on, plain, framed } = DynamicKV;
  const ROW = 6; // CSS pixels per layer
  // Cividis at 0, 1/4, 1/2, 3/4 and 1: readable without colour vision, and in grey.
  const CIVIDIS = [[0, 34, 78], [66, 78, 108], [124, 123, 120], [187, 174, 113], [254, 232, 56]];

  function color(share) {
    const place = Math.min(0.999, share) * (CIVIDIS.length - 1);
    const i = Math.floor(place);
    return CIVIDIS[i].map((from, channel) => Math.round(from + (CIVIDIS[i + 1][channel] - from) * (place - i)));
  }

  // Greatest share of heads per layer and column, as Uint8 0..heads.
  DynamicKV.binned = (kept, layers, length, columns) => {
    const bins = new Uint8Array(layers * columns);
    const column = Uint32Array.from({ length }, (_, position) => Math.floor((position * columns) / length));
    for (let layer = 0; layer < layers; layer += 1) {
      for (let position = 0; position < length; position += 1) {
        const at = layer * columns + column[position];
        const value = kept[layer * length + position];
        if (value > bins[at]) bins[at] = value;
      }
    }
    return bins;
  };

  // Draw kept heads, (layers x length), into a canvas of so many columns, one pixel row per layer.
  // Rows of layers that are not `read` yet stay clear; those of which it is not told yet what is kept (2) are pale.
  const PALE = new Uint32Array(Uint8Array.from([128, 128, 128, 70]).buffer)[0];
  DynamicKV.drawMap = (canvas, kept, layers, length, columns, heads, read = null) => {
    const bins = DynamicKV.binned(kept, layers, length, columns);
    // A pixel at a time: red, green, blue and opaque.
    const palette = new Uint32Array(Uint8Array.from(Array.from({ length: heads + 1 }, (_, i) => [...color(i / heads), 255]).flat()).buffer);
    canvas.width = columns;
    canvas.height = layers;
    const context = canvas.getContext("2d");
    const image = context.createImageData(columns, layers);
    const pixels = new Uint32Array(image.data.buffer);
    for (let i = 0; i < bins.length; i += 1) {
      const told = read ? read[Math.floor(i / columns)] : 1;
      if (told) pixels[i] = told === 1 ? palette[bins[i]] : PALE;
    }
    context.putImageData(image, 0, 0);
  };

  /** Per layer 1, or 2 for one that holds no positions, such as a state: it is drawn pale. */
  DynamicKV.rowsOf = (run, trace) => Uint8Array.from({ length: trace.layers }, (_, layer) => (run.budgets[layer] || !DynamicKV.otherKind(trace.record.model, layer) ? 1 : 2));

  DynamicKV.register("map", (element) => {
    const find = (role) => element.querySelector(`[data-role="${role}"]`);
    const canvas = find("canvas");
    const cursor = find("cursor");
    const row = find("row");

    const draw = () => {
      if (!store.trace?.runs.length || !canvas.clientWidth) return;
      const { layers } = store.trace;
      const { length } = store.trace.prompt;
      const run = store.trace.runs[store.view.run];
      const { kept, heads } = DynamicKV.seen(run, store.view.head, layers, length);
      const columns = Math.max(1, Math.min(length, Math.round(canvas.clientWidth)));
      DynamicKV.drawMap(canvas, kept, layers, length, columns, heads, run.now?.read ?? DynamicKV.rowsOf(run, store.trace));
      canvas.style.height = `${layers * ROW}px`;
      find("last").textContent = String(layers - 1);
      find("note").textContent = `${run.label} · bright: kept${store.view.head === null ? " by more heads" : ` by head ${store.view.head}`} · one column holds ${length > columns ? `up to ${Math.ceil(length / columns)} tokens` : "one token"}`;
      point();
    };

    // The cursor line (position) and the row frame (layer), from wherever the pointer is.
    function point() {
      if (!store.trace) return;
      const { layers } = store.trace;
      const { length } = store.trace.prompt;
      const position = store.hover?.position;
      const layer = store.hover?.layer ?? store.view.layer;
      cursor.hidden = position === undefined;
      const last = store.hover?.last ?? position;
      if (position !== undefined) Object.assign(cursor.style, { left: `${canvas.offsetLeft + (position / length) * canvas.clientWidth}px`, width: `${Math.max(1, ((last + 1 - position) / length) * canvas.clientWidth)}px` });
      row.hidden = layer === null || layer === undefined;
      if (!row.hidden) Object.assign(row.style, { top: `${canvas.offsetTop + layer * ROW}px`, height: `${ROW}px`, left: `${canvas.offsetLeft}px`, width: `${canvas.clientWidth}px` });
      if (layers) where(position, layer);
    }

    function where(position, layer) {
      const words = [];
      if (layer !== null && layer !== undefined) words.push(`layer ${layer}`);
      if (position !== undefined) words.push(`position ${plain(position)}`);
      find("where").textContent = words.join(" · ");
    }

    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      const { layers } = store.trace;
      const { length } = store.trace.prompt;
      const clamp = (value, top) => Math.min(top - 1, Math.max(0, Math.floor(value)));
      return { layer: clamp(((event.clientY - box.top) / box.height) * layers, layers), position: clamp(((event.clientX - box.left) / box.width) * length, length) };
    };
    const hover = framed((place) => DynamicKV.setHover({ source: "map", ...place }));
    canvas.addEventListener("pointermove", (event) => store.trace && hover(at(event)));
    canvas.addEventListener("pointerleave", () => requestAnimationFrame(() => DynamicKV.setHover(null, "map")));
    canvas.addEventListener("click", (event) => {
      if (!store.trace) return;
      const { layer, position } = at(event);
      hover({ layer, position }); // the page may have scrolled under a pointer at rest
      DynamicKV.setLayer(layer);
      DynamicKV.emit("reveal", position);
    });
    // By keys: up and down move the layer, left and right a hundredth of the prompt (with Shift a token); Enter goes to the text.
    let at_ = 0;
    canvas.addEventListener("keydown", (event) => {
      const { trace, view } = store;
      if (!trace?.runs.length || event.ctrlKey || event.altKey || event.metaKey) return;
      const { length } = trace.prompt;
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      const down = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (down) DynamicKV.setLayer(Math.min(trace.layers - 1, Math.max(0, (view.layer ?? -down) + down)));
      else if (step) at_ = Math.min(length - 1, Math.max(0, at_ + step * (event.shiftKey ? 1 : Math.max(1, Math.round(length / 100)))));
      else if (event.key === "Enter") { DynamicKV.emit("reveal", at_); DynamicKV.setPin({ first: at_, last: at_ }); }
      else return;
      event.preventDefault();
      event.stopPropagation();
      DynamicKV.setHover({ source: "map", layer: view.layer ?? 0, position: at_ });
    });
    const framedDraw = framed(draw);
    on("trace", framedDraw);
    on("runs", framedDraw);
    on("film", draw);
    on("view", (changed) => { if (changed.has("run") || changed.has("head")) framedDraw(); });
    on("hover", framed(point));
    on("view", framed(point));
    new ResizeObserver(framedDraw).observe(canvas.parentElement);
    return () => {};
  });
})();
