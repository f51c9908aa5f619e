"""The Gradio demo: `dit-accel demo`."""
