"""Bench, reproduction, zero-shot evaluation: run as `python -m lab.reproduce`."""
import signal
import sys

if sys.argv[0] == "-m":  # as long as Python looks for what `python -m lab.bench` names
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback
