"""Measurement tools of the benchmarks and tests: traffic, machine code, time, memory, and the measured cases."""
