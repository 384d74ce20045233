// Elements and words. Texts of a corpus only ever become text nodes; what can't be seen in them is made visible.

const SVG = 'http://www.w3.org/2000/svg';

// Characters that would hide, reorder or break a line: controls, marks of direction, separators, lone surrogates, tags.
// Joiners (200C, 200D) stay, since scripts and emoji are spelt with them.
const HIDDEN = new RegExp(
  '[\\u0000-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u180e\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb]' +
    '|[\\ud800-\\udbff](?![\\udc00-\\udfff])|(?<![\\ud800-\\udbff])[\\udc00-\\udfff]|\\udb40[\\udc00-\\udc7f]', 'g');
const PICTURES = { '\n': '⏎', '\r': '␍', '\t': '⇥', '\u007f': '␡' };

function picture(hidden) {
  const code = hidden.codePointAt(0);
  if (PICTURES[hidden]) return PICTURES[hidden];
  return code < 32 ? String.fromCodePoint(0x2400 + code) : `U+${code.toString(16).toUpperCase().padStart(4, '0')}`;
}

// A text as a string in which everything can be seen.
function plain(text) {
  return String(text).replace(HIDDEN, picture);
}

// A text as nodes, what could not be seen set apart.
function visible(text) {
  const out = document.createDocumentFragment();
  let at = 0;
  for (const match of String(text).matchAll(HIDDEN)) {
    if (match.index > at) out.append(text.slice(at, match.index));
    out.append(el('span', { class: PICTURES[match[0]] ? 'space-char' : 'hidden-char' }, picture(match[0])));
    at = match.index + match[0].length;
  }
  out.append(String(text).slice(at));
  return out;
}

// A name from outside, in a direction of its own.
function name(text) {
  return el('bdi', {}, visible(text));
}

// A name that may be broken behind its underscores, slashes and dots, but not within a number.
function breakable(text) {
  return el('bdi', {}, String(text).split(/(?<=[_/])|(?<=\.)(?!\d)/).flatMap((piece, i) => [i ? el('wbr') : null, visible(piece)]).filter(Boolean));
}

function put(node, given, children) {
  for (const [key, value] of Object.entries(given)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? '' : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function el(tag, given = {}, ...children) {
  return put(document.createElement(tag), given, children);
}

function svg(tag, given = {}, ...children) {
  return put(document.createElementNS(SVG, tag), given, children);
}

function $(id) {
  return document.getElementById(id);
}

function known(value) {
  return typeof value === 'number' && Number.isFinite(value);
}

// A number with so many significant digits, without a tail of zeros.
function num(value, digits = 3) {
  if (!known(value)) return '–';
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6)) {
    return exponent(Number(value.toPrecision(digits)).toExponential());
  }
  return Number(value.toPrecision(digits)).toLocaleString('en', { maximumSignificantDigits: digits }).replace('-', '−');
}

// The same with its tail of zeros, so that the numbers of a column can be compared.
function sig(value, digits = 3) {
  if (!known(value) || value === 0) return num(value);
  if (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6) return exponent(value.toExponential(digits - 1));
  const rounded = Number(value.toPrecision(digits));
  const decimals = Math.max(0, digits - 1 - Math.floor(Math.log10(Math.abs(rounded))));
  return rounded.toLocaleString('en', { minimumFractionDigits: decimals, maximumFractionDigits: decimals }).replace('-', '−');
}

function exponent(text) {
  return text.replace('e-', 'e−').replace('e+', 'e').replace(/^-/, '−');
}

function fixed(value, digits) {
  return known(value) ? value.toFixed(digits).replace('-', '−') : '–';
}

function count(value) {
  return known(value) ? Math.round(value).toLocaleString('en') : '–';
}

// A firing rate as a reader says it.
function oneIn(density) {
  if (!(density > 0)) return 'never';
  return density >= 0.1 ? `${num(100 * density, 3)} %` : `1 in ${count(1 / density)}`;
}

function plural(value, one, many = `${one}s`) {
  return `${count(value)} ${value === 1 ? one : many}`;
}
