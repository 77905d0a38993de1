"""Finding the neurons of a model and removing them: what `DynamicPruner` is made of."""
