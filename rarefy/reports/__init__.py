"""What people read: a page and a summary, from facts alone."""
