"""The real driver: trio, libp2p, web3, torch."""
