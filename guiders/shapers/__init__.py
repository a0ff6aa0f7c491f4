"""Rules that reshape the CFG update."""
