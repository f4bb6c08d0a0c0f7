// Runs beside the page in the audio thread: the microphone's samples to frames of 1,920 (80 ms) at 24 kHz mono.

const RATE = 24000;
const FRAME = 1920;
const TAPS = 16; // zero crossings on each side of the filter

/** Any rate to 24 kHz, a piece at a time, by a windowed sinc. Its output is the same however the input is cut. */
export class Resampler {
  constructor(from) {
    this.step = from / RATE; // input samples an output sample
    this.cutoff = 0.95 * Math.min(1, RATE / from); // of the input's Nyquist frequency
    this.half = Math.ceil(TAPS / this.cutoff);
    this.input = Array(this.half).fill(0); // starts with silence, so that the first output is the first input
    this.at = this.half; // where in `input` the next output lies
  }

  /** Calls emit(sample) for each output that the input so far allows. */
  feed(samples, emit) {
    for (const sample of samples) this.input.push(sample);
    while (this.at + this.half < this.input.length) {
      const first = Math.ceil(this.at - this.half);
      const last = Math.floor(this.at + this.half);
      let sum = 0;
      for (let i = Math.max(0, first); i <= last; i++) {
        const x = i - this.at;
        const window = 0.5 + 0.5 * Math.cos((Math.PI * x) / this.half);
        const angle = Math.PI * x * this.cutoff;
        sum += this.input[i] * window * this.cutoff * (x === 0 ? 1 : Math.sin(angle) / angle);
      }
      emit(sum);
      this.at += this.step;
    }
    const used = Math.floor(this.at - this.half) - 1;
    if (used > 4096) {
      this.input = this.input.slice(used);
      this.at -= used;
    }
  }
}

class Capture extends (globalThis.AudioWorkletProcessor ?? Object) {
  constructor() {
    super();
    this.resampler = sampleRate === RATE ? null : new Resampler(sampleRate);
    this.frame = new Float32Array(FRAME);
    this.filled = 0;
    this.add = (sample) => {
      this.frame[this.filled++] = sample;
      if (this.filled === FRAME) {
        this.port.postMessage(this.frame, [this.frame.buffer]);
        this.frame = new Float32Array(FRAME);
        this.filled = 0;
      }
    };
  }

  process([channels]) {
    if (!channels.length) return true;
    const mono = channels[0].map((_, i) => channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length);
    if (this.resampler) this.resampler.feed(mono, this.add);
    else mono.forEach(this.add);
    return true;
  }
}

if (globalThis.registerProcessor) registerProcessor("capture", Capture);
