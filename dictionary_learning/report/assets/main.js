// Begin: read what the page knows from the start, and let each part of it show that.

// The best dictionary; where that one was not analysed, the best of those that were.
function firstChoice() {
  const quality = (entry) => entry.frac_recovered ?? entry.frac_variance_explained ?? -Infinity;
  const candidates = run.dictionaries.map((entry, index) => ({ entry, index })).filter(({ entry }) => entry.features || !run.analysis);
  const best = candidates.find(({ entry }) => entry.name === run.best);
  return (best || candidates.sort((a, b) => quality(b.entry) - quality(a.entry))[0])?.index ?? 0;
}

async function start() {
  const theme = storedTheme();
  if (theme === 'light' || theme === 'dark') setTheme(theme);
  run = await part('run', asJson);
  Object.assign(state, { dictionary: firstChoice() }, readAddress());
  if (run.only) Object.assign(state, run.only);
  document.body.classList.toggle('only', Boolean(run.only));
  if (!run.only) {
    for (const begin of [startHead, startFront, startDictionaries, startCurves, startHistograms, startTable]) begin();
    window.addEventListener('hashchange', () => {
      choose({ dictionary: firstChoice(), feature: null, ...readAddress() }, { write: null });
      bringFeature();
    });
  }
  startFeature();
  startKeys();
  startTooltips();
  // An address leads to its latent, but a reader who loads the page again stays where they were.
  if (!run.only && known(readAddress().feature) && performance.getEntriesByType('navigation')[0]?.type === 'navigate') $('features').scrollIntoView();
  document.body.dataset.ready = 'yes';
}

start().catch((error) => {
  $('notes').append(el('p', { class: 'note warning' }, `This report can't be shown: ${error.message}. It needs a browser of 2024 or later.`));
  throw error;
});
