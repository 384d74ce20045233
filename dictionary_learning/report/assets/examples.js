// Examples: the texts that a latent fires on, each token shaded by its activation.

const SHADES = 12;
const LONG_TEXT = 420; // characters of a whole text before it is folded

// The example number `at` of a chunk, with its tokens (or its text).
async function example(chunk, at, actAt, scale) {
  const places = { value: chunk.value[at], corpus: chunk.corpus[at], document: chunk.document[at], position: chunk.position[at] };
  const start = chunk.start[at];
  const { bounds, whole } = run.analysis;
  if (whole) {
    let low = 0;
    for (let i = 0; i + 1 < bounds.length; i += 1) if (bounds[i] <= start) low = i;
    const texts = await part(`texts/${low}`, asJson);
    const [text, cut] = texts[start - bounds[low]];
    return { ...places, text, cut: Boolean(cut) };
  }
  const length = chunk.length[at];
  const size = run.analysis.tokens;
  const ids = [];
  for (let c = Math.floor(start / size); c * size < start + length; c += 1) {
    const { token } = await part(`texts/${c}`, asColumns);
    for (let i = Math.max(start, c * size); i < Math.min(start + length, (c + 1) * size); i += 1) ids.push(token[i - c * size]);
  }
  const strings = await vocabulary();
  const acts = Array.from({ length }, (_, i) => half(chunk.act[actAt + i]) * scale);
  acts[chunk.peak[at]] = places.value; // exact, where the others have three digits
  return { ...places, tokens: ids.map((id) => strings[id]), acts, peak: chunk.peak[at] };
}

// [numbers, values] of the latent at a place in its chunk: lists of all latents lie one behind the other.
function listOf(chunk, key, inside) {
  const lengths = chunk[`${key}_length`];
  const from = lengths.subarray(0, inside).reduce((sum, value) => sum + value, 0);
  const to = from + lengths[inside];
  return [[...chunk[key].subarray(from, to)], [...chunk[`${key}_value`].subarray(from, to)].map(half)];
}

// Everything but its examples.
function detailsOf(chunk, inside, strings) {
  const corpora = [];
  const { tested } = run.analysis;
  for (let c = 0; c < tested.length; c += 1) corpora.push([...chunk.corpora.subarray(4 * (inside * tested.length + c), 4 * (inside * tested.length + c + 1))]);
  const words = (key) => {
    const [numbers, values] = listOf(chunk, key, inside);
    return [numbers.map((number) => strings[number]), values];
  };
  return {
    scale: chunk.scale[inside], active: chunk.active[inside], documents: chunk.documents[inside], std: chunk.std[inside],
    spread: [...chunk.spread.subarray(5 * inside, 5 * inside + 5)], corpora, up: words('up'), down: words('down'),
    near: listOf(chunk, 'near', inside), coactive: listOf(chunk, 'coactive', inside), said: chunk.meta[inside],
  };
}

// {meta, top, samples} of a latent, its examples read.
async function latent(dictionary, feature) {
  const size = run.analysis.chunk;
  const chunk = await part(`d${dictionary}/${Math.floor(feature / size)}`, asColumns);
  const inside = feature % size;
  const meta = detailsOf(chunk, inside, await vocabulary());
  const total = (counts) => counts.reduce((sum, value) => sum + value, 0);
  const topTotal = total(chunk.tops);
  if (!chunk.actAt) { // where the activations of each example begin
    chunk.actAt = new Uint32Array(chunk.length.length + 1);
    chunk.length.forEach((length, i) => { chunk.actAt[i + 1] = chunk.actAt[i] + length; });
  }
  const read = (from, many) => Promise.all(Array.from({ length: many }, (_, i) => example(chunk, from + i, chunk.actAt[from + i], meta.scale)));
  const [top, samples] = await Promise.all([
    read(total(chunk.tops.subarray(0, inside)), chunk.tops[inside]),
    read(topTotal + total(chunk.samples.subarray(0, inside)), chunk.samples[inside]),
  ]);
  return { meta, top, samples };
}

function tokenNode(text, act, most, peak, at) {
  const shade = act > 0 && most > 0 ? Math.max(1, Math.ceil((act / most) * SHADES)) : 0;
  const node = el('span', { class: `t${shade ? ` h${Math.min(shade, SHADES)}` : ''}${peak ? ' peak' : ''}`, 'data-at': at }, visible(text));
  return tells(node, () => [el('code', {}, visible(text.replace(/^ /, '·'))), el('p', {}, act === 0 ? 'does not fire here' : `activation ${num(act, 4)}`)]);
}

// One example as a list item; with the arrow keys one goes along the tokens that it fires on.
function exampleNode(item, most) {
  const { corpora } = run.analysis;
  const facts = el('span', { class: 'where' }, el('b', { class: 'act' }, sig(item.value, 3)),
    corpora.length > 1 && item.corpus < corpora.length ? breakable(corpora[item.corpus]) : null);
  tells(facts, () => [el('p', {}, `document ${count(item.document)}${item.text === undefined ? `, token ${count(item.position)}` : ''}`)]);
  if (item.text !== undefined) return el('li', { class: 'example' }, facts, wholeText(item));
  const words = el('p', { class: 'text', dir: 'auto' }, item.tokens.map((text, i) => tokenNode(i ? text : text.replace(/^ (?=\S)/, ''), item.acts[i], most, i === item.peak, i)));
  const firing = item.acts.map((act, i) => (act > 0 ? i : -1)).filter((i) => i >= 0);
  const node = el('li', { class: 'example', tabindex: 0, 'aria-label': plain(`activation ${num(item.value, 3)} on ${item.tokens[item.peak]}: ${item.tokens.join('')}`) }, facts, words);
  let now = firing.indexOf(item.peak);
  node.addEventListener('keydown', (event) => {
    if (!['ArrowLeft', 'ArrowRight'].includes(event.key) || !firing.length) return;
    event.preventDefault();
    const move = event.key === 'ArrowRight' ? 1 : -1;
    now = node.querySelector('.t.now') ? Math.min(firing.length - 1, Math.max(0, now + move)) : now;
    node.querySelector('.t.now')?.classList.remove('now');
    const token = words.children[firing[now]];
    token.classList.add('now');
    showTip(token);
    say(`${plain(item.tokens[firing[now]])}, activation ${num(item.acts[firing[now]], 3)}`);
  });
  node.addEventListener('blur', () => node.querySelector('.t.now')?.classList.remove('now'));
  return node;
}

function wholeText(item) {
  const end = item.cut ? ' … (cut)' : '';
  if (item.text.length <= LONG_TEXT) return el('p', { class: 'text', dir: 'auto' }, visible(item.text), end);
  const node = el('p', { class: 'text', dir: 'auto' }, visible(item.text.slice(0, LONG_TEXT)), '… ');
  node.append(el('button', { type: 'button', class: 'more', onclick: () => node.replaceChildren(visible(item.text), end) }, 'more'));
  return node;
}

function exampleList(items, most, label) {
  return el('ol', { class: 'examples', 'aria-label': label }, items.map((item) => exampleNode(item, most)));
}
