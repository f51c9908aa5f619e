"""Writing videos and images: whole at the end (`files.py`), or while they are made (`growing.py`)."""
