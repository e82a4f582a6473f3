"""Training runs: the seam into TRL's trainers, settings, data, display and records."""
