"""What this machine is and what would go wrong on it: probes, each in a process of its own with a deadline."""
