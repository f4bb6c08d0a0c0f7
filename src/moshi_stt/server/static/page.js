// The page: wires microphone, files, settings and menus to the transcript.

import { Captions } from "./captions.js";
import { address, modules, socketAddress, transcribeFile, whyEnded } from "./server.js";
import { Level, offersTab, openMicrophone, openTab, SoundError, Source } from "./sound.js";
import { LiveStream, RATE } from "./stream.js";
import { FORMATS } from "./subtitles.js";
import { clock, Transcript, TranscriptView } from "./transcript.js";

const $ = (id) => document.getElementById(id);
const LAST_WORDS_MS = 20000; // how long the last words may take after Stop
const REFRESH_MS = 5000; // how often the streams in use are asked for

const transcript = new Transcript();
const view = new TranscriptView($("transcript"), $("log"));
transcript.view = view;
const captions = new Captions(view);

// ---- sentences ------------------------------------------------------------------------------------------------------------

const say = (words) => { $("state").textContent = words; };

function complain(words) {
  $("error").textContent = words;
  $("error").hidden = !words;
}

function warn(words) {
  $("warning").textContent = words;
  $("warning").hidden = !words;
}

const text = (error) => error.message || String(error);

// ---- settings -------------------------------------------------------------------------------------------------------------

const SETTINGS = ["device", "key", "path", "size", "theme", "source"];

function remembered(name) {
  try {
    return localStorage.getItem(`moshi-stt.${name}`);
  } catch {
    return null; // storage is switched off
  }
}

function remember(name, value) {
  try {
    localStorage.setItem(`moshi-stt.${name}`, value);
  } catch {
    // not kept then
  }
}

function applySettings() {
  document.documentElement.style.setProperty("--scale", $("size").value);
  if ($("theme").value) document.documentElement.dataset.theme = $("theme").value;
  else delete document.documentElement.dataset.theme;
}

function loadSettings() {
  for (const name of SETTINGS) {
    const value = remembered(name);
    if (value === null) continue;
    if (name === "device" && value) $("device").append(new Option("The one chosen before", value));
    $(name).value = value;
    if ($(name).tagName === "SELECT" && $(name).selectedIndex < 0) $(name).selectedIndex = 0;
  }
  if (!offersTab()) {
    $("source").value = "microphone";
    for (const option of [...$("source").options].slice(1)) option.remove();
    $("source").parentElement.hidden = true;
  }
  applySettings();
  for (const name of SETTINGS) {
    $(name).addEventListener("change", () => {
      remember(name, $(name).value);
      applySettings();
      if (name === "path") refreshServer();
    });
  }
}

async function listDevices() {
  const devices = (await navigator.mediaDevices?.enumerateDevices?.().catch(() => [])) ?? [];
  const inputs = devices.filter((device) => device.kind === "audioinput" && device.deviceId && device.deviceId !== "default");
  if (!inputs.length) return;
  const chosen = $("device").value;
  $("device").replaceChildren(new Option("The system's choice", ""), ...inputs.map((each, i) => new Option(each.label || `Microphone ${i + 1}`, each.deviceId)));
  $("device").value = inputs.some((device) => device.deviceId === chosen) ? chosen : "";
}

// ---- the server's state ---------------------------------------------------------------------------------------------------

const LANGUAGES = new Intl.DisplayNames(["en"], { type: "language" });
let serverKnown = false;

function languageName(code) {
  try {
    return LANGUAGES.of(code);
  } catch {
    return code;
  }
}

async function refreshServer() {
  const served = await modules();
  if (!served) {
    $("server").textContent = "The server does not answer.";
    return;
  }
  $("paths").replaceChildren(...served.map((each) => new Option(each.path, each.path)));
  const same = (each) => address(each.path).href === address($("path").value).href;
  if (!serverKnown && served.length && !served.some(same) && remembered("path") === null) $("path").value = served[0].path;
  if (!serverKnown && !recorders.length && !uploads.busy) say("Ready.");
  serverKnown = true;
  const module = served.find(same);
  if (!module) {
    $("server").textContent = `No such path: ${$("path").value}`;
  } else if (!module.lm) {
    $("server").textContent = "The model is loading.";
  } else {
    const codes = (module.languages || "").split(/[\s,]+/).filter(Boolean);
    const model = module.lm.split("/").slice(-2).join("/");
    $("server").textContent = `${model} · ${module.used_slots} of ${module.total_slots} streams in use`;
    showLanguages(codes);
  }
}

function showLanguages(codes) {
  if (codes.length === 1) $("transcript").lang = $("log").lang = codes[0];
  else for (const id of ["transcript", "log"]) $(id).removeAttribute("lang");
  if (!codes.length) return;
  const names = codes.map(languageName).join(" and ");
  $("languages").textContent = `This server recognizes ${names}${codes.length === 1 ? " only" : ""}.`;
}

// ---- live recording -------------------------------------------------------------------------------------------------------

/** One source on its way: sound → stream → recording. */
class Recorder {
  constructor(media, speaker, offset) {
    this.samples = 0;
    this.level = new Level();
    this.recording = transcript.begin({ speaker, offset });
    this.offset = offset;
    this.gone = new Promise((resolve) => { this.ended = resolve; });
    this.stream = new LiveStream(() => socketAddress($("path").value, $("key").value), {
      state: (name, detail) => this.showState(name, detail),
      word: (word) => this.recording.add(word),
      interim: (word) => this.recording.interim(word?.text ?? ""),
      pause: showPause,
      lag: showLag,
      warning: showWarning,
      ended: (problem) => this.finished(problem),
    });
    this.opening = Source.start(media, (pcm) => this.frame(pcm), () => stopRecording()).then((source) => {
      this.source = source;
      if (this.stream.over) source.close();
    });
  }

  frame(pcm) {
    this.samples += pcm.length;
    this.recording.lasted(this.samples / RATE);
    this.stream.send(pcm);
    if (this === recorders[0]) showLevel(this.level.feed(pcm));
    showTime();
  }

  showState(name, detail) {
    if (name === "connecting") say("Connecting…");
    else if (name === "live") say(stopping ? "Waiting for the last words…" : "Listening.");
    else if (name === "lost") say(detail.code === 1013 ? "The server is full. Trying again; your words are kept." : "The connection was lost. Connecting again; your words are kept.");
    if (name === "live") complain("");
  }

  /** No more sound; the last words may still come. */
  stop() {
    this.source?.close();
    this.stream.finish();
    setTimeout(() => this.stream.stop(), LAST_WORDS_MS);
  }

  async finished(problem) {
    this.source?.close();
    this.ended();
    if (problem) complain(await whyEnded(problem, $("path").value, $("key").value));
  }
}

let recorders = [];
let stopping = false;
let opening = false;

async function startRecording() {
  if (opening) return;
  opening = true;
  complain("");
  warn("");
  const chosen = $("source").value;
  const media = [];
  try {
    if (chosen !== "tab") media.push([await openMicrophone($("device").value), chosen === "both" ? "You" : ""]);
    if (chosen !== "microphone") media.push([await openTab(), chosen === "both" ? "Tab" : ""]);
    listDevices();
    const offset = transcript.end;
    stopping = false;
    recorders = media.map(([each, speaker]) => new Recorder(each, speaker, offset));
    for (const recorder of recorders) recorder.gone.then(() => recorderGone(recorder));
    showRecording();
    await Promise.all(recorders.map((recorder) => recorder.opening));
  } catch (error) {
    for (const [each] of media) for (const track of each.getTracks()) track.stop();
    for (const recorder of recorders) recorder.stream.stop();
    complain(error instanceof SoundError ? error.message : `The recording could not start: ${text(error)}.`);
    say("Not recording.");
  } finally {
    opening = false;
  }
}

function stopRecording() {
  if (stopping) return;
  stopping = true;
  say("Waiting for the last words…");
  showRecording();
  for (const recorder of recorders) recorder.stop();
}

function recorderGone(recorder) {
  recorders = recorders.filter((each) => each !== recorder);
  if (recorders.length) {
    if (!stopping && $("error").hidden === false) return; // the other one goes on
    return;
  }
  stopping = false;
  showLevel({ percent: 0, verdict: "" });
  $("lag").textContent = "";
  $("pause").hidden = $("pause-label").hidden = true;
  say(transcript.empty ? "Ready." : "Done.");
  showRecording();
}

function showRecording() {
  const on = recorders.length > 0;
  $("record").classList.toggle("on", on && !stopping);
  $("record").setAttribute("aria-disabled", String(stopping)); // it keeps the focus
  $("record-label").textContent = stopping ? "Finishing…" : on ? "Stop" : "Start";
  $("source").disabled = $("file-button").disabled = on;
  document.body.classList.toggle("recording", on);
  showEmpty();
}

function showEmpty() {
  $("empty").hidden = !transcript.empty || recorders.length > 0 || uploads.busy;
  $("save-button").disabled = transcript.empty;
}

// ---- what is measured -----------------------------------------------------------------------------------------------------

let shownLevel = 0;

function showLevel({ percent, verdict }) {
  $("level").style.width = `${percent}%`;
  const now = performance.now();
  if (now - shownLevel > 500 || verdict !== $("verdict").textContent) {
    shownLevel = now;
    $("meter").setAttribute("aria-valuenow", percent.toFixed(0));
    $("meter").setAttribute("aria-valuetext", verdict || `${percent.toFixed(0)} percent`);
    if (verdict !== $("verdict").textContent) $("verdict").textContent = verdict;
    $("meter").classList.toggle("loud", verdict === "too loud");
  }
}

function showTime() {
  const seconds = Math.max(0, ...recorders.map((recorder) => recorder.offset + recorder.samples / RATE));
  const shown = clock(seconds);
  if ($("timer").textContent !== shown) $("timer").textContent = shown;
}

function showLag(seconds) {
  $("lag").textContent = `${seconds.toFixed(1)} s behind`;
}

function showPause(probability) {
  $("pause").hidden = $("pause-label").hidden = false;
  $("pause-level").style.width = `${probability * 100}%`;
  $("pause").setAttribute("aria-valuenow", (probability * 100).toFixed(0));
}

function showWarning({ code, message }) {
  warn(message || `The server warns: ${code}.`);
}

// ---- files ----------------------------------------------------------------------------------------------------------------

const uploads = {
  queue: [],
  busy: false,

  add(files) {
    for (const file of files) {
      const row = document.createElement("li");
      const name = Object.assign(document.createElement("span"), { textContent: file.name });
      const bar = document.createElement("progress");
      bar.max = 1;
      bar.value = 0;
      bar.setAttribute("aria-label", file.name);
      const phase = Object.assign(document.createElement("span"), { className: "quiet", textContent: "waiting" });
      const cancel = Object.assign(document.createElement("button"), { type: "button", textContent: "Cancel" });
      cancel.setAttribute("aria-label", `Cancel ${file.name}`);
      row.append(name, bar, phase, cancel);
      const job = { file, row, bar, phase, stop: new AbortController() };
      cancel.onclick = () => {
        job.stop.abort();
        if (this.queue.includes(job)) {
          this.queue = this.queue.filter((each) => each !== job);
          this.remove(job);
        }
      };
      $("files").append(row);
      this.queue.push(job);
    }
    $("files").hidden = !$("files").children.length;
    this.work();
  },

  async work() {
    if (this.busy) return;
    this.busy = true;
    complain("");
    showEmpty();
    for (let job; (job = this.queue.shift()); ) await this.run(job);
    this.busy = false;
    showEmpty();
    say("Done.");
  },

  async run({ file, row, bar, phase, stop }) {
    const progress = (done, name, at) => {
      if (name === "sending" || done) bar.value = done;
      else bar.removeAttribute("value"); // how long the recording is, is not known
      if (name === "sending") phase.textContent = `sending, ${Math.round(done * 100)} %`;
      else phase.textContent = at === undefined ? "transcribing" : `transcribing, ${clock(at)}`;
    };
    say(`Transcribing ${file.name}…`);
    try {
      const words = await transcribeFile(file, $("path").value, $("key").value, progress, stop.signal);
      if (!words.length) complain(`No speech was found in ${file.name}.`);
      const recording = transcript.begin({ title: file.name });
      for (const word of words) recording.add(word);
      view.announce();
    } catch (error) {
      if (error.name !== "AbortError") complain(`${file.name}: ${text(error)}`);
    }
    this.remove({ row });
  },

  remove({ row }) {
    const next = row.nextElementSibling?.querySelector("button") ?? $("file-button");
    if (row.contains(document.activeElement)) next.focus();
    row.remove();
    $("files").hidden = !$("files").children.length;
  },
};

// ---- saving ---------------------------------------------------------------------------------------------------------------

function save(kind) {
  const { type, format } = FORMATS[kind];
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([format(transcript.words)], { type: `${type};charset=utf-8` }));
  link.download = `transcript-${new Date().toISOString().slice(0, 16).replace(/[T:]/g, "-")}.${kind}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  say(`Saved ${link.download}.`);
}

async function copy() {
  try {
    await navigator.clipboard.writeText(FORMATS.txt.format(transcript.words));
    say("Copied.");
  } catch {
    complain("This browser does not let this page copy. Save the text instead.");
  }
}

// ---- menus ----------------------------------------------------------------------------------------------------------------

function menu(button, list) {
  const close = (focus) => {
    list.hidden = true;
    button.setAttribute("aria-expanded", "false");
    if (focus) button.focus();
  };
  button.onclick = () => {
    list.hidden = !list.hidden;
    button.setAttribute("aria-expanded", String(!list.hidden));
    if (!list.hidden) list.querySelector("button").focus();
  };
  list.addEventListener("click", () => close(true));
  list.addEventListener("keydown", (event) => {
    const items = [...list.querySelectorAll("button")];
    const at = items.indexOf(document.activeElement);
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      event.preventDefault();
      items[(at + step + items.length) % items.length].focus();
    } else if (event.key === "Escape") {
      event.stopPropagation();
      close(true);
    }
  });
  document.addEventListener("click", (event) => list.hidden || button.contains(event.target) || list.contains(event.target) || close(false));
}

for (const [kind, { label }] of Object.entries(FORMATS)) {
  const item = Object.assign(document.createElement("button"), { type: "button", textContent: label });
  item.dataset.kind = kind;
  item.onclick = () => save(kind);
  $("save-menu").append(item);
}
const copyItem = Object.assign(document.createElement("button"), { type: "button", id: "copy", textContent: "Copy the text" });
copyItem.onclick = copy;
$("save-menu").append(copyItem);
menu($("save-button"), $("save-menu"));
menu($("caption-button"), $("caption-menu"));
$("caption-full").onclick = () => captions.openFull($("caption-button"));
$("caption-window").onclick = async () => {
  if (!(await captions.openWindow())) complain("The browser blocked the caption window. Allow pop-ups for this page, or use full screen.");
};

// ---- following the newest words -------------------------------------------------------------------------------------------

const main = document.querySelector("main");
let follows = true;
let scrolling = false;

function atEnd() {
  return main.scrollHeight - main.scrollTop - main.clientHeight < 120;
}

main.addEventListener("scroll", () => {
  follows = atEnd();
  $("latest").hidden = follows || transcript.empty;
}, { passive: true });

function follow() {
  if (!follows || scrolling) return;
  scrolling = true;
  requestAnimationFrame(() => {
    scrolling = false;
    main.scrollTop = main.scrollHeight;
  });
}
view.listeners.add(follow);
view.listeners.add(() => {
  if (!transcript.empty && $("save-button").disabled) showEmpty();
});
$("latest").onclick = () => {
  follows = true;
  follow();
  $("transcript").focus({ preventScroll: true });
};

// ---- the controls ---------------------------------------------------------------------------------------------------------

$("record").onclick = () => {
  if (stopping) return;
  if (recorders.length) stopRecording();
  else startRecording();
};
$("file-button").onclick = () => $("file").click();
$("file").onchange = () => {
  uploads.add([...$("file").files]);
  $("file").value = "";
};
$("settings-button").onclick = () => {
  listDevices();
  $("settings").showModal();
};
$("clear").onclick = () => {
  transcript.clear();
  $("timer").textContent = clock(0);
  showEmpty();
  say("Cleared.");
};
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (recorders.length) complain("Stop the recording first, then drop the files again.");
  else uploads.add([...event.dataTransfer.files]);
});
addEventListener("beforeunload", (event) => {
  if (recorders.length) event.preventDefault();
});
navigator.mediaDevices?.addEventListener?.("devicechange", listDevices);

loadSettings();
showRecording();
refreshServer();
setInterval(() => document.hidden || refreshServer(), REFRESH_MS);
export { transcript };
