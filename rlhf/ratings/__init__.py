"""Blind human rating: the sheet for raters, the returned sheets, and their analysis."""
