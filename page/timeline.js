/* Workers over time, on two canvases: a strip of the whole step, and the part of it that is in view. */

const LEFT = 34, RIGHT = 64, RULER = 20, BAND = 18, TOP = RULER + BAND + 4;
const rowHeight = Math.max(3, Math.min(52, Math.floor(532 / workers)));
const view = {
    from: 0,
    to: 1
};
let hovered = -1, kept = -1;

function prepare(canvas, height, width = canvas.clientWidth) {
    const ratio = window.devicePixelRatio || 1;
    canvas.style.height = height + 'px';
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
        canvas.width = Math.round(width * ratio);
        canvas.height = Math.round(height * ratio);
    }
    const context = canvas.getContext('2d');
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    context.font = '11px system-ui, sans-serif';
    context.textBaseline = 'middle';
    return {context, width, height};
}

let plot = 1;  // pixels between the gutters, as of the last drawing: asking for it is slow
function measurePlot() { plot = Math.max(1, at('lanes').clientWidth - LEFT - RIGHT); }
const xOf = us => LEFT + (us - view.from) / (view.to - view.from) * plot;
const timeAt = x => view.from + (x - LEFT) / plot * (view.to - view.from);
const yOf = worker => TOP + worker * rowHeight;

function setView(from, to) {
    const least = Math.min(1, source.end), span = Math.min(Math.max(to - from, least), source.end);
    view.from = Math.min(Math.max(0, from), source.end - span);
    view.to = view.from + span;
    requestDraw();
}

/* The two layers in the middle; all of a step that has no layers. */
function zoomLayers() {
    const layers = [...new Set(stages.map(s => split(s.name).layer))].filter(l => l >= 0);
    if (layers.length < 2) return setView(0, source.end);
    const middle = layers[Math.floor(layers.length / 2) - 1];
    let from = Infinity, to = 0;
    stages.forEach((stage, i) => {
        const layer = split(stage.name).layer;
        if (layer !== middle && layer !== middle + 1) return;
        from = Math.min(from, source.stages[i].from);
        to = Math.max(to, source.stages[i].to);
    });
    setView(from - (to - from) * 0.01, to + (to - from) * 0.01);
}

/* The first task of a worker that ends after `us`. */
function firstAfter(worker, us) {
    let low = tasks.workerBegin[worker], high = tasks.workerBegin[worker + 1];
    while (low < high) {
        const middle = (low + high) >> 1;
        if (source.done[middle] > us)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

function drawRuler(g, height) {
    const span = view.to - view.from, rough = span / Math.max(2, plot / 110);
    const power = 10 ** Math.floor(Math.log10(rough)), unit = [1, 2, 5, 10].find(m => m * power >= rough) * power;
    g.fillStyle = css('--soft');
    g.strokeStyle = css('--line');
    g.textAlign = 'center';
    for (let t = Math.ceil(view.from / unit) * unit; t <= view.to; t += unit) {
        const x = Math.round(xOf(t)) + 0.5;
        g.beginPath();
        g.moveTo(x, RULER - 4);
        g.lineTo(x, height);
        g.stroke();
        if (x < LEFT + plot - 24) g.fillText(number(t, unit < 1 ? 1 : 0) + ' µs', x, RULER / 2 - 1);
    }
}

function clipped(g, text, width) {
    if (g.measureText(text).width <= width) return text;
    while (text.length > 1 && g.measureText(text + '…').width > width) text = text.slice(0, -1);
    return text.length > 2 ? text + '…' : '';
}

function drawBand(g) {
    const ink = css('--text');
    g.textAlign = 'left';
    source.stages.forEach((s, i) => {
        if (s.to < view.from || s.from > view.to) return;
        const x0 = Math.max(LEFT, xOf(s.from)), x1 = Math.min(LEFT + plot, xOf(s.to));
        g.fillStyle = colorOf(i);
        g.globalAlpha = 0.32;
        g.fillRect(x0, RULER, Math.max(0.5, x1 - x0 - 1), BAND);
        g.globalAlpha = 1;
        if (x1 - x0 < 24) return;
        const name = split(stages[i].name);
        g.fillStyle = ink;
        g.fillText(
            clipped(g, (name.layer >= 0 ? name.layer + ' ' : '') + name.suffix, x1 - x0 - 8), x0 + 4,
            RULER + BAND / 2 + 1);
    });
}

/* Calls `draw(task, x reached, x ready, x done, y)` for the tasks in view. */
function eachInView(draw) {
    for (let w = 0; w < workers; w++)
        for (let i = firstAfter(w, view.from); i < tasks.workerBegin[w + 1] && source.reached[i] < view.to; i++)
            draw(i, xOf(source.reached[i]), xOf(source.ready[i]), xOf(source.done[i]), yOf(w));
}

function drawTasks(g) {
    const tall = rowHeight - (rowHeight >= 4 ? 1 : 0), colors = categories.map(c => c.color);
    g.fillStyle = css('--wait');
    eachInView((i, x0, x1, x2, y) => {
        if (x1 - x0 > 0.4) g.fillRect(x0, y, x1 - x0, tall);
    });
    eachInView((i, x0, x1, x2, y) => {
        g.fillStyle = colors[categoryOfStage[tasks.stage[i]]];
        g.fillRect(x1, y, Math.max(0.5, x2 - x1 - (x2 - x1 > 4 ? 0.6 : 0)), tall);
    });
    if (rowHeight < 14) return;
    g.fillStyle = '#10151c';
    g.textAlign = 'left';
    eachInView((i, x0, x1, x2, y) => {
        const left = Math.max(x1, LEFT) + 4, room = Math.min(x2, LEFT + plot) - left - 4;
        if (room > 26) g.fillText(clipped(g, split(stages[tasks.stage[i]].name).suffix, room), left, y + rowHeight / 2);
    });
}

function outline(g, task, color, width) {
    const x0 = xOf(source.ready[task]), x1 = xOf(source.done[task]);
    g.strokeStyle = color;
    g.lineWidth = width;
    g.strokeRect(x0, yOf(workerOf[task]) - 0.5, Math.max(1, x1 - x0), rowHeight);
}

function link(g, from, to) {
    const y0 = yOf(workerOf[from]) + rowHeight / 2, y1 = yOf(workerOf[to]) + rowHeight / 2;
    g.beginPath();
    g.moveTo(xOf(source.done[from]), y0);
    g.lineTo(xOf(source.ready[to]), y1);
    g.stroke();
}

function drawCritical(g) {
    const color = css('--path');
    source.path.forEach((task, i) => {
        if (source.done[task] < view.from || source.reached[task] > view.to) return;
        outline(g, task, color, 1.4);
        g.lineWidth = 1.4;
        if (i > 0) link(g, source.path[i - 1], task);
    });
}

/* What a task waits for: every task that signals, and the one whose signal came last. */
function drawDependencies(g, task) {
    const waits = tasks.pairs[tasks.waits[task]], color = css('--before');
    for (let k = 0; k < waits.length; k += 2) {
        if (waits[k + 1] <= 0) continue;
        g.strokeStyle = color;
        g.globalAlpha = 0.35;
        g.lineWidth = 0.8;
        for (const [other] of signallers.get(waits[k]) || []) link(g, other, task);
        g.globalAlpha = 1;
        const last = lastSignaller(source, waits[k], waits[k + 1]);
        if (last < 0) continue;
        g.lineWidth = 1.8;
        link(g, last, task);
        outline(g, last, color, 1.8);
    }
    outline(g, task, css('--accent'), 2.4);
}

function drawWorkers(g, width) {
    const most = Math.max(1, ...workerBytes), every = Math.ceil(14 / rowHeight);
    const bars = css('--accent'), ink = css('--soft');
    g.textAlign = 'right';
    for (let w = 0; w < workers; w++) {
        const bar = (RIGHT - 12) * workerBytes[w] / most;
        g.fillStyle = bars;
        g.globalAlpha = 0.55;
        g.fillRect(width - RIGHT + 10, yOf(w), bar, Math.max(1, rowHeight - 1));
        g.globalAlpha = 1;
        g.fillStyle = ink;
        if (w % every === 0 && (every === 1 || w % (Math.ceil(every / 4) * 4) === 0))
            g.fillText(w, LEFT - 7, yOf(w) + rowHeight / 2);
    }
    g.textAlign = 'left';
    g.fillText('weights', width - RIGHT + 10, RULER / 2 - 1);
    g.fillText(size(most), width - RIGHT + 10, RULER + BAND / 2 + 1);
}

/* All but what belongs to the task under the pointer, which changes most often. */
const base = document.createElement('canvas');
let baseIs = '';
function drawBase(width, height) {
    const g = base.getContext('2d');
    g.fillStyle = css('--lane');
    g.fillRect(LEFT, TOP, plot, workers * rowHeight);
    drawRuler(g, height);
    g.save();
    g.beginPath();
    g.rect(LEFT, RULER, plot, height);
    g.clip();
    drawBand(g);
    drawTasks(g);
    if (at('showPath').checked) drawCritical(g);
    g.restore();
    drawWorkers(g, width);
}

function drawLanes() {
    const {context: g, width, height} = prepare(at('lanes'), TOP + workers * rowHeight + 2);
    const is = [view.from, view.to, source.name, width, css('--lane'), at('showPath').checked].join();
    if (is !== baseIs) {
        prepare(base, height, width);
        drawBase(width, height);
        baseIs = is;
    }
    g.drawImage(base, 0, 0, width, height);
    const task = hovered >= 0 ? hovered : kept;
    if (task < 0) return;
    g.save();
    g.beginPath();
    g.rect(LEFT, RULER, plot, height);
    g.clip();
    drawDependencies(g, task);
    g.restore();
}

/* The strip: how many workers run what, over the whole step. */
function stripRows(width) {
    const rows = categories.map(() => new Float64Array(width)), scale = width / source.end;
    for (let i = 0; i < taskCount; i++) {
        const row = rows[categoryOfStage[tasks.stage[i]]], from = source.ready[i] * scale, to = source.done[i] * scale;
        for (let x = Math.floor(from); x <= to && x < width; x++)
            row[x] += Math.max(0, Math.min(to, x + 1) - Math.max(from, x)) / workers;
    }
    return rows;
}

const STRIP = 58;
const strip = document.createElement('canvas');
let stripIs = '';
function drawStrip() {
    const is = [source.name, plot, css('--lane')].join();
    if (is === stripIs) return;
    const {context: g} = prepare(strip, STRIP, plot), bottom = STRIP - 1, tall = STRIP - 6;
    const below = new Float64Array(plot);
    g.fillStyle = css('--lane');
    g.fillRect(0, bottom - tall, plot, tall);
    stripRows(plot).forEach((row, c) => {
        g.fillStyle = categories[c].color;
        for (let x = 0; x < plot; x++)
            if (row[x] > 0) g.fillRect(x, bottom - (below[x] += row[x]) * tall, 1, row[x] * tall + 0.3);
    });
    stripIs = is;
}

function drawOverview() {
    const {context: g, width, height} = prepare(at('overview'), STRIP);
    drawStrip();
    g.drawImage(strip, LEFT, 0, plot, height);
    const x0 = LEFT + view.from / source.end * plot, x1 = LEFT + view.to / source.end * plot;
    g.fillStyle = css('--card');
    g.globalAlpha = 0.62;
    g.fillRect(LEFT, 0, x0 - LEFT, height);
    g.fillRect(x1, 0, LEFT + plot - x1, height);
    g.globalAlpha = 1;
    g.strokeStyle = css('--accent');
    g.lineWidth = 1.5;
    g.strokeRect(x0, 1, Math.max(2, x1 - x0), height - 2);
    g.fillStyle = css('--soft');
    g.textAlign = 'left';
    g.fillText(time(source.end), width - RIGHT + 10, height / 2);
    g.textAlign = 'right';
    g.fillText('0', LEFT - 7, height / 2);
}

let pending = false;
function requestDraw() {
    if (pending) return;
    pending = true;
    requestAnimationFrame(() => {
        pending = false;
        measurePlot();
        drawOverview();
        drawLanes();
    });
}

function taskAt(event) {
    const box = at('lanes').getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    const worker = Math.floor((y - TOP) / rowHeight);
    if (worker < 0 || worker >= workers || x < LEFT || x > LEFT + plot) return -1;
    const us = timeAt(x), task = firstAfter(worker, us);
    return task < tasks.workerBegin[worker + 1] && source.reached[task] <= us ? task : -1;
}

function keep(task, show) {
    kept = task;
    if (show && task >= 0 && (source.ready[task] < view.from || source.done[task] > view.to)) {
        const span = view.to - view.from, middle = (source.ready[task] + source.done[task]) / 2;
        setView(middle - span / 2, middle + span / 2);
    }
    drawDetails(kept);
    requestDraw();
}

function listen() {
    const lanes = at('lanes'), overview = at('overview');
    let drag = null;
    lanes.onpointerdown = e => {
        drag = {x: e.clientX, from: view.from, to: view.to, moved: false};
        lanes.setPointerCapture(e.pointerId);
    };
    lanes.onpointermove = e => {
        if (drag) {
            const shift = (drag.x - e.clientX) / plot * (drag.to - drag.from);
            if (Math.abs(e.clientX - drag.x) > 3) drag.moved = true;
            if (drag.moved) setView(drag.from + shift, drag.from + shift + (drag.to - drag.from));
            return;
        }
        const task = taskAt(e);
        if (task === hovered) return;
        hovered = task;
        drawDetails(hovered >= 0 ? hovered : kept);
        requestDraw();
    };
    lanes.onpointerup = e => {
        if (drag && !drag.moved) keep(taskAt(e), false);
        drag = null;
    };
    lanes.onpointerleave = () => {
        hovered = -1;
        drawDetails(kept);
        requestDraw();
    };
    lanes.ondblclick = () => setView(0, source.end);
    lanes.addEventListener('wheel', e => {
        e.preventDefault();
        const box = lanes.getBoundingClientRect(), middle = timeAt(e.clientX - box.left);
        if (Math.abs(e.deltaX) > Math.abs(e.deltaY)) {
            const shift = e.deltaX / plot * (view.to - view.from);
            return setView(view.from + shift, view.to + shift);
        }
        const factor = Math.exp(Math.max(-100, Math.min(100, e.deltaY)) * 0.004);
        setView(middle - (middle - view.from) * factor, middle + (view.to - middle) * factor);
    }, {passive: false});
    const center = e => {
        const us = (e.clientX - overview.getBoundingClientRect().left - LEFT) / plot * source.end,
              span = view.to - view.from;
        setView(us - span / 2, us + span / 2);
    };
    overview.onpointerdown = e => {
        overview.setPointerCapture(e.pointerId);
        center(e);
    };
    overview.onpointermove = e => {
        if (e.buttons & 1) center(e);
    };
    at('showPath').onchange = requestDraw;
    at('zoomAll').onclick = () => setView(0, source.end);
    at('zoomLayer').onclick = zoomLayers;
    window.onresize = requestDraw;
    matchMedia('(prefers-color-scheme: dark)').onchange = drawAll;
}
