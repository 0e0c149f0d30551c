"""What a run writes, so that nothing is half-written, lost, or written by two."""
