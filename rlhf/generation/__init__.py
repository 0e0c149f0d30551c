"""Sampling with one seeded stream per prompt, and batched decoding."""
