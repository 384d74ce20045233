// Search in the example texts. They lie packed in the file: they are read when first asked for, a part at a time, so that
// the page goes on working, and kept as numbers of tokens (2 bytes each, 4 where there are more than 65,536 kinds).

const KEPT_WORDS = 32; // whose latents are remembered, also for longer words, which only those can have
const texts = { strings: [], tokens: null, whole: [], there: new Set(), examples: new Map(), found: [], reading: null, share: 0 };

// Part number c of the texts: lower-case strings of whole texts, else tokens, at their places among all.
async function readPart(c) {
  const { bounds, whole } = run.analysis;
  const bytes = await bytesOf(`texts/${c}`);
  if (whole) asJson(bytes).forEach(([text], i) => { texts.whole[bounds[c] + i] = text.toLowerCase(); });
  else {
    const { token } = asColumns(bytes);
    texts.tokens ??= new token.constructor(bounds.at(-1));
    texts.tokens.set(token, bounds[c]);
  }
  texts.there.add(c);
}

// Where the examples of a chunk of latents lie in the texts, and whose they are: those of the top, then the samples.
async function readPlaces(index, chunk) {
  const { tops, samples, start, length } = asColumns(await bytesOf(`d${index}/${chunk}`), ['tops', 'samples', 'start', 'length']);
  const owner = new Uint32Array(start.length);
  let at = 0;
  for (const counts of [tops, samples]) {
    counts.forEach((many, inside) => owner.fill(chunk * run.analysis.chunk + inside, at, at += many));
  }
  return { start, length, owner };
}

// Read what the search in a dictionary's texts needs; `goOn` is told how far it is, and says whether to go on.
async function readTexts(data, goOn) {
  const { bounds, chunk, whole } = run.analysis;
  const chunks = Math.ceil(data.features / chunk);
  const parts = [...bounds.keys()].slice(0, -1).filter((c) => !texts.there.has(c));
  const all = chunks + parts.length;
  let done = 0;
  const examples = [];
  if (!whole) texts.strings = (await vocabulary()).map((string) => string.toLowerCase());
  while (done < all && goOn(done / all)) {
    if (done < chunks) examples.push(await readPlaces(data.index, done));
    else await readPart(parts[done - chunks]);
    done += 1;
  }
  if (done === all) texts.examples.set(data.index, examples);
}

// For every token, what follows from it: next[k * kinds + token] letters of the word end the text, where k did before it
// (Knuth, Morris and Pratt's automaton, a token at a time). Words may begin and end within tokens, and span several.
function automaton(word, strings) {
  const fall = [0];
  const step = (k, letter) => {
    while (k && letter !== word[k]) k = fall[k - 1];
    return letter === word[k] ? k + 1 : 0;
  };
  for (let i = 1; i < word.length; i += 1) fall.push(step(fall[i - 1], word[i]));
  const next = new Uint16Array(word.length * strings.length);
  for (let from = 0; from < word.length; from += 1) {
    strings.forEach((string, token) => {
      let k = from;
      for (let i = 0; i < string.length && k < word.length; i += 1) k = step(k, string[i]);
      next[from * strings.length + token] = k;
    });
  }
  return next;
}

// How many examples of each latent hold the word, if the texts are searched and were read.
function foundInTexts(data, word) {
  const examples = texts.examples.get(data.index);
  if (!$('in-texts').checked || !examples) return null;
  const known = texts.found.filter((entry) => entry.index === data.index && word.includes(entry.word));
  const same = known.find((entry) => entry.word === word);
  if (same) return same.latents;
  const latents = new Uint16Array(data.features);
  const lacking = latents.map((_, f) => Number(known.some((entry) => !entry.latents[f]))); // a part of the word
  const { whole, tokens, strings } = texts;
  const held = run.analysis.whole ? whole.map((text) => text.includes(word)) : null;
  const next = held ? null : automaton(word, strings);
  const [kinds, letters] = [strings.length, word.length];
  for (const { start, length, owner } of examples) {
    for (let e = 0; e < start.length; e += 1) {
      if (lacking[owner[e]]) continue;
      let k = 0;
      if (!held) for (let i = start[e]; i < start[e] + length[e] && k < letters; i += 1) k = next[k * kinds + tokens[i]];
      if (held ? held[start[e]] : k === letters) latents[owner[e]] += 1;
    }
  }
  texts.found.push({ index: data.index, word, latents });
  if (texts.found.length > KEPT_WORDS) texts.found.shift();
  return latents;
}

// Begin to read the texts when a search wants them; no longer wanted (not ticked, another dictionary), it stops.
async function lookIntoTexts() {
  const { data } = table;
  const wanted = () => $('in-texts').checked && table.data === data;
  if (!wanted() || !asked().length || texts.examples.has(data.index) || texts.reading === data) return;
  Object.assign(texts, { reading: data, share: 0 });
  tellCount();
  let failed = '';
  try {
    await readTexts(data, (share) => {
      const tenths = Math.floor(10 * share) / 10;
      if (wanted() && texts.share !== tenths) {
        texts.share = tenths;
        tellCount();
      }
      return wanted();
    });
  } catch (error) {
    failed = ` · the texts can't be searched: ${error.message}.`;
    $('in-texts').checked = false;
  }
  if (texts.reading === data) texts.reading = null;
  refresh({ keep: true });
  $('count').append(failed);
}

function startTexts() {
  $('in-texts-label').hidden = run.analysis.bounds.length < 2;
  $('in-texts').addEventListener('change', () => refresh());
}
