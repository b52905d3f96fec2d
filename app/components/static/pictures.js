// Pictures and tables of every view: PNG, SVG and CSV, each titled with what was asked of which model. A picture of a view is
// drawn from what is on screen: boxes, lines of text, canvases. Nothing is sent.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { make, store, on } = DynamicKV;
  const escaped = (words) => String(words).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/"/g, "&quot;");

  // What a spreadsheet would run as a formula is marked as text.
  const cell = (value) => {
    if (typeof value !== "string") return String(value ?? "");
    const safe = /^\s*[=+\-@]/.test(value) ? `'${value}` : value;
    return /[",\n]/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe;
  };
  DynamicKV.csv = (rows) => `${rows.map((row) => row.map(cell).join(",")).join("\n")}\n`;

  // ---- titles -------------------------------------------------------------------------------------------------------
  /** Two lines: what and the question; model, tokens, capacity, methods. */
  DynamicKV.captionOf = (title) => {
    const { record, runs } = store.trace;
    const { question } = record.prompt;
    const sizes = [...new Set(record.runs.map((run) => run.parameters.capacity).filter(Boolean))];
    const made = [record.model.name, DynamicKV.counting(record.prompt.length, "token"), sizes.length && `capacity ${sizes.map(DynamicKV.plain).join(", ")}`, runs.filter((run) => !run.predicted).map((run) => run.label).join(", ")];
    return `${title}: ${question.length > 90 ? `${question.slice(0, 90)}…` : question}\n${made.filter(Boolean).join(" · ")}`;
  };

  // ---- charts: Plotly's own export, on white paper --------------------------------------------------------------------
  DynamicKV.savePlot = async (plot, caption, format, name) => {
    const Plotly = await DynamicKV.loadPlotly();
    const ink = { color: "#1b1f24" };
    const [first, second] = caption.split("\n").map(escaped);
    const { data, layout } = plot;
    const axes = Object.fromEntries(Object.entries(layout).filter(([key]) => /^[xy]axis\d*$/.test(key)).map(([key, axis]) => [key, { ...axis, gridcolor: "#dfe3e8", linecolor: "#5b6470", tickfont: ink, title: { ...axis.title, font: ink } }]));
    const width = Math.max(900, plot.clientWidth);
    const top = (layout.margin?.t ?? 40) + 64;
    const url = await Plotly.toImage({ data, layout: { ...layout, ...axes, paper_bgcolor: "#ffffff", plot_bgcolor: "#ffffff", font: { ...layout.font, ...ink },
      annotations: (layout.annotations ?? []).map((item) => ({ ...item, font: { ...item.font, ...ink } })), legend: { ...layout.legend, font: ink },
      title: { text: `${first}<br><span style="font-size:12px">${second ?? ""}</span>`, font: { size: 15, ...ink }, x: 0.01, xanchor: "left", y: 1, yref: "container", yanchor: "top", pad: { t: 12 } },
      margin: { ...layout.margin, t: top } } }, { format, width, height: plot.clientHeight + 64, scale: format === "png" ? 2 : 1 });
    const body = url.slice(url.indexOf(",") + 1);
    DynamicKV.saveBlob(format === "svg" ? new Blob([decodeURIComponent(body)], { type: "image/svg+xml" }) : new Blob([Uint8Array.from(atob(body), (char) => char.charCodeAt(0))], { type: "image/png" }), name);
  };

  // ---- any other view: what is on screen as SVG -----------------------------------------------------------------------
  const visible = (style) => style.visibility !== "hidden" && style.display !== "none" && Number(style.opacity) > 0;
  const painted = (color) => color && color !== "transparent" && !/, 0\)$/.test(color);
  const SKIP = "select, button, input, textarea, script, style, .dkv-unseen, [data-role=menu]";

  function drawn(root) {
    const frame = root.getBoundingClientRect();
    const parts = [];
    const inside = (box, clip) => box.width > 0.3 && box.height > 0.3 && box.bottom > clip.top && box.top < clip.bottom && box.right > clip.left && box.left < clip.right;
    const at = (value) => Math.round(value * 100) / 100;
    const rect = (box, fill, more = "") => `<rect x="${at(box.left - frame.left)}" y="${at(box.top - frame.top)}" width="${at(box.width)}" height="${at(box.height)}" fill="${escaped(fill)}"${more}/>`;
    const narrower = (clip, box) => ({ left: Math.max(clip.left, box.left), top: Math.max(clip.top, box.top), right: Math.min(clip.right, box.right), bottom: Math.min(clip.bottom, box.bottom) });
    function text(node, style, clip) {
      const range = document.createRange();
      let line = null;
      const flush = () => {
        if (line && line.words.trim()) parts.push(`<text x="${at(line.left - frame.left)}" y="${at(line.bottom - frame.top - line.height * 0.24)}" font-family="${escaped(style.fontFamily)}" font-size="${style.fontSize}" font-weight="${style.fontWeight}"${style.fontStyle === "italic" ? ' font-style="italic"' : ""} fill="${escaped(style.color)}" textLength="${at(line.right - line.left)}" lengthAdjust="spacingAndGlyphs" xml:space="preserve">${escaped(line.words.trimEnd())}</text>`);
        line = null;
      };
      for (const piece of node.data.matchAll(/\S+\s*/g)) {
        range.setStart(node, piece.index);
        range.setEnd(node, piece.index + piece[0].trimEnd().length);
        for (const box of range.getClientRects()) {
          if (!inside(box, clip) || box.bottom > clip.bottom + 2) continue;
          if (line && Math.abs(box.top - line.top) < 2) { line.words += `${line.gap}${piece[0].trimEnd()}`; line.right = box.right; } else { flush(); line = { words: piece[0].trimEnd(), left: box.left, right: box.right, top: box.top, bottom: box.bottom, height: box.height }; }
          line.gap = /\s$/.test(piece[0]) ? " " : "";
        }
      }
      flush();
    }
    function walk(node, clip) {
      if (node.nodeType === Node.TEXT_NODE) { text(node, getComputedStyle(node.parentElement), clip); return; }
      if (node.nodeType !== Node.ELEMENT_NODE || node.matches(SKIP)) return;
      const style = getComputedStyle(node);
      if (!visible(style)) return;
      const box = node.getBoundingClientRect();
      if (style.display !== "contents" && box.width && !inside(box, clip)) return;
      if (node instanceof HTMLCanvasElement) { if (node.width && node.height) parts.push(`<image x="${at(box.left - frame.left)}" y="${at(box.top - frame.top)}" width="${at(box.width)}" height="${at(box.height)}" preserveAspectRatio="none" href="${node.toDataURL()}"/>`); return; }
      if (node instanceof SVGElement) return;
      if (painted(style.backgroundColor)) for (const part of node.getClientRects()) if (inside(part, clip)) parts.push(rect(part, style.backgroundColor));
      if (parseFloat(style.borderBottomWidth) && style.borderBottomStyle !== "none" && painted(style.borderBottomColor)) for (const part of node.getClientRects()) if (inside(part, clip) && part.bottom <= clip.bottom + 1) parts.push(rect({ left: part.left, top: part.bottom - parseFloat(style.borderBottomWidth), width: part.width, height: parseFloat(style.borderBottomWidth) }, style.borderBottomColor));
      const next = /(auto|scroll|hidden|clip)/.test(`${style.overflowX} ${style.overflowY}`) ? narrower(clip, box) : clip;
      for (const child of node.childNodes) walk(child, next);
    }
    walk(root, frame);
    return { parts, width: frame.width, height: frame.height };
  }

  /** A view as one SVG with its caption above. */
  DynamicKV.pictureOf = (root, caption) => {
    const { parts, width, height } = drawn(root);
    const [first, second] = caption.split("\n");
    const [paper, ink, muted] = ["--dkv-panel", "--dkv-ink", "--dkv-muted"].map(DynamicKV.cssColor);
    const wide = Math.round(Math.max(width, 480));
    const font = escaped(getComputedStyle(document.body).fontFamily);
    const most = Math.floor(wide / 7.5);
    const cut = (words, size) => (words.length > size ? `${words.slice(0, size - 1)}…` : words);
    return { width: wide, height: Math.round(height) + 60, svg: `<svg xmlns="http://www.w3.org/2000/svg" width="${wide}" height="${Math.round(height) + 60}" viewBox="0 0 ${wide} ${Math.round(height) + 60}"><title>${escaped(caption)}</title><rect width="100%" height="100%" fill="${escaped(paper)}"/>`
      + `<text x="12" y="24" font-family="${font}" font-size="15" font-weight="600" fill="${escaped(ink)}">${escaped(cut(first, most))}</text><text x="12" y="44" font-family="${font}" font-size="12" fill="${escaped(muted)}">${escaped(cut(second ?? "", Math.floor(wide / 6)))}</text>`
      + `<g transform="translate(0 56)">${parts.join("")}</g></svg>` };
  };

  async function saveView(root, caption, format, name) {
    const { svg, width, height } = DynamicKV.pictureOf(root, caption);
    if (format === "svg") { DynamicKV.saveBlob(new Blob([svg], { type: "image/svg+xml" }), name); return; }
    const image = new Image();
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
    await image.decode();
    const canvas = make("canvas", { width: 2 * width, height: 2 * height });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => { if (blob) DynamicKV.saveBlob(blob, name); }, "image/png");
  }
  DynamicKV.saveView = saveView;

  // ---- tables of Explore's views --------------------------------------------------------------------------------------
  const shownRun = () => store.trace.runs[store.view.run];
  const textOf = (position) => { const { text, starts, ends } = store.trace.prompt; return text.slice(starts[position], ends[position]); };
  const positions = () => Array.from({ length: store.trace.prompt.length }, (_, i) => i);
  const keptAt = (run, position) => { let sum = 0; for (let layer = 0; layer < store.trace.layers; layer += 1) sum += run.kept[layer * store.trace.prompt.length + position]; return sum; };
  const TABLES = {
    answers: () => [["method", "capacity", "kept_fraction", "kv_bytes", "surviving", "lost_word", "expected_found", "answer"], ...store.trace.runs.filter((run) => !run.predicted).map((run) => {
      const full = store.trace.runs.find((item) => item.method === "FullKV");
      const span = run.aligned && run.aligned.loss !== null && full ? run.aligned.utf16_spans[run.aligned.loss] : null;
      return [run.label, run.parameters.capacity ?? "", run.kept_fraction, run.kv_bytes, run.aligned?.surviving ?? "", span ? full.pieces.join("").slice(...span) : "", run.expected_found ?? "", run.answer];
    })],
    text: () => { const runs = store.trace.runs; return [["position", "token", ...runs.map((run) => `${run.label}, share of layers and heads`)], ...positions().map((p) => [p, textOf(p), ...runs.map((run) => (keptAt(run, p) / (store.trace.layers * run.heads)).toFixed(4))])]; },
    map: () => { const run = shownRun(); const { layers, prompt } = store.trace; return [["position", "token", ...Array.from({ length: layers }, (_, layer) => `${run.label}, layer ${layer}, heads of ${run.heads}`)], ...positions().map((p) => [p, textOf(p), ...Array.from({ length: layers }, (_, layer) => run.kept[layer * prompt.length + p])])]; },
    evidence: (root) => [...root.querySelectorAll("table tr")].map((row) => [...row.children].map((node) => node.getAttribute("aria-label") ?? node.textContent.trim())),
  };
  // [where the menu stands, what is drawn, title, table]
  const VIEWS = [
    [".dkv-answers .dkv-source", ".dkv-answers", "Answers", "answers"],
    [".dkv-document .dkv-menu-box", ".dkv-document", "What the cache kept", "text"],
    [".dkv-map header, .dkv-layer-map header", ".dkv-map, .dkv-layer-map", "The whole cache", "map"],
    [".dkv-evidence header", ".dkv-evidence", "Evidence", "evidence"],
  ];
  function addMenus() {
    for (const [head, view, title, table] of VIEWS) {
      const place = document.querySelector(head);
      if (!place || place.querySelector(".dkv-save-view")) continue;
      const menu = make("select", { className: "dkv-save-view", data: { view: table } }, ...[["", "Save …"], ["png", "PNG"], ["svg", "SVG"], ["csv", "CSV"]].map(([value, words]) => make("option", { value }, words)));
      menu.setAttribute("aria-label", `Save: ${title}`);
      menu.addEventListener("change", () => {
        const format = menu.value;
        menu.value = "";
        if (!store.trace || !format) return;
        const root = [...document.querySelectorAll(view)].find((node) => node.offsetParent);
        const run = table === "map" || table === "evidence" || table === "text" ? `, ${shownRun().label}` : "";
        const name = `${store.trace.name.replace(".json.gz", "")}_${table}.${format}`;
        if (format === "csv") DynamicKV.saveBlob(new Blob([DynamicKV.csv([...DynamicKV.captionOf(title).split("\n").map((line) => [`# ${line}`]), ...TABLES[table](root)])], { type: "text/csv" }), name);
        else if (root) saveView(root, DynamicKV.captionOf(`${title}${run}`), format, name);
      });
      place.append(menu);
    }
  }
  // Gradio puts the page together piece by piece: a head may come after the first record.
  let tries = 0;
  function whenThere() {
    addMenus();
    if (document.querySelectorAll(".dkv-save-view").length < VIEWS.length && (tries += 1) < 60) setTimeout(whenThere, 250);
  }
  on("trace", (trace) => { if (trace) requestAnimationFrame(whenThere); });

  /** Do something once, when the next run of one's own is on screen. */
  DynamicKV.afterNextRun = (action) => { let waiting = true; on("trace", (trace) => { if (waiting && trace && !trace.example) { waiting = false; action(); } }); };
})();
