"""p2pfm: decentralized federated learning of foundation models, with rewards on chain."""

__version__ = "0.1.0"
