"""compress(): the steps in a recipe's order, under one budget, with a gate after each."""
