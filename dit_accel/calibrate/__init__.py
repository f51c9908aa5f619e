"""Calibration: measure, while running dense, what each head can bear, and write the cheapest preset within a budget."""
