"""The sections of bench.py, a file each."""
