"""The protocol: one pure state machine, `Peer.handle(event, now_ms) -> list[Action]`."""
