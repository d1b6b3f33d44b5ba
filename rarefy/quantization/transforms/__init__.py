"""What is changed in a float network so that it loses less in integers."""
