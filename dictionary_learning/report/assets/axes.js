// Scales, ticks and the frame of a chart. A chart is drawn again when its box or what is chosen changes.

const NARROW = 520;

function linear(domain, range) {
  const [a, b] = domain;
  const at = (value) => range[0] + ((value - a) / (b - a || 1)) * (range[1] - range[0]);
  at.ticks = (wanted) => {
    const rough = (b - a) / Math.max(1, wanted);
    const unit = 10 ** Math.floor(Math.log10(rough || 1));
    const step = [1, 2, 5, 10].map((m) => m * unit).find((s) => s >= rough) || unit;
    const out = [];
    for (let i = Math.ceil(a / step - 1e-9); i * step <= b + step * 1e-9; i += 1) out.push(Number((i * step).toPrecision(12)));
    return out;
  };
  return at;
}

function logarithmic(domain, range) {
  const inner = linear(domain.map(Math.log10), range);
  const at = (value) => inner(Math.log10(value));
  at.ticks = (wanted) => {
    const [low, high] = domain.map(Math.log10);
    const of = (mantissas) => {
      const out = [];
      for (let e = Math.floor(low); e <= high; e += 1) for (const m of mantissas) out.push(Number((m * 10 ** e).toPrecision(6)));
      return out.filter((v) => Math.log10(v) >= low - 1e-9 && Math.log10(v) <= high + 1e-9);
    };
    const choices = [[1, 1.5, 2, 3, 4, 5, 6, 8], [1, 2, 3, 5], [1, 3], [1]].map(of);
    const fits = choices.find((ticks) => ticks.length <= wanted + 1) || choices.at(-1);
    return fits.length < 2 ? linear(domain, range).ticks(wanted) : fits;
  };
  at.text = (value) => (value >= 1e4 ? tickText(value, [value]) : num(value, 2));
  return at;
}

function extent(values, fallback = [0, 1]) {
  const there = values.filter(known);
  if (!there.length) return fallback;
  return [Math.min(...there), Math.max(...there)];
}

function padded([low, high], share = 0.06) {
  const room = (high - low || Math.abs(high) || 1) * share;
  return [low - room, high + room];
}

function tickText(value, ticks) {
  const step = ticks.length > 1 ? Math.min(...ticks.slice(1).map((t, i) => Math.abs(t - ticks[i]))) : Math.abs(value) || 1;
  if (Math.abs(value) >= 1e6) return `${num(value / 1e6, 3)} M`;
  if (Math.abs(value) >= 1e4) return `${num(value / 1e3, 3)} k`;
  if (value !== 0 && step < 1e-4) return num(value, 2);
  return value.toFixed(Math.min(5, Math.max(0, -Math.floor(Math.log10(step) + 1e-9)))).replace('-', '−');
}

// Grid lines, ticks and names of the axes.
function frame(box, x, y, { xName, yName, xTicks = 6, yTicks = 5 } = {}) {
  const out = svg('g', { class: 'frame' });
  const xs = x.ticks(xTicks);
  const ys = y.ticks(yTicks);
  for (const tick of ys) {
    out.append(svg('line', { class: 'rule', x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) }));
    out.append(svg('text', { class: 'tick', x: box.left - 8, y: y(tick), dy: '0.32em', 'text-anchor': 'end' }, (y.text || tickText)(tick, ys)));
  }
  for (const tick of xs) {
    out.append(svg('line', { class: 'notch', x1: x(tick), x2: x(tick), y1: box.bottom, y2: box.bottom + 4 }));
    out.append(svg('text', { class: 'tick', x: x(tick), y: box.bottom + 17, 'text-anchor': 'middle' }, (x.text || tickText)(tick, xs)));
  }
  out.append(svg('line', { class: 'base', x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  if (xName) out.append(svg('text', { class: 'axis', x: box.right, y: box.bottom + 33, 'text-anchor': 'end' }, xName));
  if (yName) out.append(svg('text', { class: 'axis', x: box.left - 8, y: box.top - 10, 'text-anchor': 'start' }, yName));
  return out;
}

// Draws into a container, and again when its width changes; the function that draws again.
function chart(node, height, draw, label) {
  let width = 0;
  const again = () => {
    width = Math.floor(node.clientWidth) || 600;
    const high = typeof height === 'function' ? height(width) : height;
    const picture_ = svg('svg', { viewBox: `0 0 ${width} ${high}`, width, height: high, role: 'group', 'aria-label': label });
    draw(picture_, width, high);
    node.replaceChildren(picture_);
  };
  new ResizeObserver(() => {
    if (Math.floor(node.clientWidth) !== width) again();
  }).observe(node);
  return again;
}

// Shapes and colours of the architectures: each differs from the others in both.
const SHAPES = [
  (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0Z`,
  (r) => `M${-r * 0.9},${-r * 0.9}h${r * 1.8}v${r * 1.8}h${-r * 1.8}Z`,
  (r) => `M0,${-r * 1.2}L${r * 1.15},${r * 0.85}H${-r * 1.15}Z`,
  (r) => `M0,${-r * 1.3}L${r * 1.3},0L0,${r * 1.3}L${-r * 1.3},0Z`,
  (r) => `M0,${r * 1.2}L${r * 1.15},${-r * 0.85}H${-r * 1.15}Z`,
  (r) => `M${-r * 0.4},${-r * 1.2}h${r * 0.8}v${r * 0.8}h${r * 0.8}v${r * 0.8}h${-r * 0.8}v${r * 0.8}h${-r * 0.8}v${-r * 0.8}h${-r * 0.8}v${-r * 0.8}h${r * 0.8}Z`,
];
const COLOURS = 7;

function architectureOf(dictionary) {
  return [...new Set(run.dictionaries.map((entry) => entry.architecture))].indexOf(dictionary.architecture);
}

function shape(index, radius) {
  return SHAPES[index % SHAPES.length](radius);
}

function colour(index) {
  return `s${index % COLOURS}`;
}
