// A prompt's text on the page: one text node per paragraph, marks by the CSS Custom Highlight API, pointing back from pixels to
// UTF-16 units. Browsers without the API get merged spans. It knows texts and offsets, not runs.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { make } = DynamicKV;
  const native = () => Boolean(window.CSS?.highlights && window.Highlight && window.StaticRange);

  // `boxes` are three elements: before, in and after the document.
  DynamicKV.textLayer = (boxes) => {
    let prompt = null;
    let nodes = []; // {node, start, end} in UTF-16 units of the whole prompt, ascending
    let places = new Map(); // the same, by node

    function fill(next) {
      const same = native() && nodes.length && prompt?.text === next.text && String(prompt.document_utf16_span) === String(next.document_utf16_span);
      prompt = next;
      if (same) return; // laying a long text out again takes long
      nodes = [];
      const { text, document_utf16_span: span } = prompt;
      [[0, span[0]], span, [span[1], text.length]].forEach(([start, end], index) => fillSection(boxes[index], start, end));
      places = new Map(nodes.map((entry) => [entry.node, entry]));
    }

    function fillSection(box, start, end) {
      box.replaceChildren();
      let from = start;
      while (from < end) {
        const newline = prompt.text.indexOf("\n", from);
        const to = newline < 0 || newline + 1 > end ? end : newline + 1;
        const node = document.createTextNode(prompt.text.slice(from, to));
        box.append(node);
        nodes.push({ node, start: from, end: to });
        from = to;
      }
    }

    function nodeAt(unit) {
      let low = 0;
      let high = nodes.length - 1;
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (nodes[middle].start <= unit) low = middle; else high = middle - 1;
      }
      return low;
    }

    // Static ranges over [start, end) units; one per paragraph touched.
    function ranges(start, end, out = []) {
      for (let i = nodes.length ? nodeAt(start) : 0; i < nodes.length && nodes[i].start < end; i += 1) {
        const { node, start: base, end: stop } = nodes[i];
        const from = Math.max(start, base) - base;
        const to = Math.min(end, stop) - base;
        if (to > from) out.push(new StaticRange({ startContainer: node, startOffset: from, endContainer: node, endOffset: to }));
      }
      return out;
    }

    // Runs of tokens that share a mark become one range.
    function merged(marks, use) {
      const { starts, ends } = prompt;
      let first = 0;
      for (let i = 1; i <= marks.length; i += 1) {
        if (i < marks.length && marks[i] === marks[first]) continue;
        if (marks[first]) use(marks[first], starts[first], ends[i - 1]);
        first = i;
      }
    }

    function highlight(name, found, priority) {
      if (!native()) return;
      const marked = new Highlight();
      for (const range of found) marked.add(range);
      marked.priority = priority;
      CSS.highlights.set(name, marked);
    }

    // Mark tokens [first, last] under a name; nothing while the text is not there yet.
    const markTokens = (name, first, last, priority) => native() && prompt && highlight(name, ranges(prompt.starts[first], prompt.ends[last]), priority);
    const markUnits = (name, spans, priority) => native() && highlight(name, spans.flatMap(([start, end]) => ranges(start, end)), priority);
    const clear = (name) => highlight(name, [], 0);

    // Paint a mark (1, 2, ...) per token, 0 for none; names[mark - 1] is the highlight's. `trimmed` leaves the space before out.
    function paint(marks, names, trimmed = false) {
      if (!prompt) return;
      if (!native()) { paintSpans(marks, names); return; }
      const buckets = names.map(() => []);
      const inside = (start, end) => (trimmed ? start + /^\s*/.exec(prompt.text.slice(start, end))[0].length : start);
      merged(marks, (mark, start, end) => ranges(inside(start, end), end, buckets[mark - 1]));
      names.forEach((name, i) => highlight(name, buckets[i], 1));
    }

    function paintSpans(marks, names) {
      fill(prompt);
      const spans = [];
      merged(marks, (mark, start, end) => spans.push([start, end, mark]));
      let next = 0;
      for (const { node, start, end } of nodes) {
        const parts = [];
        let at = start;
        while (next < spans.length && spans[next][0] < end) {
          const [from, to, mark] = spans[next];
          const left = Math.max(from, start);
          const right = Math.min(to, end);
          parts.push(prompt.text.slice(at, left), make("span", { className: names[mark - 1].replace("dkv-", "dkv-span-") }, prompt.text.slice(left, right)));
          at = right;
          if (to > end) break;
          next += 1;
        }
        if (parts.length) node.replaceWith(...parts, prompt.text.slice(at, end));
      }
    }

    // Where a text node begins in the prompt; spans of the fallback are found by measuring their section.
    function unitOf(node) {
      const entry = places.get(node);
      if (entry) return entry.start;
      const index = node?.nodeType === Node.TEXT_NODE ? boxes.findIndex((box) => box.contains(node)) : -1;
      if (index < 0) return -1;
      const range = document.createRange();
      range.setStart(boxes[index], 0);
      range.setEnd(node, 0);
      return [0, ...prompt.document_utf16_span][index] + range.toString().length;
    }

    function unitAt(x, y) {
      let node; let offset;
      if (document.caretPositionFromPoint) {
        const caret = document.caretPositionFromPoint(x, y);
        if (!caret) return -1;
        ({ offsetNode: node, offset } = caret);
      } else if (document.caretRangeFromPoint) {
        const caret = document.caretRangeFromPoint(x, y);
        if (!caret) return -1;
        ({ startContainer: node, startOffset: offset } = caret);
      }
      const start = unitOf(node);
      if (start < 0) return -1;
      // The caret sits between characters: take the character whose box holds the pointer.
      for (const at of [offset - 1, offset]) {
        if (at < 0 || at >= node.length) continue;
        const range = document.createRange();
        range.setStart(node, at);
        range.setEnd(node, at + 1);
        const holds = [...range.getClientRects()].some((box) => x >= box.left && x <= box.right && y >= box.top && y <= box.bottom);
        if (holds) return start + at;
      }
      return -1;
    }

    // The tokens under a point: {position, last}, several where they share one character. Null beside the text.
    function tokensAt(x, y) {
      const unit = unitAt(x, y);
      if (unit < 0) return null;
      const { starts, ends } = prompt;
      const last = DynamicKV.tokenAt(starts, unit);
      if (last < 0 || ends[last] <= unit) return null;
      let position = last;
      while (position > 0 && ends[position - 1] > unit) position -= 1;
      return { position, last };
    }

    // The tokens that a selection touches: {first, last}, or null.
    function selected() {
      const selection = document.getSelection();
      if (!selection?.rangeCount || selection.isCollapsed) return null;
      const range = selection.getRangeAt(0);
      const from = unitOf(range.startContainer);
      const to = unitOf(range.endContainer);
      if (from < 0 || to < 0) return null;
      const start = from + range.startOffset;
      const end = to + range.endOffset;
      if (end <= start) return null;
      return { first: Math.max(0, DynamicKV.tokenAt(prompt.starts, start)), last: DynamicKV.tokenAt(prompt.starts, end - 1) };
    }

    // The line on which a token begins, as a box on the screen; its fold is opened first when asked.
    function lineOf(position, open = false) {
      const { node, start } = nodes[nodeAt(prompt.starts[position])];
      const fold = node.parentElement?.closest("details");
      if (fold && open) fold.open = true;
      const range = document.createRange();
      range.setStart(node, Math.min(prompt.starts[position] - start, node.length));
      return range.getBoundingClientRect();
    }

    return { fill, paint, markTokens, markUnits, clear, tokensAt, selected, lineOf, nodes: () => nodes };
  };
})();
