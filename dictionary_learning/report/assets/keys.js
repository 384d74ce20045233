// The keyboard, and how one gets from the table to a latent and back.

const KEYS = [
  ['/', 'search the latents'], ['x', 'search their texts too, or not'], ['j k or ↓ ↑', 'next, previous latent'], ['Enter', 'from the table into the latent'], ['Esc', 'back to the table; clear the search'],
  ['[ ]', 'previous, next dictionary'], ['c', 'copy the name of the latent'], ['← →', 'along the tokens that an example fires on'], ['t', 'light or dark'], ['?', 'this help'],
];

function typing(node) {
  return node.matches?.('input:not([type=checkbox]), select, textarea');
}

function toTable() {
  $('table').focus({ preventScroll: true });
  $('table').scrollIntoView({ block: 'nearest' });
}

// On a narrow screen the latent stands below the table: go there.
function bringFeature() {
  if (matchMedia('(max-width: 900px)').matches) $('feature').scrollIntoView({ block: 'start' });
}

function nextDictionary(by) {
  const many = run.dictionaries.length;
  choose({ dictionary: (state.dictionary + by + many) % many, feature: null });
  say(plain(chosen().name));
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $('help').open) return;
  const inSearch = event.target === $('search');
  const inTable = $('table').contains(event.target);
  const act = (action) => {
    event.preventDefault();
    action();
  };
  if (event.key === 'Escape') {
    hideTip();
    if (inSearch && $('search').value) act(() => { $('search').value = ''; $('search').dispatchEvent(new Event('input')); });
    else if (inSearch || $('feature').contains(event.target)) act(toTable);
    return;
  }
  if (inSearch && ['ArrowDown', 'Enter'].includes(event.key)) {
    act(() => {
      if (table.rows.length) choose({ feature: table.rows[0] });
      toTable();
    });
    return;
  }
  if (typing(event.target)) return;
  const page = Math.max(1, Math.floor((table.box?.clientHeight || ROW) / ROW) - 1);
  const moves = { j: 1, k: -1, ...(inTable ? { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity } : {}) };
  if (moves[event.key] && table.data) act(() => step(Math.max(-1e9, Math.min(1e9, moves[event.key]))));
  else if (event.key === 'Enter' && event.target === $('table')) act(() => { $('feature').focus({ preventScroll: true }); bringFeature(); });
  else if (event.key === '/') act(() => { $('search').focus(); });
  else if (event.key === 'x' && !$('in-texts-label').hidden) act(() => $('in-texts').click());
  else if (event.key === '?') act(() => $('help').showModal());
  else if (event.key === 'c' && $('feature').querySelector('.id')) act(copyName);
  else if (event.key === 't') act(toggleTheme);
  else if (event.key === '[' || event.key === ']') act(() => nextDictionary(event.key === ']' ? 1 : -1));
}

function startKeys() {
  document.addEventListener('keydown', onKey);
  $('keys').append(...KEYS.map(([keys, does]) => el('div', {}, el('dt', {}, keys.split(' ').flatMap((key, i) => [i ? ' ' : '', key === 'or' ? 'or' : el('kbd', {}, key)])), el('dd', {}, does))));
  $('help-open').addEventListener('click', () => $('help').showModal());
  $('theme').addEventListener('click', toggleTheme);
  for (const button of document.querySelectorAll('[data-to]')) {
    button.addEventListener('click', () => $(button.dataset.to).scrollIntoView({ block: 'start', behavior: matchMedia('(prefers-reduced-motion: reduce)').matches ? 'auto' : 'smooth' }));
  }
  document.querySelector('[data-skip]').addEventListener('click', (event) => {
    event.preventDefault();
    $('features').scrollIntoView();
    toTable();
  });
}
