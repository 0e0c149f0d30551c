"""Proximal policy optimisation; read `trainer` first."""
