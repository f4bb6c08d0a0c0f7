// @deepgram/sdk, the openai package and the AI SDK of Node, unchanged, against a server: each hears real speech, ends, closes.
//
//     node tests/full/node_clients.mjs http://127.0.0.1:PORT SPEECH.wav
//
// Runs in a folder that has the packages. Prints a line for each client; exit status 1 where one fails.

import { createReadStream, readFileSync } from "node:fs";
import { createOpenAI } from "@ai-sdk/openai";
import { DeepgramClient } from "@deepgram/sdk";
import { experimental_transcribe as transcribe } from "ai";
import OpenAI from "openai";
import { OpenAIRealtimeWebSocket } from "openai/realtime/websocket";
import WebSocket from "ws";

globalThis.WebSocket ??= WebSocket;

const SAID = "ever tried ever failed no matter try again fail again fail better";
const KEY = "local";
const DEADLINE_MS = 120_000;
const [base, path] = process.argv.slice(2);
const bare = (text) => text.toLowerCase().replace(/[^a-z ]/g, "").split(/\s+/).filter(Boolean).join(" ");
const file = readFileSync(path);
const pcm16 = file.subarray(44); // 16 kHz, 16 bit, mono

const openai = () => new OpenAI({ baseURL: `${base}/v1`, apiKey: KEY, maxRetries: 0 });

async function rest() {
  const answer = await openai().audio.transcriptions.create({ file: createReadStream(path), model: "whisper-1" });
  return answer.text;
}

async function restStreamed() {
  const options = { file: createReadStream(path), model: "gpt-4o-transcribe", stream: true };
  let text = "";
  for await (const event of await openai().audio.transcriptions.create(options)) {
    if (event.type === "transcript.text.delta") text += event.delta;
    if (event.type === "transcript.text.done" && event.text !== text) throw new Error(`${event.text} is not ${text}`);
  }
  return text;
}

async function realtime() {
  const model = "gpt-realtime-whisper";
  const onURL = (url) => { url.protocol = "ws:"; };
  const socket = new OpenAIRealtimeWebSocket({ model, onURL, dangerouslyAllowBrowser: true }, openai());
  return await new Promise((resolve, reject) => {
    socket.on("error", reject);
    socket.on("session.created", () => {
      const format = { type: "audio/pcm", rate: 16_000 };
      socket.send({ type: "session.update", session: { type: "transcription", audio: { input: { format, turn_detection: null } } } });
      for (let at = 0; at < pcm16.length; at += 6_400) {
        socket.send({ type: "input_audio_buffer.append", audio: pcm16.subarray(at, at + 6_400).toString("base64") });
      }
      socket.send({ type: "input_audio_buffer.commit" });
    });
    socket.on("conversation.item.input_audio_transcription.completed", (event) => {
      socket.close();
      resolve(event.transcript);
    });
  });
}

async function aiSdk() {
  const model = createOpenAI({ baseURL: `${base}/v1`, apiKey: KEY }).transcription("whisper-1");
  const providerOptions = { openai: { timestampGranularities: ["word"] } };
  const { text, segments, durationInSeconds } = await transcribe({ model, audio: file, providerOptions });
  if (!segments.length || !(durationInSeconds > 9)) throw new Error("no segments or no duration");
  return text;
}

const deepgram = () => new DeepgramClient({ apiKey: KEY, baseUrl: base });

async function deepgramFile() {
  const answer = await deepgram().listen.v1.media.transcribeFile(file, { model: "nova-3", smart_format: true });
  return answer.results.channels[0].alternatives[0].transcript;
}

async function deepgramLive() {
  const options = { model: "nova-3", encoding: "linear16", sample_rate: 16_000, smart_format: "true", Authorization: `Token ${KEY}` };
  const connection = await deepgram().listen.v1.connect(options);
  const finals = [];
  return await new Promise((resolve, reject) => {
    connection.on("error", reject);
    connection.on("message", (message) => {
      if (message.type === "Results" && message.is_final) finals.push(message.channel.alternatives[0].transcript);
      if (message.type === "Metadata") {
        connection.close();
        resolve(finals.join(" "));
      }
    });
    connection.on("open", () => {
      for (let at = 0; at < pcm16.length; at += 3_200) connection.socket.send(pcm16.subarray(at, at + 3_200));
      connection.socket.send(JSON.stringify({ type: "CloseStream" }));
    });
    connection.connect();
  });
}

let failed = 0;
for (const client of [rest, restStreamed, realtime, aiSdk, deepgramFile, deepgramLive]) {
  let deadline;
  const late = new Promise((_, reject) => { deadline = setTimeout(() => reject(new Error("too late")), DEADLINE_MS); });
  try {
    const text = await Promise.race([client(), late]);
    const ok = bare(text) === SAID;
    console.log(`${ok ? "ok  " : "FAIL"} ${client.name}: ${text}`);
    failed += !ok;
  } catch (error) {
    console.log(`FAIL ${client.name}:`, error);
    failed += 1;
  } finally {
    clearTimeout(deadline);
  }
}
process.exit(failed ? 1 : 0);
