"""What presets may switch on besides attention: what may be asked for (`settings.py`), and doing it (`install.py`)."""
