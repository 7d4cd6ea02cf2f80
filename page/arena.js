/* The activation arena: a lane for each place, and which tensor has it from its first write to its last read. */

function tensorLives() {
    const lives = new Map(), seen = new Set();
    for (let i = 0; i < taskCount; i++)
        for (const list of [tasks.readTensors[i], tasks.writeTensors[i]]) {
            const key = tasks.stage[i] * 65536 + list;
            if (seen.has(key)) continue;
            seen.add(key);
            for (const tensor of tasks.tensors[list]) {
                if (plan.tensors[tensor].space !== 'activations') continue;
                const life = lives.get(tensor) || {first: Infinity, last: -1};
                life.first = Math.min(life.first, tasks.stage[i]);
                life.last = Math.max(life.last, tasks.stage[i]);
                lives.set(tensor, life);
            }
        }
    return lives;
}

/* Layers after the first few go on like them: they are left out. */
const ARENA_LAYERS = 5;

function drawArena() {
    const svg = at('arena'), lives = tensorLives(), lanes = new Map(), columns = new Int32Array(stages.length + 1);
    const isShown = stages.map(stage => split(stage.name).layer < ARENA_LAYERS);
    stages.forEach((stage, i) => {
        columns[i + 1] = columns[i] + isShown[i];
    });
    const total = columns[stages.length];
    for (const [tensor, life] of lives) {
        if (columns[life.first] === columns[life.last + 1]) continue;
        const offset = plan.tensors[tensor].offset;
        if (!lanes.has(offset)) lanes.set(offset, []);
        lanes.get(offset).push(tensor);
    }
    const offsets = [...lanes.keys()].sort((a, b) => a - b), lane = 19, left = 150, top = 22;
    const width = Math.max(900, svg.parentNode.clientWidth - 4), bottom = top + offsets.length * lane;
    const x = column => left + column / total * (width - left - 6);
    svg.replaceChildren();
    svg.setAttribute('width', width);
    svg.setAttribute('height', bottom + 6);
    stages.forEach((stage, i) => {
        const layer = split(stage.name).layer, before = i > 0 ? split(stages[i - 1].name).layer : -1;
        if (layer === before || (layer >= ARENA_LAYERS)) return;
        shape(svg, 'line', {x1: x(columns[i]), x2: x(columns[i]), y1: 4, y2: bottom, stroke: 'var(--line)'});
        shape(svg, 'text', {x: x(columns[i]) + 4, y: 13, class: 'soft'}, layer >= 0 ? `layer ${layer}` : 'end');
    });
    offsets.forEach((offset, row) => {
        const y = top + row * lane, list = lanes.get(offset), bytes = Math.max(...list.map(t => plan.tensors[t].bytes));
        shape(
            svg, 'text', {x: left - 10, y: y + 12, 'text-anchor': 'end', class: 'soft'},
            `${size(offset)} + ${size(bytes)}`);
        for (const tensor of list) {
            const life = lives.get(tensor), t = plan.tensors[tensor], x0 = x(columns[life.first]),
                  x1 = x(columns[life.last + 1]);
            const box = shape(svg, 'rect', {
                x: x0,
                y,
                width: Math.max(1, x1 - x0 - 1),
                height: lane - 3,
                rx: 2,
                fill: colorOf(life.first),
                'fill-opacity': 0.75
            });
            shape(
                box, 'title', {},
                `${t.name} [${t.rows}, ${t.cols}] ${t.dtype}, ${size(t.bytes)} at ${t.offset}: ` +
                    `${stages[life.first].name} to ${stages[life.last].name}`);
            const label = shorten(split(t.name).suffix, Math.floor((x1 - x0 - 6) / 6.2));
            if (label) shape(svg, 'text', {x: x0 + 4, y: y + 12, style: 'fill:#10151c;pointer-events:none'}, label);
        }
    });
    const isCut = stages.some((_, i) => !isShown[i]);
    at('arenaHint').textContent = `${size(plan.spaces.activations)}; a lane for each place (offset + size), by the ` +
        'stages between a tensor\'s first write and its last read' +
        (isCut ? `; layers from ${ARENA_LAYERS} on go on like these` : '');
}
