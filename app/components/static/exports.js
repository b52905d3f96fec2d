// One run as one HTML page: the server's skeleton (the same for every run) with the run put in here. Nothing is sent.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { store } = DynamicKV;
  const PLACE = '"the run goes here"';

  DynamicKV.savePage = async () => {
    if (!store.trace) return;
    const root = window.gradio_config?.root || "";
    const reply = await fetch(`${root}/gradio_api/explorer/offline.html`);
    if (!reply.ok) return;
    const skeleton = await reply.text();
    const { runs } = await DynamicKV.wholeRecord();
    await DynamicKV.fetchReads();
    const { record, ...rest } = store.payload;
    const run = { ...rest, ...(store.trace.reads ? { reads: store.trace.reads.sent } : {}), key: "", example: "", ready: false, record: { ...record, runs: record.runs.map((item, i) => ({ ...item, scores: runs[i].scores })) } };
    // "<" never appears in the data, so no text can end the script it stands in.
    const data = JSON.stringify({ run, cards: store.cards }).replace(/</g, "\\u003c");
    const page = skeleton.replace(PLACE, () => data);
    DynamicKV.saveBlob(new Blob([page], { type: "text/html" }), store.trace.name.replace(".json.gz", ".html"));
  };
})();
