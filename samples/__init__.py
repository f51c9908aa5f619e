"""The small trained model that ships with the project, how it was trained, and example scripts."""
