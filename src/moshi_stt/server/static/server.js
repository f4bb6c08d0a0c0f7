// What the page asks of the server besides the stream: what it serves, why it refuses, and the words of a file.
// All addresses are relative to the page, so that it also works under a path of a reverse proxy.

/** An address on the server. path: as in the configuration, with or without its leading slash. */
export const address = (path) => new URL(path.replace(/^\/+/, ""), new URL(".", document.baseURI));

export function socketAddress(path, key) {
  const url = address(path);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  if (key) url.searchParams.set("auth_id", key);
  return url;
}

/** The modules, or null where the server does not answer. */
export async function modules() {
  try {
    const answer = await fetch(address("api/modules_info"), { cache: "no-store" });
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

/** Why a WebSocket was refused, as a sentence: browsers do not tell. */
export async function whyRefused(path, key) {
  const served = await modules();
  if (!served) return "The server does not answer. Is it running?";
  const paths = served.map((module) => module.path);
  if (!paths.some((each) => address(each).href === address(path).href)) {
    return `The server has no path ${path}. It serves ${paths.join(" and ")}: choose one in the settings.`;
  }
  try {
    const attempt = await fetch(address(path), { method: "POST", headers: { "kyutai-api-key": key }, body: "" });
    if (attempt.status === 401) return "The server does not accept this key. Enter one of its keys (authorized_ids) in the settings.";
    if (attempt.status === 403) return "The server does not accept this page's address. Add it to allowed_origins in the server's configuration.";
    const state = await (await fetch(address("ready"), { cache: "no-store" })).json();
    if (state.reason) return refusal(state.reason);
  } catch {
    return "The server does not answer. Is it running?";
  }
  return "The connection was refused, and the server does not say why. Its log may.";
}

/** The server's reason for not taking a stream, as a sentence. */
function refusal(reason) {
  if (/no free (channels|slot)/.test(reason)) return "All streams of the server are in use. Try again in a moment.";
  if (/shutting down/.test(reason)) return "The server is shutting down. Try again in a moment.";
  if (/loading/.test(reason)) return "The model is still loading. Try again in a moment.";
  return `The server cannot transcribe now: ${reason}.`;
}

const CLOSED = {
  1001: "The server is shutting down. Try again in a moment.",
  1006: "The connection was lost.",
  1008: "The server ended the connection.",
  1009: "A message was too large for the server.",
  1011: "The server failed. Its log says why.",
  1013: "All streams of the server are in use. Try again in a moment.",
};

/** Why a stream ended, as a sentence. */
export async function whyEnded({ code, message }, path, key) {
  if (code === 1006 && !message) return whyRefused(path, key);
  if (code === 1013) return message && !/no free/.test(message) ? refusal(message) : CLOSED[1013];
  return sentence(message) || CLOSED[code] || `The connection ended (code ${code}).`;
}

const sentence = (words) => words && words[0].toUpperCase() + words.slice(1) + (/[.!?]$/.test(words) ? "" : ".");

/** A file's words. progress(done, phase, at): done as a share of 1, 0 where unknown; phase "sending" or "transcribing"; at: seconds of the recording. */
export function transcribeFile(file, path, key, progress, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", address(path));
    request.setRequestHeader("kyutai-api-key", key);
    request.setRequestHeader("accept", "application/x-ndjson, application/json;q=0.9");
    request.upload.onprogress = ({ loaded, total }) => progress(total ? loaded / total : 0, "sending");
    request.upload.onload = () => progress(0, "transcribing");
    let length = 0;
    durationOf(file).then((seconds) => { length = seconds; });
    const lines = new Lines(({ type, start_time }) => type === "Word" && progress(length ? Math.min(1, start_time / length) : 0, "transcribing", start_time));
    request.onprogress = () => isLines(request) && lines.feed(request.responseText);
    request.onerror = () => reject(new Error("The connection to the server was lost."));
    request.onabort = () => reject(new DOMException("stopped", "AbortError"));
    request.onload = () => {
      if (request.status !== 200) return reject(new Error(uploadProblem(request.status, request.responseText)));
      if (!isLines(request)) return resolve(pair(JSON.parse(request.responseText)));
      lines.feed(request.responseText);
      const failure = lines.all.find((line) => line.type === "Error");
      return failure ? reject(new Error(sentence(failure.message))) : resolve(pair(lines.all));
    };
    signal.addEventListener("abort", () => request.abort());
    request.send(file);
  });
}

/** Seconds of a recording, 0 where the browser cannot tell. */
function durationOf(file) {
  return new Promise((resolve) => {
    const sound = document.createElement("audio");
    const done = (seconds) => {
      URL.revokeObjectURL(sound.src);
      resolve(Number.isFinite(seconds) ? seconds : 0);
    };
    sound.onloadedmetadata = () => done(sound.duration);
    sound.onerror = () => done(0);
    sound.preload = "metadata";
    sound.src = URL.createObjectURL(file);
  });
}

const isLines = (request) => (request.getResponseHeader("content-type") ?? "").startsWith("application/x-ndjson");

/** JSON documents, one a line, of a text that grows. */
class Lines {
  constructor(each) {
    Object.assign(this, { each, at: 0, all: [] });
  }

  feed(text) {
    for (let end; (end = text.indexOf("\n", this.at)) >= 0; this.at = end + 1) {
      const line = JSON.parse(text.slice(this.at, end));
      this.all.push(line);
      this.each(line);
    }
  }
}

function uploadProblem(status, text) {
  if (status === 401) return "The server does not accept this key. Enter one of its keys (authorized_ids) in the settings.";
  if (status === 404 || status === 405) return "The server has no such path. Choose one in the settings.";
  if (status === 413) return `The file is larger than the server takes: ${text || "see max_upload_bytes in its configuration"}.`;
  if (status === 503) return refusal(text || "it is busy");
  return sentence(text) || `The server answered with status ${status}.`;
}

function pair(events) {
  const words = [];
  for (const event of events) {
    if (event.type === "Word") words.push({ text: event.text, start: event.start_time, end: null });
    else if (event.type === "EndWord" && words.length) words[words.length - 1].end = event.stop_time;
  }
  return words;
}
