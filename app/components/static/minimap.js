// A strip beside the text: one column per layer, one row per few pixels of text; the frame is what the scroll box shows.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { store } = DynamicKV;

  // `text` is a text layer, `scroll` the box that scrolls, `box` holds the canvas and the frame.
  DynamicKV.minimap = (text, scroll, box) => {
    const canvas = box.querySelector("canvas");
    const frame = box.querySelector("i");
    let rows = []; // tokens per row of the strip, as last measured

    // The first token of every row of the strip, found by measuring paragraphs and sharing their height by length.
    function rowsOf(count) {
      const { prompt } = store.trace;
      const top = scroll.getBoundingClientRect().top - scroll.scrollTop;
      const found = Array.from({ length: count }, () => []);
      for (const { node, start, end } of text.nodes()) {
        if (!node.isConnected || node.parentElement.closest("details:not([open])")) continue;
        const range = document.createRange();
        range.selectNodeContents(node);
        const place = range.getBoundingClientRect();
        if (!place.height) continue;
        const first = Math.max(0, DynamicKV.tokenAt(prompt.starts, start));
        const last = DynamicKV.tokenAt(prompt.starts, end - 1);
        const span = Math.max(1, end - start);
        for (let token = first; token <= last; token += 1) {
          const y = place.top - top + (place.height * (prompt.starts[token] - start)) / span;
          const row = Math.floor((y / scroll.scrollHeight) * count);
          if (row >= 0 && row < count) found[row].push(token);
        }
      }
      return found;
    }

    // Where the tokens lie changes with the text, the folds and the width alone.
    function measure() {
      const height = Math.round(box.clientHeight);
      rows = store.trace?.runs.length && height ? rowsOf(height) : [];
      draw();
      follow();
    }

    function draw() {
      const height = rows.length;
      if (!store.trace?.runs.length || !height) return;
      const { layers, prompt: { length } } = store.trace;
      const { kept, heads } = DynamicKV.seen(store.trace.runs[store.view.run], store.view.head, layers, length);
      canvas.width = layers;
      canvas.height = height;
      const context = canvas.getContext("2d");
      const image = context.createImageData(layers, height);
      const paint = DynamicKV.dark() ? [77, 166, 221] : [0, 114, 178];
      let at = 0;
      for (const tokens of rows) {
        for (let layer = 0; layer < layers; layer += 1) {
          let most = 0;
          for (const token of tokens) most = Math.max(most, kept[layer * length + token]);
          for (const channel of paint) image.data[at++] = channel;
          image.data[at++] = Math.round((255 * most) / heads);
        }
      }
      context.putImageData(image, 0, 0);
    }

    function follow() {
      const share = box.clientHeight / Math.max(1, scroll.scrollHeight);
      frame.style.top = `${scroll.scrollTop * share}px`;
      frame.style.height = `${Math.max(8, scroll.clientHeight * share)}px`;
    }

    const go = (event) => {
      const place = box.getBoundingClientRect();
      scroll.scrollTop = ((event.clientY - place.top) / place.height) * scroll.scrollHeight - scroll.clientHeight / 2;
    };
    box.addEventListener("pointerdown", (event) => { box.setPointerCapture(event.pointerId); go(event); });
    box.addEventListener("pointermove", (event) => { if (event.buttons) go(event); });
    scroll.addEventListener("scroll", follow, { passive: true });
    return { draw: DynamicKV.framed(draw), measure: DynamicKV.framed(measure) };
  };
})();
