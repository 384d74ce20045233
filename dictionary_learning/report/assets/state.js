// What is chosen, who wants to know, and how it stands in the address: #trainer_3/512.

let run = null; // what the page knows from the start
const state = { dictionary: 0, feature: null, hook: '', metric: 'loss' };
const watchers = [];

function watch(callback) {
  watchers.push(callback);
}

// Choose, and tell everyone once, with what has changed. The address is replaced, or pushed where one should be able to
// go back from, or left alone (null).
function choose(change, { write = 'replace' } = {}) {
  const changed = Object.keys(change).filter((key) => state[key] !== change[key]);
  if (!changed.length) return;
  Object.assign(state, change);
  if (write && (changed.includes('dictionary') || changed.includes('feature'))) writeAddress(write);
  for (const callback of watchers) callback(changed);
}

function chosen() {
  return run.dictionaries[state.dictionary];
}

function address(dictionary, feature) {
  const start = `#${encodeURIComponent(run.dictionaries[dictionary].name)}`;
  return feature === null ? start : `${start}/${feature}`;
}

function writeAddress(how) {
  try {
    history[`${how}State`](null, '', address(state.dictionary, state.feature));
  } catch {
    // an inner frame of a notebook has no address to write
  }
}

// {dictionary, feature} of the address, as far as they exist.
function readAddress() {
  let [asked, number] = location.hash.slice(1).split('/');
  try {
    asked = decodeURIComponent(asked);
  } catch {
    return {};
  }
  const dictionary = run.dictionaries.findIndex((entry) => entry.name === asked);
  if (dictionary < 0) return {};
  const feature = /^\d+$/.test(number || '') ? Number(number) : null;
  return { dictionary, feature: feature !== null && feature < (run.dictionaries[dictionary].features || 0) ? feature : null };
}

function storedTheme(theme) {
  try {
    if (theme) localStorage.setItem('sae-factory-theme', theme);
    return localStorage.getItem('sae-factory-theme');
  } catch {
    return theme || null; // private windows and inner frames may have no storage
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

function isDark() {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
}

function toggleTheme() {
  setTheme(storedTheme(isDark() ? 'light' : 'dark') || (isDark() ? 'light' : 'dark'));
}

function say(text) {
  $('said').textContent = text;
}
