"""Checkpoints of other systems -> exports, and models -> other formats."""
