"""Real training runs: what clipping costs in one, and what it is for."""
