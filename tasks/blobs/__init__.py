"""Bytes: blobs that are kept, transients that live as long as one request, rings between two processes."""
