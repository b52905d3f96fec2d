// The component that receives a run record and hands it to every view on the page. It draws nothing itself.
(() => {
  "use strict";
  window.DynamicKV.register("store", () => (payload) => window.DynamicKV.setTrace(payload));
})();
