"""Checkpoints: the crash-safe store, the resumable form, and the export to Hugging Face."""
