"""Training: data, recipe, the stages of a run and their order, the folder it is kept in."""
