// Microphone and browser tab as frames of 1,920 samples (80 ms) at 24 kHz mono, with their level.

import { RATE } from "./stream.js";

/** Why a source could not be opened, as a sentence. */
export class SoundError extends Error {}

const BLOCKED = "Click the icon at the left of the address bar (Safari: Settings › Websites › Microphone), allow it there, then try again. On a Mac, look at System Settings › Privacy & Security › Microphone, too.";

/** Opens the microphone. deviceId: "" for the system's. */
export async function openMicrophone(deviceId) {
  if (!navigator.mediaDevices?.getUserMedia) {
    throw new SoundError("Browsers offer the microphone only to pages on localhost or over HTTPS. Open this page as http://localhost:… or over HTTPS.");
  }
  const audio = { channelCount: 1, echoCancellation: false, noiseSuppression: true, autoGainControl: true };
  if (deviceId) audio.deviceId = { exact: deviceId };
  try {
    return await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    if (error.name === "NotFoundError") throw new SoundError("No microphone was found. Connect one, then try again.");
    if (error.name === "NotAllowedError") throw new SoundError(`The browser was not allowed to use the microphone. ${BLOCKED}`);
    if (error.name === "NotReadableError") throw new SoundError("Another program is using the microphone. Close it there, then try again.");
    if (error.name === "OverconstrainedError") throw new SoundError("The chosen microphone is not connected. Choose another one in the settings.");
    throw new SoundError(`The microphone could not be opened: ${error.message || error.name}.`);
  }
}

/** Whether the browser may offer a tab's sound. */
export const offersTab = () => Boolean(navigator.mediaDevices?.getDisplayMedia);

/** Asks for a tab (or screen) and keeps its sound only. */
export async function openTab() {
  let media;
  try {
    media = await navigator.mediaDevices.getDisplayMedia({ video: true, audio: { suppressLocalAudioPlayback: false } });
  } catch (error) {
    throw new SoundError(error.name === "NotAllowedError" ? "No tab was chosen." : `The tab's sound could not be opened: ${error.message || error.name}.`);
  }
  for (const track of media.getVideoTracks()) track.enabled = false;
  if (!media.getAudioTracks().length) {
    for (const track of media.getTracks()) track.stop();
    throw new SoundError("The chosen tab was shared without its sound. Choose a tab and switch on “Share tab audio”.");
  }
  return media;
}

/** A running source. onFrame gets a Float32Array of 1,920 samples; onEnd is called when the source ends by itself. */
export class Source {
  static async start(media, onFrame, onEnd) {
    const source = new Source(media);
    try {
      const node = source.connectable();
      await source.context.audioWorklet.addModule(new URL("capture.js", import.meta.url));
      const capture = new AudioWorkletNode(source.context, "capture");
      capture.port.onmessage = ({ data }) => source.closed || onFrame(data);
      node.connect(capture).connect(source.context.destination); // silent; some browsers run only what is connected
      for (const track of media.getAudioTracks()) track.onended = onEnd;
      await source.context.resume?.();
      return source;
    } catch (error) {
      source.close();
      throw new SoundError(`The browser could not read the sound: ${error.message}.`);
    }
  }

  constructor(media) {
    this.media = media;
    this.closed = false;
  }

  /** The media in a context of 24 kHz; where the browser cannot resample (Firefox), of its own rate: capture.js resamples. */
  connectable() {
    this.context = new AudioContext({ sampleRate: RATE });
    try {
      return this.context.createMediaStreamSource(this.media);
    } catch {
      this.context.close();
      this.context = new AudioContext();
      return this.context.createMediaStreamSource(this.media);
    }
  }

  close() {
    if (this.closed) return;
    this.closed = true;
    for (const track of this.media.getTracks()) {
      track.onended = null;
      track.stop();
    }
    this.context?.close();
  }
}

const QUIET_DB = -50;
const QUIET_FRAMES = 100; // 8 s below QUIET_DB in all of its loud moments
const LOUD_FRAMES = 12; // clipped frames within a second and a half

/** Level of a stream of frames, and whether it has been too quiet or too loud for a while. */
export class Level {
  constructor() {
    this.quiet = 0;
    this.loud = 0;
  }

  /** Returns {percent, verdict}: verdict is "", "too quiet" or "too loud". */
  feed(pcm) {
    let sum = 0;
    let peak = 0;
    for (const sample of pcm) {
      sum += sample * sample;
      peak = Math.max(peak, Math.abs(sample));
    }
    const decibels = 10 * Math.log10(sum / pcm.length + 1e-10);
    this.quiet = decibels < QUIET_DB ? this.quiet + 1 : 0;
    this.loud = peak > 0.99 ? Math.min(LOUD_FRAMES + 6, this.loud + 3) : Math.max(0, this.loud - 1);
    const verdict = this.loud >= LOUD_FRAMES ? "too loud" : this.quiet >= QUIET_FRAMES ? "too quiet" : "";
    return { percent: Math.max(0, Math.min(100, ((decibels + 60) / 60) * 100)), verdict };
  }
}
