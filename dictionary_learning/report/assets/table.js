// The table of latents. Only the rows in sight exist; the rest is the height of an empty box.

const ROW = 34; // pixels, as in feature.css
const HEAD = 32;
const BEYOND = 8; // rows kept above and below those in sight
const table = { data: null, rows: [], body: null, box: null, shown: [0, 0] };

function bar(share) {
  const rule = svg('svg', { class: 'mini', width: 36, height: 6, 'aria-hidden': 'true' });
  rule.append(svg('rect', { class: 'mini-all', width: 36, height: 6, rx: 3 }), svg('rect', { class: 'mini-part', width: Math.max(0, Math.min(1, share)) * 36, height: 6, rx: 3 }));
  return rule;
}

function tokens(list, kind = '') {
  return list.map((text) => el('span', { class: `tok ${kind}` }, el('bdi', {}, visible(text.replace(/^ /, '') || '·'))));
}

function cell(column, data, f) {
  const kind = `cell c-${column.key}${column.number ? ' number' : ''}${column.wide ? ' wide' : ''}`;
  const of = (...children) => el('div', { class: kind, role: 'gridcell' }, ...children);
  switch (column.key) {
    case 'feature': return of(String(f));
    case 'label': {
      const state_ = STATUSES[data.status[f]];
      const badge = state_ ? el('span', { class: `badge ${state_}` }, state_) : null;
      const times = inTextsAlone(data, f);
      const found = times ? el('span', { class: 'badge found', title: 'examples that hold what was searched for' }, `in ${plural(times, 'text')}`) : null;
      return data.said(f) ? of(badge, found, el('span', { class: data.meta.description[f] ? 'said' : 'words' }, name(data.said(f))), ' ', ...reasons(data, f)) : of(badge, found, ...tokens(data.fired(f)));
    }
    case 'density': return of(data.density[f] > 0 ? bar(1 + Math.log10(data.density[f]) / 6) : null, el('span', {}, data.density[f] > 0 ? sig(data.density[f], 2) : '0'));
    case 'max': return of(data.density[f] > 0 ? sig(data.max[f], 3) : '–');
    case 'ablation_loss': return of(sig(data.ablation_loss[f], 2));
    case 'corpus': return of(name(data.corpusName(f)));
    default: return of(...tokens(data.meta.promoted[f], 'quiet'));
  }
}

function tableColumns(data) {
  return TABLE_COLUMNS.filter(({ key }) => {
    if (key === 'promotes') return data.meta.promoted.some((list) => list.length);
    if (key === 'corpus') return run.analysis.tested.length > 1;
    if (key === 'ablation_loss') return data.ablation_loss.some((value) => !Number.isNaN(value));
    return true;
  });
}

function paint() {
  const { data, rows, box, body } = table;
  if (!data) return; // of another dictionary, on its way
  const from = Math.max(0, Math.floor(box.scrollTop / ROW) - BEYOND);
  const to = Math.min(rows.length, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + BEYOND);
  table.shown = [from, to];
  body.style.height = `${rows.length * ROW}px`;
  const columns = tableColumns(data);
  body.replaceChildren(...rows.slice(from, to).map((f, i) => {
    const on = f === state.feature;
    const row = el('div', { class: `row${on ? ' on' : ''}`, role: 'row', id: `row-${f}`, 'data-feature': f, 'aria-rowindex': from + i + 2, 'aria-selected': String(on) },
      columns.map((column) => cell(column, data, f)));
    row.style.top = `${(from + i) * ROW}px`;
    return row;
  }));
  if (rows.includes(state.feature)) $('table').setAttribute('aria-activedescendant', `row-${state.feature}`);
  else $('table').removeAttribute('aria-activedescendant');
}

function heads(data) {
  const columns = tableColumns(data);
  return el('div', { class: 'row head', role: 'row', 'aria-rowindex': 1 }, columns.map((column) =>
    el('div', { class: `cell c-${column.key}${column.number ? ' number' : ''}${column.wide ? ' wide' : ''}`, role: 'columnheader', 'data-key': column.key,
      title: column.title, 'aria-sort': query.key === column.key ? (query.down ? 'descending' : 'ascending') : 'none' },
      el('button', { type: 'button', onclick: () => sortBy(column) }, column.heading))));
}

function sortBy(column) {
  query.down = query.key === column.key ? !query.down : column.down;
  query.key = column.key;
  refresh();
  say(`sorted by ${column.heading}, ${query.down ? 'descending' : 'ascending'}`);
}

// Search, filter and sort again; where the scroll stays only if asked to.
function refresh({ keep = false } = {}) {
  const { data, box } = table;
  if (!data) return;
  table.rows = shownLatents(data);
  $('table').setAttribute('aria-rowcount', table.rows.length + 1);
  const held = box.contains(document.activeElement) ? document.activeElement.closest('[data-key]')?.dataset.key : null;
  box.firstElementChild.replaceWith(heads(data));
  if (held) box.querySelector(`[data-key="${held}"] button`)?.focus({ preventScroll: true });
  if (!keep) box.scrollTop = 0;
  paint();
  tellCount();
  lookIntoTexts();
}

// How many are shown, and what the texts have to do with it.
function tellCount() {
  const { data, rows } = table;
  const many = rows.length === data.features ? plural(data.features, 'latent') : `${count(rows.length)} of ${plural(data.features, 'latent')}`;
  const words = asked();
  const byTexts = $('in-texts').checked ? rows.filter((f) => !words.every((word) => data.text[f].includes(word))).length : 0;
  const hint = words.length && !$('in-texts').checked && !$('in-texts-label').hidden ? ' Tick “in texts” to search their example texts too.' : '';
  const reading = texts.reading === data && $('in-texts').checked ? ` · reading their texts, ${num(100 * texts.share)} %` : '';
  $('count').textContent = (rows.length ? `${many}${byTexts ? `, ${count(byTexts)} by their texts` : ''}` : `No latent matches.${hint}`) + reading;
}

function reveal(feature) {
  const at = table.rows.indexOf(feature);
  if (at < 0) return;
  const { box } = table;
  if (at * ROW < box.scrollTop) box.scrollTop = at * ROW;
  else if ((at + 1) * ROW > box.scrollTop + box.clientHeight - HEAD) box.scrollTop = (at + 1) * ROW - box.clientHeight + HEAD;
}

// Go so many rows down (or up); the latent that is now chosen.
function step(by) {
  const { rows } = table;
  if (!rows.length) return;
  const at = rows.indexOf(state.feature);
  const next = at < 0 ? (by > 0 ? 0 : rows.length - 1) : Math.min(rows.length - 1, Math.max(0, at + by));
  choose({ feature: rows[next] });
}

// What one begins with: a latent that fires, and not everywhere.
function chooseFirst() {
  const { data, rows } = table;
  if (!data) return;
  const first = rows.find((f) => !data.status[f]) ?? rows.find((f) => data.status[f] !== 1) ?? rows[0];
  if (first !== undefined) choose({ feature: first }, { write: null });
}

async function showTable() {
  Object.assign(table, { data: null, rows: [] }); // whose latents are not those of the dictionary that is now chosen
  const entry = chosen();
  const there = Boolean(entry.features);
  $('explorer').classList.toggle('none', !there);
  $('dictionary').value = state.dictionary;
  if (!there) {
    $('count').replaceChildren('This dictionary was not analysed. All of them: ', el('code', {}, 'sae-factory analyze RUN --overwrite'));
    return;
  }
  const index = state.dictionary;
  const data = await columnsOf(index);
  if (index !== state.dictionary) return; // another was chosen meanwhile
  table.data = data;
  if (!$('table').firstElementChild) {
    table.body = el('div', { class: 'body', role: 'rowgroup' });
    table.box = el('div', { class: 'rows', role: 'presentation' }, el('div'), table.body);
    $('table').append(table.box);
    table.box.addEventListener('scroll', paint, { passive: true });
    new ResizeObserver(paint).observe(table.box);
    table.body.addEventListener('click', (event) => {
      const row = event.target.closest('.row');
      if (!row || !table.data) return;
      choose({ feature: Number(row.dataset.feature) });
      bringFeature();
    });
  }
  refresh();
  if (state.feature === null) chooseFirst();
  else reveal(state.feature);
}

function startTable() {
  if (!run.dictionaries.some((entry) => entry.features)) {
    $('features').hidden = true;
    document.querySelector('[data-to="features"]').hidden = true;
    return;
  }
  $('dictionary').append(...run.dictionaries.map((entry, index) =>
    el('option', { value: index }, plain(`${entry.name} · ${entry.architecture} ${entry.sparsity}${entry.features ? '' : ' (not analysed)'}`))));
  $('dictionary').addEventListener('change', (event) => choose({ dictionary: Number(event.target.value), feature: null }));
  $('status').append(...[['', 'all latents'], ['alive', 'alive'], ['dead', 'dead'], ['dense', 'dense']].map(([value, text]) => el('option', { value }, text)));
  const { tested, corpora } = run.analysis;
  $('corpus').hidden = tested.length < 2;
  $('corpus').append(el('option', { value: '' }, 'all corpora'), ...tested.map((label) => el('option', { value: corpora.indexOf(label) }, plain(label))));
  const filter = (key, node) => node.addEventListener('input', () => {
    query[key] = node.value;
    refresh();
  });
  filter('text', $('search'));
  filter('corpus', $('corpus'));
  filter('status', $('status'));
  startTexts();
  watch((changed) => {
    if (changed.includes('dictionary')) showTable();
    else if (changed.includes('feature') && state.feature === null && chosen().features) chooseFirst();
    else if (changed.includes('feature') && table.data) {
      reveal(state.feature);
      paint();
    }
  });
  showTable();
}
