// The page's head: its name, the state of the model that loads in the background, and whether the server is still there.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const LOOK_EVERY = 10_000; // ms
  const GONE = "server not reachable: what is on screen can still be read and saved";

  DynamicKV.register("model", (element) => {
    const chip = element.querySelector(".dkv-model");
    const words = element.querySelector('[data-role="state"]');
    let last = null;
    let gone = false;
    function show() {
      chip.dataset.state = gone ? "gone" : last?.state ?? "loading";
      words.textContent = gone ? GONE : last?.message ?? "";
    }
    // Something small that the server always has; nothing is asked while nobody looks.
    async function look() {
      if (document.hidden) return;
      const root = window.gradio_config?.root || "";
      const there = await fetch(`${root}/gradio_api/explorer/preview.png`, { method: "HEAD", cache: "no-store" }).then(() => true, () => false);
      if (there === !gone) return;
      gone = !there;
      show();
      const status = document.querySelector("#dkv-status");
      if (status) DynamicKV.sayStatus(status, gone ? { state: "error", message: "The server is not reachable: nothing can be run." } : {});
    }
    setInterval(look, LOOK_EVERY);
    window.addEventListener("offline", look);
    element.querySelector('[data-role="keys"]').addEventListener("click", () => DynamicKV.listKeys());
    element.querySelector('[data-role="skip"]').addEventListener("click", (event) => {
      event.preventDefault();
      const answer = document.querySelector(".dkv-answer");
      answer?.scrollIntoView({ block: "center" });
      answer?.focus();
    });
    return (payload) => {
      DynamicKV.labelTour?.();
      last = payload ?? last;
      show();
    };
  });
})();
