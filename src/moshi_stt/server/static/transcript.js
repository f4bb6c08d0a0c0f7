// The transcript: what was said, as data (words of all recordings on one clock) and as paragraphs on the page.

const PARAGRAPH_SECONDS = 1.5; // a pause this long begins a paragraph
const LONG_PARAGRAPH = 480; // characters from which the end of a sentence begins one
const LONGEST_PARAGRAPH = 900; // characters from which any word does
const SENTENCE_END = /[.?!…。？！]["'”’»)\]]*$/;

/** `h:mm:ss` or `m:ss`. */
export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const two = (n) => String(n).padStart(2, "0");
  const hours = Math.floor(whole / 3600);
  const minutes = Math.floor(whole / 60) % 60;
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

/** Words and paragraphs in order of time. Has no page: the view is told of each change. */
export class Transcript {
  constructor() {
    this.recordings = [];
    this.view = null;
  }

  get words() {
    return this.recordings.flatMap((recording) => recording.words).sort((a, b) => a.start - b.start || a.number - b.number);
  }

  get empty() {
    return this.recordings.every((recording) => !recording.words.length);
  }

  /** Seconds at which the next recording begins: after all that is there. */
  get end() {
    return this.recordings.reduce((latest, recording) => Math.max(latest, recording.end), 0);
  }

  /** A recording that begins at `offset`. Recordings made at the same time share an offset and have a speaker each. */
  begin({ speaker = "", title = "", offset = this.end } = {}) {
    const recording = new Recording(this, speaker, title, offset);
    this.recordings.push(recording);
    return recording;
  }

  clear() {
    this.recordings = [];
    this.view?.clear();
  }
}

export class Recording {
  constructor(transcript, speaker, title, offset) {
    Object.assign(this, { transcript, speaker, title, offset, words: [], end: offset, paragraph: null, last: null });
  }

  /** word: {text, start, end | null}, its times from the start of the recording; it may get its end later. */
  add(word) {
    const { offset, speaker } = this;
    const last = this.last;
    const entry = {
      text: word.text,
      speaker,
      doubtful: word.doubtful ?? false,
      number: this.words.length,
      get start() { return offset + word.start; },
      get end() { return offset + (word.end ?? word.start + 0.3); },
    };
    this.words.push(entry);
    this.end = Math.max(this.end, entry.end);
    if (!this.paragraph || this.begins(entry)) {
      this.paragraph = { start: entry.start, speaker, title: this.words.length === 1 ? this.title : "", length: 0 };
      this.transcript.view?.paragraph(this, this.paragraph);
    }
    this.paragraph.length += word.text.length + 1;
    this.transcript.latest = this;
    this.last = entry;
    this.transcript.view?.word(this, this.paragraph, entry);
    return entry;
  }

  begins(entry) {
    const { last, paragraph } = this;
    if (!last) return true;
    if (entry.start - last.end >= PARAGRAPH_SECONDS) return true;
    if (this.transcript.latest !== this && SENTENCE_END.test(last.text)) return true; // another speaker answered
    if (paragraph.length > LONGEST_PARAGRAPH) return true;
    return paragraph.length > LONG_PARAGRAPH && SENTENCE_END.test(last.text);
  }

  /** The recording lasted at least this many seconds: what follows begins after it. */
  lasted(seconds) {
    this.end = Math.max(this.end, this.offset + seconds);
  }

  interim(text) {
    this.transcript.view?.interim(this, text);
  }
}

/** Shows a transcript in an element: a paragraph is one <p> with its time in the margin and one text node. */
export class TranscriptView {
  /** log: a live region that holds the newest sentence only, so that a screen reader never has hours to go through. */
  constructor(element, log) {
    Object.assign(this, { element, log, nodes: new Map(), listeners: new Set(), said: "" });
  }

  paragraph(recording, paragraph) {
    if (paragraph.title) {
      const title = document.createElement("h2");
      title.textContent = paragraph.title;
      this.element.append(title);
    }
    const node = document.createElement("p");
    if (recording.words.length === 1 && !paragraph.title && this.element.childElementCount) node.className = "begins";
    const time = document.createElement("time");
    time.textContent = clock(paragraph.start);
    time.dateTime = `PT${paragraph.start.toFixed(1)}S`;
    node.append(time);
    if (paragraph.speaker) {
      const speaker = document.createElement("b");
      speaker.textContent = paragraph.speaker;
      node.append(speaker, " ");
    }
    const text = document.createTextNode("");
    const before = this.nodes.get(recording);
    const interim = before?.interim ?? Object.assign(document.createElement("span"), { className: "interim" });
    node.append(text, interim);
    if (before && !before.text) before.node.remove();
    this.element.append(node);
    this.announce();
    this.nodes.set(recording, { node, text, interim });
    this.changed();
  }

  word(recording, paragraph, word) {
    const nodes = this.nodes.get(recording);
    if (word.doubtful) {
      const doubtful = Object.assign(document.createElement("span"), { className: "doubtful", title: "The model is not sure of this word." });
      doubtful.textContent = `${word.text} `;
      nodes.text = document.createTextNode("");
      nodes.interim.before(doubtful, nodes.text);
    } else {
      nodes.text.appendData(`${word.text} `);
    }
    this.said += `${word.text} `;
    if (SENTENCE_END.test(word.text)) this.announce();
    this.changed();
  }

  interim(recording, words) {
    let nodes = this.nodes.get(recording);
    if (!nodes) {
      if (!words) return;
      const node = document.createElement("p");
      const interim = Object.assign(document.createElement("span"), { className: "interim" });
      node.append(interim);
      this.element.append(node);
      nodes = { node, text: null, interim };
      this.nodes.set(recording, nodes);
    }
    nodes.interim.textContent = words;
    if (!words && !nodes.text) {
      nodes.node.remove();
      this.nodes.delete(recording);
    }
    this.changed();
  }

  announce() {
    if (this.said.trim()) this.log.textContent = this.said.trim();
    this.said = "";
  }

  /** The last `characters` of settled text and the interim text, for captions. */
  tail(characters) {
    const paragraphs = [...this.element.children].slice(-3);
    const settled = paragraphs.map((node) => [...node.childNodes].filter((each) => each.nodeType === 3 || each.className === "doubtful").map((each) => each.textContent).join("")).join("\n");
    const interim = [...this.nodes.values()].map((nodes) => nodes.interim.textContent).join(" ").trim();
    return { settled: settled.slice(-characters).replace(/^\S*\s/, settled.length > characters ? "" : "$&").trim(), interim };
  }

  changed() {
    for (const listener of this.listeners) listener();
  }

  clear() {
    this.element.replaceChildren();
    this.nodes.clear();
    this.said = this.log.textContent = "";
    this.changed();
  }
}
