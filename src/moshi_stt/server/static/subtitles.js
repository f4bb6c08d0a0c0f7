// Timed words to plain text, SRT, WebVTT and JSON, with the same cues as `moshi-stt transcribe` (text/subtitles.py).
// A word is {text, start, end, speaker?}; times are seconds, in order.

const LINE_CHARACTERS = 42;
const CUE_CHARACTERS = 2 * LINE_CHARACTERS;
const CUE_SECONDS = 7;
const PAUSE_SECONDS = 0.8; // a silence this long ends a cue
const PARAGRAPH_SECONDS = 2; // a silence this long ends a line of plain text
const SHORTEST_CUE_SECONDS = 1; // a cue stays this long if the next one leaves room
const SHORTEST_SENTENCE_CHARACTERS = 12; // a shorter sentence shares its cue with the next one

const SENTENCE_END = [".", "?", "!", "…", "。", "？", "！"];
const CLAUSE_END = [",", ";", ":", "—", "–", ...SENTENCE_END];
const CLOSING = /["'”’»)\]]+$/;

const squeeze = (text) => text.split(/\s+/).filter(Boolean).join(" ");
const length = (text) => [...text].length;
const endsWith = (text, marks) => {
  const bare = text.trimEnd().replace(CLOSING, "");
  return marks.some((mark) => bare.endsWith(mark));
};

export const joinWords = (words) => words.map((word) => squeeze(word.text)).filter(Boolean).join(" ");

/** Words to cues {words, start, end, speaker} that neither overlap nor are empty. A change of speaker ends a cue. */
export function cutCues(words) {
  const groups = [];
  let current = [];
  for (const word of words) {
    if (!squeeze(word.text)) continue;
    if (current.length && endsBefore(current, word)) {
      groups.push(current);
      current = [];
    }
    while (current.length && tooLong([...current, word])) {
      const cut = bestCut(current);
      groups.push(current.slice(0, cut));
      current = current.slice(cut);
    }
    current.push(word);
  }
  if (current.length) groups.push(current);
  return timesOf(groups);
}

function endsBefore(current, word) {
  const last = current[current.length - 1];
  if (last.speaker !== word.speaker || word.start - last.end >= PAUSE_SECONDS) return true;
  return endsWith(last.text, SENTENCE_END) && length(joinWords(current)) >= SHORTEST_SENTENCE_CHARACTERS;
}

function tooLong(words) {
  if (words[words.length - 1].end - words[0].start > CUE_SECONDS) return true;
  const text = joinWords(words);
  return length(text) > CUE_CHARACTERS || (words.length > 1 && !fitsTwoLines(text));
}

const fitsTwoLines = (text) => length(text) <= LINE_CHARACTERS || Math.max(...linesOf(text).map(length)) <= LINE_CHARACTERS;

/** How many words of a full cue stay: up to a clause in its second half, else to its longest gap there, else all. */
function bestCut(words) {
  const half = (words.length + 1) >> 1;
  for (let i = words.length - 1; i >= half - 1; i--) if (endsWith(words[i].text, CLAUSE_END)) return i + 1;
  let cut = words.length;
  let longest = 0;
  for (let i = half; i < words.length; i++) {
    const gap = words[i].start - words[i - 1].end;
    if (i === half || gap >= longest) [longest, cut] = [gap, i];
  }
  return longest >= PAUSE_SECONDS / 4 ? cut : words.length;
}

function timesOf(groups) {
  let earliest = 0;
  return groups.map((group, i) => {
    const start = Math.max(earliest, group[0].start);
    const next = i + 1 < groups.length ? groups[i + 1][0].start : Infinity;
    const spoken = Math.max(start + 0.001, ...group.map((word) => word.end));
    const end = Math.max(start + 0.001, Math.min(Math.max(spoken, start + SHORTEST_CUE_SECONDS), next));
    earliest = end;
    return { words: group, start, end, speaker: group[0].speaker, text: joinWords(group) };
  });
}

/** One line, or two of about the same length. */
function linesOf(text) {
  const characters = [...text];
  if (characters.length <= LINE_CHARACTERS) return [text];
  let cut = -1;
  let off = Infinity;
  characters.forEach((character, i) => {
    const distance = Math.abs(characters.length - 1 - 2 * i);
    if (character === " " && distance < off) [cut, off] = [i, distance];
  });
  return cut < 0 ? [text] : [characters.slice(0, cut).join(""), characters.slice(cut + 1).join("")];
}

function roundHalfEven(x) {
  const floor = Math.floor(x);
  if (x - floor !== 0.5) return Math.round(x);
  return floor % 2 ? floor + 1 : floor;
}

/** `00:01:02,345` for 62.345 and point ",". */
export function timestamp(seconds, point) {
  const ms = Math.max(0, roundHalfEven(seconds * 1000));
  const two = (n) => String(n).padStart(2, "0");
  const fraction = String(ms % 1000).padStart(3, "0");
  return `${two(Math.floor(ms / 3600000))}:${two(Math.floor(ms / 60000) % 60)}:${two(Math.floor(ms / 1000) % 60)}${point}${fraction}`;
}

const named = (cue, text) => (cue.speaker ? `${cue.speaker}: ${text}` : text);

export function formatText(words) {
  const lines = [];
  for (const word of words) {
    const line = lines[lines.length - 1];
    const last = line?.[line.length - 1];
    if (!line || last.speaker !== word.speaker || word.start - last.end >= PARAGRAPH_SECONDS) lines.push([word]);
    else line.push(word);
  }
  return lines.map((line) => `${named(line[0], joinWords(line))}\n`).join("");
}

export function formatSrt(words) {
  return cutCues(words)
    .map((cue, i) => {
      const text = linesOf(named(cue, cue.text).replaceAll("-->", "->")).join("\n");
      return `${i + 1}\n${timestamp(cue.start, ",")} --> ${timestamp(cue.end, ",")}\n${text}\n`;
    })
    .join("\n");
}

export function formatVtt(words) {
  const escape = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const cues = cutCues(words).map((cue) => {
    const voice = cue.speaker ? `<v ${escape(cue.speaker)}>` : "";
    return `\n${timestamp(cue.start, ".")} --> ${timestamp(cue.end, ".")}\n${voice}${linesOf(cue.text).map(escape).join("\n")}\n`;
  });
  return `WEBVTT\n${cues.join("")}`;
}

export function formatJson(words) {
  const round = (seconds) => Math.round(seconds * 1000) / 1000;
  const spoken = (each) => (each.speaker ? { speaker: each.speaker } : {});
  const document = {
    text: joinWords(words),
    words: words.map((word) => ({ text: word.text, start: round(word.start), end: round(word.end), ...spoken(word) })),
    segments: cutCues(words).map((cue) => ({ start: round(cue.start), end: round(cue.end), text: cue.text, ...spoken(cue) })),
  };
  return `${JSON.stringify(document, null, 2)}\n`;
}

export const FORMATS = {
  txt: { label: "Plain text (TXT)", type: "text/plain", format: formatText },
  srt: { label: "Subtitles (SRT)", type: "application/x-subrip", format: formatSrt },
  vtt: { label: "Subtitles (WebVTT)", type: "text/vtt", format: formatVtt },
  json: { label: "Words and times (JSON)", type: "application/json", format: formatJson },
};
