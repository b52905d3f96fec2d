// The page's head: its name, and the state of the model that loads in the background.
(() => {
  "use strict";
  window.DynamicKV.register("model", (element) => (payload) => {
    const chip = element.querySelector(".dkv-model");
    window.DynamicKV.labelTour?.();
    chip.dataset.state = payload?.state ?? "loading";
    element.querySelector('[data-role="state"]').textContent = payload?.message ?? "";
  });
})();
