"""What a run leaves to read: its folder, metrics, console, tables, plots."""
