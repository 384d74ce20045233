// The table of dictionaries: sorted by any column, a row chosen as a point is.

const DICTIONARY_COLUMNS = [
  ['Dictionary', 'name'], ['Architecture', 'architecture', 'wide'], ['Hook point', 'hook_point', 'wide'], ['Sparsity', 'sparsity'],
  ['Latents', 'width', 'wide', count], ['L0', 'l0', 'number', (v) => fixed(v, 2)], ['Loss recovered', 'frac_recovered', 'number', (v) => fixed(v, 4)],
  ['Explained variance', 'frac_variance_explained', 'number', (v) => fixed(v, 4)], ['KL', 'kl', 'wide', (v) => fixed(v, 4)],
  ['Alive', 'frac_alive', 'number', (v) => fixed(v, 3)], ['Learning rate', 'lr', 'wide', (v) => num(v, 3)], ['Seed', 'seed', 'wide', (v) => num(v)],
];
const sorted = { key: null, down: false };

// Without what no dictionary has, and what the head says of all of them.
function dictionaryColumns() {
  const values = (key) => [...new Set(run.dictionaries.map((entry) => entry[key]))];
  return DICTIONARY_COLUMNS.filter(([, key]) => {
    if (['hook_point', 'width', 'seed'].includes(key)) return values(key).length > 1;
    return values(key).some((value) => value !== null);
  });
}

function ordered(entries) {
  if (!sorted.key) return entries;
  const sign = sorted.down ? -1 : 1;
  const natural = new Intl.Collator('en', { numeric: true });
  const rank = (a, b) => (typeof a === 'string' || typeof b === 'string' ? natural.compare(a ?? '', b ?? '') : a - b);
  return [...entries].sort((a, b) => {
    const [left, right] = [a[sorted.key], b[sorted.key]];
    if (left === null || right === null) return (left === null) - (right === null); // what is not known stands last
    return sign * rank(left, right);
  });
}

function dictionaryRow(entry) {
  const on = entry.index === state.dictionary;
  const which = architectureOf(entry);
  const cells = dictionaryColumns().map(([, key, kind, show]) => {
    const value = entry[key];
    if (key === 'name') {
      return el('th', { scope: 'row' },
        el('button', { type: 'button', 'data-dictionary': entry.index, 'aria-pressed': String(on) },
          svg('svg', { width: 14, height: 14, viewBox: '-8 -8 16 16', class: colour(which), 'aria-hidden': 'true' }, svg('path', { d: shape(which, 5.5) })), name(value)),
        onFront(entry) ? el('abbr', { class: 'star', title: 'on the front' }, '★') : null,
        entry.stopped ? el('abbr', { class: 'stopped', title: plain(entry.stopped) }, 'stopped') : null);
    }
    return el('td', { class: show ? `number ${kind}` : kind }, show ? show(value) : name(value ?? '–'));
  });
  return el('tr', { class: on ? 'on' : null, 'data-dictionary': entry.index }, cells);
}

function startDictionaries() {
  const table = $('dictionaries');
  const head = el('tr', {}, dictionaryColumns().map(([heading, key, kind, show]) =>
    el('th', { scope: 'col', class: `${show ? 'number ' : ''}${kind || ''}`, 'data-key': key, 'aria-sort': 'none' },
      el('button', { type: 'button', onclick: () => {
        sorted.down = sorted.key === key ? !sorted.down : Boolean(show);
        sorted.key = key;
        draw();
      } }, heading))));
  const body = el('tbody');
  table.append(el('thead', {}, head), body);
  const draw = () => {
    for (const cell of head.children) {
      cell.setAttribute('aria-sort', cell.dataset.key === sorted.key ? (sorted.down ? 'descending' : 'ascending') : 'none');
    }
    body.replaceChildren(...ordered(shownDictionaries()).map(dictionaryRow));
    const [box, row] = [table.parentElement, body.querySelector('.on')];
    if (row && (row.offsetTop < box.scrollTop + row.offsetHeight || row.offsetTop + row.offsetHeight > box.scrollTop + box.clientHeight)) {
      box.scrollTop = row.offsetTop - box.clientHeight / 2;
    }
  };
  body.addEventListener('click', (event) => {
    const row = event.target.closest('[data-dictionary]');
    if (!row) return;
    choose({ dictionary: Number(row.dataset.dictionary), feature: null });
    body.querySelector(`button[data-dictionary="${row.dataset.dictionary}"]`)?.focus({ preventScroll: true });
  });
  watch((changed) => {
    if (changed.includes('dictionary') || changed.includes('hook')) draw();
  });
  draw();
}
