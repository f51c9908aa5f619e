"""The commands `generate-video` and `dit-accel`."""
