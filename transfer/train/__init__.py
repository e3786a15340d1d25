"""How models are trained: recipes, the classifier, what all trainers share."""
