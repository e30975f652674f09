"""Targets: each knows what one runtime or device can do, compiles a model for it and runs it."""
