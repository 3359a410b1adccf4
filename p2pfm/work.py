"""The heavy work that a peer asks for (train, score, merge), on tensors, for both drivers.

Knows a Learner and a blob store; no socket, clock or message. Each function answers one Action of `protocol.events`.
"""
