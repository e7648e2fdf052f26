"""Training: the recipe, the loop through Lightning, scoring."""
