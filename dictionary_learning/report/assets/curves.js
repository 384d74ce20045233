// Training curves: one metric of all dictionaries, the chosen one before the others.

const SHARES = { explained: true, dead: true, silent: true };

function drawCurves(picture_, width, height) {
  const metric = state.metric;
  const lines = shownDictionaries()
    .map((entry) => ({ entry, curve: run.curves[entry.name] }))
    .filter(({ curve }) => curve && curve[metric] && curve[metric].some(known));
  if (!lines.length) {
    picture_.append(svg('text', { class: 'empty', x: width / 2, y: height / 2, 'text-anchor': 'middle' }, 'Nothing was logged.'));
    return;
  }
  const box = { left: 58, right: width - 14, top: 16, bottom: height - 40 };
  const values = lines.flatMap(({ curve }) => curve[metric].filter(known));
  let domain = extent(values);
  if (SHARES[metric]) domain = [Math.min(0.95, Math.max(0, domain[0])), Math.min(1, Math.max(domain[1], 0.05))];
  const log = !SHARES[metric] && domain[0] > 0 && domain[1] / domain[0] > 20;
  const x = linear([0, extent(lines.flatMap(({ curve }) => curve.tokens))[1]], [box.left, box.right]);
  const y = log ? logarithmic([domain[0] / 1.1, domain[1] * 1.1], [box.bottom, box.top]) : linear(padded(domain, 0.04), [box.bottom, box.top]);
  picture_.append(frame(box, x, y, { xName: 'activations', yName: log ? 'log scale' : '', xTicks: width < NARROW ? 4 : 8, yTicks: 5 }));
  const last = ({ entry }) => (entry.index === state.dictionary ? 1 : 0);
  for (const { entry, curve } of lines.sort((a, b) => last(a) - last(b))) {
    const on = entry.index === state.dictionary;
    const at = (value) => Math.min(box.bottom, Math.max(box.top - 6, y(value)));
    let pen = false;
    let d = '';
    curve.tokens.forEach((tokens, i) => {
      const value = curve[metric][i];
      if (known(value)) d += `${pen ? 'L' : 'M'}${x(tokens).toFixed(1)},${at(value).toFixed(1)}`;
      pen = known(value);
    });
    const line = svg('g', { class: `curve ${colour(architectureOf(entry))}${on ? ' on' : ''}`, 'data-dictionary': entry.index },
      svg('path', { class: 'reach', d }), svg('path', { d }));
    const end = curve[metric].findLastIndex(known);
    line.append(svg('path', { class: 'end', transform: `translate(${x(curve.tokens[end])},${at(curve[metric][end])})`, d: shape(architectureOf(entry), on ? 5 : 3) }));
    picture_.append(tells(line, (across) => {
      const away = (i) => Math.abs(x(curve.tokens[i]) - across * width);
      const i = curve.tokens.reduce((best, tokens, j) => (known(curve[metric][j]) && away(j) < away(best) ? j : best), end);
      return [el('strong', {}, name(entry.name), ' · ', name(entry.architecture), ' ', visible(entry.sparsity)),
        el('p', {}, `${num(curve[metric][i], 4)} at ${count(curve.tokens[i])} activations`)];
    }, { follow: true }));
  }
}

function startCurves() {
  const metrics = Object.entries(run.metrics);
  if (!metrics.length) {
    $('training').hidden = true;
    return;
  }
  if (!run.metrics[state.metric]) state.metric = metrics[0][0];
  const draw = chart($('curves'), (width) => (width < NARROW ? 260 : 320), drawCurves, 'Training curves');
  $('metric').append(...metrics.map(([key, heading]) =>
    el('button', { type: 'button', 'data-metric': key, 'aria-pressed': String(key === state.metric), onclick: () => choose({ metric: key }) }, heading)));
  $('curves').addEventListener('click', (event) => {
    const line = event.target.closest('[data-dictionary]');
    if (line) choose({ dictionary: Number(line.dataset.dictionary), feature: null });
  });
  watch((changed) => {
    if (changed.includes('metric')) {
      for (const button of $('metric').children) button.setAttribute('aria-pressed', String(button.dataset.metric === state.metric));
    }
    if (['metric', 'dictionary', 'hook'].some((key) => changed.includes(key))) draw();
  });
  draw();
}
