// One latent: how often it fires, on what, where, and what it does.

const BANDS = [ // of the active values, by the quantiles that are known
  ['top tenth', 4, Infinity], ['75 to 90 %', 3, 4], ['50 to 75 %', 2, 3], ['25 to 50 %', 1, 2], ['10 to 25 %', 0, 1], ['lowest tenth', -Infinity, 0],
];

function section(heading, hint, ...children) {
  return el('section', { class: 'piece' }, el('h4', {}, heading, hint ? el('small', {}, hint) : null), ...children);
}

function stat(label, value, more) {
  return el('div', {}, el('dt', {}, label), el('dd', {}, value, more ? el('small', {}, more) : null));
}

function statistics(data, f, meta) {
  const density = data.density[f];
  const ablation = data.ablation_loss[f];
  return el('dl', { class: 'stats' },
    stat('Density', density > 0 ? sig(density, 3) : '0', oneIn(density)),
    stat(run.analysis.whole ? 'Texts' : 'Fired', count(meta.active), run.analysis.whole ? null : `in ${plural(meta.documents, 'document')}`),
    density > 0 ? stat('Max', sig(data.max[f], 4)) : null,
    density > 0 ? stat('Mean', sig(data.mean[f], 4), `± ${sig(meta.std, 3)}`) : null,
    Number.isNaN(ablation) ? null : stat('Δ loss', `${ablation > 0 ? '+' : ''}${sig(ablation, 2)}`, 'nats, when ablated'));
}

// The quantiles of the active values, from zero to the largest.
function quantiles(meta, most) {
  const [q10, q25, q50, q75, q90] = meta.spread;
  if (!known(q50) || !(most > 0)) return null;
  const width = 250;
  const x = linear([0, most], [4, width - 8]);
  return svg('svg', { class: 'spread', viewBox: `0 0 ${width} 40`, width, height: 40, role: 'img', 'aria-label': `Active values: median ${num(q50)}, tenths ${num(q10)} and ${num(q90)}, largest ${num(most)}` },
    svg('line', { class: 'base', x1: x(0), x2: x(most), y1: 14, y2: 14 }),
    svg('rect', { class: 'bar faint', x: x(q10), width: Math.max(1, x(q90) - x(q10)), y: 9, height: 10 }),
    svg('rect', { class: 'bar', x: x(q25), width: Math.max(1, x(q75) - x(q25)), y: 5, height: 18 }),
    svg('line', { class: 'marker', x1: x(q50), x2: x(q50), y1: 2, y2: 26 }),
    svg('text', { class: 'tick', x: x(0), y: 38 }, '0'),
    x(q50) > 30 && x(most) - x(q50) > 60 ? svg('text', { class: 'tick', x: x(q50), y: 38, 'text-anchor': 'middle' }, num(q50)) : null,
    svg('text', { class: 'tick', x: x(most), y: 38, 'text-anchor': 'end' }, num(most)));
}

function sampleGroups(samples, spread, most) {
  const groups = BANDS.map(([label, low, high]) => {
    const from = low < 0 ? -Infinity : spread[low];
    const to = high > 4 ? Infinity : spread[high];
    return [label, samples.filter(({ value }) => value >= from && value < to).sort((a, b) => b.value - a.value)];
  });
  return groups.filter(([, items]) => items.length).map(([label, items]) =>
    el('details', { class: 'band' }, el('summary', {}, label, el('small', {}, [...new Set([sig(items.at(-1).value), sig(items[0].value)])].join(' – '))), exampleList(items, most, `Samples, ${label}`)));
}

function logits([texts, values], kind) {
  const most = Math.max(...values.map(Math.abs), 1e-9);
  return el('table', { class: `logits ${kind}`, 'aria-label': kind === 'up' ? 'Promoted tokens' : 'Suppressed tokens' }, el('tbody', {}, texts.map((text, i) =>
    el('tr', {}, el('th', { scope: 'row' }, ...tokens([text])), el('td', { class: 'number' }, fixed(values[i], 2)), el('td', { class: 'gauge' }, gauge(Math.abs(values[i]) / most))))));
}

function gauge(share) {
  return svg('svg', { class: 'mini', viewBox: '0 0 100 6', preserveAspectRatio: 'none', 'aria-hidden': 'true' }, svg('rect', { class: 'mini-part', width: 100 * Math.min(1, share || 0), height: 6 }));
}

function corporaTable(rows) {
  const most = Math.max(...rows.map(([rate]) => rate || 0), 1e-12);
  return el('table', { class: 'corpora' }, el('thead', {}, el('tr', {}, ['Corpus', 'Rate', '', 'Ratio', 'p', 'q'].map((heading, i) => (heading ? el('th', { scope: 'col', class: i ? 'number' : null }, heading) : el('td', { class: 'gauge' }))))),
    el('tbody', {}, rows.map(([rate, ratio, p, q], i) => el('tr', { class: q < 0.01 && ratio >= 1 ? 'strong' : null },
      el('th', { scope: 'row' }, breakable(run.analysis.tested[i])), el('td', { class: 'number' }, sig(rate, 2)), el('td', { class: 'gauge' }, gauge((rate || 0) / most)),
      el('td', { class: 'number' }, known(ratio) ? `${sig(2 ** ratio, 2)}×` : '–'), el('td', { class: 'number' }, sig(p, 2)), el('td', { class: 'number' }, sig(q, 2))))));
}

function links(data, [features, values], measure) {
  return el('ul', { class: 'links' }, features.filter((f) => f >= 0 && f < data.features).map((f, i) => {
    const inside = [el('b', {}, String(f)), el('span', { class: 'words' }, STATUSES[data.status[f]] ? `${STATUSES[data.status[f]]} ` : null, name(data.words(f))), el('small', { title: measure }, fixed(values[i], 2))];
    return el('li', {}, run.only ? el('span', { class: 'link' }, ...inside) : el('a', { class: 'link', href: address(state.dictionary, f), onclick: (event) => follow(event, f) }, ...inside));
  }));
}

// A link within the page, of which the inner frame of a notebook knows no address.
function follow(event, feature) {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return; // another tab or window
  event.preventDefault();
  choose({ feature }, { write: 'push' });
  bringFeature();
}

function featureHead(data, f, meta) {
  const said = data.meta.description[f];
  const label = data.meta.label[f];
  const share = data.label_share[f];
  const status = STATUSES[data.status[f]];
  const go = (by, text, sign) => el('button', { type: 'button', 'aria-label': text, title: text, onclick: () => step(by) }, sign);
  return el('header', {},
    el('p', { class: 'path' }, el('span', { class: 'id' }, name(chosen().name), el('span', { class: 'of' }, '/'), el('b', {}, String(f))),
      el('button', { type: 'button', class: 'copy', 'aria-label': 'Copy the name of this latent', title: 'Copy (c)', onclick: copyName }, svg('svg', { viewBox: '0 0 16 16', 'aria-hidden': 'true' }, svg('path', { d: 'M5.5 5.5h8v8h-8zM3 10.5h-.5v-8h8V3' }))), status ? el('span', { class: `badge ${status}` }, status) : null,
      data.corpusName(f) ? el('span', { class: 'badge corpus' }, name(data.corpusName(f))) : null,
      run.only ? null : el('span', { class: 'go' }, el('button', { type: 'button', class: 'back', onclick: () => toTable() }, 'Table'), go(-1, 'Previous latent (k)', '↑'), go(1, 'Next latent (j)', '↓'))),
    el('h3', {}, said || label ? name(said || label) : data.fired(f).length ? tokens(data.fired(f)) : `Latent ${f}`),
    said ? el('p', { class: 'hint' }, 'Described by ', name(meta.said?.model || 'a model'), known(meta.said?.score) ? `, detection score ${fixed(meta.said.score, 2)}` : '', label ? [' · words of its texts: ', name(label)] : '')
      : label ? el('p', { class: 'hint' }, `Words that set its texts apart${Number.isNaN(share) ? '' : `; in ${num(100 * share, 2)} % of them`}.`) : null,
    (said || label) && data.fired(f).length ? el('p', { class: 'fires' }, el('span', { class: 'hint' }, 'Peaks on '), tokens(data.fired(f))) : null);
}

// The name by which an address and a colleague know the latent. The clipboard's newer interface is barred from frames.
function copyName() {
  const pane = $('feature');
  getSelection().selectAllChildren(pane.querySelector('.id'));
  if (!document.execCommand('copy')) return; // it is selected at least
  say(`copied ${getSelection()}`);
  pane.querySelector('.copy').replaceChildren('✓');
}

// Put the pieces into the pane; what had the focus there has it again.
function fill(pane, pieces) {
  const held = pane.contains(document.activeElement) ? document.activeElement : null;
  const again = held && held !== pane ? held.getAttribute('aria-label') : null;
  pane.replaceChildren(...pieces);
  pane.scrollTop = 0;
  if (held) ((again && pane.querySelector(`.path [aria-label="${CSS.escape(again)}"]`)) || pane).focus({ preventScroll: true });
}

async function showFeature() {
  const pane = $('feature');
  const { dictionary, feature } = state;
  if (!chosen().features) pane.replaceChildren();
  if (feature === null || !chosen().features) return; // the table is about to choose one
  try {
    const [data, { meta, top, samples }] = await Promise.all([columnsOf(dictionary), latent(dictionary, feature)]);
    if (dictionary !== state.dictionary || feature !== state.feature) return;
    const most = data.max[feature];
    const pieces = [featureHead(data, feature, meta), statistics(data, feature, meta),
      el('div', { class: `pictures ${colour(architectureOf(chosen()))}` },
        el('figure', {}, densityPicture(chosen(), 250, data.density[feature]), el('figcaption', {}, 'log', el('sub', {}, '10'), ' density, among all latents')),
        most > 0 ? el('figure', {}, quantiles(meta, most), el('figcaption', {}, 'active values: middle half, tenths, median')) : null)];
    if (top.length) pieces.push(section('Top texts', run.analysis.whole ? 'where it fires most' : `where it fires most; shades go up to ${sig(most)}`, exampleList(top, most, 'Top texts')));
    else pieces.push(el('p', { class: 'note info' }, data.status[feature] === 1 ? 'This latent never fired on the texts that were analysed.' : 'No texts of this latent are in this file.'));
    if (samples.length) pieces.push(section('Samples', 'of the quantiles of its active values', ...sampleGroups(samples, meta.spread, most)));
    if (meta.corpora.length && meta.active > 0) pieces.push(section('Corpora', 'firing rate, against all others; q is p corrected for all tests', el('div', { class: 'scroll' }, corporaTable(meta.corpora))));
    if (meta.up[0].length || meta.down[0].length) {
      pieces.push(section('Next token', 'effect of its decoder direction on the logits', el('div', { class: 'pair' }, logits(meta.up, 'up'), logits(meta.down, 'down'))));
    }
    if (meta.near[0].length) pieces.push(section('Neighbours', 'cosine of the decoder directions', links(data, meta.near, 'cosine')));
    if (meta.coactive[0].length) pieces.push(section('Fires with', `Jaccard index of the ${run.analysis.whole ? 'texts' : 'tokens'}`, links(data, meta.coactive, 'Jaccard index')));
    fill(pane, pieces);
  } catch (error) {
    pane.replaceChildren(el('p', { class: 'note warning' }, `This latent can't be shown: ${error.message}.`));
  }
}

function startFeature() {
  watch((changed) => {
    if (changed.includes('feature') || changed.includes('dictionary')) showFeature();
  });
  if (state.feature !== null) showFeature();
}
