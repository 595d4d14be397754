"""What can stop a stack from starting."""

from __future__ import annotations


class StackError(Exception):
    """Raised when the stack cannot start or go on; the message says what was found and the remedy."""
