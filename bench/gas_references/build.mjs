// Compiles References.sol as contracts/build.mjs compiles the contracts. Usage: node bench/gas_references/build.mjs
import { createHash } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const contracts = join(here, "..", "..", "contracts");
const solc = createRequire(join(contracts, "build.mjs"))("solc");
const content = readFileSync(join(here, "References.sol"), "utf8");
const settings = {
  evmVersion: "prague",
  viaIR: true,
  optimizer: { enabled: true, runs: 200 },
  metadata: { bytecodeHash: "none", appendCBOR: false },
  outputSelection: { "*": { "*": ["abi", "evm.bytecode.object"] } },
};
const input = { language: "Solidity", sources: { "References.sol": { content } }, settings };
const readImport = (path) => ({ contents: readFileSync(join(contracts, "node_modules", path), "utf8") });
const result = JSON.parse(solc.compile(JSON.stringify(input), { import: readImport }));
for (const { formattedMessage } of result.errors ?? []) console.error(formattedMessage);
if ((result.errors ?? []).some(({ severity }) => severity === "error")) process.exit(1);
const { abi, evm } = result.contracts["References.sol"].References;
const sourceHash = createHash("sha256").update(content).digest("hex");
const artifact = { compiler: solc.version(), sourceHash, abi, bytecode: `0x${evm.bytecode.object}` };
writeFileSync(join(here, "References.json"), `${JSON.stringify(artifact, null, 1)}\n`);
