"""Blind human rating: the sheet that raters fill in, what comes back, and what it says."""
