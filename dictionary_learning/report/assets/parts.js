// The lazy parts of the file: base64 of gzip in inert elements, unpacked when asked for and kept while they are new.

const KEPT_PARTS = 160;
const SIZES = { u1: 1, u2: 2, u4: 4, f2: 2, f4: 4 };
const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f2: Uint16Array, f4: Float32Array };
const unpacked = new Map();

const wholePage = new Promise((done) => {
  if (document.readyState !== 'loading') done();
  else document.addEventListener('DOMContentLoaded', done, { once: true });
});

async function bytesOf(id) {
  let node = $(id);
  if (!node) {
    await wholePage; // the browser may still read the file
    node = $(id);
  }
  if (!node) throw new Error(`the file lacks its part ${id}`);
  const text = atob(node.textContent);
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function asJson(bytes) {
  return JSON.parse(new TextDecoder().decode(bytes));
}

// {meta, and each column by its name, or those that are wanted}. A column's bytes are transposed: first bytes of all
// numbers, then second, ...
function asColumns(bytes, wanted = null) {
  const length = new DataView(bytes.buffer).getUint32(0, true);
  const { meta, columns } = asJson(bytes.subarray(4, 4 + length));
  const out = { meta };
  let at = 4 + length;
  for (const [key, type, size] of columns) {
    const width = SIZES[type];
    if (wanted && !wanted.includes(key)) {
      at += size * width;
      continue;
    }
    const plainBytes = new Uint8Array(size * width);
    for (let k = 0; k < width; k += 1) {
      for (let i = 0; i < size; i += 1) plainBytes[i * width + k] = bytes[at + k * size + i];
    }
    at += size * width;
    out[key] = new ARRAYS[type](plainBytes.buffer);
  }
  return out;
}

// A half-precision number from its bits (not every browser has Float16Array yet).
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

function part(id, read) {
  if (unpacked.has(id)) {
    const found = unpacked.get(id);
    unpacked.delete(id); // the newest stand last
    unpacked.set(id, found);
    return found;
  }
  const made = bytesOf(id).then((bytes) => read(bytes));
  made.catch(() => unpacked.delete(id));
  unpacked.set(id, made);
  if (unpacked.size > KEPT_PARTS) unpacked.delete(unpacked.keys().next().value);
  return made;
}
