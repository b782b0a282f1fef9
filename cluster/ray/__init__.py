"""A Ray cluster that is there already, or that Ray's autoscaler starts; the library of that name is not in here."""
