"""What must leave together (dependency groups), and the graph that is left."""
