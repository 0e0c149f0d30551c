"""One limit for whatever a test waits for: it ends what hangs, however slow or busy the machine is."""

HANG = 1200  # seconds
