// The line under Run: what is happening now, how far it is, how long it takes; or, in one sentence, what went wrong.
(() => {
  "use strict";
  const { DynamicKV } = window;
  DynamicKV.register("status", (element) => (payload) => {
    const box = element.querySelector(".dkv-status");
    box.dataset.state = payload?.state ?? "idle";
    box.querySelector('[data-role="message"]').textContent = payload?.message ?? "";
    box.querySelector('[data-role="detail"]').textContent = payload?.detail ?? "";
    box.querySelector(".dkv-progress > i").style.width = `${100 * (payload?.done ?? 0)}%`;
    // While a run is on, what the views below show is the run before it.
    document.body.classList.toggle("dkv-running", payload?.state === "running");
  });
})();
