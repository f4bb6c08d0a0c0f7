// Whole sessions of the page's stream.js against the counting server, with connections that break at any moment.

import { Server } from "./counting_server.mjs";

const FRAMES = 200;

/** What each of `count` seeded sessions showed. pages: address of the page's folder. */
export async function sessions(pages, resumes, count) {
  const { LiveStream } = await import(`${pages}/stream.js`);
  const { decode } = await import(`${pages}/messagepack.js`);
  const outcomes = [];
  for (let seed = 1; seed <= count; seed++) outcomes.push(await session(LiveStream, new Server({ decode, resumes }), seed));
  return outcomes;
}

async function session(LiveStream, server, seed) {
  const due = [];
  globalThis.setTimeout = (work) => due.push(work);
  globalThis.clearTimeout = () => {};
  const random = () => (seed = (seed * 1103515245 + 12345) % 2147483648) / 2147483648;
  const shown = { words: [], ended: 0, problem: null };
  const on = {
    state() {}, interim() {}, pause() {}, lag() {}, warning() {},
    word: (word) => shown.words.push(word),
    ended: (problem) => Object.assign(shown, { ended: shown.ended + 1, problem }),
  };
  const stream = new LiveStream(() => "ws://server/", on, { socket: (url) => server.socket(url), now: () => 0 });
  const turn = async (most) => {
    for (let i = 0; i < 2; i++) await null;
    for (const socket of server.sockets) socket.pump(most);
    for (const work of due.splice(0)) work();
    await null;
  };
  await turn();
  for (let i = 0; i < FRAMES; i++) {
    stream.send(Float32Array.from({ length: 1920 }, (_, k) => i * 1920 + k));
    const chance = random();
    if (chance < 0.08) {
      server.refuse = Math.floor(random() * 3);
      server.drop();
    } else if (chance < 0.1) {
      server.forget();
    }
    await turn(Math.floor(random() * 4));
  }
  stream.finish();
  for (let i = 0; i < 400 && !shown.ended; i++) await turn();
  return {
    ...shown,
    words: shown.words.map((word) => word.text),
    starts: shown.words.map((word) => word.start),
    connects: server.connects,
  };
}

/** How a stream takes the end of its socket: the close code that it tells, or "tries again". */
export async function endings(pages) {
  const { LiveStream } = await import(`${pages}/stream.js`);
  const ready = Uint8Array.from([0x81, 0xa4, ...Buffer.from("type"), 0xa5, ...Buffer.from("Ready")]).buffer;
  const ending = (isReady, code) => {
    let told = "tries again";
    const socket = { readyState: 1, send() {}, close() {} };
    const on = { state() {}, interim() {}, ended: (problem) => { told = problem.code; } };
    new LiveStream(() => "ws://server/", on, { socket: () => socket });
    if (isReady) socket.onmessage({ data: ready });
    socket.onclose({ code });
    return told;
  };
  return {
    refused: ending(false, 1006),
    full: ending(false, 1013),
    violation: ending(true, 1008),
    lost: ending(true, 1006),
    "shutting down": ending(true, 1001),
  };
}
