"""One peer's network: py-libp2p made safe, discovery, and payloads by digest."""
