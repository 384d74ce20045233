"""The report: its files, and what a reader does with it in a browser."""
