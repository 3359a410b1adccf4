"""`p2pfm explorer`: a small web page of networks, rounds and rewards, for a browser on this machine."""
