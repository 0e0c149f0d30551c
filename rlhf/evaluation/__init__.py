"""Responses of base and tuned models on unseen prompts, and their statistics."""
