"""Strategies of adversaries: as learners (what is announced) and as filters (words, ears). See `sim.faults`."""
