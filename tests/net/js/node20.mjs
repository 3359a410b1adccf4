// js-libp2p 3 is written for Node.js 22; all that it lacks in 20 is this. Imported before anything else.

Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new this((take, refuse) => { resolve = take; reject = refuse })
  return { promise, resolve, reject }
}
