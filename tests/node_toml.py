"""The shortest configuration of a node, as text: tests of single keys add or replace theirs."""

NODE = f"""
home = "h"
data = "d"
rpc = "r"
[network]
name = "n"
genesis_ms = 0
backbone = "tiny"
probe = "{"0" * 64}"
chain = {{ chain_id = 1, federation = "0x{"11" * 20}", token = "0x{"11" * 20}" }}
"""
