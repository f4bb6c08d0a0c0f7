// As much of a browser as the page uses, for Node: elements that remember, sound that is given, Node's own WebSocket.
// Usage: node --experimental-websocket fake_browser.mjs PAGE_FOLDER SERVER_URL KEY SECONDS file|microphone
// Drops a file of SECONDS of silence on the page, or speaks so long into its microphone and presses Stop. Prints, as JSON, what
// the page then shows.

import { pathToFileURL } from "node:url";

const [folder, server, key, seconds, source] = process.argv.slice(2);

class Element {
  constructor() {
    this.style = {};
    this.value = "";
    this.textContent = "";
    this.children = [];
    this.classes = new Set();
    this.classList = {
      add: (name) => this.classes.add(name),
      remove: (name) => this.classes.delete(name),
      toggle: (name, on) => (on ? this.classes.add(name) : this.classes.delete(name)),
    };
  }
  setAttribute() {}
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.children = children; }
  querySelector() { return this.children.findLast((child) => child.classes?.has("latest")); }
}

const elements = {};
const listeners = {};
globalThis.location = new URL(server);
globalThis.innerHeight = globalThis.scrollY = 0;
globalThis.scrollTo = () => {};
globalThis.addEventListener = (type, listener) => { listeners[type] = listener; };
globalThis.document = {
  body: Object.assign(new Element(), { scrollHeight: 0 }),
  getElementById: (id) => (elements[id] ??= new Element()),
  createElement: () => new Element(),
};
globalThis.OfflineAudioContext = class {
  async decodeAudioData() {
    const length = Math.round(seconds * 24000);
    return { length, numberOfChannels: 2, getChannelData: () => new Float32Array(length) };
  }
};
const microphone = { open: 0, port: null };
Object.defineProperty(globalThis, "navigator", {
  value: { mediaDevices: { getUserMedia: async () => ({ getTracks: () => [{ stop: () => { microphone.open -= 1; } }] }) } },
});
globalThis.AudioContext = class {
  constructor({ sampleRate = 48000 } = {}) {
    this.sampleRate = sampleRate;
    this.destination = {};
    this.audioWorklet = { addModule: async () => {} };
  }
  createMediaStreamSource() {
    if (this.sampleRate !== 48000) throw new Error("this browser cannot resample");
    microphone.open += 1;
    return { context: this, connect: (node) => ({ connect: () => { microphone.port = node.port; } }) };
  }
  close() {}
};
globalThis.AudioWorkletNode = class { port = {}; };
const fetchThere = globalThis.fetch;
globalThis.fetch = (path, options) => fetchThere(new URL(path, server), options);
document.getElementById("key").value = key;
document.getElementById("path").value = "/api/asr-streaming";

await import(pathToFileURL(`${folder}/captions.js`));
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const speak = () => microphone.port.onmessage({ data: new Float32Array(1920).fill(0.1) });

async function talk() {
  elements.talk.onclick();
  while (!microphone.port) await pause(1);
  const frames = Math.round(seconds * 12.5);
  for (let i = 0; i < 3; i++) speak(); // before the server is ready
  while (elements.state.textContent !== "Listening. Speak.") await pause(1);
  for (let i = 3; i < frames; i++) speak();
  elements.talk.onclick();
}

if (source === "microphone") await talk();
else listeners.drop({ preventDefault() {}, dataTransfer: { files: [{ name: "speech.wav", arrayBuffer: async () => new ArrayBuffer(0) }] } });
const over = () => elements.state?.textContent === "Done." || elements.error?.textContent;
for (let i = 0; i < 1500 && !over(); i++) await pause(10);
console.log(JSON.stringify({
  microphones: microphone.open,
  server: elements.server?.textContent,
  state: elements.state?.textContent,
  error: elements.error?.textContent ?? "",
  words: elements.words?.children.filter((child) => child instanceof Element).map((child) => child.textContent) ?? [],
}));
process.exit(0);
