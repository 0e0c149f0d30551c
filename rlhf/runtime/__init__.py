"""Processes, run folders and trackers."""
