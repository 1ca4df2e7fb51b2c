"""Settings, artifacts, exit codes, progress and preemption."""
