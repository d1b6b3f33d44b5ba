"""What must leave together (dependency groups), and the proof that what is left computes the same."""
