// A client of Node's `ws`, unchanged, that sends a whole file at once and prints every answer as a line of hexadecimal digits.
//
//     node fast_client.mjs FOLDER_OF_WS URL KEY FILE LAST
//
// FILE holds messages, each after its length (4 bytes, little-endian). The socket is closed after the message that equals LAST.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const [folder, url, key, path, last] = process.argv.slice(2);
const WebSocket = createRequire(`${folder}/`)("ws");
const file = readFileSync(path);
const socket = new WebSocket(url, { headers: { "kyutai-api-key": key } });
const lines = [];
let done = false;

socket.on("open", () => {
  for (let at = 0; at < file.length; ) {
    const size = file.readUInt32LE(at);
    socket.send(file.subarray(at + 4, at + 4 + size));
    at += 4 + size;
  }
});
socket.on("message", (data) => {
  const line = data.toString("hex");
  lines.push(line);
  if (line !== last) return;
  done = true;
  socket.close();
});
socket.on("error", (error) => console.error(String(error)));
socket.on("close", (code, reason) => {
  if (!done) console.error(`closed with ${code} ${reason} after ${lines.length} messages`);
  process.stdout.write(lines.join("\n"), () => process.exit(done ? 0 : 1));
});
