"""Bench, reproduction, zero-shot evaluation: run as `python -m lab.reproduce`."""
