"""The engine, the loop, checkpoints and what is written down while they run."""
