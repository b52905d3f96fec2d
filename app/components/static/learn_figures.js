// The figures of the six sections. Each is a pure picture of the lesson's record; sliders and selects redraw it at once.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { make, plain, counting } = DynamicKV;
  const SHOWN_BEFORE = 9; // prompt tokens shown as chips
  const NEAR = 45; // tokens around the evidence
  const visible = (text) => text.replace(/\n/g, "⏎").replace(/^ /, "");
  const percent = (share) => `${Math.round(100 * share)} %`;
  const runOf = (lesson, method) => lesson.trace.runs.find((run) => run.method === method);
  const bytesOf = (base64) => Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
  const named = (name, learn, find) => { const box = learn.querySelector(`[data-figure="${name}"]`); return (role) => find(role, box); };

  function size(bytes) {
    const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let unit = 0;
    while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit += 1; }
    return `${bytes >= 100 || Number.isInteger(bytes) ? Math.round(bytes).toLocaleString("en-GB") : bytes.toFixed(1)} ${units[unit]}`;
  }

  // 1. One answer token: what is computed and what is read, with the cache and without.
  DynamicKV.learnFigure((learn, find_) => {
    const find = named("cache", learn, find_);
    let lesson = null;
    function draw() {
      if (!lesson) return;
      const { prompt } = lesson.trace;
      const answer = runOf(lesson, "FullKV").pieces;
      const at = Number(find("token").value);
      const before = Array.from({ length: SHOWN_BEFORE }, (_, i) => prompt.length - SHOWN_BEFORE + i).map((i) => prompt.text.slice(prompt.starts[i], prompt.ends[i]));
      const chip = (text, kind) => make("span", { className: `dkv-chip-${kind}` }, visible(text) || "end");
      find("chips").replaceChildren(make("span", { className: "dkv-chip-more" }, `${plain(prompt.length - SHOWN_BEFORE)} tokens`),
        ...before.map((text) => chip(text, "read")), ...answer.slice(0, at - 1).map((text) => chip(text, "read")),
        chip(answer[at - 1], "new"), ...answer.slice(at).map((text) => chip(text, "later")));
      const all = prompt.length + at;
      find("token-label").textContent = `${at} of ${answer.length}`;
      const rows = { with: [1, "1"], without: [all, plain(all)], read: [all - 1, plain(all - 1)] };
      for (const [name, [number, words]] of Object.entries(rows)) {
        find(`${name}-bar`).style.width = `${Math.max(0.4, (100 * number) / (prompt.length + answer.length))}%`;
        find(name).textContent = words;
      }
    }
    find("token").addEventListener("input", draw);
    return { lesson(next) {
      lesson = next;
      const last = runOf(next, "FullKV").pieces.length;
      Object.assign(find("token"), { max: String(last) });
      find("token").value = String(Math.min(4, last));
      draw();
    } };
  });

  // 2. The calculator.
  DynamicKV.learnFigure((learn, find_, tools) => {
    const find = named("grows", learn, find_);
    const { models } = tools.index;
    let capacity = 512;
    find("model").replaceChildren(...models.map((model, i) => make("option", { value: String(i), selected: model.max_positions === Math.max(...models.map((other) => other.max_positions)) }, model.name)));
    find("models").replaceChildren(...models.map((model) => make("tr", {}, make("th", { scope: "row" }, model.name), make("td", {}, make("i"), make("s")), make("td"))));
    function draw() {
      const tokens = 2 ** Number(find("context").value);
      const [bytes, batch] = [Number(find("bytes").value), Number(find("batch").value)];
      const chosen = models[Number(find("model").value)];
      const cost = (model, count) => 2 * model.num_layers * model.num_kv_heads * model.head_dim * bytes * count * batch;
      const weights = (model) => model.parameters * 2;
      const most = Math.max(...models.map((model) => Math.max(cost(model, tokens), weights(model))));
      find("context-label").textContent = counting(tokens, "token");
      find("context").setAttribute("aria-valuetext", counting(tokens, "token"));
      find("product").textContent = `2 × ${chosen.num_layers} layers × ${chosen.num_kv_heads} KV heads × ${chosen.head_dim} × ${bytes} ${bytes === 1 ? "byte" : "bytes"} = ${size(cost(chosen, 1) / batch)} per token · × ${plain(tokens)}${batch > 1 ? ` × ${batch}` : ""} = ${size(cost(chosen, tokens))}`;
      models.forEach((model, i) => {
        const row = find("models").children[i];
        row.classList.toggle("dkv-chosen", model === chosen);
        row.classList.toggle("dkv-beyond", tokens > model.max_positions);
        const [bar, mark] = row.children[1].children;
        bar.style.width = `${Math.max(0.3, (100 * cost(model, tokens)) / most)}%`;
        mark.style.left = `${(100 * weights(model)) / most}%`;
        row.children[2].textContent = size(cost(model, tokens));
      });
      const kept = Math.min(capacity, tokens);
      const long = tokens > chosen.max_positions ? ` It reads at most ${plain(chosen.max_positions)} tokens.` : "";
      find("grows-note").textContent = `The mark is the model's weights in 16 bit: ${size(weights(chosen))} for ${chosen.name}.${long} With ${plain(kept)} tokens kept per layer, its cache takes ${size(cost(chosen, kept))}.`;
    }
    for (const role of ["model", "context", "bytes", "batch"]) find(role).addEventListener("input", draw);
    return { lesson(next) { capacity = next.parameters.capacity; draw(); } };
  });

  // 3. Scores of one layer over the text, in the explorer's shades.
  const SHADES = [1, 2, 3, 4, 5].map((shade) => `dkv-attended-${shade}`);
  const SINKS = 4; // pooling gives the first token's score to its next neighbours
  DynamicKV.learnFigure((learn, find_) => {
    const find = named("attended", learn, find_);
    const box = find("text");
    const text = DynamicKV.textLayer([...box.children]);
    let lesson = null;
    let scores = null;
    // Scores are eighths of a halving below the layer's highest.
    const level = (below) => (below <= 8 ? 5 : below <= 16 ? 4 : below <= 24 ? 3 : below <= 32 ? 2 : below <= 40 ? 1 : 0);
    function draw() {
      if (!lesson) return;
      const { prompt, layers } = lesson.trace;
      const layer = Number(find("layer").value);
      const prefix = prompt.length - lesson.parameters.window_size;
      const row = scores.subarray(layer * prefix, (layer + 1) * prefix);
      const highest = row.subarray(SINKS).reduce((least, score) => Math.min(least, score), 255);
      const levels = new Uint8Array(prompt.length);
      for (let i = 0; i < prefix; i += 1) levels[i] = level(row[i] - highest);
      text.paint(levels, SHADES);
      text.markUnits("dkv-proof", lesson.spans.map(([first, last]) => [prompt.starts[first], prompt.ends[last]]), 3);
      find("layer-label").textContent = `${layer} of 0–${layers - 1}`;
      const [first, inside, tenth] = lesson.attention[layer];
      find("attended-note").textContent = `Layer ${layer}: of the window's attention ${percent(first)} goes to the first token, ${percent(inside)} stays in the window, ${percent(tenth)} goes to the best tenth of the rest and ${percent(1 - first - inside - tenth)} to all others.`;
    }
    find("layer").addEventListener("input", draw);
    return {
      lesson(next) {
        lesson = next;
        scores = bytesOf(next.scores);
        text.fill(next.trace.prompt);
        find("layer").max = String(next.trace.layers - 1);
        find("layer").value = String(Math.round(next.trace.layers / 2));
        draw();
        reveal(box, text, next.spans[0][0]);
      },
      shown() { if (lesson && !box.scrollTop) reveal(box, text, lesson.spans[0][0]); },
    };
  });

  // Scroll a text box, and nothing else, to a token.
  function reveal(box, text, position) {
    const line = text.lineOf(position);
    const frame = box.getBoundingClientRect();
    const scale = frame.height / (box.offsetHeight || 1); // ?big=1 zooms
    if (line.height && scale) box.scrollTop += (line.top - frame.top) / scale - box.clientHeight / 3;
  }
  DynamicKV.revealIn = reveal;

  // 4. and beyond: what four methods keep, layer by position, drawn as the explorer's map is.
  const FIXED = ["StreamingLLM", "H2O", "SnapKV", "PyramidKV"];
  DynamicKV.learnFigure((learn, find_) => {
    const find = named("fixed", learn, find_);
    let lesson = null;
    let boxes = [];
    function range() {
      const { length } = lesson.trace.prompt;
      if (find("zoom").value === "whole") return [0, length];
      const [first, last] = lesson.spans[0];
      return [Math.max(0, first - NEAR), Math.min(length, last + NEAR)];
    }
    function draw() {
      if (!lesson || !learn.offsetParent) return;
      const { layers, prompt: { length } } = lesson.trace;
      const [from, to] = range();
      boxes.forEach(({ run, canvas, marks }) => {
        const width = canvas.clientWidth;
        if (!width) return;
        const cut = new Uint8Array(layers * (to - from));
        for (let layer = 0; layer < layers; layer += 1) cut.set(run.kept.subarray(layer * length + from, layer * length + to), layer * (to - from));
        DynamicKV.drawMap(canvas, cut, layers, to - from, Math.min(to - from, Math.round(width)), run.heads);
        marks.replaceChildren(...lesson.spans.filter(([first, last]) => last >= from && first < to).map(([first, last]) => make("i", {
          style: `left:${(100 * (Math.max(first, from) - from)) / (to - from)}%;width:${(100 * (Math.min(last + 1, to) - Math.max(first, from))) / (to - from)}%`,
        })));
      });
      find("fixed-note").textContent = `Layer 0 on top, positions ${plain(from)} to ${plain(to - 1)} from left to right. Bright: kept by more heads. The bracket marks the evidence.`;
    }
    find("zoom").addEventListener("input", draw);
    return {
      lesson(next) {
        lesson = next;
        boxes = FIXED.map((method) => {
          const run = runOf(next, method);
          const canvas = make("canvas", { role: "img" });
          const marks = make("div", { className: "dkv-map-marks" });
          canvas.setAttribute("aria-label", `${method}: kept tokens by layer and position`);
          const budgets = `${plain(Math.max(...run.budgets))} to ${plain(Math.min(...run.budgets))} per layer`;
          const same = Math.max(...run.budgets) === Math.min(...run.budgets);
          const head = make("figcaption", { data: { method } }, make("span", { className: "dkv-glyph", ariaHidden: "true" }, run.glyph), make("b", {}, method), make("small", {}, same ? `${plain(run.budgets[0])} in every layer` : budgets));
          return { run, canvas, marks, node: make("figure", { className: "dkv-small-map" }, head, marks, canvas) };
        });
        find("maps").replaceChildren(...boxes.map(({ node }) => node));
        draw();
      },
      shown: draw,
    };
  });

  // 5. The film of a run's updates, and the numbers of one layer beside the formula.
  DynamicKV.learnFigure((learn, find_, tools) => {
    const find = named("budget", learn, find_);
    const words = (role) => find_(role, learn.querySelector("#learn-budget"));
    const slider = find("update");
    let lesson = null;
    const step = () => lesson.updates[Math.min(Number(slider.value), lesson.updates.length - 1)];
    const row = () => Math.min(Number(words("row").value), step().budgets.length - 1);
    const sum = (values) => values.reduce((total, value) => total + value, 0);
    // Numbers for the formula, each as the engine has it.
    function values() {
      const { mean_budget: mean, r_max: times } = lesson.parameters;
      const { counts, shares, claims, excess, budgets } = step();
      const layer = row();
      const { layers, prompt } = lesson.trace;
      const first = Math.min(Math.trunc(times * mean), prompt.length - lesson.parameters.window_size);
      return { layer, mean, first, layers, c: counts[layer], s: shares[layer], S: sum(shares), k: claims[layer], K: sum(claims), rho: excess, b: budgets[layer], total: sum(budgets), seen: budgets.length };
    }
    tools.symbol = (name) => {
      if (!lesson) return "";
      const v = values();
      return {
        k: `k = ${plain(v.k)}: the claim of layer ${v.layer}`,
        B: `B = ${plain(v.first)}: the most a layer may hold at first, ${lesson.parameters.r_max} × the mean, or the whole prompt if that is less`,
        s: `s = ${plain(v.s)}: layer ${v.layer} has ${plain(v.c)} of the best scores; divided by the ${v.seen} layers seen`,
        S: `Σs = ${plain(v.S)}: all shares together`,
        rho: `ρ = ${v.rho.toFixed(4)}: all claims over what the whole model may keep`,
        K: `Σk = ${plain(v.K)}: the claims of all ${v.seen} layers seen`,
        mean: `mean = ${plain(v.mean)}: capacity ${plain(lesson.parameters.capacity)} less the window of ${lesson.parameters.window_size}`,
        L: `L = ${v.layers}: layers of the model`,
        b: `b = ${plain(v.b)}: the budget of layer ${v.layer}, without the window`,
      }[name];
    };
    function tell() {
      const v = values();
      const newest = v.layer === v.seen - 1;
      words("update-name").textContent = `at update ${Math.min(Number(slider.value), lesson.updates.length - 1) + 1} of ${lesson.updates.length}, ${v.seen} layers seen`;
      words("claim").textContent = `${plain(v.first)} × ${plain(v.s)} ÷ ${plain(v.S)} → ${plain(v.k)}`;
      words("correction").textContent = `${plain(v.K)} ÷ ${plain(v.mean * v.layers)} = ${v.rho.toFixed(4)}`;
      words("budget").textContent = `${plain(v.k)} ÷ ${v.rho.toFixed(4)} → ${plain(v.b)}${newest ? ", with what rounding left" : ""}`;
      words("sum").textContent = `${plain(v.total)} = ${plain(v.mean)} × ${v.layers}`;
      tools.refreshTip();
    }
    async function draw() {
      if (!lesson || !learn.offsetParent) return;
      const at = Number(slider.value);
      const film = lesson.film.steps[at];
      const last = at === lesson.film.steps.length - 1;
      find("update-label").textContent = film.label;
      slider.setAttribute("aria-valuetext", film.label);
      find("update-note").textContent = last ? film.note : `${film.note[0].toUpperCase()}${film.note.slice(1)}. Layer 0 has ${plain(lesson.updates[at].budgets[0])}${at ? `, and had ${plain(lesson.updates[at - 1].budgets[0])} before` : ""}.`;
      const data = lesson.film.data.map((bar, i) => ({ ...bar, x: film.x[i], base: film.base[i] }));
      await DynamicKV.drawFigure(find("plot"), { ...lesson.film, data }, lesson.trace.runs, film.limit);
    }
    const redraw = () => { if (lesson) { tell(); draw(); } };
    slider.addEventListener("input", redraw);
    words("row").addEventListener("input", tell);
    return {
      lesson(next) {
        lesson = next;
        slider.max = String(next.film.steps.length - 1);
        slider.value = slider.max;
        const runs = next.trace.runs.filter((run) => ["SnapKV", "DynamicKV"].includes(run.method));
        find("keys").replaceChildren(...runs.map((run) => make("span", { data: { method: run.look } }, make("span", { className: "dkv-glyph", ariaHidden: "true" }, run.glyph), run.label)), make("span", { className: "dkv-key-window" }, "observation window"));
        words("row").replaceChildren(...Array.from({ length: next.trace.layers }, (_, layer) => make("option", { value: String(layer) }, String(layer))));
        redraw();
      },
      shown: draw,
      theme: draw,
    };
  });

  // 6. Answers, where they part, and in which layers the evidence survived.
  DynamicKV.learnFigure((learn, find_, tools) => {
    const find = named("lost", learn, find_);
    let lesson = null;
    function answer() {
      if (!lesson) return;
      const card = lesson.cards.find((item) => item.method === find("method").value);
      const parting = lesson.partings.find((item) => item.method === card.method);
      const held = lesson.words.find((item) => item.method === card.method);
      const lost = held && held.loss !== null ? held.words[held.loss] : null;
      const word = ({ text, survives, here, full, instead }, i) => {
        const title = `${full} with the full cache, ${here} with this one${instead ? `, which would rather say “${visible(instead)}”` : ""}`;
        const node = make(i === held.loss ? "mark" : "span", { className: "dkv-survives", title }, text.trimStart());
        node.style.setProperty("--lost", 1 - survives);
        return [text.slice(0, text.length - text.trimStart().length), node];
      };
      find("answer").dataset.method = card.method;
      find("answer").replaceChildren(
        make("p", {}, make("b", {}, "FullKV "), ...(held ? held.words.flatMap(word) : [lesson.cards[0].answer.join("")])),
        make("p", {}, make("b", {}, `${card.method} `), card.answer.join("")));
      const names = parting ? parting.tokens.map((token) => `“${visible(token)}”`) : [];
      const carries = lost ? `The loss is carried by “${visible(lost.text.trim())}”: ${lost.full} with the full cache, ${lost.here} with this one. ` : held ? "No word loses half of its probability. " : "";
      find("lost-note").replaceChildren(
        held ? `On average ${held.survives} of a word's probability survives. ${carries}` : "",
        parting ? `They part at token ${parting.at}: with this cache ${names[0]} has ${parting.here[0]} and ${names[1]} ${parting.here[1]}; with the full cache ${parting.full[0]} and ${parting.full[1]}. ` : card.method === "FullKV" ? "The yardstick. " : "This answer never leaves FullKV's. ",
        make("a", { href: tools.exploreLink({ method: ["SnapKV", "DynamicKV"].includes(card.method) ? card.method.toLowerCase() : "dynamickv" }) }, "See what was kept in Explore"));
      for (const line of find("survival").querySelectorAll("tr")) line.classList.toggle("dkv-chosen", line.dataset.method === card.method);
    }
    function matrix() {
      const { layers, runs } = lesson.trace;
      const head = make("tr", {}, make("th", { scope: "col" }, "evidence"), make("th", { scope: "col" }, "in layers"), make("th", { scope: "col" }, "in all"),
        ...Array.from({ length: layers }, (_, layer) => make("th", { scope: "col", title: `layer ${layer}` }, layer % 5 ? "" : String(layer))));
      for (const [i, cell] of [...head.children].entries()) if (i > 2) cell.setAttribute("aria-label", `layer ${i - 3}`);
      const rows = runs.map((run) => {
        const shares = lesson.survival[run.method];
        const row = make("tr", { data: { method: run.look } },
          make("th", { scope: "row" }, make("span", { className: "dkv-glyph", ariaHidden: "true" }, run.glyph), run.label),
          make("td", { className: "dkv-sum" }, `${shares.filter((share) => share > 0).length} of ${layers}`),
          make("td", { className: "dkv-sum" }, percent(shares.reduce((sum, share) => sum + share, 0) / layers)),
          ...shares.map((share, layer) => {
            const cell = make("td", { data: { layer }, title: `${run.label}, layer ${layer}: ${percent(share)}` }, percent(share));
            cell.style.setProperty("--share", share ? 0.15 + 0.85 * share : 0); // a little is seen, too
            return cell;
          }));
        return row;
      });
      find("survival").replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
    }
    find("method").addEventListener("input", answer);
    return { lesson(next) {
      lesson = next;
      const before = find("method").value || "DynamicKV";
      find("method").replaceChildren(...next.trace.runs.map((run) => make("option", { value: run.method, selected: run.method === before }, run.method)));
      matrix();
      answer();
    } };
  });
})();
