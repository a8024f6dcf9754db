// The page's blocks of arrays, as `penstock_dashboards.features` packs them.

const DATA = JSON.parse(document.getElementById("data").textContent);
const KINDS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const characters = atob(base64), bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

/** A block's header with its `arrays` by name. The bytes of an array's numbers lie apart: all first ones, all second ones, ... */
async function unpacked(bytes) {
  const plain = new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
  const buffer = new Uint8Array(await plain.arrayBuffer());
  const length = new DataView(buffer.buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(buffer.subarray(4, 4 + length)));
  const arrays = {};
  let at = 4 + length;
  for (const [name, kind, count] of header.arrays) {
    const size = KINDS[kind].BYTES_PER_ELEMENT, joined = new Uint8Array(count * size);
    for (let part = 0; part < size; part++)
      for (let i = 0, to = part, from = at + part * count; i < count; i++, to += size) joined[to] = buffer[from + i];
    arrays[name] = new KINDS[kind](joined.buffer);
    at += count * size;
  }
  return { ...header, arrays };
}

/** Where each of lists that lie one after the other begins; one more, where the last ends. */
function starts(counts) {
  const found = new Uint32Array(counts.length + 1);
  for (let i = 0; i < counts.length; i++) found[i + 1] = found[i] + counts[i];
  return found;
}

const embedded = id => unpacked(bytesOf(document.getElementById(id).textContent));

/** Keeps the chunks that were last asked for; one that failed is asked for again. */
const CHUNKS = new Map();

function chunkOf(row) {
  const number = Math.floor(row / DATA.chunk);
  if (!CHUNKS.has(number)) {
    if (CHUNKS.size >= 64) CHUNKS.delete(CHUNKS.keys().next().value);
    const asked = DATA.served ? fetched(`examples/${LATENTS.latent[row]}`) : embedded(`chunk-${number}`);
    CHUNKS.set(number, asked.then(withStarts));
    asked.catch(() => CHUNKS.delete(number));
  }
  return CHUNKS.get(number);
}

async function fetched(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
  return unpacked(new Uint8Array(await answer.arrayBuffer()));
}

function withStarts({ arrays }) {
  for (const [name, counts] of [["neighbourStarts", "neighbour_counts"], ["exampleStarts", "example_counts"], ["tokenStarts", "lengths"]])
    arrays[name] = starts(arrays[counts]);
  return arrays;
}
