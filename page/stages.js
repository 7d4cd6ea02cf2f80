/* The table of stages, those of all layers in one row, and the critical path as a list. */

const cells = texts => texts.map(text => element('td', {}, text));

function stageRow(c, most) {
    const other = twin(source);
    const mean = (s, get) => c.stages.reduce((sum, i) => sum + get(s.stages[i]), 0) / c.stages.length;
    const chain = s => number(mean(s, t => t.to - t.from), 2);
    const all = mean(source, t => t.to - t.from) * c.stages.length;
    return element(
        'tr', {}, element('td', {title: c.name}, key(c.color), c.name),
        ...cells([number(c.stages.length), number(stages[c.stages[0]].tasks)]),
        ...cells([c.bytes ? size(c.bytes / c.stages.length) : '-', chain(source), ...(other ? [chain(other)] : [])]),
        ...cells([t => t.run, t => t.worst, t => t.wait].map(get => number(mean(source, get), 2))),
        ...cells([number(all, 1)]),
        element(
            'td', {class: 'bar'},
            element('span', {style: `width:${Math.max(1, all / most * 70)}%;background:${c.color}`}),
            number(all / source.end * 100, 1) + ' %'));
}

function drawStages() {
    const others = twin(source) ? [twin(source).kind] : [];
    const names = ['stage', 'count', 'tasks', 'bytes', `chain, ${source.kind}`, ...others, 'run', 'longest', 'wait'];
    const head = [...names, 'in all', 'share of the step'].map(text => element('th', {}, text));
    const length = i => source.stages[i].to - source.stages[i].from;
    const most = Math.max(...categories.map(c => c.stages.reduce((sum, i) => sum + length(i), 0)));
    const total =
        ['step', number(stages.length), number(taskCount), size(plan.stream_bytes), '', ...others.map(() => '')];
    at('stages').replaceChildren(
        element('tr', {}, ...head), ...categories.map(c => stageRow(c, most)),
        element('tr', {}, ...cells([...total, '', '', '', number(source.end, 1), ''])));
    at('stagesHint').textContent = 'µs. Chain: from the end of the stages before to the stage\'s own end, so chains ' +
        'add up to the step; run and wait: of a task, mean; bytes: a stage';
}

function drawPath() {
    let waited = 0;
    const rows = source.path.map((task, i) => {
        waited += source.ready[task] - (i > 0 ? source.done[source.path[i - 1]] : 0);
        return element(
            'div', {onclick: () => keep(task, true), title: 'to the task'},
            element('span', {class: 'soft number'}, number(source.ready[task], 1)),
            element('span', {}, key(colorOf(tasks.stage[task]))), element('span', {}, stages[tasks.stage[task]].name),
            element('span', {class: 'soft number'}, 'w ' + workerOf[task]),
            element('span', {class: 'number'}, time(source.done[task] - source.ready[task])));
    });
    at('path').replaceChildren(...rows);
    const work = time(source.end - waited), between = time(waited);
    at('pathHint').textContent =
        `${plural(source.path.length, 'task')}: ${work} of work, ${between} between signal and start`;
}
