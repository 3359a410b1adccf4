#!/usr/bin/env node
// npm's solc behind the two calls that crytic-compile makes of a native one: `--version`, and `--standard-json` with the
// input on stdin. Run from this folder: imports are looked for here, then in node_modules.
import { existsSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const solc = createRequire(import.meta.url)("solc");

const readImport = (path) => {
  const found = [join(here, path), join(here, "node_modules", path)].find(existsSync);
  return found ? { contents: readFileSync(found, "utf8") } : { error: `${path}: no such file` };
};
if (process.argv.includes("--version")) {
  console.log(`solc, the solidity compiler\nVersion: ${solc.version()}`);
} else {
  const input = JSON.parse(readFileSync(0, "utf8"));
  for (const [path, source] of Object.entries(input.sources)) {
    if (source.urls) input.sources[path] = { content: readFileSync(join(here, source.urls[0]), "utf8") };
  }
  process.stdout.write(solc.compile(JSON.stringify(input), { import: readImport }));
}
