"""Presets and methods against dense: the same prompts and seeds, interleaved; time, closeness, prompt following."""
