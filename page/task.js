/* One task in words, beside the timeline. */

function unitsText(i) {
    const first = tasks.first[i], stride = tasks.stride[i], count = tasks.count[i];
    const all = stages[tasks.stage[i]].units;
    if (count <= 1) return `${first} of ${all}`;
    if (stride === 1) return `${first} to ${first + count - 1} of ${all}`;
    return Array.from({length: Math.min(count, 3)}, (_, k) => first + k * stride).join(', ') +
        (count > 3 ? ', …' : '') + ` (${count} of ${all})`;
}

function regionText(tensor, r, k) {
    const t = plan.tensors[tensor], [rowBegin, rowEnd, begin, count, stride, repeat] = r.slice(k, k + 6);
    const columns = count * repeat === t.cols && begin === 0 ?
        'all columns' :
        `columns ${begin}:${begin + count}` + (repeat > 1 ? ` and ${repeat - 1} more, ${stride} apart` : '');
    const rows = rowBegin === 0 && rowEnd === t.rows ? '' : `rows ${rowBegin}:${rowEnd}, `;
    return element(
        'div', {class: 'item', title: `${t.space}, ${t.layout}, ${t.dtype} [${t.rows}, ${t.cols}]`}, `${t.name} `,
        element('span', {style: 'color:var(--soft)'}, rows + columns));
}

function regionList(tensors, regions) {
    return tasks.tensors[tensors].map((tensor, k) => regionText(tensor, tasks.regions[regions], 6 * k));
}

function waitItems(i) {
    const waits = tasks.pairs[tasks.waits[i]], items = [];
    for (let k = 0; k < waits.length; k += 2) {
        const all = signallers.get(waits[k]) || [], of = stageOfCounter.get(waits[k]);
        const whole = all.reduce((sum, s) => sum + s[1], 0), last = lastSignaller(source, waits[k], waits[k + 1]);
        const item = element(
            'div', {class: 'item'},
            `counter ${waits[k]} ≥ ${waits[k + 1]} of ${whole}, ` +
                `${of === undefined ? 'no stage' : stages[of].name}: ${plural(all.length, 'task')}`);
        if (last >= 0)
            item.append(
                '; the last ',
                element(
                    'a', {onclick: () => keep(last, true)},
                    `on worker ${workerOf[last]} at ${time(source.done[last])}`));
        items.push(item);
    }
    return items.length ? items : [element('div', {class: 'item'}, 'nothing')];
}

function drawDetails(i) {
    const panel = at('details');
    if (i < 0) return panel.replaceChildren(element('p', {class: 'hint'}, 'Point at a task.'));
    const stage = stages[tasks.stage[i]], other = twin(source), rows = [];
    const row = (name, ...value) => rows.push(element('dt', {}, name), element('dd', {}, ...value));
    const run = s => time(s.done[i] - s.ready[i]);
    row('worker', `${workerOf[i]}, its task ${i - tasks.workerBegin[workerOf[i]]}`);
    row('units', unitsText(i));
    row('reached', time(source.reached[i]));
    row('waits', time(source.ready[i] - source.reached[i]));
    row('runs', run(source) + (other ? ` (${other.kind} ${run(other)})` : ''));
    row('done', time(source.done[i]));
    if (tasks.bytes[i] > 0)
        row('streams',
            `${size(tasks.bytes[i])}, ${
                number(tasks.bytes[i] / (source.done[i] - source.ready[i]) / 1000, 1)} GB/s while it runs`);
    const signals = tasks.pairs[tasks.signals[i]], signalItems = [];
    for (let k = 0; k < signals.length; k += 2)
        signalItems.push(element('div', {class: 'item'}, `counter ${signals[k]} + ${signals[k + 1]}`));
    panel.replaceChildren(
        element('h3', {}, key(colorOf(tasks.stage[i])), stage.name),
        element(
            'div', {class: 'hint'},
            `task ${number(i)} of ${number(taskCount)}` + (source.onPath.has(i) ? ', on the critical path' : '')),
        element('dl', {}, ...rows), element('h4', {}, 'waits for'), ...waitItems(i), element('h4', {}, 'signals'),
        ...signalItems, element('h4', {}, 'reads'), ...regionList(tasks.readTensors[i], tasks.reads[i]),
        element('h4', {}, 'writes'), ...regionList(tasks.writeTensors[i], tasks.writes[i]), element('h4', {}, 'runs'),
        element('code', {}, plan.kinds[stage.kind]));
}
