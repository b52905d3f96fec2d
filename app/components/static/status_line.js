// The line under Run: what is happening now, how far it is, how long it takes; or, in one sentence, what went wrong.
(() => {
  "use strict";
  const { DynamicKV } = window;

  // A run is watched in the answers: bring them on screen when most of them is not.
  function showAnswers() {
    const box = document.querySelector(".dkv-answers")?.getBoundingClientRect();
    if (!box || (box.top > -60 && box.top < window.innerHeight * 0.6)) return;
    document.querySelector(".dkv-answers").scrollIntoView({ behavior: DynamicKV.reducedMotion() ? "auto" : "smooth", block: "start" });
  }

  // What a status line says and how far it is; false where it comes too late to be said.
  DynamicKV.sayStatus = (element, payload) => {
    const box = element.querySelector(".dkv-status");
    // Stop answers on a way of its own and may come in after the run's last word.
    if (payload?.stopping && box.dataset.state !== "running") return false;
    box.dataset.state = payload?.state ?? "idle";
    box.querySelector('[data-role="message"]').textContent = payload?.message ?? "";
    box.querySelector('[data-role="detail"]').textContent = payload?.detail ?? "";
    box.querySelector(".dkv-progress > i").style.width = `${100 * (payload?.done ?? 0)}%`;
    return true;
  };

  // An error is about what was sent: it goes when somebody changes that.
  document.addEventListener("input", (event) => {
    const box = document.querySelector("#dkv-status .dkv-status");
    if (!event.isTrusted || box?.dataset.state !== "error" || !event.target.closest("#dkv-inputs, #dkv-model-choice")) return;
    DynamicKV.sayStatus(box.parentElement, { state: "idle", message: "", detail: "" });
  });

  DynamicKV.register("status", (element) => (payload) => {
    if (!DynamicKV.sayStatus(element, payload)) return;
    // While a run is on, what the views below show is the run before it.
    const running = payload?.state === "running";
    const began = running && !document.body.classList.contains("dkv-running");
    // On a narrow screen progress and Stop leave the form for the screen's foot: their place stays, so that nothing moves.
    if (began) document.body.style.setProperty("--dkv-action", `${document.querySelector("#dkv-action")?.offsetHeight ?? 0}px`);
    document.body.classList.toggle("dkv-running", running);
    if (began) showAnswers();
  });
})();
