"""The web application of the annotation desk: pages from the server, a little JavaScript."""
