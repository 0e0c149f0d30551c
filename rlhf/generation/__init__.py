"""Sampling with one seeded stream a prompt, and batched decoding."""
