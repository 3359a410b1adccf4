"""Answering requests while nodes die: pure routing and replayable sessions."""
