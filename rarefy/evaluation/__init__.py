"""evaluate(), measure(), certify(): how good, how fast, how big, and how sure that is."""
