// MessagePack, as much of it as this protocol uses.

const utf8 = new TextEncoder();
const text = new TextDecoder();
const string = (s) => { const bytes = utf8.encode(s); return [0xa0 | bytes.length, ...bytes]; }; // up to 31 bytes
const AUDIO_HEAD = [0x82, ...string("type"), ...string("Audio"), ...string("pcm")];
const MARKER_HEAD = [0x82, ...string("type"), ...string("Marker"), ...string("id")];

/** {"type": "Audio", "pcm": [...]} as an array of float32, 5 bytes each: every server of this protocol takes it. */
export function encodeAudio(pcm) {
  const head = AUDIO_HEAD.length;
  const view = new DataView(new ArrayBuffer(head + 5 + 5 * pcm.length));
  AUDIO_HEAD.forEach((byte, i) => view.setUint8(i, byte));
  view.setUint8(head, 0xdd);
  view.setUint32(head + 1, pcm.length);
  for (let i = 0, at = head + 5; i < pcm.length; i++, at += 5) {
    view.setUint8(at, 0xca);
    view.setFloat32(at + 1, pcm[i]);
  }
  return view.buffer;
}

/** {"type": "Marker", "id": id}, id from 0 to 127. */
export const encodeMarker = (id) => Uint8Array.from([...MARKER_HEAD, id]).buffer;

/** Any document of maps, arrays, strings and numbers. Throws a RangeError where it ends too early. */
export function decode(buffer) {
  const view = new DataView(buffer);
  let at = 0;
  const u8 = () => view.getUint8(at++);
  const u16 = () => { at += 2; return view.getUint16(at - 2); };
  const u32 = () => { at += 4; return view.getUint32(at - 4); };
  const str = (size) => { at += size; return text.decode(new Uint8Array(buffer, at - size, size)); };
  const list = (size) => Array.from({ length: size }, value);
  const map = (size) => Object.fromEntries(Array.from({ length: size }, () => [value(), value()]));
  function value() {
    const tag = u8();
    if (tag < 0x80) return tag;
    if (tag < 0x90) return map(tag & 0x0f);
    if (tag < 0xa0) return list(tag & 0x0f);
    if (tag < 0xc0) return str(tag & 0x1f);
    if (tag >= 0xe0) return tag - 0x100;
    switch (tag) {
      case 0xc0: return null;
      case 0xc2: return false;
      case 0xc3: return true;
      case 0xca: at += 4; return view.getFloat32(at - 4);
      case 0xcb: at += 8; return view.getFloat64(at - 8);
      case 0xcc: return u8();
      case 0xcd: return u16();
      case 0xce: return u32();
      case 0xcf: at += 8; return Number(view.getBigUint64(at - 8));
      case 0xd0: at += 1; return view.getInt8(at - 1);
      case 0xd1: at += 2; return view.getInt16(at - 2);
      case 0xd2: at += 4; return view.getInt32(at - 4);
      case 0xd3: at += 8; return Number(view.getBigInt64(at - 8));
      case 0xd9: return str(u8());
      case 0xda: return str(u16());
      case 0xdb: return str(u32());
      case 0xdc: return list(u16());
      case 0xdd: return list(u32());
      case 0xde: return map(u16());
      case 0xdf: return map(u32());
      default: throw new RangeError(`unexpected MessagePack byte 0x${tag.toString(16)}`);
    }
  }
  return value();
}
