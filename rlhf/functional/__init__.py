"""Maths on tensors and nothing else: masks, KL, advantages, losses."""
