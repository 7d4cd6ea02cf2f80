/* Draws everything, and again when the source of times changes. */

function drawAll() {
    view.to > 1 ? setView(view.from, view.to) : zoomLayers();
    drawHead();
    drawTotals();
    drawStages();
    drawPath();
    drawNote();
    drawDetails(kept);
    drawArena();
    requestDraw();
}

drawLegend();
drawGraph();
zoomLayers();
/* At first, the longest of the tasks in view that the step's length depends on. */
const inView = source.path.filter(t => source.ready[t] >= view.from && source.done[t] <= view.to);
const length = t => source.done[t] - source.ready[t];
kept = inView.length ? inView.reduce((a, b) => length(b) > length(a) ? b : a) : -1;
listen();
drawAll();
