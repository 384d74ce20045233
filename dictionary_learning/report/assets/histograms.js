// How many latents fire how often: a small histogram a dictionary, those that never fired apart from the rest.

const DENSITY = { height: 104, top: 10, bottom: 84, dead: 14 };

// The bars of a histogram; `marked` is a density to point at.
function densityPicture(entry, width, marked = null) {
  const { counts, dead, low } = entry.histogram;
  const most = Math.max(dead, ...counts, 1);
  const left = DENSITY.dead + 10;
  const x = linear([low, 0], [left, width - 4]);
  const y = linear([0, Math.sqrt(most)], [DENSITY.bottom, DENSITY.top]); // the square root keeps small counts in sight
  const bin = -low / counts.length;
  const picture_ = svg('svg', { viewBox: `0 0 ${width} ${DENSITY.height}`, width, height: DENSITY.height, role: 'img',
    'aria-label': `Densities of ${plain(entry.name)}: ${plural(dead, 'latent')} of ${count(entry.features)} never fired` });
  picture_.append(svg('rect', { class: 'dead-bar', x: 2, width: DENSITY.dead, y: y(Math.sqrt(dead)), height: DENSITY.bottom - y(Math.sqrt(dead)) }));
  counts.forEach((value, i) => {
    if (!value) return;
    const top = y(Math.sqrt(value));
    picture_.append(svg('rect', { class: 'bar', x: x(low + i * bin) + 0.5, width: Math.max(1, x(low + (i + 1) * bin) - x(low + i * bin) - 1), y: top, height: DENSITY.bottom - top }));
  });
  picture_.append(svg('line', { class: 'base', x1: 0, x2: width, y1: DENSITY.bottom, y2: DENSITY.bottom }));
  picture_.append(svg('text', { class: 'tick', x: 2, y: DENSITY.bottom + 14 }, '−10'));
  for (const tick of [-8, -6, -4, -2, 0]) {
    picture_.append(svg('text', { class: 'tick', x: x(tick), y: DENSITY.bottom + 14, 'text-anchor': tick === 0 ? 'end' : 'middle' }, String(tick).replace('-', '−')));
  }
  if (marked !== null) {
    const at = marked > 0 ? x(Math.max(low, Math.log10(marked))) : 2 + DENSITY.dead / 2;
    picture_.append(svg('line', { class: 'marker', x1: at, x2: at, y1: 2, y2: DENSITY.bottom }), svg('path', { class: 'marker', d: `M${at - 5},0h10l-5,7Z` }));
  }
  return tells(picture_, (across) => {
    const i = Math.floor((across * width - left) / ((width - 4 - left) / counts.length));
    if (i < 0) return [el('p', {}, `never fired: ${plural(dead, 'latent')}`)];
    const from = low + Math.min(i, counts.length - 1) * bin;
    return [el('p', {}, 'log', el('sub', {}, '10'), ` ${fixed(from, 2)} to ${fixed(from + bin, 2)}: ${plural(counts[Math.min(i, counts.length - 1)], 'latent')}`)];
  }, { follow: true });
}

function startHistograms() {
  const there = run.dictionaries.some((entry) => entry.histogram);
  $('densities').hidden = !there;
  document.querySelector('[data-to="densities"]').hidden = !there;
  if (!there) return;
  let width = 0;
  const draw = () => {
    const entries = shownDictionaries().filter((entry) => entry.histogram);
    const cards = entries.map((entry) =>
      el('button', { type: 'button', class: `density ${colour(architectureOf(entry))}`, 'data-dictionary': entry.index, 'aria-pressed': String(entry.index === state.dictionary) },
        el('span', { class: 'density-name' }, name(entry.name), el('small', {}, name(entry.architecture), ' ', visible(entry.sparsity))),
        el('span', { class: 'picture' }),
        el('small', {}, `${num((100 * entry.histogram.dead) / entry.features, 2)} % never fired`)));
    $('histograms').replaceChildren(...cards);
    width = cards.length ? Math.floor(cards[0].querySelector('.picture').clientWidth) || 236 : 0;
    cards.forEach((card, i) => card.querySelector('.picture').append(densityPicture(entries[i], width)));
  };
  new ResizeObserver(() => {
    const now = $('histograms').querySelector('.picture')?.clientWidth;
    if (now && Math.floor(now) !== width) draw();
  }).observe($('histograms'));
  $('histograms').addEventListener('click', (event) => {
    const button = event.target.closest('[data-dictionary]');
    if (!button) return;
    choose({ dictionary: Number(button.dataset.dictionary), feature: null });
    $('histograms').querySelector(`[data-dictionary="${button.dataset.dictionary}"]`)?.focus({ preventScroll: true });
  });
  watch((changed) => {
    if (changed.includes('hook')) draw();
    else if (changed.includes('dictionary')) {
      for (const button of $('histograms').children) button.setAttribute('aria-pressed', String(Number(button.dataset.dictionary) === state.dictionary));
    }
  });
  draw();
}
