// What every run holds of the layers read so far, as bars on a canvas over a chart's empty axes: drawn while a run goes on, when
// Plotly would hold up everything else.
(() => {
  "use strict";
  const { DynamicKV } = window;
  const { store } = DynamicKV;

  /** `lanes`: looks of the runs that have a lane each, or null for no bars; `span`: the lanes' part of a layer's height. */
  DynamicKV.liveBars = (canvas, plot, lanes, span) => {
    const { xaxis, yaxis } = plot._fullLayout ?? {};
    canvas.hidden = !lanes || !yaxis;
    if (canvas.hidden) return;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [plot.clientWidth, plot.clientHeight];
    Object.assign(canvas, { width: width * ratio, height: height * ratio });
    Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const left = xaxis._offset + xaxis.l2p(0);
    const end = xaxis._offset + xaxis._length;
    const x = (tokens) => Math.min(end, xaxis._offset + xaxis.l2p(tokens));
    const row = Math.abs(yaxis.l2p(1) - yaxis.l2p(0)) * span;
    const lane = row / Math.max(1, lanes.length);
    for (const run of store.trace.runs) {
      const place = lanes.indexOf(run.look);
      if (place < 0 || !run.now) continue;
      context.fillStyle = run.color[DynamicKV.dark() ? 1 : 0];
      run.now.budgets.forEach((held, layer) => {
        const top = yaxis._offset + yaxis.l2p(layer) - row / 2 + place * lane;
        const border = x(Math.min(held, run.window));
        context.globalAlpha = 0.45; // the observation window, as in the chart
        context.fillRect(left, top, border - left, 0.9 * lane);
        context.globalAlpha = 1;
        context.fillRect(border, top, x(held) - border, 0.9 * lane);
      });
    }
  };
})();
