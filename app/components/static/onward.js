// On from a run: the smallest capacity of each method that still answers, and another question on the same compressed caches, with
// what it would have kept marked in the text. All texts are text nodes.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { make, store, on, plain } = DynamicKV;
  const LEAST = 0.06; // share of layers and heads from which a token is marked
  const bytes = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  const named = (row) => { const glyph = make("span", { className: "dkv-glyph" }, row.glyph); glyph.setAttribute("aria-hidden", "true"); return [glyph, ` ${row.label}`]; };

  DynamicKV.register("onward", (element, props, link) => {
    const root = element.querySelector(".dkv-onward");
    const find = (role) => element.querySelector(`[data-role="${role}"]`);
    let told = null; // the last results, of one key
    let pending = null; // what waits for the prompt to be read
    let shown = null; // the run whose marks are shown

    const key = () => store.trace?.key ?? "";
    function can() {
      const { trace } = store;
      const full = trace?.runs.some((run) => run.method === "FullKV");
      const own = trace?.runs.some((run) => run.method !== "FullKV" && !run.predicted);
      return Boolean(trace && full && own && key());
    }
    function start(name, more = {}) {
      if (!can()) return;
      if (!store.trace.ready) {
        pending = () => start(name, more);
        const seconds = Math.max(1, Math.round(store.trace.record.prefill_seconds));
        find("note").textContent = `The prompt is read once first (about ${DynamicKV.counting(seconds, "second")}).`;
        DynamicKV.emit("readprompt");
        return;
      }
      pending = null;
      find("note").textContent = "";
      link.trigger(name, { key: key(), ...more });
    }
    on("standing", ({ ready }) => { if (ready && pending) { const go = pending; pending = null; go(); } });
    find("smallest").addEventListener("click", () => start("smallest"));
    find("form").addEventListener("submit", (event) => {
      event.preventDefault();
      const question = find("question").value.trim();
      if (question) start("ask", { question }); else find("question").focus();
    });

    // ---- smallest -------------------------------------------------------------------------------------------------
    function showSmallest() {
      const found = told?.smallest;
      find("found").hidden = !found;
      if (!found) return;
      const most = Math.max(...found.rows.map((row) => row.capacity));
      find("found").replaceChildren(make("table", { className: "dkv-smallest-table" },
        make("caption", {}, `Smallest capacity that still answers. ${found.how}`),
        make("thead", {}, make("tr", {}, ...["Method", "Tokens per layer", "", "Of the cache"].map((words) => make("th", { scope: "col" }, words)))),
        make("tbody", {}, ...[...found.rows].sort((a, b) => a.capacity - b.capacity).map((row) => {
          const bar = make("i", { data: { method: row.method } });
          bar.style.width = `${Math.max(1, (100 * row.capacity) / most)}%`;
          return make("tr", { title: `Tried: ${row.tried}` }, make("th", { scope: "row" }, ...named(row)), make("td", {}, plain(row.capacity)), make("td", { className: "dkv-smallest-bar" }, bar), make("td", {}, row.words));
        }))));
    }

    // ---- another question -----------------------------------------------------------------------------------------
    function showAsked() {
      const asked = told?.asked;
      find("asked").hidden = !asked;
      if (!asked) return;
      const marked = asked.rows.filter((row) => row.marks);
      if (!marked.includes(shown)) shown = marked.find((row) => row.label === shown?.label) ?? marked.find((row) => row.method === "DynamicKV") ?? marked[0] ?? null;
      find("asked").replaceChildren(
        make("h3", {}, "Then asked: ", make("q", {}, asked.question)),
        make("div", { className: "dkv-asked-rows" }, ...asked.rows.map((row) => {
          const own = make("article", { className: "dkv-asked-row", data: { method: row.method } }, make("h4", {}, ...named(row)), make("p", { className: "dkv-asked-answer" }, row.answer || "(no words)"));
          if (row.held) own.append(make("p", { className: "dkv-note" }, `${row.held} of what this question would keep is held`));
          if (row.first !== undefined) own.append(make("p", { className: "dkv-note" }, "asked first: ", make("q", {}, row.first || "(no words)")));
          return own;
        })),
        ...(shown ? [marksOf(marked)] : []));
      const text = find("asked").querySelector(".dkv-asked-text");
      const first = text?.querySelector(".dkv-would-gone, .dkv-would-held");
      if (first) text.scrollTop = Math.max(0, first.offsetTop - text.offsetTop - 24);
    }
    function marksOf(marked) {
      const tabs = make("div", { className: "dkv-tabs", role: "group" }, ...marked.map((row) => {
        const button = make("button", { type: "button" }, row.label);
        button.setAttribute("aria-pressed", String(row === shown));
        button.addEventListener("click", () => { shown = row; showAsked(); find("asked").querySelector('.dkv-tabs [aria-pressed="true"]')?.focus({ preventScroll: true }); });
        return button;
      }));
      tabs.setAttribute("aria-label", "Method whose cache is held against the question");
      const text = make("div", { className: "dkv-asked-text", tabIndex: 0, role: "region" }, ...spans(shown.marks));
      text.setAttribute("aria-label", "The document: what the other question would have kept");
      return make("div", { className: "dkv-asked-marks" }, tabs,
        make("p", { className: "dkv-note" }, "What this question would have kept: ", make("span", { className: "dkv-would-held" }, "held"), " and ", make("span", { className: "dkv-would-gone" }, "gone, dropped for the first question"), "."), text);
    }
    // Runs of tokens with the same mark become one span.
    function spans({ first, wanted, gone }) {
      const { text, starts, ends, document_span: [, last] } = store.trace.prompt;
      const [want, lost] = [bytes(wanted), bytes(gone)];
      const parts = [];
      let run = null;
      for (let i = 0; first + i < last; i += 1) {
        const share = (want[i] ?? 0) / 255;
        const name = share < LEAST ? "" : (lost[i] > want[i] / 2 ? "dkv-would-gone" : "dkv-would-held");
        if (run && run.name === name) run.end = ends[first + i]; else { if (run) parts.push(run); run = { name, start: starts[first + i], end: ends[first + i] }; }
      }
      if (run) parts.push(run);
      return parts.map((part) => (part.name ? make("span", { className: part.name }, text.slice(part.start, part.end)) : text.slice(part.start, part.end)));
    }

    DynamicKV.restoreRun = (earlier) => link.trigger("restore", { key: earlier });
    DynamicKV.showHistory?.();
    if (store.trace) root.hidden = !can();
    on("trace", (trace) => {
      if (told && told.key !== trace?.key) told = null;
      root.hidden = !can();
      pending = null;
      find("note").textContent = "";
      showSmallest();
      showAsked();
    });
    return (payload) => {
      if (!payload?.key || payload.key !== key()) return;
      told = { ...(told?.key === payload.key ? told : {}), ...payload };
      showSmallest();
      showAsked();
    };
  });
})();
