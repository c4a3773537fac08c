"""The inference engine: one object that generates for every caller, many requests at a time."""
