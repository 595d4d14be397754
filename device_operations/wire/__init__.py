"""What travels in requests, answers and messages: JSON, texts, ids, and the limits on them."""
