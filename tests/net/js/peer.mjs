// A peer by another implementation (js-libp2p), from docs/wire.md alone: it connects to ours, hears an announcement,
// reads it with an independent MessagePack reader, fetches a blob, and says something itself.
// Arguments: ADDRESS TOPIC NETWORK_ID_HEX BLOB_DIGEST_HEX. Lines of JSON on standard output; bytes are hex digits.

import './node20.mjs'
import { createHash } from 'node:crypto'
import { generateKeyPairFromSeed } from '@libp2p/crypto/keys'
import { gossipsub } from '@libp2p/gossipsub'
import { identify } from '@libp2p/identify'
import { noise } from '@libp2p/noise'
import { peerIdFromString } from '@libp2p/peer-id'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { decode, encode } from '@msgpack/msgpack'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

const REQUEST_PROTOCOL = '/p2pfm/request/1'
const SIGNING_DOMAIN = 'p2pfm/2 envelope'
const CHUNK_BYTES = 262144
const READY_MS = 20_000

const [address, topic, networkHex, digestHex] = process.argv.slice(2)
const networkId = Buffer.from(networkHex, 'hex')
const say = (event, fields) => console.log(JSON.stringify({ event, ...fields }))
const hex = (bytes) => Buffer.from(bytes).toString('hex')
const sha256 = (bytes) => createHash('sha256').update(bytes).digest()

function signedBytes (author, body) {
  const name = Buffer.from(author)
  const length = Buffer.alloc(2)
  length.writeUInt16BE(name.length)
  return Buffer.concat([Buffer.from(SIGNING_DOMAIN), networkId, length, name, body])
}

async function openEnvelope (data) {
  const [author, body, signature] = decode(data)
  const isSigned = await peerIdFromString(author).publicKey.verify(signedBytes(author, body), signature)
  return { author, isSigned, body }
}

// Not js-libp2p's own choice, which takes the key in place of the peer id: in IHAVE and IWANT all must name a message alike.
function messageId (message) {
  const number = Buffer.alloc(8)
  number.writeBigUInt64BE(message.sequenceNumber)
  return Buffer.concat([message.from.toMultihash().bytes, number])
}

// Frames of one stream: 4 bytes of length, big endian, then so many bytes.
async function * readFrames (stream) {
  let buffer = Buffer.alloc(0)
  for await (const chunk of stream) {
    buffer = Buffer.concat([buffer, chunk.subarray()])
    while (buffer.length >= 4 && buffer.length >= 4 + buffer.readUInt32BE(0)) {
      const end = 4 + buffer.readUInt32BE(0)
      yield buffer.subarray(4, end)
      buffer = buffer.subarray(end)
    }
  }
}

function frame (bytes) {
  const length = Buffer.alloc(4)
  length.writeUInt32BE(bytes.length)
  return Buffer.concat([length, bytes])
}

// One stream, as many requests as the blob has chunks.
async function fetchBlob (node, peer, digest) {
  const stream = await node.dialProtocol(peer, REQUEST_PROTOCOL)
  const frames = readFrames(stream)
  const chunks = []
  let start = 0
  let total = 1
  while (start < total) {
    stream.send(frame(encode(['blob', digest, start, CHUNK_BYTES])))
    const reply = decode((await frames.next()).value)
    if (reply[0] !== 'blob_reply' || reply[1] === 0) throw new Error(`no blob: ${JSON.stringify(reply.slice(0, 2))}`)
    total = reply[1]
    chunks.push(reply[2])
    start += reply[2].length
  }
  await stream.close()
  return Buffer.concat(chunks)
}

async function until (condition, what) {
  for (const end = Date.now() + READY_MS; !condition();) {
    if (Date.now() > end) throw new Error(`not within ${READY_MS} ms: ${what}`)
    await new Promise((resolve) => setTimeout(resolve, 50))
  }
}

const privateKey = await generateKeyPairFromSeed('Ed25519', new Uint8Array(32).fill(0x4a))
const node = await createLibp2p({
  privateKey,
  addresses: { listen: [] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: { identify: identify(), ping: ping(), pubsub: gossipsub({ globalSignaturePolicy: 'StrictSign', msgIdFn: messageId }) }
})

try {
  const me = node.peerId.toString()
  const heard = new Promise((resolve) => {
    node.services.pubsub.addEventListener('message', (event) => {
      if (event.detail.topic === topic) resolve(event.detail)
    })
  })
  node.services.pubsub.subscribe(topic)

  const identified = new Promise((resolve) => {
    node.addEventListener('peer:identify', (event) => resolve(event.detail), { once: true })
  })
  const connection = await node.dial(multiaddr(address))
  const remote = connection.remotePeer
  const told = await identified
  say('identified', {
    me,
    peer: told.peerId.toString(),
    protocols: told.protocols,
    encryption: connection.encryption,
    multiplexer: connection.multiplexer
  })
  say('pinged', { rttMs: await node.services.ping.ping(remote) })

  await until(() => node.services.pubsub.getMeshPeers(topic).includes(remote.toString()), 'our place in its mesh')
  say('joined', { subscribers: node.services.pubsub.getSubscribers(topic).map(String) })

  const message = await heard
  const { author, isSigned, body } = await openEnvelope(message.data)
  const [tag, round, peer, base, payload, payloadBytes, numTokens, privacy] = decode(body)
  say('announcement', {
    from: message.from.toString(),
    id: hex(messageId(message)),
    author,
    isSigned,
    fields: { tag, round, peer, base: hex(base), payload: hex(payload), payloadBytes, numTokens, privacy }
  })

  const blob = await fetchBlob(node, remote, Buffer.from(digestHex, 'hex'))
  say('blob', { bytes: blob.length, sha256: hex(sha256(blob)) })

  const own = encode(['commit', 41, 3, sha256('scores')])
  const signature = await privateKey.sign(signedBytes(me, Buffer.from(own)))
  await node.services.pubsub.publish(topic, encode([me, own, signature]))
  say('published', { bytes: own.length })
  await new Promise((resolve) => process.stdin.once('data', resolve).once('end', resolve)) // until the test has heard it
} catch (error) {
  console.error(error)
  process.exitCode = 1
}
await node.stop()
process.exit()
