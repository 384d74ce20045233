"""The dictionaries by family; `dictionary_learning.dictionary` is where they are imported from."""
