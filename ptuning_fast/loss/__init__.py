"""A model's own loss: of which kind it is, and on labelled rows alone, in chunks."""
