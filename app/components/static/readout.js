// A small number with its meaning, beside the control it belongs to.
(() => {
  "use strict";
  window.DynamicKV.register("readout", (element) => (payload) => {
    element.querySelector('[data-role="value"]').textContent = payload?.value ?? "";
    element.querySelector('[data-role="note"]').textContent = payload?.note ?? "";
    element.querySelector(".dkv-readout").dataset.tone = payload?.tone ?? "plain";
  });
})();
