/* What is above and below the pictures: title, totals, legend, notes. */

/* ---- head and totals ---- */

function drawHead() {
    const c = plan.config, d = plan.device;
    document.title = data.title + ' - perk';
    at('title').textContent = data.title;
    at('subtitle').textContent = `${plan.graph.name} for ${d.arch}${d.portable ? ', portable' : ''} · at most ` +
        `${plural(c.max_num_batched_tokens, 'token')} of ${plural(c.max_num_batched_requests, 'request')} a step · ` +
        `${plural(c.max_seq_length, 'position')} · ${number(c.max_num_pages)} KV pages of ${c.page_size}`;
    at('sources').replaceChildren(...sources.map(
        s => element(
            'button', {
                'aria-pressed': s === source,
                onclick: () => {
                    source = s;
                    drawAll();
                }
            },
            s.name)));
}

function total(what, value, ...more) {
    return element(
        'div', {class: 'total'}, element('div', {class: 'what'}, what), element('div', {class: 'value'}, value),
        ...more.map(m => typeof m === 'string' ? element('div', {class: 'more'}, m) : m));
}

/* A bar of parts, and what they are. */
function stack(parts, whole) {
    const shown = parts.filter(p => p[1] > 0), colors = palettes.linear;
    const span = ([name, value], i) => element('span', {
        style: `width:${value / whole * 100}%;background:${colors[i]}`,
        title: `${name} ${size(value)}`,
    });
    return [
        element('div', {class: 'stack'}, ...shown.map(span)),
        element(
            'div', {class: 'more parts'},
            ...shown.map(([name, value], i) => element('span', {}, key(colors[i]), `${name} ${size(value)}`))),
    ];
}

function drawTotals() {
    const step = source.step, other = twin(source), shared = plan.shared_memory, spaces = plan.spaces;
    const floor = plan.stream_bytes / step.bandwidth * 1e6, bytes = plan.workers.stream_bytes,
          count = plan.workers.tasks;
    const device = Object.values(spaces).reduce((a, b) => a + b);
    const parts = [
        ['ring', shared.ring_slots * shared.slot_bytes], ['slices', shared.slices_bytes],
        ['staging', shared.staging_bytes], ['reduction', shared.reduction_bytes], ['batch', shared.batch_bytes],
        ['barriers', shared.barrier_bytes]
    ];
    at('totals').replaceChildren(
        total(
            `Step, ${source.kind}`, time(source.end),
            other ? `${other.kind} ${time(other.end)}` :
                    `${plural(step.requests, 'request')}, context ${number(step.context)}`),
        total(
            'Weights alone', time(floor),
            `at ${number(step.bandwidth / 1e12, 2)} TB/s` + (source.kind === 'measured' ? '' : ', assumed') +
                `: ${number(floor / source.end * 100)} % of the step`),
        total(
            'Streamed a step', size(plan.stream_bytes), `a worker ${size(bytes.min)} to ${size(bytes.max)}`,
            `imbalance ${number(bytes.imbalance_percent, 1)} %`),
        total(
            'Tasks', number(plan.task_count), `${count.min} to ${count.max} of each of ${workers} workers`,
            `${plural(stages.length, 'stage')}, ${plural(plan.counter_count, 'counter')}`),
        total('Shared memory a worker', size(shared.bytes), ...stack(parts, plan.device.shared_memory)),
        total(
            'Device memory', size(device),
            ...stack(['weights', 'constants', 'kv', 'activations'].map(n => [n, spaces[n]]), device)));
}

function drawLegend() {
    at('legend').replaceChildren(...categories.map(c => element('span', {title: c.name}, key(c.color), c.short)));
}

/* What the times are. */
function drawNote() {
    const s = source.step, bandwidth = number(s.bandwidth / 1e12, 2);
    const lines = [
        `Expected times are a model's: every worker streams its share of ${
            bandwidth} TB/s into its ring, a task takes ` +
        'a fixed time by its kind and for each chunk of weights, and a wait ends a fixed time after the last signal. ' +
        'The constants were fitted to one H100; of another device the bandwidth alone is known: unless measured or ' +
        'given, 94 % of what its maker states. ' +
        `Assumed: ${plural(s.requests, 'request')} of ${plural(s.tokens, 'token')}, ` +
        `${number(s.context)} positions before them.`
    ];
    if (source.kind === 'measured')
        lines.unshift('Measured times are stamps of the GPU\'s clock, which the tasks of a profiled program wrote.');
    at('note').replaceChildren(...lines.map(text => element('p', {}, text)));
}
