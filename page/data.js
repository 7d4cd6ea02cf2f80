/* The plan that the page draws, and when its tasks ran: the data are as `perk plan --json` has them, with the tasks in
 * columns and the times of steps as differences. The files of page/ are joined in one function: they share their names.
 */

const data = JSON.parse(document.getElementById('data').textContent);
const plan = data.plan, tasks = data.tasks, stages = plan.stages, steps = data.steps;
const workers = tasks.workerBegin.length - 1, taskCount = tasks.stage.length;
const at = id => document.getElementById(id);

/* ---- words ---- */

const number = (value, digits = 0) =>
    value.toLocaleString('en-US', {minimumFractionDigits: digits, maximumFractionDigits: digits});
const time = us => Math.abs(us) >= 1000 ? number(us / 1000, 3) + ' ms' : number(us, us < 10 ? 2 : 1) + ' µs';
const size = bytes => {
    if (bytes < 1000) return bytes + ' B';
    const units = ['KB', 'MB', 'GB', 'TB'];
    let value = bytes / 1000, unit = 0;
    for (; value >= 999.95 && unit + 1 < units.length; unit++) value /= 1000;
    return number(value, value < 10 ? 2 : 1) + ' ' + units[unit];
};
const shorten = (text, most) => text.length <= most ? text : most < 3 ? '' : text.slice(0, most - 1) + '…';
const plural = (count, word) => number(count) + ' ' + word + (count === 1 ? '' : 's');

/* "layers.12.qkv" -> layer 12 of "layers", "qkv" */
function split(name) {
    const parts = /^(.*?)\.(\d+)\.(.+)$/.exec(name);
    return parts ? {prefix: parts[1], layer: +parts[2], suffix: parts[3]} : {prefix: '', layer: -1, suffix: name};
}
const general = name => {
    const s = split(name);
    return s.layer < 0 ? name : s.prefix + '.*.' + s.suffix;
};

/* ---- elements ---- */

function element(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
        if (name.startsWith('on'))
            made[name] = value;
        else if (name === 'style')
            made.style.cssText = value;
        else
            made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
}
/* A square of colour. */
const key = color => element('span', {class: 'key', style: `background:${color}`});

const svgSpace = at('graph').namespaceURI;
function shape(parent, tag, attributes, text) {
    const made = document.createElementNS(svgSpace, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
}
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/* ---- categories: stages of all layers under one name ---- */

/* Colours by kind of op, so that the same work looks the same in all plans. */
const palettes = {
    linear: ['#3b82d6', '#f2a33a', '#8467d7', '#e0527d', '#4fb3bf', '#d6615a', '#5f9ea0'],
    attention: ['#7bc8a4', '#2a9d6f', '#a3c644'],
    rmsnorm: ['#c58b5a', '#b79f3f'],
    '': ['#8d99ae', '#a98d8d', '#c879c2', '#5f7d95', '#9a9f6b'],
};
const kindOfOp = new Map(plan.graph.ops.map(op => [op.name, op.kind]));
const categories = [], categoryOfStage = [];
{
    const places = new Map(), used = {};
    stages.forEach((stage, i) => {
        const name = general(stage.name);
        if (!places.has(name)) {
            const kind = palettes[kindOfOp.get(stage.op)] ? kindOfOp.get(stage.op) : '', palette = palettes[kind];
            used[kind] = (used[kind] ?? -1) + 1;
            places.set(name, categories.length);
            categories.push({
                name,
                short: split(stage.name).suffix,
                color: palette[used[kind] % palette.length],
                stages: [],
                bytes: 0
            });
        }
        const category = categories[places.get(name)];
        category.stages.push(i);
        category.bytes += stage.stream_bytes;
        categoryOfStage.push(places.get(name));
    });
}
const colorOf = stage => categories[categoryOfStage[stage]].color;

/* ---- tasks ---- */

const workerOf = new Int32Array(taskCount);
const workerBytes = new Float64Array(workers);
const signallers = new Map();  // counter -> [[task, amount], ...]
for (let w = 0; w < workers; w++)
    for (let i = tasks.workerBegin[w]; i < tasks.workerBegin[w + 1]; i++) {
        workerOf[i] = w;
        workerBytes[w] += tasks.bytes[i];
        const pairs = tasks.pairs[tasks.signals[i]];
        for (let k = 0; k < pairs.length; k += 2) {
            if (!signallers.has(pairs[k])) signallers.set(pairs[k], []);
            signallers.get(pairs[k]).push([i, pairs[k + 1]]);
        }
    }
const stageOfCounter = new Map(stages.map((stage, i) => [stage.counter, i]));

/* ---- times: from differences to microseconds since the step began ---- */

function makeSource(step, kind) {
    const ns = step[kind];
    const s = {
        step,
        kind,
        name: steps.length > 1 ? `${step.name}, ${kind}` : kind,
        reached: new Float64Array(taskCount),
        ready: new Float64Array(taskCount),
        done: new Float64Array(taskCount),
        end: 0
    };
    for (let w = 0; w < workers; w++) {
        let now = 0;
        for (let i = tasks.workerBegin[w]; i < tasks.workerBegin[w + 1]; i++) {
            s.reached[i] = (now += ns[3 * i]) / 1000;
            s.ready[i] = (now += ns[3 * i + 1]) / 1000;
            s.done[i] = (now += ns[3 * i + 2]) / 1000;
        }
        s.end = Math.max(s.end, now / 1000);
    }
    s.stages = stageTimes(s);
    s.satisfied = new Map();
    s.path = criticalPath(s);
    s.onPath = new Set(s.path);
    return s;
}

/* Chain: from the end of the stages before to the stage's own end. */
function stageTimes(s) {
    const result = stages.map(() => ({from: 0, to: 0, run: 0, worst: 0, wait: 0}));
    for (let i = 0; i < taskCount; i++) {
        const r = result[tasks.stage[i]], run = s.done[i] - s.ready[i];
        r.to = Math.max(r.to, s.done[i]);
        r.run += run / stages[tasks.stage[i]].tasks;
        r.worst = Math.max(r.worst, run);
        r.wait += (s.ready[i] - s.reached[i]) / stages[tasks.stage[i]].tasks;
    }
    let end = 0;
    for (const r of result) {
        r.from = end;
        r.to = Math.max(r.to, end);
        end = r.to;
    }
    return result;
}

/* The signal that brings a counter to what is needed: its task; -1 for what the step before has signalled. */
function lastSignaller(s, counter, needed) {
    if (needed <= 0) return -1;
    const key = counter + ':' + needed;
    if (!s.satisfied.has(key)) {
        const all = (signallers.get(counter) || []).slice().sort((a, b) => s.done[a[0]] - s.done[b[0]]);
        let seen = 0, found = -1;
        for (const [task, amount] of all) {
            seen += amount;
            found = task;
            if (seen >= needed) break;
        }
        s.satisfied.set(key, found);
    }
    return s.satisfied.get(key);
}

/* Back from the task that ends last: to the signal it waited for, or to the task before it on its worker. */
function criticalPath(s) {
    let task = 0;
    for (let i = 1; i < taskCount; i++)
        if (s.done[i] > s.done[task]) task = i;
    const path = [];
    while (task >= 0 && path.length <= taskCount) {
        path.push(task);
        const before = task > tasks.workerBegin[workerOf[task]] ? task - 1 : -1;
        const waits = tasks.pairs[tasks.waits[task]];
        let next = before;
        for (let k = 0; k < waits.length; k += 2) {
            const signaller = lastSignaller(s, waits[k], waits[k + 1]);
            if (signaller >= 0 && (next < 0 || s.done[signaller] > s.done[next])) next = signaller;
        }
        task = next;
    }
    return path.reverse();
}

const sources = [];
for (const step of steps) {
    if (step.measured) sources.push(makeSource(step, 'measured'));
    sources.push(makeSource(step, 'expected'));
}
let source = sources[0];
const twin = s => sources.find(o => o.step === s.step && o !== s);
