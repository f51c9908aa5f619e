"""What was really computed: records of calls (`records.py`), pictures of plans, the page made of both (`page.py`)."""
