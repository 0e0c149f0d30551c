"""Preference pairs, prompts, chat format and splits."""
