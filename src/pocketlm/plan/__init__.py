"""From a budget to a recipe."""
