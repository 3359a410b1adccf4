"""The Solidity contracts and their committed artifacts (`artifacts/*.json`), read through importlib.resources."""
