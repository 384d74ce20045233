// Quality against sparsity: a point a dictionary, the front as a line a hook point.

const QUALITIES = {
  recovered: { key: 'frac_recovered', front: 'front_recovered', label: 'loss recovered' },
  explained: { key: 'frac_variance_explained', front: 'front_explained', label: 'explained variance' },
};

function shownDictionaries() {
  return run.dictionaries.map((entry, index) => ({ ...entry, index })).filter((entry) => !state.hook || entry.hook_point === state.hook);
}

function dictionaryTip(entry) {
  const row = (key, value) => el('tr', {}, el('th', { scope: 'row' }, key), el('td', {}, value));
  return [
    el('strong', {}, name(entry.name), ' · ', name(entry.architecture)),
    el('table', {}, row('sparsity', visible(entry.sparsity)), row('L0', num(entry.l0, 4)), row('loss recovered', fixed(entry.frac_recovered, 4)),
      row('explained variance', fixed(entry.frac_variance_explained, 4)), row('alive', fixed(entry.frac_alive, 3))),
    entry.stopped ? el('p', {}, 'stopped: ', visible(entry.stopped)) : null,
    entry.measured === 'batch' ? el('p', {}, 'not evaluated: of its last training batch') : null,
  ].filter(Boolean);
}

function drawFront(quality) {
  const { key, front, label } = QUALITIES[quality];
  return (picture_, width, height) => {
    const points = shownDictionaries().filter((entry) => known(entry.l0) && known(entry[key]));
    if (!points.length) {
      picture_.append(svg('text', { class: 'empty', x: width / 2, y: height / 2, 'text-anchor': 'middle' }, `No dictionary has a ${label}.`));
      return;
    }
    const box = { left: 52, right: width - 14, top: 16, bottom: height - 40 };
    const l0 = points.map((entry) => entry.l0);
    const positive = Math.min(...l0) > 0;
    const xs = extent(l0);
    const x = positive
      ? logarithmic([xs[0] / 1.18, xs[1] * 1.18], [box.left, box.right])
      : linear(padded(xs), [box.left, box.right]);
    const values = points.map((entry) => entry[key]);
    const below = Math.min(...values) < 0 && Math.max(...values) > 0; // how bad does not matter, and would flatten the rest
    const ys = extent(below ? values.filter((value) => value >= 0) : values);
    const [low, high] = padded(ys, 0.09);
    const inner = linear([low, Math.max(ys[1], Math.min(high, 1))], [box.bottom, box.top]);
    const y = Object.assign((value) => Math.min(box.bottom, inner(value)), { ticks: inner.ticks });
    picture_.append(frame(box, x, y, { xName: positive ? 'L0, log scale' : 'L0', xTicks: width < NARROW ? 5 : 8, yTicks: 5 }));
    if (below) picture_.append(svg('text', { class: 'axis', x: box.left, y: box.bottom + 33 }, 'below 0: at the lower edge'));
    for (const hook of new Set(points.map((entry) => entry.hook_point))) {
      const along = points.filter((entry) => entry[front] && entry.hook_point === hook).sort((a, b) => a.l0 - b.l0);
      picture_.append(svg('path', { class: 'front-line', d: along.map((entry, i) => `${i ? 'L' : 'M'}${x(entry.l0)},${y(entry[key])}`).join('') }));
    }
    const last = (entry) => (entry.index === state.dictionary ? 1 : 0);
    for (const entry of [...points].sort((a, b) => last(a) - last(b))) picture_.append(mark(entry, x(entry.l0), y(entry[key]), quality));
  };
}

function mark(entry, x, y, quality) {
  const which = architectureOf(entry);
  const { key, label } = QUALITIES[quality];
  const on = entry.index === state.dictionary;
  const said = `${plain(entry.name)}, ${plain(entry.architecture)}, L0 ${num(entry.l0, 4)}, ${label} ${fixed(entry[key], 4)}`;
  const node = svg('g', {
    class: `mark ${colour(which)}${entry.measured === 'batch' ? ' hollow' : ''}${on ? ' on' : ''}`,
    transform: `translate(${x},${y})`, tabindex: 0, role: 'button', 'aria-label': said, 'aria-pressed': String(on), 'data-dictionary': entry.index,
  }, svg('circle', { class: 'reach', r: 14 }), on ? svg('circle', { class: 'ring', r: 11 }) : null, svg('path', { d: shape(which, 5.5) }));
  return tells(node, () => dictionaryTip(entry));
}

function startFront() {
  const draws = Object.keys(QUALITIES).map((quality) =>
    chart($(`front-${quality}`), (width) => (width < NARROW ? 250 : 300), drawFront(quality), `L0 against ${QUALITIES[quality].label}`));
  for (const quality of Object.keys(QUALITIES)) {
    const node = $(`front-${quality}`);
    const pick = (event) => {
      const point = event.target.closest('[data-dictionary]');
      if (!point) return;
      event.preventDefault();
      choose({ dictionary: Number(point.dataset.dictionary), feature: null });
      node.querySelector(`[data-dictionary="${point.dataset.dictionary}"]`)?.focus({ preventScroll: true });
    };
    node.addEventListener('click', pick);
    node.addEventListener('keydown', (event) => {
      if (event.key === 'Enter' || event.key === ' ') pick(event);
    });
  }
  legend();
  const hooks = [...new Set(run.dictionaries.map((entry) => entry.hook_point))];
  if (hooks.length > 1) {
    $('hook-label').hidden = false;
    $('hook').append(el('option', { value: '' }, 'all'), ...hooks.map((hook) => el('option', { value: hook }, plain(hook))));
    $('hook').addEventListener('change', (event) => choose({ hook: event.target.value }));
  }
  const draw = () => draws.forEach((again) => again());
  watch((changed) => {
    if (changed.includes('dictionary') || changed.includes('hook')) draw();
  });
  draw();
}

// What the marks mean, as far as they are there.
function legend() {
  const architectures = [...new Set(run.dictionaries.map((entry) => entry.architecture))];
  const item = (kind, d, text) =>
    el('span', {}, svg('svg', { width: 16, height: 16, viewBox: '-8 -8 16 16', class: kind, 'aria-hidden': 'true' }, svg('path', { d })), text);
  $('legend').append(...architectures.map((architecture, index) => item(colour(index), shape(index, 5.5), name(architecture))));
  if (run.dictionaries.some(onFront)) $('legend').append(el('span', {}, el('span', { class: 'star', 'aria-hidden': 'true' }, '★'), 'on the front'));
  if (run.dictionaries.some((entry) => entry.measured === 'batch')) $('legend').append(item('s5 hollow', shape(0, 5), 'not evaluated: of its last batch'));
}

function onFront(entry) {
  return entry.front_recovered || (entry.front_explained && !known(entry.frac_recovered));
}
