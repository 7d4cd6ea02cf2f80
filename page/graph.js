/* The graph: boxes are ops with what is folded into them; layers that repeat are drawn once. */

/* Ops that share stages belong together. */
function makeBoxes() {
    const boxes = [], boxOfStage = new Map();
    for (const op of plan.graph.ops) {
        let box = op.stages.map(s => boxOfStage.get(s)).find(b => b);
        if (!box) boxes.push(box = {ops: [], stages: []});
        box.ops.push(op);
        for (const s of op.stages)
            if (!boxOfStage.has(s)) {
                boxOfStage.set(s, box);
                box.stages.push(s);
            }
    }
    const main = box => box.ops.find(op => !op.folded) || box.ops[0];
    return boxes.map(box => ({...box, main: main(box), ...split(main(box).name)}));
}

/* Runs of layers whose boxes look the same. */
function makeGroups(boxes) {
    const groups = [];
    const look = list =>
        JSON.stringify(list.map(b => b.ops.map(op => [op.kind, split(op.name).suffix, op.shape, op.folded])));
    for (let i = 0; i < boxes.length;) {
        let end = i + 1;
        while (boxes[i].layer >= 0 && end < boxes.length && boxes[end].layer === boxes[i].layer &&
               boxes[end].prefix === boxes[i].prefix)
            end++;
        const list = boxes.slice(i, end), before = groups[groups.length - 1];
        if (before && before.layer >= 0 && list[0].layer === before.layer + before.repeats &&
            look(before.boxes) === look(list)) {
            before.repeats++;
        } else {
            groups.push({boxes: list, layer: list[0].layer, prefix: list[0].prefix, repeats: 1});
        }
        i = end;
    }
    return groups;
}

const weights = new Map(plan.graph.weights.map(w => [w.name, w]));
const stageIndex = new Map(stages.map((s, i) => [s.name, i]));

function boxLines(box) {
    const lines = [];
    for (const op of box.ops) {
        const matrix = op.inputs.map(name => weights.get(name)).find(w => w && w.shape[0] > 1);
        lines.push([op.kind + (op.folded ? ', folded in' : ''), matrix ? `[${matrix.shape.join(', ')}]` : '']);
    }
    const last = box.ops[box.ops.length - 1];
    lines.push([`${last.shape[0] === 'logit rows' ? 'rows' : last.shape[0]} × ${number(last.shape[1])}`, '']);
    return lines;
}

const GAP = 18, LINE = 15;
const ruler = document.createElement('canvas').getContext('2d');
ruler.font = '11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
const textWidth = text => ruler.measureText(text).width;

function measureBox(box) {
    const streamed = box.stages.reduce((sum, s) => sum + stages[stageIndex.get(s)].stream_bytes, 0);
    box.lines = boxLines(box);
    box.foot = `${plural(box.stages.length, 'stage')}${streamed ? ', ' + size(streamed) : ''}`;
    box.title = shorten(box.suffix, 26);
    box.width = 20 +
        Math.max(
            60, textWidth(box.title) * 1.12, textWidth(box.foot),
            ...box.lines.map(([left, right]) => textWidth(left) + (right ? textWidth(right) + 10 : 0)));
}

function drawBox(svg, box, y) {
    const lines = box.lines, height = 28 + lines.length * LINE + 22, right = box.x + box.width - 9;
    shape(svg, 'rect', {x: box.x, y, width: box.width, height, rx: 5, class: 'box'});
    box.stages.forEach((s, i) => shape(svg, 'rect', {
                           x: box.x + 1 + i * (box.width - 2) / box.stages.length,
                           y: y + 1,
                           width: (box.width - 2) / box.stages.length,
                           height: 5,
                           fill: colorOf(stageIndex.get(s))
                       }));
    shape(shape(svg, 'text', {x: box.x + 9, y: y + 22, class: 'strong'}, box.title), 'title', {}, box.main.name);
    lines.forEach(([left, end], i) => {
        shape(svg, 'text', {x: box.x + 9, y: y + 39 + i * LINE, class: i === lines.length - 1 ? '' : 'soft'}, left);
        shape(svg, 'text', {x: right, y: y + 39 + i * LINE, 'text-anchor': 'end', class: 'soft'}, end);
    });
    shape(svg, 'text', {x: box.x + 9, y: y + height - 8, class: 'soft'}, box.foot);
}

function drawGraph() {
    const svg = at('graph'), boxes = makeBoxes(), groups = makeGroups(boxes), shown = [];
    let x = 4;
    for (const group of groups) {
        if (group.layer >= 0) x += 12;
        group.x = x;
        for (const box of group.boxes) {
            measureBox(box);
            box.x = x;
            shown.push(box);
            x += box.width + GAP;
        }
        group.end = x - GAP;
        if (group.layer >= 0) x += 12;
    }
    x += 4 - GAP;
    svg.replaceChildren();
    const deepest = Math.max(...shown.map(b => b.lines.length)), y = 74, bottom = y + 28 + deepest * LINE + 22;
    const fit =
        Math.max(0.86, Math.min(1, (svg.parentNode.clientWidth - 4) / x)); /* a little smaller, else it scrolls */
    svg.setAttribute('viewBox', `0 0 ${x} ${bottom + 16}`);
    svg.setAttribute('width', x * fit);
    svg.setAttribute('height', (bottom + 16) * fit);
    const tip = shape(
        shape(svg, 'defs', {}), 'marker',
        {id: 'tip', viewBox: '0 0 8 8', refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: 'auto'});
    shape(tip, 'path', {d: 'M0 0L8 4L0 8z', class: 'tip'});
    for (const group of groups) {
        if (group.layer < 0) continue;
        shape(
            svg, 'rect',
            {x: group.x - 14, y: 20, width: group.end - group.x + 28, height: bottom - 20 + 10, rx: 8, class: 'group'});
        const last = group.layer + group.repeats - 1;
        shape(
            svg, 'text', {x: group.x - 4, y: 14, class: 'strong'},
            group.repeats > 1 ?
                `${group.prefix}.${group.layer} … ${group.prefix}.${last}: ${group.repeats} times the same` :
                `${group.prefix}.${group.layer}`);
    }
    const producers = new Map();
    for (const box of shown)
        for (const op of box.ops) producers.set(op.name, box);
    shown.forEach((box, i) => drawBox(svg, box, y));
    drawEdges(svg, shown, producers, y);
    at('graphHint').textContent = `${plan.graph.ops.length} ops, ${
        plan.graph.kv_layers} layers of KV cache; an op that is folded has no stage of its own`;
}

/* To the next box straight, to later ones in an arc above. */
function drawEdges(svg, shown, producers, y) {
    shown.forEach((box, index) => {
        const from = new Set();
        for (const op of box.ops)
            for (const name of op.inputs) {
                const producer = producers.get(name);
                if (producer && producer !== box) from.add(shown.indexOf(producer));
            }
        const own = index > 0 && (from.has(index - 1) || ![...from].some(f => f < index));
        if (own)
            shape(svg, 'path', {
                d: `M${shown[index - 1].x + shown[index - 1].width} ${y + 48}H${box.x - 1}`,
                class: 'edge',
                'marker-end': 'url(#tip)'
            });
        for (const f of from) {
            if (f === index - 1) continue;
            const x0 = shown[f].x + shown[f].width - 26, x1 = box.x + 26, top = y - 14 - 9 * Math.min(3, index - f - 1);
            shape(svg, 'path', {
                d: `M${x0} ${y}V${top + 8}Q${x0} ${top} ${x0 + 8} ${top}H${x1 - 8}Q${x1} ${top} ${x1} ${top + 8}V${
                    y - 1}`,
                class: 'edge',
                'marker-end': 'url(#tip)'
            });
        }
    });
}
