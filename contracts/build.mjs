// Compiles src/*.sol with the pinned solc and writes artifacts/*.json (ABI, bytecode, compiler, source hash).
// Usage: node build.mjs [output folder]. Same sources and same solc give the same bytes on every machine.
import { createHash } from "node:crypto";
import { mkdirSync, readFileSync, readdirSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const solc = createRequire(import.meta.url)("solc");
const output = process.argv[2] ?? join(here, "artifacts");
const CONTRACTS = ["PFMToken", "Federation", "ServingPool"];
const CODE_BYTES_MAX = 24576; // EIP-170

function sourcesUnder(folder) {
  return readdirSync(folder, { withFileTypes: true })
    .flatMap((entry) => (entry.isDirectory() ? sourcesUnder(join(folder, entry.name)) : [join(folder, entry.name)]))
    .filter((path) => path.endsWith(".sol"))
    .sort();
}

const settings = {
  evmVersion: "prague",
  viaIR: true,
  optimizer: { enabled: true, runs: 200 },
  metadata: { bytecodeHash: "none", appendCBOR: false },
  outputSelection: { "*": { "*": ["abi", "evm.bytecode.object", "evm.deployedBytecode.object"] } },
};
const sources = Object.fromEntries(
  sourcesUnder(join(here, "src")).map((path) => [relative(here, path), { content: readFileSync(path, "utf8") }]),
);
const hash = createHash("sha256");
for (const [name, { content }] of Object.entries(sources)) hash.update(`${name}\n${content}\n`);
const sourceHash = hash.digest("hex");

const readImport = (path) => ({ contents: readFileSync(join(here, "node_modules", path), "utf8") });
const result = JSON.parse(
  solc.compile(JSON.stringify({ language: "Solidity", sources, settings }), { import: readImport }),
);
for (const { formattedMessage } of result.errors ?? []) console.error(formattedMessage);
if ((result.errors ?? []).some(({ severity }) => severity === "error")) process.exit(1);

mkdirSync(output, { recursive: true });
for (const contract of CONTRACTS) {
  const { abi, evm } = result.contracts[`src/${contract}.sol`][contract];
  const size = evm.deployedBytecode.object.length / 2;
  if (size > CODE_BYTES_MAX) throw new Error(`${contract}: ${size} bytes, at most ${CODE_BYTES_MAX} can be deployed`);
  const artifact = {
    contract,
    compiler: solc.version(),
    evmVersion: settings.evmVersion,
    sourceHash,
    deployedBytes: size,
    abi,
    bytecode: `0x${evm.bytecode.object}`,
  };
  writeFileSync(join(output, `${contract}.json`), `${JSON.stringify(artifact, null, 1)}\n`);
  console.log(`${contract}: ${size} bytes`);
}
