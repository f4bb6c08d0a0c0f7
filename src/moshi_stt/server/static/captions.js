// Live captions: microphone or file, over the server's own WebSocket protocol. No library.

import { decode, encodeAudio, encodeMarker } from "./messagepack.js";

const RATE = 24000;
const FRAME = 1920;
const FILE_MARKER = 1;
const BUFFERED_BYTES = 1 << 20; // the socket may hold so much before a file's next frame waits

const $ = (id) => document.getElementById(id);

// ---- what is shown --------------------------------------------------------------------------------------------------------

let words = []; // {text, start, end}

function say(sentence) { $("state").textContent = sentence; }

function complain(sentence) {
  $("error").textContent = sentence;
  $("error").hidden = !sentence;
}

function showWord(word) {
  $("words").querySelector(".latest")?.classList.remove("latest");
  const span = document.createElement("span");
  span.className = "latest";
  span.textContent = word.text;
  span.title = `${word.start.toFixed(2)} s`;
  const nearBottom = innerHeight + scrollY >= document.body.scrollHeight - 80;
  $("words").append(span, " ");
  if (nearBottom) scrollTo(0, document.body.scrollHeight);
  $("after").hidden = false;
}

function showLevel(pcm) {
  let sum = 0;
  let peak = 0;
  for (const sample of pcm) {
    sum += sample * sample;
    peak = Math.max(peak, Math.abs(sample));
  }
  const decibels = 10 * Math.log10(sum / pcm.length + 1e-10);
  const percent = Math.max(0, Math.min(100, ((decibels + 60) / 60) * 100));
  $("level").style.width = `${percent}%`;
  $("level").classList.toggle("loud", peak > 0.99);
  $("meter").setAttribute("aria-valuenow", percent.toFixed(0));
}

const CLOSED = {
  1001: "The server is shutting down.",
  1006: "The connection was lost.",
  1008: "The server ended the session.",
  1009: "A message was too large for the server.",
  1011: "The server failed.",
  1013: "Every place on the server is taken. Try again in a moment.",
};

// ---- the session ----------------------------------------------------------------------------------------------------------

let session = null;

class Session {
  constructor(onEnd) {
    this.onEnd = onEnd;
    this.error = "";
    this.over = false;
    const url = new URL($("path").value, location.href);
    url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    if ($("key").value) url.searchParams.set("auth_id", $("key").value);
    this.ready = new Promise((resolve) => { this.isReady = resolve; });
    this.socket = new WebSocket(url);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => this.receive(decode(data));
    this.socket.onclose = ({ code }) => this.closed(code);
    this.socket.onerror = () => setTimeout(() => this.closed(1006), 500); // where no close event follows
  }

  receive(message) {
    if (message.type === "Ready") {
      this.isReady(true);
    } else if (message.type === "Word") {
      const word = { text: message.text, start: message.start_time, end: null };
      words.push(word);
      showWord(word);
    } else if (message.type === "EndWord") {
      if (words.length) words[words.length - 1].end = message.stop_time;
    } else if (message.type === "Marker") {
      this.end("Done.");
    } else if (message.type === "Error") {
      this.error = message.message;
    }
  }

  send(pcm) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(encodeAudio(pcm));
  }

  mark(id) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(encodeMarker(id));
  }

  end(sentence) {
    if (this.over) return;
    this.over = true;
    this.isReady(false);
    this.socket.close(1000);
    this.onEnd(sentence);
  }

  async closed(code) {
    if (this.over) return;
    const expected = this.error || CLOSED[code];
    this.end("");
    if (code === 1006 && !this.error) complain(await whyNot());
    else if (this.error && CLOSED[code] && code === 1013) complain(CLOSED[code]);
    else complain(expected ? sentenceOf(expected) : `The connection ended (${code}).`);
  }
}

const sentenceOf = (words) => words[0].toUpperCase() + words.slice(1) + (/[.!?]$/.test(words) ? "" : ".");

/** A browser does not say why a WebSocket was refused: ask the server how it is. */
async function whyNot() {
  try {
    const answer = await fetch("/ready", { cache: "no-store" });
    const state = await answer.json();
    if (state.reason) return `The server cannot serve now: ${state.reason}.`;
    return "The server refused the connection. Is the key right? It is one of authorized_ids in the server's configuration.";
  } catch {
    return "The server does not answer. Is it running?";
  }
}

// ---- the microphone -------------------------------------------------------------------------------------------------------

let microphone = null; // {context, tracks}

async function startMicrophone() {
  complain("");
  if (!navigator.mediaDevices) {
    complain("This browser gives the microphone only to pages on localhost or over HTTPS. Open the page as http://localhost:… instead.");
    return;
  }
  let media;
  try {
    media = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, echoCancellation: false, noiseSuppression: true, autoGainControl: true } });
  } catch (error) {
    complain(error.name === "NotFoundError" ? "There is no microphone." : `The microphone may not be used: ${error.message || error.name}.`);
    return;
  }
  try {
    const source = openSource(media);
    const context = source.context;
    microphone = { context, tracks: media.getTracks() };
    await context.audioWorklet.addModule("capture.js");
    session = new Session(stopped);
    const capture = new AudioWorkletNode(context, "capture");
    const queue = [];
    let open = false;
    capture.port.onmessage = ({ data }) => {
      showLevel(data);
      if (open) session?.send(data);
      else queue.push(data); // said before the server was ready: nothing is lost
    };
    source.connect(capture).connect(context.destination); // it puts out silence; some browsers run only what is connected
    $("talk").textContent = "Stop";
    $("talk").classList.add("on");
    $("file").disabled = true;
    say("Connecting…");
    if (await session.ready) {
      say("Listening. Speak.");
      for (const frame of queue.splice(0)) session.send(frame);
      open = true;
    }
  } catch (error) {
    session?.end("");
    stopped("");
    complain(`The microphone could not be opened: ${error.message}.`);
  }
}

/** The microphone in a context of 24 kHz; where the browser cannot resample (Firefox), of its own rate: capture.js does it then. */
function openSource(media) {
  const context = new AudioContext({ sampleRate: RATE });
  try {
    return context.createMediaStreamSource(media);
  } catch {
    context.close();
    return new AudioContext().createMediaStreamSource(media);
  }
}

function releaseMicrophone() {
  if (!microphone) return;
  for (const track of microphone.tracks) track.stop();
  microphone.context.close();
  microphone = null;
}

function stopTalking() {
  releaseMicrophone();
  if (session?.socket.readyState !== WebSocket.OPEN) {
    session?.end("");
    return;
  }
  say("Waiting for the last words…");
  $("talk").disabled = true;
  session?.mark(FILE_MARKER); // the last words come before it
}

function stopped(sentence) {
  session = null;
  releaseMicrophone();
  $("talk").textContent = "Start the microphone";
  $("talk").classList.remove("on");
  $("talk").disabled = $("file").disabled = false;
  $("level").style.width = 0;
  say(sentence || "Drop a sound file anywhere on this page, or start the microphone.");
}

// ---- a file ---------------------------------------------------------------------------------------------------------------

async function transcribe(file) {
  if (session || !file) return;
  complain("");
  $("talk").disabled = $("file").disabled = true;
  say(`Reading ${file.name}…`);
  let pcm;
  try {
    const sound = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await file.arrayBuffer()); // decodes and resamples
    pcm = new Float32Array(sound.length);
    for (let c = 0; c < sound.numberOfChannels; c++) {
      sound.getChannelData(c).forEach((sample, i) => { pcm[i] += sample / sound.numberOfChannels; });
    }
  } catch {
    stopped("");
    complain(`${file.name} is no sound file that this browser can read.`);
    return;
  }
  const current = session = new Session(stopped);
  say("Connecting…");
  if (!(await current.ready)) return;
  for (let at = 0; at < pcm.length && !current.over; at += FRAME) {
    const frame = pcm.subarray(at, at + FRAME);
    current.send(frame);
    if (at % (FRAME * 25) === 0) {
      showLevel(frame);
      say(`Sending ${file.name}: ${Math.round((at / pcm.length) * 100)} %`);
    }
    while (current.socket.bufferedAmount > BUFFERED_BYTES && !current.over) await new Promise((resolve) => setTimeout(resolve, 20));
  }
  if (current.over) return;
  say("Waiting for the last words…");
  current.mark(FILE_MARKER);
}

// ---- results --------------------------------------------------------------------------------------------------------------

const plain = () => words.map((word) => word.text).join(" ");

function clock(seconds) {
  const ms = Math.round(seconds * 1000);
  const two = (n) => String(n).padStart(2, "0");
  return `${two(Math.floor(ms / 3600000))}:${two(Math.floor(ms / 60000) % 60)}:${two(Math.floor(ms / 1000) % 60)},${String(ms % 1000).padStart(3, "0")}`;
}

/** Lines of up to 42 characters or 5 seconds, ended by a pause of more than a second. */
function subtitles() {
  const cues = [];
  for (const word of words) {
    const end = word.end ?? word.start + 0.3;
    const cue = cues[cues.length - 1];
    if (cue && cue.text.length + word.text.length < 42 && end - cue.start < 5 && word.start - cue.end < 1) {
      cue.text += ` ${word.text}`;
      cue.end = end;
    } else {
      cues.push({ start: word.start, end, text: word.text });
    }
  }
  return cues.map((cue, i) => `${i + 1}\n${clock(cue.start)} --> ${clock(cue.end)}\n${cue.text}\n`).join("\n");
}

function save(name, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: "text/plain" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// ---- the page -------------------------------------------------------------------------------------------------------------

$("talk").onclick = () => (session ? stopTalking() : startMicrophone());
$("file").onchange = () => { transcribe($("file").files[0]); $("file").value = ""; };
$("copy").onclick = async () => {
  try {
    await navigator.clipboard.writeText(plain());
    say("Copied.");
  } catch {
    complain("This browser lets no page on this address copy: select the text instead.");
  }
};
$("srt").onclick = () => save("captions.srt", subtitles());
$("clear").onclick = () => { words = []; $("words").replaceChildren(); $("after").hidden = true; };
addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
addEventListener("dragleave", () => document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  transcribe(event.dataTransfer.files[0]);
});

fetch("/api/modules_info").then((answer) => answer.json()).then((modules) => {
  if (modules.length && !modules.some((module) => module.path === $("path").value)) $("path").value = modules[0].path;
  const module = modules.find((each) => each.path === $("path").value) ?? modules[0];
  if (!module?.lm) $("server").textContent = "The model is loading.";
  else $("server").textContent = `${module.lm.split("/").slice(-2).join("/")} on ${module.device}, language: ${module.languages}; ${module.used_slots} of ${module.total_slots} places taken`;
}).catch(() => { $("server").textContent = "The server does not answer."; });
