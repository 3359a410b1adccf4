#!/bin/sh
# Static analysis of src/ by slither, in an environment of its own (it pins web3 < 8): fails on any finding of medium
# impact or higher that no comment in the source explains (`slither-disable-next-line`, with the reason above it).
# Needs Node.js and `npm install --prefix contracts`. The compiler is npm's (solc.mjs): nothing else is downloaded.
set -eu
cd "$(dirname "$0")"
VERSION=0.11.6
VENV=node_modules/.slither-$VERSION
if [ ! -x "$VENV/bin/slither" ]; then
  "${PYTHON:-python3}" -m venv "$VENV"
  "$VENV/bin/pip" install --quiet --disable-pip-version-check "slither-analyzer==$VERSION"
fi
exec "$VENV/bin/slither" slither.json --compile-force-framework solc-json --solc "$PWD/solc.mjs" \
  --filter-paths node_modules --exclude-low --exclude-informational --exclude-optimization --fail-medium
