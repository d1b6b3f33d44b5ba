"""Images and labels: where they come from, how they are decoded, how they are varied."""
