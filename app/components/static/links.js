// Links: what is looked at stands in the address, for built-in examples only. Reload and a shared link show the same again.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { store, on, setView } = DynamicKV;
  const OURS = ["ex", "m", "b", "layer", "head", "by", "mark", "shades"];
  const given = new URLSearchParams(window.location.search);
  let restored = false;
  let capacity = null; // what the form asks for: the record's own, the link's, or what was set since

  const slug = (label) => label.toLowerCase().replace(/[^a-z0-9]+/g, "-");
  const whole = (text) => (/^\d{1,4}$/.test(text ?? "") ? Number(text) : null);

  const offered = (size) => {
    const box = document.querySelector("#dkv-capacity input[type=number]");
    return size !== null && box && size >= Number(box.min) && size <= Number(box.max) ? size : null;
  };

  // "m" is the shown method, and after a comma the one it is compared with.
  function restore() {
    const runs = store.trace.runs.map((run) => slug(run.label));
    const [run, against] = (given.get("m") ?? "").split(",").map((name) => runs.indexOf(name));
    const wanted = { layer: whole(given.get("layer")), head: whole(given.get("head")), unit: given.get("by"), mark: given.get("mark"), shades: given.get("shades") };
    if (run >= 0) wanted.run = run;
    if (against >= 0) wanted.against = against;
    setView(wanted);
  }

  function write() {
    const { trace, view } = store;
    if (!trace || trace.live || !restored) return;
    // A lesson's address is the lesson's: what Explore shows meanwhile is not part of it.
    if (new URLSearchParams(window.location.search).has("lesson")) return;
    const address = new URL(window.location.href);
    for (const name of OURS) address.searchParams.delete(name);
    if (trace.example && !trace.runs[view.run]?.predicted) {
      const set = (name, value) => { if (value !== null && value !== undefined) address.searchParams.set(name, value); };
      set("ex", trace.example);
      const names = [view.run, view.against].filter((run) => run !== null && trace.runs[run]).map((run) => slug(trace.runs[run].label));
      set("m", names.join(","));
      set("b", capacity);
      set("layer", view.layer);
      set("head", view.head);
      if (view.unit !== "token") set("by", view.unit);
      if (view.mark !== "fill") set("mark", view.mark);
      if (view.shades !== "normal") set("shades", view.shades);
    }
    const next = address.href.replace(/%2C/g, ",");
    if (next !== window.location.href) window.history.replaceState(window.history.state, "", next);
  }

  // The window's title names the run without its text: histories outlive the tab.
  const title = document.title || "DynamicKV Explorer";
  const entitle = (trace) => {
    const { record, example } = trace;
    document.title = example ? title : `${record.model.name}, ${DynamicKV.counting(record.prompt.length, "token")}${capacity ? `, capacity ${capacity}` : ""} · ${title}`;
  };

  // The first record may be the page's own and the wanted one still on its way.
  let first = null;
  on("trace", (trace) => {
    if (!trace || trace.live) return;
    first ??= trace.example;
    const wanted = given.get("ex");
    capacity = trace.runs.find((run) => run.parameters.capacity)?.parameters.capacity ?? null;
    if (wanted === trace.example && !restored) capacity = offered(whole(given.get("b"))) ?? capacity;
    if (!restored && (!wanted || wanted === trace.example || trace.example !== first)) {
      if (!wanted || wanted === trace.example) restore();
      restored = true;
    }
    write();
    entitle(trace);
  });
  on("view", DynamicKV.framed(write));
  const changed = DynamicKV.framed((size) => { capacity = offered(whole(size)) ?? capacity; write(); });
  for (const kind of ["input", "change"]) document.addEventListener(kind, (event) => { if (event.target.closest?.("#dkv-capacity")) changed(event.target.value); });

  DynamicKV.copyLink = async () => {
    if (!store.trace?.example) return "Only built-in examples have a link: save this run as a file.";
    write();
    await navigator.clipboard.writeText(window.location.href);
    return "Link copied.";
  };
})();
