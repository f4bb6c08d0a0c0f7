// A stand-in for the server, for stream.js in Node: it says word i when the audio of word i is complete, and can drop its
// connections and lose its streams. Samples carry their own number, so that it hears what it was sent, not what it expects.

export const WORD = 12000; // samples a word lasts

export class Server {
  /** decode: of messagepack.js. resumes: whether it holds streams whose connection broke. */
  constructor({ decode, resumes }) {
    Object.assign(this, { decode, resumes, streams: new Map(), sockets: [], refuse: 0, tokens: 0, connects: 0 });
  }

  socket(url) {
    this.connects += 1;
    const socket = new Socket(this, new URL(url).searchParams);
    this.sockets.push(socket);
    return socket;
  }

  /** Every connection breaks; what is on its way is lost. */
  drop() {
    for (const socket of this.sockets.splice(0)) socket.break(1006);
  }

  /** As a restart: the streams are gone, too. */
  forget() {
    this.streams.clear();
    this.drop();
  }
}

class Socket {
  constructor(server, query) {
    Object.assign(this, { server, query, readyState: 0, inbox: [], outbox: [] });
    queueMicrotask(() => this.begin());
  }

  begin() {
    if (this.readyState !== 0) return;
    const { server, query } = this;
    if (server.refuse > 0) {
      server.refuse -= 1;
      this.break(1006);
      return;
    }
    this.readyState = 1;
    const asked = query.get("resume");
    if (asked && asked !== "1") {
      this.stream = server.streams.get(asked);
      if (!this.stream) {
        this.break(4404);
        return;
      }
      this.at = Number(query.get("samples"));
      this.say({ type: "Ready", token: this.stream.token });
      for (const event of this.stream.events.slice(Number(query.get("events")))) this.say(event);
      return;
    }
    const token = server.resumes ? `t${(server.tokens += 1)}` : null;
    this.stream = { token, samples: [], said: 0, events: [] };
    this.at = 0;
    if (token) server.streams.set(token, this.stream);
    this.say(token ? { type: "Ready", token } : { type: "Ready" });
  }

  say(event) {
    this.outbox.push(event);
  }

  /** Passes on what the client sent and what the server says, up to `most` messages each way. */
  pump(most = Infinity) {
    for (const message of this.inbox.splice(0, most)) this.hear(message);
    for (const event of this.outbox.splice(0, most)) this.onmessage?.({ data: encode(event) });
  }

  send(buffer) {
    if (this.readyState !== 1) throw new Error("sent on a socket that is not open");
    this.inbox.push(this.server.decode(buffer));
  }

  hear(message) {
    const { stream } = this;
    const event = (each) => {
      stream.events.push(each);
      this.say(each);
    };
    if (message.type === "Marker") {
      event({ type: "Marker", id: message.id });
      return;
    }
    for (const sample of message.pcm) {
      if (this.at === stream.samples.length) stream.samples.push(sample);
      this.at += 1;
    }
    const skip = (WORD - (stream.samples[0] % WORD)) % WORD; // the rest of a word whose beginning was not heard
    for (let first; (first = skip + stream.said * WORD) + WORD <= stream.samples.length; stream.said += 1) {
      event({ type: "Word", text: `w${Math.round(stream.samples[first] / WORD)}`, start_time: first / 24000 });
      event({ type: "EndWord", stop_time: (first + WORD) / 24000 });
    }
    if (stream.token) this.say({ type: "Ack", samples: stream.samples.length });
  }

  break(code) {
    if (this.readyState === 3) return;
    this.readyState = 3;
    this.onclose?.({ code });
  }

  close() {
    this.readyState = 3;
  }
}

/** As much MessagePack as the events need. */
function encode(event) {
  const text = new TextEncoder();
  const bytes = [];
  const value = (each) => {
    if (typeof each === "string") {
      const raw = text.encode(each);
      bytes.push(0xd9, raw.length, ...raw);
    } else if (Number.isInteger(each)) {
      const view = new DataView(new ArrayBuffer(8));
      view.setBigUint64(0, BigInt(each));
      bytes.push(0xcf, ...new Uint8Array(view.buffer));
    } else {
      const view = new DataView(new ArrayBuffer(8));
      view.setFloat64(0, each);
      bytes.push(0xcb, ...new Uint8Array(view.buffer));
    }
  };
  const entries = Object.entries(event);
  bytes.push(0x80 | entries.length);
  for (const [key, each] of entries) {
    value(key);
    value(each);
  }
  return Uint8Array.from(bytes).buffer;
}
