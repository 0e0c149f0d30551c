"""The dry run: a stage's memory need per device, estimated before any weight is loaded."""
