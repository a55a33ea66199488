"""The process of a run: its place in the world, signals, watchdog, restarts, exit codes."""
