// One live stream over the server's WebSocket protocol. It outlives its socket: when the connection breaks it connects again
// with increasing pauses, sends the audio that the server has not taken, and passes each word on once.

import { decode, encodeAudio, encodeMarker } from "./messagepack.js";

export const RATE = 24000;
const HELD_SECONDS = 600; // audio kept while there is no connection; beyond this the oldest is given up
const AGAIN_SECONDS = 30; // audio that a new stream hears again at most: no word comes later than this after its sound
const DOUBTFUL = 0.5; // a word with less confidence than this is likely wrong
const RETRY_MS = [250, 500, 1000, 2000, 4000, 8000];
const FINAL = new Set([1000, 1002, 1003, 1007, 1008, 1009]); // these close codes will not get better by trying again
const RESUME_REFUSED = 4404; // "start anew": the server no longer holds the stream

export class LiveStream {
  /**
   * url: () => URL of the module's WebSocket, key included. on: {state(name, detail), word(word), interim(word|null),
   * pause(probability), lag(seconds), warning(warning), ended(problem|null)}; times are seconds since the first sample.
   */
  constructor(url, on, { socket = (address) => new WebSocket(address), now = () => performance.now() } = {}) {
    Object.assign(this, { url, on, open: socket, now });
    this.sent = 0; // samples given to `send`
    this.held = []; // {start, pcm, at}: not yet taken by the server, oldest first
    this.heldSamples = 0;
    this.clock = []; // {sample, at}: when which sample was spoken, for the lag
    this.base = 0; // the first sample of the server's present stream
    this.token = null;
    this.events = 0; // messages received on the present stream, for a resume
    this.settled = 0; // sample up to which all words are here
    this.acked = 0; // sample up to which the server said that it has taken the audio
    this.lostAt = 0; // samples sent when the connection broke
    this.unfinished = null; // a word without its end
    this.attempt = 0;
    this.wasReady = false;
    this.live = false;
    this.over = false;
    this.markers = 0;
    this.finishing = false;
    this.problem = null;
    this.connect();
  }

  /** Send samples: Float32Array at 24 kHz. Without a connection they are kept and sent later. */
  send(pcm) {
    if (this.over) return;
    const at = this.now();
    const chunk = { start: this.sent, pcm, at };
    this.held.push(chunk);
    this.heldSamples += pcm.length;
    this.sent += pcm.length;
    this.clock.push({ sample: this.sent, at });
    if (this.clock.length > 4000) this.clock.splice(0, 2000);
    while (this.heldSamples > HELD_SECONDS * RATE) this.heldSamples -= this.held.shift().pcm.length;
    if (this.live) this.socket.send(encodeAudio(pcm));
  }

  /** No more audio: `ended` follows when the last words are here. */
  finish() {
    this.finishing = true;
    if (this.live) this.mark();
    else if (!this.wasReady && !this.sent) this.end(null);
  }

  /** Give up at once. */
  stop() {
    this.end(null);
  }

  mark() {
    this.markers += 1;
    this.socket.send(encodeMarker(this.markers));
  }

  connect() {
    const url = new URL(this.url());
    const query = url.searchParams;
    for (const name of ["interim", "confidence", "warnings"]) query.set(name, "1");
    query.set("resume", this.token ?? "1");
    if (this.token) {
      query.set("samples", String(this.acked - this.base));
      query.set("events", String(this.events));
    }
    this.problem = null;
    this.on.state(this.wasReady ? "reconnecting" : "connecting");
    const socket = (this.socket = this.open(url));
    socket.binaryType = "arraybuffer";
    socket.onmessage = ({ data }) => socket === this.socket && this.receive(decode(data));
    socket.onclose = ({ code }) => socket === this.socket && this.closed(code);
    socket.onerror = () => {}; // a close event follows
  }

  receive(message) {
    const { type } = message;
    if (type === "Ready") {
      this.ready(message.token ?? null);
      return;
    }
    if (type !== "Ack" && type !== "Error") this.events += 1;
    const offset = this.base / RATE;
    if (type === "Word") {
      this.close();
      const doubtful = message.confidence !== undefined && message.confidence < DOUBTFUL;
      this.unfinished = { text: message.text, start: offset + message.start_time, end: null, doubtful };
      this.on.word(this.unfinished);
    } else if (type === "EndWord") {
      if (this.unfinished) this.unfinished.end = Math.max(this.unfinished.start, offset + message.stop_time);
      this.close();
      this.tellLag(offset + message.stop_time);
    } else if (type === "Interim") {
      this.on.interim(message.text ? { text: message.text, start: offset + message.start_time } : null);
    } else if (type === "Step") {
      if (message.prs.length) this.on.pause(message.prs[Math.min(2, message.prs.length - 1)]);
    } else if (type === "Ack") {
      this.acked = this.base + message.samples;
      this.release(Math.max(Math.min(this.settled, this.acked), this.acked - AGAIN_SECONDS * RATE));
    } else if (type === "Warning") {
      this.on.warning(message);
    } else if (type === "Marker") {
      if (this.finishing && message.id === this.markers) this.end(null);
    } else if (type === "Error") {
      this.problem = message.message;
    }
  }

  /** The latest word is complete: a new stream would start from its end. */
  close() {
    const word = this.unfinished;
    if (!word) return;
    word.end ??= word.start + 0.3;
    this.unfinished = null;
    this.settled = Math.max(this.settled, Math.round(word.end * RATE));
    this.release(Math.min(this.settled, this.token ? this.acked : this.sent));
  }

  tellLag(time) {
    const sample = time * RATE;
    const spoken = this.clock.find((each) => each.sample >= sample);
    if (spoken) this.on.lag(Math.max(0, (this.now() - spoken.at) / 1000));
  }

  release(sample) {
    while (this.held.length && this.held[0].start + this.held[0].pcm.length <= sample) this.heldSamples -= this.held.shift().pcm.length;
  }

  /** Give up the held audio before this sample, to the sample: a word that is here must not be heard half again. */
  startAt(sample) {
    this.release(sample);
    const [first] = this.held;
    if (!first || first.start >= sample) return;
    this.heldSamples -= sample - first.start;
    first.pcm = first.pcm.subarray(sample - first.start);
    first.start = sample;
  }

  ready(token) {
    const resumed = this.token !== null && token === this.token;
    if (!resumed) {
      if (this.wasReady) {
        this.close();
        this.startAt(Math.max(this.settled, (this.acked || this.lostAt) - AGAIN_SECONDS * RATE));
      }
      this.base = this.acked = this.held.length ? this.held[0].start : this.sent;
      this.events = 0;
    }
    this.token = token;
    this.wasReady = this.live = true;
    this.attempt = 0;
    this.on.interim(null);
    this.on.state("live");
    for (const { start, pcm } of this.held) {
      if (start + pcm.length > this.acked) this.socket.send(encodeAudio(pcm.subarray(Math.max(0, this.acked - start))));
    }
    if (this.finishing) this.mark();
  }

  closed(code) {
    if (this.over) return;
    if (this.live) this.lostAt = this.sent;
    this.live = false;
    if (code === RESUME_REFUSED && this.token) {
      this.token = null;
      this.connect();
      return;
    }
    if (!this.wasReady || FINAL.has(code)) {
      this.end({ code, message: this.problem });
      return;
    }
    const pause = RETRY_MS[Math.min(this.attempt, RETRY_MS.length - 1)];
    this.attempt += 1;
    this.on.state("lost", { code, message: this.problem, retryMs: pause });
    this.timer = setTimeout(() => this.over || this.connect(), pause);
  }

  end(problem) {
    if (this.over) return;
    this.over = true;
    clearTimeout(this.timer);
    this.close();
    this.on.interim(null);
    if (this.socket.readyState <= 1) this.socket.close(1000);
    this.held = [];
    this.on.ended(problem);
  }
}
