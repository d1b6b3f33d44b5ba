"""From a graph to a file that a runtime runs, and the proof that it answers the same."""
