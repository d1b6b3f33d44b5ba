// This folder, and nothing above it, on http://localhost:8000 (any static server will do): node server.mjs [PORT]
import { createReadStream, realpathSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { dirname, extname, join, sep } from "node:path";
import { fileURLToPath } from "node:url";

const root = realpathSync(dirname(fileURLToPath(import.meta.url)));
const kinds = { ".html": "text/html", ".css": "text/css", ".mjs": "text/javascript", ".wasm": "application/wasm", ".onnx": "application/octet-stream" };

export const server = createServer((request, response) => {
  try {
    const asked = decodeURIComponent(new URL(request.url, "http://localhost").pathname);
    const path = realpathSync(join(root, asked === "/" ? "index.html" : asked));
    if (!path.startsWith(root + sep) || !statSync(path).isFile()) throw new Error("not here");
    response.writeHead(200, { "content-type": kinds[extname(path)] ?? "application/octet-stream" });
    createReadStream(path).pipe(response);
  } catch {
    response.writeHead(404).end("not found");
  }
});

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const port = Number(process.argv[2] ?? 8000);
  server.listen(port, "localhost", () => console.log(`http://localhost:${port}`));
}
