"""Speculators for ptrain."""
