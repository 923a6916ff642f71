"""Comparing runs of several arms: what may be compared, differences with their errors, the level reached, a report."""
