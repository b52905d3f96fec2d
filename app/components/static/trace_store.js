// The component that receives a run record and hands it to every view on the page. It draws nothing itself.
(() => {
  "use strict";
  window.DynamicKV.register("store", () => (payload) => {
    const { DynamicKV } = window;
    if (payload?.restore) DynamicKV.liveFilm?.(null);
    else if (payload?.film?.rows) DynamicKV.liveFilm?.(payload.film);
    else DynamicKV.setTrace(payload);
  });
})();
