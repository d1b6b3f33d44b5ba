"""The one representation: a network as a graph, and the passes that every step needs."""
