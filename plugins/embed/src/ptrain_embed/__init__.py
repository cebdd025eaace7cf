"""Retrieval embedding models for ptrain: the trainer `embed`."""
