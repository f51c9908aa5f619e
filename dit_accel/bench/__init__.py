"""Benchmarks: methods against the fastest dense attention of this machine, at real models' shapes and at small ones."""
