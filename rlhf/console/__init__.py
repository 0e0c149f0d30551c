"""What the commands print: one design for all, and libraries' own output in a log."""
