"""Measurements beside honest baselines; they report and never decide."""
