// The Learn tab: fetches recorded lessons when it is first opened, fills in their numbers, and tells its figures which lesson is
// on screen. Figures are in learn_figures.js, learn_choice.js; the tour in tour.js. Nothing here needs the model or the explorer.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { make } = DynamicKV;
  const figures = [];
  const found = new Map(); // lessons by name, fetched once

  // Called by the figures' scripts: build(element, find, learn) returns {lesson(lesson), shown(), theme()}, each optional.
  DynamicKV.learnFigure = (build) => figures.push(build);

  const root = () => window.gradio_config?.root || "";
  function fetched(name) {
    if (!found.has(name)) {
      found.set(name, fetch(`${root()}/gradio_api/explorer/learn/${name}.json`).then((answer) => {
        if (!answer.ok) throw new Error(`the lesson ${name} did not load (${answer.status})`);
        return answer.json();
      }).catch((error) => { found.delete(name); throw error; }));
    }
    return found.get(name);
  }

  const decoded = (lesson) => ({ ...lesson, trace: DynamicKV.decode(lesson.trace) });
  const given = () => new URLSearchParams(window.location.search);

  DynamicKV.register("learn", (element) => {
    const learn = element.querySelector(".dkv-learn");
    const find = (role, within = learn) => within.querySelector(`[data-role="${role}"]`);
    const tools = { fetched, decoded, index: null, lesson: null };
    let parts = [];

    // ---- lessons ----------------------------------------------------------------------------------------------
    async function open(name) {
      try {
        const next = decoded(await fetched(name));
        if (tools.wanted !== name) return;
        tools.lesson = next;
        tell(next);
        for (const part of parts) part.lesson?.(next);
        learn.dataset.state = "ready";
      } catch (error) { complain(error); }
    }

    function complain(error) {
      find("problem").hidden = false;
      find("problem").textContent = `The lessons did not load: ${error.message}. Reload the page to try again.`;
      learn.dataset.state = "failed";
    }

    function tell(lesson) {
      for (const place of learn.querySelectorAll("[data-number]")) place.textContent = lesson.numbers[place.dataset.number] ?? "";
      find("asked").textContent = `“${lesson.trace.record.prompt.question}”`;
      find("recorded").textContent = `· ${lesson.trace.record.model.name}, ${lesson.trace.source}`;
      find("explore").href = exploreLink({});
      for (const button of find("lessons").children) button.setAttribute("aria-pressed", String(button.dataset.lesson === lesson.id));
      teach(lesson);
      handout(lesson);
    }

    // A link into the explorer, to the same document at the same place.
    function exploreLink({ layer = null, method = "dynamickv" }) {
      const query = new URLSearchParams();
      query.set("ex", tools.lesson.example);
      query.set("m", method);
      if (layer !== null) query.set("layer", layer);
      if (given().get("big") === "1") query.set("big", "1");
      return `?${query}`;
    }
    tools.exploreLink = exploreLink;

    function choose(name) {
      tools.wanted = name;
      const address = new URL(window.location.href);
      address.searchParams.set("lesson", name);
      window.history.replaceState(window.history.state, "", address);
      open(name);
    }

    function lessonButtons({ lessons }) {
      find("lessons").replaceChildren(...lessons.map(({ id, title }) => {
        const button = make("button", { type: "button", data: { lesson: id } }, title);
        button.addEventListener("click", () => choose(id));
        return button;
      }));
      find("links").replaceChildren(...lessons.flatMap(({ id, title }) => [false, true].map((big) => make("a", { href: `?lesson=${id}${big ? "&big=1" : ""}` }, big ? `${title}, for a hall` : title))));
    }

    // ---- teacher's notes --------------------------------------------------------------------------------------
    function teach({ title, notes }) {
      find("teach-title").textContent = title;
      find("teach-aim").textContent = notes.aim;
      find("teach-points").replaceChildren(...notes.point.map(({ at, what }) => {
        const go = make("a", { href: `#learn-${at}` }, learn.querySelector(`#learn-${at} h3`).lastChild.textContent.trim());
        return make("li", {}, go, `: ${what}`);
      }));
      find("teach-questions").replaceChildren(...notes.questions.map(({ ask, answer }) => make("details", { className: "dkv-question" }, make("summary", {}, ask), make("p", {}, answer))));
    }

    function handout({ title, notes, trace, cards, numbers }) {
      find("handout-title").textContent = `${title}: “${trace.record.prompt.question}”`;
      const ours = trace.runs.find((run) => run.method === "DynamicKV");
      const most = Math.max(...ours.budgets);
      const bars = find("handout-bars");
      bars.replaceChildren(...ours.budgets.map((kept) => make("i", { style: `height:${(100 * kept) / most}%` })));
      bars.style.setProperty("--mean", `${(100 * ours.parameters.capacity) / most}%`);
      bars.dataset.last = numbers.last_layer;
      find("handout-answers").replaceChildren(...cards.map((card) => make("div", {}, make("dt", {}, card.method), make("dd", {}, card.answer.join("")))));
      find("handout-questions").replaceChildren(...notes.questions.map(({ ask }) => make("li", {}, ask)));
    }

    find("print").addEventListener("click", () => window.print());
    const printing = (on) => document.body.classList.toggle("dkv-printing", on && learn.offsetParent !== null);
    window.addEventListener("beforeprint", () => printing(true));
    window.addEventListener("afterprint", () => printing(false));

    // ---- words explained where they stand -----------------------------------------------------------------------
    const tip = find("tip");
    let asked = null;
    const meaning = (node) => node.dataset.term
      ? learn.querySelector(`[data-entry="${node.dataset.term}"] dd`)?.textContent
      : tools.symbol?.(node.dataset.symbol);
    function explain(node) {
      const words = meaning(node);
      if (!words) return;
      asked?.removeAttribute("aria-describedby");
      asked = node;
      tip.textContent = words;
      tip.hidden = false;
      node.setAttribute("aria-describedby", tip.id);
      const frame = learn.getBoundingClientRect();
      const box = node.getBoundingClientRect();
      const scale = learn.offsetWidth ? frame.width / learn.offsetWidth : 1; // ?big=1 zooms
      const left = Math.min(Math.max(0, box.left - frame.left), frame.width - tip.offsetWidth * scale);
      const below = (box.bottom - frame.top) / scale + 6;
      const above = (box.top - frame.top) / scale - tip.offsetHeight - 6;
      // Above, so that the numbers under a symbol stay in sight; below where the window ends.
      Object.assign(tip.style, { left: `${left / scale}px`, top: `${box.top > tip.offsetHeight * scale + 60 ? above : below}px` });
    }
    function hide() {
      asked?.removeAttribute("aria-describedby");
      asked = null;
      tip.hidden = true;
    }
    const word = (event) => event.target.closest?.(".dkv-term, .dkv-symbol");
    for (const name of ["mouseover", "focusin", "click"]) learn.addEventListener(name, (event) => { if (word(event)) explain(word(event)); });
    learn.addEventListener("mouseout", (event) => { if (word(event) && event.relatedTarget !== tip && word(event) !== document.activeElement) hide(); });
    tip.addEventListener("mouseleave", () => { if (asked !== document.activeElement) hide(); });
    learn.addEventListener("focusout", (event) => { if (word(event)) hide(); });
    learn.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
    tools.refreshTip = () => { if (asked && !tip.hidden) explain(asked); };

    // The explorer's own keys move what is shown there, and not from here.
    learn.addEventListener("keydown", (event) => event.stopPropagation());
    DynamicKV.labelTour?.();
    // ---- start ------------------------------------------------------------------------------------------------
    DynamicKV.on("theme", () => parts.forEach((part) => part.theme?.()));
    new ResizeObserver(DynamicKV.framed(() => { if (learn.offsetParent) parts.forEach((part) => part.shown?.()); })).observe(learn);
    (async () => {
      try {
        tools.index = await fetched("index");
        lessonButtons(tools.index);
        parts = figures.map((build) => build(learn, find, tools));
        const names = tools.index.lessons.map(({ id }) => id);
        tools.wanted = names.includes(given().get("lesson")) ? given().get("lesson") : names[0];
        await open(tools.wanted);
      } catch (error) { complain(error); }
    })();
    return () => {};
  });

  // A link to a lesson opens its tab, once, as soon as there is one.
  function openTab() {
    const tab = [...document.querySelectorAll('[role="tab"]')].find((node) => node.textContent.trim() === "Learn" && node.offsetParent);
    if (!tab) { requestAnimationFrame(openTab); return; }
    tab.click();
  }
  if (given().has("lesson")) requestAnimationFrame(openTab);
})();
