// The latents of a dictionary as columns, and which of them a search and the filters leave, in which order.

const STATUSES = ['', 'dead', 'dense'];
const NO_CORPUS = 255;
const WORDS_SHOWN = 3;

const TABLE_COLUMNS = [
  { key: 'feature', heading: '#', of: (data, f) => f, down: false },
  { key: 'label', heading: 'Fires on', of: (data, f) => data.words(f), down: false },
  { key: 'density', heading: 'Density', of: (data, f) => data.density[f], down: true, number: true },
  { key: 'max', heading: 'Max', of: (data, f) => data.max[f], down: true, number: true },
  { key: 'ablation_loss', heading: 'Δ loss', of: (data, f) => data.ablation_loss[f], down: true, number: true, wide: true, title: 'Mean rise of the next-token loss, in nats, when it is ablated where it fires' },
  { key: 'corpus', heading: 'Corpus', of: (data, f) => data.corpusName(f), down: false, wide: true },
  { key: 'promotes', heading: 'Promotes', of: (data, f) => data.meta.promoted[f].join(' '), down: false, wide: true },
];

function vocabulary() {
  return part('vocabulary', asJson);
}

// Everything that the table of a dictionary's latents needs.
async function columnsOf(index) {
  const [data, tokens] = await Promise.all([part(`d${index}/table`, asColumns), vocabulary()]);
  if (data.ready) return data;
  const features = data.density.length;
  const each = data.fires.length / features;
  data.features = features;
  data.index = index;
  // The tokens that its best examples peak at, the most frequent first.
  data.fired = (f) => [...data.fires.subarray(f * each, (f + 1) * each)].filter((number) => number > 0).map((number) => tokens[number - 1]);
  data.said = (f) => data.meta.description[f] || data.meta.label[f];
  data.words = (f) => data.said(f) || data.fired(f).slice(0, WORDS_SHOWN).join(' ');
  data.corpusName = (f) => (data.corpus[f] === NO_CORPUS ? '' : run.analysis.corpora[data.corpus[f]]);
  // What is searched: what the table shows first, then what it fires on too, then what it promotes too.
  const more = (texts, words) => texts.map((text, f) => `${text}\n${words(f).join('\n').toLowerCase()}`);
  data.named = Array.from({ length: features }, (_, f) => [f, data.meta.description[f] || '', data.meta.label[f]].join('\n').toLowerCase());
  data.own = more(data.named, data.fired);
  data.text = more(data.own, (f) => data.meta.promoted[f]);
  data.ready = true;
  return data;
}

const query = { text: '', corpus: '', status: '', key: 'feature', down: false };

function asked() {
  return query.text.toLowerCase().split(/\s+/).filter(Boolean);
}

// The tokens for which a search found a latent, where what the table shows of it does not say so.
function reasons(data, f) {
  const words = asked();
  if (!words.length || !data.said(f) || words.every((word) => data.named[f].includes(word))) return [];
  const [fires, promotes] = [data.fired(f), data.meta.promoted[f]].map((list) => list.filter((token) => words.some((word) => token.toLowerCase().includes(word))));
  return fires.length ? tokens(fires.slice(0, 2)) : tokens(promotes.slice(0, 2), 'quiet');
}

// In how many of its examples a search found what a latent's names lack; 0 where they lack nothing.
function inTextsAlone(data, f, words = asked(), inTexts = words.map((word) => foundInTexts(data, word))) {
  const times = inTexts.filter((_, i) => !data.text[f].includes(words[i])).map((latents) => latents?.[f] ?? 0);
  return times.length ? Math.min(...times) : 0;
}

// The numbers of the latents that are shown, in order.
function shownLatents(data) {
  const words = asked();
  const inTexts = words.map((word) => foundInTexts(data, word));
  const corpus = query.corpus === '' ? null : Number(query.corpus);
  const fits = (f) => {
    if (corpus !== null && data.corpus[f] !== corpus) return false;
    if (query.status === 'alive' ? data.status[f] === 1 : query.status && data.status[f] !== STATUSES.indexOf(query.status)) return false;
    return words.every((word, i) => data.text[f].includes(word) || inTexts[i]?.[f]);
  };
  const found = [];
  for (let f = 0; f < data.features; f += 1) if (fits(f)) found.push(f);
  const column = TABLE_COLUMNS.find(({ key }) => key === query.key);
  const values = new Map(found.map((f) => [f, column.of(data, f)]));
  const sign = query.down ? -1 : 1;
  const missing = (value) => value === '' || Number.isNaN(value);
  // As long as no column was chosen, what a latent is called counts before what it fires on, that before what it
  // promotes, and that before its texts, of which many count before few.
  const ranked = words.length > 0 && query.key === 'feature' && !query.down;
  const has = (texts, f) => words.every((word) => texts[f].includes(word));
  const rank = new Map(found.map((f) => [f, !ranked || has(data.named, f) ? 0 : has(data.own, f) ? 1 : has(data.text, f) ? 2 : 3 + 1 / (1 + inTextsAlone(data, f, words, inTexts))]));
  const exact = /^\d+$/.test(query.text.trim()) ? Number(query.text) : -1; // a number asked for stands first
  return found.sort((a, b) => {
    if (a === exact || b === exact) return a === exact ? -1 : 1;
    if (rank.get(a) !== rank.get(b)) return rank.get(a) - rank.get(b);
    const [left, right] = [values.get(a), values.get(b)];
    if (missing(left) || missing(right)) return missing(left) - missing(right) || a - b;
    if (left === right) return a - b;
    if (typeof left === 'string') return sign * (left.toLowerCase() < right.toLowerCase() ? -1 : 1) || a - b;
    return sign * (left - right);
  });
}
